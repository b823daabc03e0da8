"""Vision-R1 (arXiv 2503.06749): a cold start that over-thinks, and how to stop it.

    CI      <- SFT on long traces with self-questioning, written by a reasoner of text
    stage 1 <- GRPO from CI, completions cut at L1
    stage 2 <- GRPO from stage 1, cut at L2 > L1, with fewer completions of a prompt

The reward is 1 for a right answer in the right layout, else 0. A completion that is cut has no
layout, which is all that presses on the length. The schedule is configuration
(`configs/papers/vision_r1/`), the way to the long traces is in `vision_r1_bridging`. Here are
over-thinking traces for a task that has a solver, the reward, and what is measured.
"""

import functools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxrl_reason.errors import InputError
from jaxrl_reason.rewards import extract_answer
from jaxrl_reason.tasks import Problem, Task, Verdict, read_completion, write_completion
from jaxrl_reason.tasks.problem import check_rate

MARKERS = ("wait", "hmm", "mistake", "alternatively", "check")
"""Words that the paper counts in traces as signs of reflection."""
QUARTILES = {2: (41, 57, 87), 3: (49, 65, 95)}
"""By difficulty: the length in tokens below which about a quarter, a half and three quarters of the
demonstrations of `configs/papers/vision_r1/small.yaml` are."""

_STEP = re.compile(r"(\w+) = (\d+) ([-+*]) (\d+) = (\d+)")
_APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}

# Data


def detour_traces(
    task: Task,
    problems: Sequence[Problem],
    rng: random.Random,
    *,
    mean_detours: float,
    spread: float = 1.0,
    mistake_rate: float = 0.25,
    max_tokens: int,
) -> Iterator[dict[str, Any]]:
    """Right derivations with detours in between, as many on easy problems as on hard ones.

    Behind a step, an earlier one is checked again, computed wrongly and then repaired, or left for
    another computation that leads nowhere. Their number is log-normal: most traces have few, some
    have many.

    Args:
        task: of arithmetic; its solver writes the derivation.
        problems: what the traces are about.
        rng: draws all.
        mean_detours: detours of a trace on average, before `max_tokens` cuts the longest.
        spread: standard deviation of the logarithm of their number.
        mistake_rate: share of detours that go wrong and are repaired.
        max_tokens: a trace has no more words than this; detours that do not fit are left out.

    Raises:
        InputError: options out of range, or a task whose traces have no such steps.
    """
    check_rate("mistake_rate", mistake_rate)
    if mean_detours <= 0 or spread <= 0:
        raise InputError(f"mean_detours={mean_detours} and spread={spread} must be above 0")
    centre = math.log(mean_detours) - spread**2 / 2
    for number, problem in enumerate(problems):
        short = task.trace(problem, "short")
        steps = _STEP.findall(short)
        if not steps:
            raise InputError(
                f"task {task.name!r} has no steps such as `a = 3 + 4 = 7` to digress from; "
                f"its short trace is {short!r}"
            )
        parts = [["{} = {} {} {} = {} ;".format(*step)] for step in steps]
        room = max_tokens - len(short.split())
        for _ in range(int(rng.lognormvariate(centre, spread) + rng.random())):
            behind = rng.randrange(len(steps))
            step = steps[rng.randint(0, behind)]
            detour = _detour(step, problem.columns["modulus"], rng, mistake_rate)
            room -= len(detour.split())
            if room < 0:
                break
            parts[behind].append(detour)
        thought = " ".join(piece for part in parts for piece in part)
        yield {"problem": number, "completion": write_completion(thought, problem.answer)}


def _detour(step: tuple[str, ...], modulus: int, rng: random.Random, mistake_rate: float) -> str:
    """A detour about a step, given as its name, operand, sign, operand and value."""
    name, left, sign, right, value = step
    known = f"{name} = {left} {sign} {right} = {value}"
    begin = rng.choice(("wait", "hmm"))
    if rng.random() < mistake_rate:
        wrong = (int(value) + rng.randrange(1, modulus)) % modulus
        slip = f"{name} = {left} {sign} {right} = {wrong}"
        return f"{begin} ; check {slip} ; no ; mistake ; {known} ok ;"
    if rng.random() < 0.5:
        return f"{begin} ; check {known} ok ;"
    other = rng.choice([s for s in _APPLY if s != sign])
    aside = _APPLY[other](int(left), int(right)) % modulus
    return f"alternatively {name} = {left} {other} {right} = {aside} ; no ; {known} ;"


