"""Factum's rewards, and what an experiment measures of its responses.

Every score is `f(problem, completion, verdict, length) -> float | None`, so that it is a measure of
an evaluation as it stands; `*_reward` is the same as a reward. None: it does not apply.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_reason.objectives import hypervolume
from jaxrl_reason.papers.factum import FIELDS, PUBLISHED, events, read_response
from jaxrl_reason.tasks import Problem, Verdict
from jaxrl_reason.tasks.facts import Fact, read_facts, read_records
from jaxrl_reason.tasks.intervals import read_interval, temporal_iou

Score = Callable[[Problem, str, Verdict, int], float | None]
Records = Mapping[str, Mapping[str, Any]]

LOW, HIGH = 10, 40
"""Words of a thought up to which its length costs nothing, and from which it costs all, at the
scale of `small.yaml`. With a tokenizer of words they are tokens."""
LOW_PUBLISHED, HIGH_PUBLISHED = 128, 512
"""The same for a published model, whose thoughts are sentences."""
NEAR = 0.3
"""Temporal IoU from which on an interval opens the gate of the length reward."""
SUCCESS = 0.5
"""Temporal IoU that counts as recalled (R1@0.5)."""

_FACTS = re.compile(r"<facts>.*?</facts>", re.DOTALL)
_WORD = re.compile(r"[A-Za-z0-9]+|[^\sA-Za-z0-9]")


# Scores


def layout(
    problem: Problem,
    completion: str,
    verdict: Verdict | None,
    length: int,
    *,
    facts: bool,
    thought: bool,
    fields: Sequence[str] = FIELDS,
) -> float:
    """1 for every required part once, in order, with facts that can be read; else 0."""
    response = read_response(completion)
    if response is None:
        return 0.0
    has = (response.facts is not None, response.thought is not None)
    is_read = response.facts is None or read_records(response.facts, fields) is not None
    return float(has == (facts, thought) and is_read)


def iou(problem: Problem, completion: str, verdict: Verdict | None, length: int) -> float | None:
    """Temporal IoU with the true interval; None for questions that ask for none."""
    true = read_interval(problem.answer)
    if true is None:
        return None
    response = read_response(completion)
    ours = None if response is None else read_interval(response.answer)
    return 0.0 if ours is None else temporal_iou(ours, true)


def accuracy(problem: Problem, completion: str, verdict: Verdict, length: int) -> float | None:
    """1 for the right option or value; None for questions that ask for an interval."""
    return float(verdict.correct) if read_interval(problem.answer) is None else None


def recall(problem: Problem, completion: str, verdict: Verdict | None, length: int) -> bool | None:
    """R1@0.5: whether an interval overlaps the true one by `SUCCESS`."""
    overlap = iou(problem, completion, verdict, length)
    return None if overlap is None else overlap >= SUCCESS


def brevity(
    problem: Problem, completion: str, verdict: Verdict, length: int, *, low: int, high: int
) -> float:
    """1 for a thought of up to `low` words, falling to 0 at `high`; 0 where the answer is far off.

    Facts are not counted. Without the gate an empty answer would be a Pareto point.
    """
    response, overlap = read_response(completion), iou(problem, completion, verdict, length)
    is_near = verdict.correct if overlap is None else overlap >= NEAR
    if response is None or not is_near:
        return 0.0
    return min(1.0, max(0.0, (high - _words(response.thought)) / (high - low)))


def thought_length(
    problem: Problem, completion: str, verdict: Verdict, length: int
) -> float | None:
    """Words of the thought; None where no thought can be found."""
    response = read_response(completion)
    return None if response is None else float(_words(response.thought))


def facts_f1(problem: Problem, completion: str, verdict: Verdict, length: int) -> float:
    """F1 of the records against what happens in the film: time, object, action and cause.

    Whatever stands around the block, so that it tells how well facts alone were learnt.
    """
    block = _FACTS.search(completion)
    found = None if block is None else read_facts(block[0], FIELDS)
    if found is None:
        return 0.0
    true = events([Fact.from_json(value) for value in problem.columns["facts"]])
    ours, theirs = ({(f.time, f.object, f.action, f.cause) for f in side} for side in (found, true))
    return 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours or theirs else 1.0


full_layout = functools.partial(layout, facts=True, thought=True)
no_facts_layout = functools.partial(layout, facts=False, thought=True)
no_thought_layout = functools.partial(layout, facts=True, thought=False)
small_brevity = functools.partial(brevity, low=LOW, high=HIGH)
published_layout = functools.partial(layout, facts=True, thought=True, fields=PUBLISHED)
published_brevity = functools.partial(brevity, low=LOW_PUBLISHED, high=HIGH_PUBLISHED)


def _words(thought: str | None) -> int:
    return len(_WORD.findall(thought or ""))


# Rewards


def _reward(score: Score) -> Callable[..., list[float | None]]:
    def reward(
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        problem: Sequence[Problem],
        verdict: Sequence[Verdict],
        **_: Any,
    ) -> list[float | None]:
        return [score(p, c, v, 0) for p, c, v in zip(problem, completions, verdict, strict=True)]

    return reward


format_reward = _reward(full_layout)
no_facts_format_reward = _reward(no_facts_layout)
no_thought_format_reward = _reward(no_thought_layout)
iou_reward = _reward(iou)
accuracy_reward = _reward(accuracy)
length_reward = _reward(small_brevity)
published_format_reward = _reward(published_layout)
published_length_reward = _reward(published_brevity)
facts_reward = _reward(facts_f1)
"""F1 of the facts: a fifth objective that the paper does not have."""


# Metrics of an experiment


def volume(records: Records, stage: str, *, objectives: Sequence[str]) -> float:
    """Hypervolume between 0 and the means of the objectives on held-out problems."""
    return hypervolume([_means(records, stage, objectives)], [0.0] * len(objectives))


def worst(records: Records, stage: str, *, objectives: Sequence[str]) -> float:
    """The least of the means of the objectives, all of which are from 0 to 1."""
    return min(_means(records, stage, objectives))


def volume_gap(
    records: Records, stage: str, *, objectives: Sequence[str], against: Mapping[str, str]
) -> float:
    """By how much the hypervolume of a stage exceeds that of its counterpart in `against`."""
    ours, theirs = (
        volume(records, name, objectives=objectives) for name in (stage, against[stage])
    )
    return ours - theirs


def excess_drop(
    records: Records, stage: str, *, plain: str, other: str, other_plain: str, share: float
) -> float:
    """The drop of accuracy from `plain` to a stage, minus a share of another pair's drop."""
    drop = lambda before, after: records[before]["accuracy"] - records[after]["accuracy"]
    return drop(plain, stage) - share * drop(other_plain, other)


def _means(records: Records, stage: str, objectives: Sequence[str]) -> list[float]:
    return [records[stage]["measures"][name] for name in objectives]
