"""Metis-SPECS (arXiv 2510.25801): a cold start from preferences that are about the layout only.

    zero  <- a short run of GRPO from the base model
    pairs <- right, well laid out and supported answers of zero, against right answers of the base
             model whose layout is then corrupted in one of five ways
    warm  <- DPO + SFT on the chosen side, from the base model and against it
    final <- GRPO from warm

The stages are those of the library. Here are the pairs, a task whose prompt says which layout the
completion is to have, demonstrations that follow it only at times, and the paper's score of how far
a cold start generalises.
"""

import dataclasses
import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxrl_reason.errors import InputError
from jaxrl_reason.papers.metis_specs_layouts import (
    ANSWERS,
    CORRUPTIONS,
    LAYOUTS,
    STANDARD,
    TAG,
    THOUGHTS,
    corrupt,
    read_layout,
    relaid,
)
from jaxrl_reason.plugins import load_object
from jaxrl_reason.stages.groups import Group, Sampled
from jaxrl_reason.tasks import Problem, Task, Verdict, make_task, write_completion
from jaxrl_reason.tasks.problem import Split, Style

_DERIVED = re.compile(r"\b[a-z] = \d+ [-+*] \d+ = (\d+)")


# Pairs


def format_pairs(
    groups: Sequence[Group],
    rng: random.Random,
    *,
    judge: str | None = "jaxrl_reason.papers.metis_specs:supports",
    coupled: bool = False,
    teacher: Mapping[str, Any] | None = None,
    pairs_per_prompt: int = 1,
) -> Iterator[dict[str, Any]]:
    """Pairs that tell a layout from none, and a row with each chosen completion; for `reject`.

    Args:
        groups: completions of the policy to learn from, and as `others` those of the base model.
            Without others the chosen text itself is corrupted, which leaves only its tags.
        rng: draws completions and corruptions.
        judge: `f(problem, text)`, whether the thought supports the answer; None keeps all.
        coupled: reject wrong answers in place of right ones, so that a pair is about both.
        teacher: name and options of a task whose solver writes the chosen side.
        pairs_per_prompt: at most so many of a problem.

    Raises:
        InputError: `coupled` without a base model whose wrong answers could be rejected.
    """
    if coupled and not all(group.others for group in groups):
        raise InputError("coupled=true rejects wrong answers of a base model; set rejected_from")
    supported = (lambda problem, text: True) if judge is None else load_object(judge, "judge")
    solver = None if teacher is None else make_task(teacher["name"], teacher["options"])
    for group in groups:
        problem = group.problem
        if solver is None:
            chosen = [c.text for c in group.completions if c.is_right]
        else:
            chosen = [solver.trace(problem, "short")] * pairs_per_prompt
        chosen = [text for text in chosen if read_layout(text) and supported(problem, text)]
        rng.shuffle(chosen)
        rejected = _laid_out(group.others, correct=not coupled) if group.others else [*chosen]
        if group.others:
            rng.shuffle(rejected)
        for good, bad in list(zip(chosen, rejected, strict=False))[:pairs_per_prompt]:
            kind = rng.choice(list(CORRUPTIONS))
            sides = {"chosen": good, "rejected": corrupt(bad, kind), "corruption": kind}
            yield {"problem": group.number, **sides}
            yield {"problem": group.number, "completion": good}


def _laid_out(completions: Sequence[Sampled], *, correct: bool) -> list[str]:
    """Right or wrong ones from which tags can be taken: a text must have them to lose them."""
    ended = [c for c in completions if c.finished and c.verdict.answer is not None]
    return [c.text for c in ended if c.verdict.correct == correct and read_layout(c.text)]


def supports(problem: Problem, text: str) -> bool:
    """Whether the last value that a thought about arithmetic derives is the answer it gives."""
    if (laid := read_layout(text)) is None:
        return False
    derived = _DERIVED.findall(laid.thought)
    return bool(derived) and derived[-1] == laid.answer


