"""RL with Cold Start (arXiv 2505.22334): which demonstrations should come before GRPO?

    base -> SFT on one construction of reasoning, all of the same questions -> GRPO, reward 0 or 1

The stages are those of the library. Here are seven constructions by procedural teachers, the same
from sampled completions as far as these have what it takes, a base model's demonstrations, and
measures of turning back ("wait, let me re-check").

The questions are chains of arithmetic: what a scene would show are the given lines, which
Caption-CoT repeats before it reasons. A row of data has no mask of its own, so the wrong attempt of
Reflection-CoT cannot be left out of the loss; it counts, as in plain SFT.
"""

import functools
import random
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_reason.errors import InputError, nearest
from jaxrl_reason.papers.rl_cold_start_teachers import Attempt, attempt_until, caption, fact
from jaxrl_reason.stages.groups import Group
from jaxrl_reason.tasks import Problem, Task, Verdict, write_completion
from jaxrl_reason.tasks.problem import check_rate, check_whole

TURN = "wait , let me re-check :"
"""What stands between a wrong attempt and the next one."""

_TURNS = re.compile(
    r"\bwait\b|\bre\s*-?\s*(?:evaluat|check|examin)|\blet\s+me\s+check\b", re.IGNORECASE
)

# Demonstrations by teachers


def base_rows(
    task: Task, problems: Sequence[Problem], rng: random.Random, *, captions: float, facts: float
) -> Iterator[dict[str, Any]]:
    """What a base model learns, for SFT stages on `arithmetic`.

    Args:
        task: of the problems.
        problems: what the rows are about.
        rng: draws what each row is.
        captions: share of rows that say what a problem gives.
        facts: share of rows with one step by itself, `37 + 5 = 42`; the rest of the rows answers
            the problem without a thought.
    """
    check_rate("captions", captions)
    check_rate("facts", facts, high=1 - captions)
    for number, problem in enumerate(problems):
        drawn = rng.random()
        if drawn < captions:
            prompt = problem.prompt.rpartition(";")[0] + "; describe"
            yield {"problem": number, "prompt": prompt, "completion": caption(problem)}
        elif drawn < captions + facts:
            asked, value = fact(problem, rng)
            completion = f"{asked} = {value}"
            yield {"problem": number, "prompt": f"{asked} ?", "completion": completion}
        else:
            yield {"problem": number, "completion": write_completion("", problem.answer)}


def _alone(problem: Problem, only: Attempt) -> str:
    return only.thought


def _reflected(problem: Problem, wrong: Attempt, right: Attempt) -> str:
    return f"{wrong.thought} so {wrong.answer} ; {TURN} {right.thought}"


def _captioned(problem: Problem, right: Attempt) -> str:
    return f"{caption(problem)} reasoning : {right.thought}"


def _criticised(problem: Problem, draft: Attempt, right: Attempt) -> str:
    critique = f"{draft.slip} is wrong" if draft.slip else "no error"
    return f"draft : {draft.thought} critique : {critique} ; revised : {right.thought}"


class Construction(NamedTuple):
    """What a demonstration is made of; its answer is that of the last attempt."""

    attempts: tuple[tuple[str, bool | None], ...]
    """Teacher of each attempt, and whether its answer is to be right; None takes the first."""
    write: Callable[..., str]


CONSTRUCTIONS = {
    "distilled_strong": Construction((("strong", True),), _alone),
    "distilled_weak": Construction((("weak", True),), _alone),
    "reflection": Construction((("weak", False), ("strong", True)), _reflected),
    "caption": Construction((("strong", True),), _captioned),
    "self_critic": Construction((("weak", None), ("strong", True)), _criticised),
    "unfiltered_weak": Construction((("weak", None),), _alone),
    "wrong_only": Construction((("weak", False),), _alone),
}


def cold_start(
    task: Task,
    problems: Sequence[Problem],
    rng: random.Random,
    *,
    construction: str,
    plain: float = 0.0,
    strong: float = 0.02,
    weak: float = 0.4,
    tries: int = 24,
) -> Iterator[dict[str, Any]]:
    """One demonstration of each problem, for SFT stages on `arithmetic`.

    Args:
        task: of the problems.
        problems: what they are about.
        rng: draws the teachers' attempts.
        construction: one of `CONSTRUCTIONS`.
        plain: share of rows that are those of `distilled_strong` instead.
        strong: share of wrong steps of the strong teacher.
        weak: the same of the weak one.
        tries: attempts of a teacher at one problem, after which it is left out.
    """
    _check_name(construction, CONSTRUCTIONS)
    check_rate("plain", plain)
    check_whole("tries", tries, low=1, high=1000)
    noise = {"strong": strong, "weak": weak}
    for teacher, rate in noise.items():
        check_rate(teacher, rate)
    for number, problem in enumerate(problems):
        recipe = CONSTRUCTIONS["distilled_strong" if rng.random() < plain else construction]
        attempts = [
            attempt_until(problem, rng, noise=noise[teacher], right=right, tries=tries)
            for teacher, right in recipe.attempts
        ]
        if None not in attempts:
            thought = recipe.write(problem, *attempts)
            completion = write_completion(thought, attempts[-1].answer)
            yield {"problem": number, "completion": completion}


