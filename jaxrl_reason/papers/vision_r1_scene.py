"""A teacher of rules for the bridging of Vision-R1: scenes of `shapes` as facts, solved from them.

A caption is a list of figures with their places in tenths of the canvas, `red circle 2 7 ; ...`.
The solver knows of a scene what the caption says and of the question its text.
"""

import dataclasses
import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxrl_reason.errors import InputError
from jaxrl_reason.papers.vision_r1_bridging import bridge
from jaxrl_reason.tasks import Problem, Task, make_task, write_completion
from jaxrl_reason.tasks.problem import check_rate
from jaxrl_reason.tasks.render import PALETTE, SHAPES, Figure
from jaxrl_reason.tasks.scene import Look, tenths
from jaxrl_reason.tasks.shapes_questions import EDGES, Question, answer, thought

_CANVAS = 100  # on which the solver puts figures of which it knows tenths


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneTeacher:
    """Captions of symbolic scenes, and a solver that sees only those."""

    task: Task
    """The task `shapes`."""
    rng: random.Random
    """Draws what a caption mentions."""
    detail: float = 0.5
    """Share of the figures that a caption mentions for no reason."""

    def __post_init__(self):
        check_rate("detail", self.detail)
        if self.task.name != "shapes":
            raise InputError(f"SceneTeacher knows the task 'shapes' only; got {self.task.name!r}")

    def draft(self, problems: Sequence[Problem]) -> list[str]:
        """The task's short trace, which names the figures that count."""
        return [self.task.trace(problem, "short") for problem in problems]

    def describe(self, problems: Sequence[Problem], drafts: Sequence[str] | None) -> list[str]:
        """The figures that a draft names, and some of the others."""
        known = drafts or [""] * len(problems)
        return [
            " ; ".join(self._facts(problem, draft))
            for problem, draft in zip(problems, known, strict=True)
        ]

    def _facts(self, problem: Problem, draft: str) -> Iterator[str]:
        names = ("colour", "shape", "radius", "x", "y")
        for values in problem.columns["figures"]:
            figure = Figure(**dict(zip(names, values, strict=True)))
            if figure.name in draft or self.rng.random() < self.detail:
                across, down = tenths(figure, problem.columns["canvas_size"])
                yield f"{figure.name} {across} {down}"

    def reason(self, questions: Sequence[str], descriptions: Sequence[str]) -> list[str]:
        """A look at every figure of a description, or the complaint that it lacks one."""
        return [_solve(q, d) for q, d in zip(questions, descriptions, strict=True)]


def _solve(prompt: str, description: str) -> str:
    figures = []
    for fact in filter(None, description.split(" ; ")):
        colour, shape, *place = fact.split()
        x, y = (10 * int(tenth) + 5 for tenth in place)
        figures.append(Figure(colour=colour, shape=shape, radius=0, x=x, y=y))
    question = _questions()[prompt]
    # An edge that no figure is close to has no answer.
    found = answer(question, figures, _CANVAS) if figures or question.form != "edge" else None
    told = f"the description says {description or 'no shapes'} ;"
    if found is None:
        return write_completion(f"{told} so the image is not given", "unknown")
    steps = thought(question, figures, _CANVAS, long=True)
    return write_completion(f"{told} {steps} ; so {found}", found)


@functools.cache
def _questions() -> Mapping[str, Question]:
    """Every question of the task by its text."""
    looks = [Look(c, s) for c in ("", *PALETTE) for s in ("", *SHAPES) if c or s]
    pairs = list(itertools.permutations(looks, 2))
    asked = [Question(form=form, looks=(look,)) for form in ("count", "quarter") for look in looks]
    asked += [Question(form=form, looks=pair) for form in ("compare", "side") for pair in pairs]
    asked += [Question(form="edge", edge=edge) for edge in EDGES]
    return {question.prompt(): question for question in asked}


# How much is kept


@functools.cache
def fates(*, passes: int, problems: int, detail: float, seed: int = 0) -> Mapping[str, float]:
    """Shares of the traces about `shapes` by what became of them: `kept`, `wrong`, `unseen`."""
    task = make_task("shapes", {})
    asked = [task.generate("train", index) for index in range(problems)]
    teacher = SceneTeacher(task=task, rng=random.Random(seed), detail=detail)
    counts = Counter(found.fault or "kept" for found in bridge(task, asked, teacher, passes=passes))
    return {fate: count / problems for fate, count in counts.items()}


def keep_rate(
    records: Mapping[str, Any], stage: str, *, passes: int, problems: int, detail: float
) -> float:
    """The share that is kept; a metric of an experiment that no stage and no seed changes."""
    return fates(passes=passes, problems=problems, detail=detail).get("kept", 0.0)


def keep_gain(records: Mapping[str, Any], stage: str, *, problems: int, detail: float) -> float:
    """By how much the share that is kept is higher with two passes than with one."""
    one, two = (
        keep_rate(records, stage, passes=passes, problems=problems, detail=detail)
        for passes in (1, 2)
    )
    return two - one