# The task


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InstructedLayout:
    """A task of text whose prompt ends with the layout that the completion must have.

    `... ; d ? write <work> <final>` asks for `<work> ... </work> <final> 4 </final>`. A completion
    is formatted if it has the layout asked for, and right if its answer is right as well.
    """

    task: str = "arithmetic"
    """Name of the task that is asked."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Its options."""
    layouts: Mapping[str, float] = dataclasses.field(default_factory=lambda: {STANDARD: 1.0})
    """Share of each layout among the prompts."""
    seed: int = 0
    """Seed of the streams of problems and of their layouts."""

    name = "instructed_layout"

    def __post_init__(self) -> None:
        """Check the layouts."""
        unknown = set(self.layouts) - set(LAYOUTS)
        if unknown or not self.layouts or min(self.layouts.values()) <= 0:
            raise InputError(
                f"layouts={dict(self.layouts)} must give a share above 0 to some of {list(LAYOUTS)}"
            )
        self._inner.words()

    @functools.cached_property
    def _inner(self) -> Task:
        return make_task(self.task, {"seed": self.seed, **self.options})

    def words(self) -> tuple[str, ...]:
        """Words of the task, all tags, and what corrupted completions have."""
        tags = (f"<{slash}{name}>" for name in THOUGHTS + ANSWERS for slash in ("", "/"))
        return (*self._inner.words(), *tags, "write", "Answer", ":")

    def generate(self, split: Split, index: int, difficulty: int | None = None) -> Problem:
        """Problem `index` of a split of the task; its layout follows from that place."""
        problem = self._inner.generate(split, index, difficulty)
        rng = random.Random(f"layout|{self.seed}|{split}|{index}|{difficulty}")
        (layout,) = rng.choices(list(self.layouts), list(self.layouts.values()))
        return dataclasses.replace(
            problem,
            prompt=problem.prompt + _instruction(layout),
            columns={**problem.columns, "layout": layout},
        )

    def trace(self, problem: Problem, style: Style) -> str:
        """The task's own trace in the layout asked for."""
        return relaid(self._inner.trace(_asked(problem), style), problem.columns["layout"])

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Judge the layout, then the answer."""
        laid, wanted = read_layout(text), problem.columns["layout"]
        if laid is None or laid.layout != wanted:
            reason = f"asked for {wanted!r}, got {laid.layout!r}" if laid else "no layout"
            return Verdict(correct=False, formatted=False, answer=None, reason=reason)
        return self._inner.verify(_asked(problem), write_completion(laid.thought, laid.answer))


def _instruction(layout: str) -> str:
    return " write " + " ".join(f"<{name}>" for name in layout.split())


def _asked(problem: Problem) -> Problem:
    """The problem as the task itself has it."""
    prompt = problem.prompt.removesuffix(_instruction(problem.columns["layout"]))
    return dataclasses.replace(problem, prompt=prompt)


def inconsistent_traces(
    task: InstructedLayout,
    problems: Sequence[Problem],
    rng: random.Random,
    *,
    obey: float,
    other: float,
    styles: Mapping[Style, float],
) -> Iterator[dict[str, Any]]:
    """Demonstrations that reason well and often miss the layout asked for: a base model's text.

    Args:
        task: whose solver writes them.
        problems: what they are about.
        rng: draws all.
        obey: share in the layout asked for.
        other: share in another layout; the rest is corrupted.
        styles: share of each style of trace.
    """
    for number, problem in enumerate(problems):
        (style,) = rng.choices(list(styles), list(styles.values()))
        text, draw = task.trace(problem, style), rng.random()
        if draw >= obey + other:
            text = corrupt(text, rng.choice(list(CORRUPTIONS)))
        elif draw >= obey:
            wanted = problem.columns["layout"]
            text = relaid(text, rng.choice([layout for layout in LAYOUTS if layout != wanted]))
        yield {"problem": number, "completion": text}


# Rewards and measures


def layout_reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """1 for the standard layout, for tasks whose verifier reads the answer only."""
    laid = (read_layout(completion) for completion in completions)
    return [float(parts is not None and parts.layout == STANDARD) for parts in laid]


def answer_right(problem: Problem, completion: str, verdict: Verdict, length: int) -> bool:
    """Whether the answer is right, wherever it stands: in an answer block, or as the last word."""
    blocks = re.findall(rf"<({'|'.join(ANSWERS)})>(.*?)</\1>", completion, re.DOTALL)
    words = blocks[-1][1].split() if blocks else TAG.sub(" ", completion).split()
    return bool(words) and words[-1] == problem.answer


def standard_layout(problem: Problem, completion: str, verdict: Verdict, length: int) -> bool:
    """Whether the layout is the one of the cold start, whichever was asked for."""
    laid = read_layout(completion)
    return laid is not None and laid.layout == STANDARD


def generalization_factor(
    records: Mapping[str, Mapping[str, Any]],
    stage: str,
    *,
    base: str | None,
    id_metric: str,
    ood_metrics: Sequence[str],
    weights: Sequence[float] | None = None,
    b: float = 2.0,
) -> float:
    """F-beta of what a stage gained on the trained layout and on shifted ones, in points.

    Args:
        records: results of the stages by name.
        stage: which of them.
        base: stage that gains are counted from; None counts the scores themselves.
        id_metric: path of a score from 0 to 1 on the trained layout.
        ood_metrics: paths of scores on shifted ones.
        weights: of the latter in their mean; equal when None.
        b: the larger, the more the shifted ones count.

    Returns:
        (1 + b^2) ID OOD / (b^2 ID + OOD); 0 where one of the gains is not above 0.
    """
    shares = [1.0] * len(ood_metrics) if weights is None else weights

    def gain(metric: str) -> float:
        return 100 * (_read(records[stage], metric) - (_read(records[base], metric) if base else 0))

    of_id = gain(id_metric)
    pairs = zip(shares, ood_metrics, strict=True)
    of_ood = sum(share * gain(metric) for share, metric in pairs) / sum(shares)
    if of_id <= 0 or of_ood <= 0:
        return 0.0
    return (1 + b * b) * of_id * of_ood / (b * b * of_id + of_ood)


def _read(record: Mapping[str, Any], metric: str) -> float:
    found: Any = functools.reduce(lambda part, key: part[key], metric.split("."), record)
    return found