def brief_traces(
    task: Task, problems: Sequence[Problem], rng: random.Random, *, formatted: float
) -> Iterator[dict[str, Any]]:
    """The solver's short traces, of which a share has the layout: what a model without RL writes.

    Of the others one half lacks the tags of the thought, one half all tags.
    """
    check_rate("formatted", formatted)
    for number, problem in enumerate(problems):
        text, draw = task.trace(problem, "short"), rng.random()
        if draw >= formatted:
            tags = r"</?think>" if draw < (1 + formatted) / 2 else r"</?(?:think|answer)>"
            text = " ".join(re.sub(tags, "", text).split())
        yield {"problem": number, "completion": text}


# Rewards


def formatted_result(
    prompts: Sequence[str], completions: Sequence[str], *, verdict: Sequence[Verdict], **_: Any
) -> list[float]:
    """1 for a right answer in the layout, else 0, also where the verifier asks for no layout.

    For tasks whose verifier does, `accuracy` is the same.
    """
    pairs = zip(completions, verdict, strict=True)
    return [float(v.correct and _is_laid_out(text)) for text, v in pairs]


def stated_result(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: Any
) -> list[float]:
    """1 for a right answer between answer tags, whatever the rest looks like.

    Beside `format` it is the soft contrast, where `accuracy` would ask for the layout again.
    """
    pairs = zip(completions, answer, strict=True)
    return [float(extract_answer(text) == gold) for text, gold in pairs]


def _is_laid_out(text: str) -> bool:
    return read_completion(text).answer is not None


# Measures


def valid_but_wrong(problem: Problem, completion: str, verdict: Verdict, length: int) -> bool:
    """Whether a completion has the layout and a wrong answer."""
    return _is_laid_out(completion) and not verdict.correct


def reflections(problem: Problem, completion: str, verdict: Verdict, length: int) -> float:
    """How often a word of `MARKERS` occurs."""
    return float(sum(word.lower() in MARKERS for word in re.findall(r"\w+", completion)))


def tokens(problem: Problem, completion: str, verdict: Verdict, length: int) -> float:
    """The length; for its mean by difficulty."""
    return float(length)


def squared_tokens(problem: Problem, completion: str, verdict: Verdict, length: int) -> float:
    """The square of the length."""
    return float(length**2)


def right_tokens(problem: Problem, completion: str, verdict: Verdict, length: int) -> float:
    """The length of a right completion, 0 of a wrong one."""
    return float(length * verdict.correct)


def _right_in(
    problem: Problem, completion: str, verdict: Verdict, length: int, *, quarter: int
) -> bool | None:
    """Whether it is right, of completions as long as one quarter of the demonstrations."""
    bounds = (0, *QUARTILES[problem.columns["difficulty"]], math.inf)
    return verdict.correct if bounds[quarter - 1] <= length < bounds[quarter] else None


right_in_quarter_1 = functools.partial(_right_in, quarter=1)
right_in_quarter_2 = functools.partial(_right_in, quarter=2)
right_in_quarter_3 = functools.partial(_right_in, quarter=3)
right_in_quarter_4 = functools.partial(_right_in, quarter=4)


# Metrics of an experiment

Records = Mapping[str, Mapping[str, Any]]


def accuracy_drop(records: Records, stage: str, *, quarter: int) -> float:
    """How much less often completions of the next longer quarter are right."""
    measures = records[stage]["measures"]
    return measures[f"right_in_quarter_{quarter}"] - measures[f"right_in_quarter_{quarter + 1}"]


def length_slope(records: Records, stage: str) -> float:
    """Change of accuracy for one standard deviation of length, among problems as difficult.

    cov(right, length) / sd(length), both means over difficulties; 0 where lengths do not differ.
    Reads the measures `tokens`, `squared_tokens` and `right_tokens`.
    """
    record = records[stage]
    by = record["measures_by_difficulty"]
    covariance = variance = 0.0
    for difficulty, accuracy in record["accuracy_by_difficulty"].items():
        mean = by["tokens"][difficulty]
        covariance += by["right_tokens"][difficulty] - accuracy * mean
        variance += by["squared_tokens"][difficulty] - mean**2
    levels = len(record["accuracy_by_difficulty"])
    # Records have six digits.
    if variance <= 1e-4 * levels:
        return 0.0
    return covariance / levels / math.sqrt(variance / levels)


def recovery(records: Records, stage: str, *, start: str, end: str, share: float) -> float:
    """By how much a stage exceeds `share` of the way from the accuracy of `start` to that of `end`.

    A difference, since a ratio of small gains says nothing.
    """
    low, high = records[start]["accuracy"], records[end]["accuracy"]
    return records[stage]["accuracy"] - low - share * (high - low)


def training_fall(records: Records, stage: str, *, series: str, steps: int = 5) -> float:
    """Mean of a training metric at the first steps, minus that at the last."""
    values = [value for value in records[stage]["train"][series] if value is not None]
    first, last = values[:steps], values[-steps:]
    return sum(first) / len(first) - sum(last) / len(last)
