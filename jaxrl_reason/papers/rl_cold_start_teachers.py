"""Teachers for RL with Cold Start (arXiv 2505.22334): solvers of arithmetic that make mistakes."""

import operator
import random
from typing import NamedTuple

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
    name, start = problem.columns["first"]
    values, lines, slip = {name: start}, [], None
    for name, first, sign, second in problem.columns["steps"]:
        left, right = values[first], values.get(second, second)
        value = _APPLY[sign](left, right)
        if rng.random() < noise:
            value += rng.choice(_MISSES)
            slip = slip or name
        values[name] = value % problem.columns["modulus"]
        parts = {"name": name, "first": first, "sign": sign, "left": left, "right": right}
        lines.append(wording.format(**parts, value=values[name]))
    return Attempt(" ".join(lines), str(values[name]), slip)


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
