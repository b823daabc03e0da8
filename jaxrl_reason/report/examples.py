"""Which held-out problems to show, and how many changed from one stage to another.

All stages answer the same problems, so a problem has a history: right or wrong after each stage.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl_reason.report.run_folder import StageRecord

Row = Mapping[str, Any]

# (right before, right after) -> what happened to a problem, in the order in which they are shown.
KINDS: Mapping[tuple[bool, bool], str] = {
    (False, True): "became right",
    (True, False): "became wrong",
    (True, True): "right before and after",
    (False, False): "wrong before and after",
}


_TO_LOSE = 0.05  # of a stage that is right less often hardly any problem can become wrong


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The stages whose completions can be compared.

    Attributes:
        stages: in order; row `i` of the samples of each is about problem `i`.
        others: stages that answered other problems.
        problems: how many problems all of `stages` answered.
        before: the stage with which the last one is compared for examples. It is the oldest
            ancestor of the last stage with something to lose (5 % right), else the first stage.
    """

    stages: Sequence[StageRecord]
    others: Sequence[StageRecord]
    problems: int
    before: str


@dataclass(frozen=True, kw_only=True)
class Transition:
    """What became of the held-out problems between two stages."""

    before: str
    after: str
    counts: Mapping[str, int]
    """Problems of each kind of `KINDS`."""

    @property
    def problems(self) -> int:
        """How many they are."""
        return sum(self.counts.values())

    @property
    def change(self) -> float:
        """Difference in accuracy on these problems, as a fraction."""
        gained = self.counts[KINDS[False, True]] - self.counts[KINDS[True, False]]
        return gained / self.problems


def shared_problems(stages: Sequence[StageRecord]) -> Shared:
    """The stages with samples that answered the problems of the first of them.

    A stage with fewer rows shortens the comparison; one whose rows have other prompts or answers is
    left out of it.
    """
    with_samples = [stage for stage in stages if stage.samples]
    asked = lambda row: (row["prompt"], row["answer"])
    first = [asked(row) for row in with_samples[0].samples] if with_samples else []
    alike, others = [], []
    for stage in with_samples:
        pairs = zip(map(asked, stage.samples), first, strict=False)
        (alike if all(own == theirs for own, theirs in pairs) else others).append(stage)
    problems = min((len(stage.samples) for stage in alike), default=0)
    before = ""
    if alike:
        path = _ancestors(alike[-1], stages)
        share = {s.name: sum(row["correct"] for row in s.samples) / len(s.samples) for s in alike}
        able = [name for name in path if share.get(name, 0) >= _TO_LOSE]
        before = able[0] if able else alike[0].name
    return Shared(stages=alike, others=others, problems=problems, before=before)


def _ancestors(stage: StageRecord, stages: Sequence[StageRecord]) -> list[str]:
    """Names from the untrained model, or the oldest of the given stages, to the stage's parent."""
    parents = {stage.name: stage.parent for stage in stages}
    found = []
    name = stage.parent
    while name is not None:
        found.insert(0, name)
        name = parents.get(name)
    return found


def transitions(shared: Shared, stages: Sequence[StageRecord]) -> list[Transition]:
    """From each stage's parent to the stage, and at the end to the last stage from the first.

    Args:
        shared: the stages that can be compared. For a parent that is not among them its own parent
            stands in.
        stages: all stages.
    """
    by_name = {stage.name: stage for stage in shared.stages}
    pairs = []
    for stage in shared.stages:
        before = [name for name in _ancestors(stage, stages) if name in by_name]
        if before:
            pairs.append((before[-1], stage.name))
    if len(shared.stages) > 1:
        last = shared.stages[-1].name
        pairs += [(name, last) for name in (shared.before, shared.stages[0].name)]
    return [
        _transition(by_name[before], by_name[after], shared.problems)
        for before, after in dict.fromkeys(pairs)
    ]


def _transition(before: StageRecord, after: StageRecord, problems: int) -> Transition:
    counts = dict.fromkeys(KINDS.values(), 0)
    for first, last in zip(before.samples[:problems], after.samples[:problems], strict=True):
        counts[KINDS[bool(first["correct"]), bool(last["correct"])]] += 1
    return Transition(before=before.name, after=after.name, counts=counts)


def choose(shared: Shared, number: int) -> dict[str, list[int]]:
    """At most `number` problems that tell something, by what became of them since `before`.

    The kinds take turns, so that each has as many as any other while it has some left. Within a
    kind the histories take turns, the most frequent first, so that a reader sees when problems
    changed; and within a history the first problems stand for all.

    Args:
        shared: the stages that can be compared, at least one.
        number: of problems.

    Returns:
        Kind of `KINDS`, or `right` and `wrong` where there is a single stage -> numbers of
        problems, growing. Kinds that no problem has are left out.
    """
    by_kind: dict[str, dict[tuple[bool, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    before = [stage.name for stage in shared.stages].index(shared.before)
    for index in range(shared.problems):
        history = tuple(bool(stage.samples[index]["correct"]) for stage in shared.stages)
        by_kind[_kind(history, before)][history].append(index)
    names = [name for name in (*KINDS.values(), "right", "wrong") if name in by_kind]
    queues = [_in_turns(_frequent_first(by_kind[name])) for name in names]
    named = [[(name, index) for index in queue] for name, queue in zip(names, queues, strict=True)]
    chosen: dict[str, list[int]] = {name: [] for name in names}
    for name, index in _in_turns(named)[:number]:
        chosen[name].append(index)
    return {name: sorted(indices) for name, indices in chosen.items() if indices}


def _kind(history: Sequence[bool], before: int) -> str:
    if len(history) == 1:
        return "right" if history[0] else "wrong"
    return KINDS[history[before], history[-1]]


def _frequent_first(histories: Mapping[tuple[bool, ...], list[int]]) -> list[list[int]]:
    return [
        histories[key] for key in sorted(histories, key=lambda key: (-len(histories[key]), key))
    ]


def _in_turns(queues: Sequence[Sequence[Any]]) -> list[Any]:
    """One of each queue, then the second of each, and so on."""
    rounds = itertools.zip_longest(*queues, fillvalue=None)
    return [item for items in rounds for item in items if item is not None]