# Demonstrations from samples


def sampled_rows(
    groups: Sequence[Group],
    rng: random.Random,
    *,
    construction: str,
    plain: float = 0.0,
    turn: str = "\n\nWait, let me re-check.\n\n",
) -> Iterator[dict[str, Any]]:
    r"""One demonstration of each problem from sampled completions, for `reject` stages.

    Completions are free text that ends with its answer in `\boxed{}`. Only those that came to their
    end are used.

    Args:
        groups: the completions.
        rng: chooses among those of a problem.
        construction: `distilled` (a right one), `reflection` (a wrong one, `turn`, a right one),
            `unfiltered` (any) or `wrong_only`.
        plain: share of rows that are those of `distilled` instead.
        turn: what stands between the two attempts of a reflection.
    """
    _check_name(construction, _SAMPLED)
    check_rate("plain", plain)
    for group in groups:
        parts = _SAMPLED["distilled" if rng.random() < plain else construction]
        ended = [c for c in group.completions if c.finished]
        pools = [[c for c in ended if right in (None, c.is_right)] for right in parts]
        if all(pools):
            text = turn.join(rng.choice(pool).text.strip() for pool in pools)
            yield {"problem": group.number, "completion": text}


# Of which completions, right or wrong or either, a row is made.
_SAMPLED = {
    "distilled": (True,),
    "reflection": (False, True),
    "unfiltered": (None,),
    "wrong_only": (False,),
}


def _check_name(construction: str, known: Mapping[str, Any]) -> None:
    if construction not in known:
        raise InputError(
            f"construction={construction!r} is unknown; {nearest(construction, list(known))}"
        )


# Measures


def turn_back(problem: Problem, completion: str, verdict: Verdict, length: int) -> bool:
    """Whether a completion says that it looks again."""
    return _TURNS.search(completion) is not None


def right_after_turning(
    problem: Problem, completion: str, verdict: Verdict, length: int
) -> bool | None:
    """Whether the answer is right; applies to completions that turn back."""
    return verdict.correct if turn_back(problem, completion, verdict, length) else None


def right_without_turning(
    problem: Problem, completion: str, verdict: Verdict, length: int
) -> bool | None:
    """Whether the answer is right; applies to completions that do not turn back."""
    return None if turn_back(problem, completion, verdict, length) else verdict.correct


def answer_present(problem: Problem, completion: str, verdict: Verdict, length: int) -> bool:
    """Whether there is an answer that could be right."""
    return verdict.answer is not None


def turning_gain(records: Mapping[str, Mapping[str, Any]], stage: str) -> float:
    """Accuracy with a turn-back phrase less that without, among problems of equal difficulty.

    The difference at each difficulty has the weight p (1 - p), p being the share of phrases there:
    that of Mantel and Haenszel for as many problems of each. 0 where no difficulty has both kinds.
    """
    of = records[stage]["measures_by_difficulty"]
    total = weights = 0.0
    for level, share in of["turn_back"].items():
        if 0 < share < 1:
            weight = share * (1 - share)
            gain = of["right_after_turning"][level] - of["right_without_turning"][level]
            total, weights = total + weight * gain, weights + weight
    return total / weights if weights else 0.0


def spearman(
    records: Mapping[str, Mapping[str, Any]],
    stage: str,
    *,
    first: Sequence[str],
    second: Sequence[str],
    metric: str = "accuracy",
) -> float:
    """Rank correlation of a metric between stages and what became of them, within a seed.

    Args:
        records: results of the stages by name.
        stage: whose number it is called; all that are named below are read.
        first: stages.
        second: the stage that followed each.
        metric: path of the number in their results.

    Returns:
        From -1 to 1; 0 where one side is the same throughout, so has no order.
    """
    read = lambda name: functools.reduce(
        lambda part, key: part[key], metric.split("."), records[name]
    )
    sides = [_ranks([read(name) for name in names]) for names in (first, second)]
    if any(len(set(side)) == 1 for side in sides):
        return 0.0
    return statistics.correlation(*sides)


def _ranks(values: Sequence[float]) -> list[float]:
    """The place of each in their order, counted from 0; equal ones share the mean of theirs."""
    return [sum((o < v) + (o == v) / 2 for o in values) - 0.5 for v in values]
