"""Teachers for RL with Cold Start (arXiv 2505.22334): solvers of arithmetic that make mistakes."""

import operator
import random
from typing import Any, NamedTuple

from jaxrl_reason.tasks import Problem

_WORDINGS = (
    "{name} = {left} {sign} {right} = {value} ;",
    "{first} is {left} so {name} = {left} {sign} {right} = {value} ;",
    "then {name} is {left} {sign} {right} = {value} ;",
)
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_MISSES = (-2, -1, 1, 2)


class Attempt(NamedTuple):
    """One way through a problem."""

    thought: str
    answer: str
    slip: str | None
    """Variable of the first wrong step."""


def attempt(problem: Problem, rng: random.Random, *, noise: float) -> Attempt:
    """A solution of a problem of `arithmetic` whose steps are wrong with probability `noise`.

    A wrong step is off by one or two, and the steps after it go on from there; so errors may cancel
    and a right answer does not prove its steps. The wording is drawn.
    """
    wording = rng.choice(_WORDINGS)
    steps = _steps(problem, rng, noise)
    slips = [step["name"] for step in steps if step["miss"]]
    thought = " ".join(wording.format(**step) for step in steps)
    return Attempt(thought, str(steps[-1]["value"]), slips[0] if slips else None)


def _steps(problem: Problem, rng: random.Random, noise: float) -> list[dict[str, Any]]:
    """The fields of the wordings for each step, and by how much its value misses the right one."""
    name, start = problem.columns["first"]
    values, steps = {name: start}, []
    for name, first, sign, second in problem.columns["steps"]:
        left, right = values[first], values.get(second, second)
        miss = rng.choice(_MISSES) if rng.random() < noise else 0
        values[name] = (_APPLY[sign](left, right) + miss) % problem.columns["modulus"]
        operands = {"left": left, "sign": sign, "right": right}
        steps.append(
            {"name": name, "first": first, **operands, "value": values[name], "miss": miss}
        )
    return steps


def attempt_until(
    problem: Problem, rng: random.Random, *, noise: float, right: bool | None, tries: int
) -> Attempt | None:
    """The first attempt whose answer is right, or wrong, as wanted; None where no try gives one."""
    for _ in range(tries):
        found = attempt(problem, rng, noise=noise)
        if right in (None, found.answer == problem.answer):
            return found
    return None


def caption(problem: Problem) -> str:
    """What a problem of `arithmetic` gives, without its question."""
    name, start = problem.columns["first"]
    given = [f"{name} is {start}"]
    given += [" ".join([step[0], "is", *map(str, step[1:])]) for step in problem.columns["steps"]]
    return f"image : {' , '.join(given)} ."


def fact(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """One of the steps of a problem by itself, with its value: `37 + 5` and `42`."""
    step = rng.choice(_steps(problem, rng, 0.0))
    return "{left} {sign} {right}".format(**step), str(step["value"])
