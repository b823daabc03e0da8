"""Short films of moving shapes: when something happens, where, and why.

A film is planned as events with causes (`events`), written down as facts (`facts`) and rendered to
frames. Questions for intervals are graded by temporal IoU, the others by exact match. Difficulty is
the number of shapes. The split belongs to the opening of a film, that is which shapes there are and
in which quarter each is first seen, so neither a film nor a list of facts is in both splits.
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_reason.errors import InputError
from jaxrl_reason.tasks import events, facts, motion, render
from jaxrl_reason.tasks import moving_shapes_questions as questions
from jaxrl_reason.tasks import problem as shared
from jaxrl_reason.tasks.facts import Fact
from jaxrl_reason.tasks.intervals import read_interval, temporal_iou, write_seconds
from jaxrl_reason.tasks.moving_shapes_questions import Question
from jaxrl_reason.tasks.problem import Media, Problem, Split, Style, Verdict, Video
from jaxrl_reason.tasks.scene import QUARTERS, Look
from jaxrl_reason.tasks.shapes import check_picture

_LEAST, _MOST = 2, 6
_RATES = (1, 2, 4, 5, 10, 20, 25)  # those of which times have at most two decimals
_ATTEMPTS = 30  # films tried for a form of question


@dataclass(frozen=True, kw_only=True)
class MovingShapes:
    """Options of the task."""

    seed: int = 0
    """Seed of the streams of problems; the split of a problem does not depend on it."""
    min_shapes: int = 2
    """Fewest shapes when difficulties are mixed."""
    max_shapes: int = 4
    """Most shapes when difficulties are mixed."""
    frames: int = 24
    """Frames of a video."""
    fps: int = 1
    """Frames a second; changes the times in texts, not the frames."""
    canvas_size: int = 64
    """Height and width of the frames in pixels, a multiple of 4."""
    colours: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "white")
    """Colours to draw from."""
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "cross")
    """Shapes to draw from."""
    questions: tuple[str, ...] = ("interval", "spatial", "cause")
    """Kinds of questions, equally often; one named twice comes twice as often."""
    min_iou: float = 0.5
    """Temporal IoU from which on an interval counts as correct."""
    test_fraction: float = 0.1
    """Share of all openings that is held out."""

    name = "moving_shapes"

    def __post_init__(self) -> None:
        """Check ranges."""
        shared.check_whole("seed", self.seed, low=0, high=2**63 - 1)
        shared.check_whole("min_shapes", self.min_shapes, low=_LEAST, high=_MOST)
        shared.check_whole("max_shapes", self.max_shapes, low=self.min_shapes, high=_MOST)
        shared.check_whole("frames", self.frames, low=12, high=128)
        if self.fps not in _RATES or isinstance(self.fps, bool | float):
            raise InputError(f"fps={self.fps!r} must be one of {_RATES}")
        check_picture(self.canvas_size, self.colours, self.shapes)
        shared.check_names("questions", self.questions, questions.KINDS, repeats=True)
        shared.check_rate("min_iou", self.min_iou, low=0.01)
        shared.check_rate("test_fraction", self.test_fraction, low=0.001, high=0.9)

    def difficulties(self) -> tuple[int, ...]:
        """Numbers of shapes that are mixed."""
        return tuple(range(self.min_shapes, self.max_shapes + 1))

    def words(self) -> tuple[str, ...]:
        """Colours, shapes, times, and the words of questions, facts and traces."""
        times = (write_seconds(frame / self.fps) for frame in range(self.frames))
        names = (*self.colours, *self.shapes, *QUARTERS)
        words = shared.split_words((*questions.WORDS, *names, *times))
        return (*words, *facts.write_facts(()).split(), *(f"[{field}]" for field in facts.FIELDS))

    def generate(self, split: Split, index: int, difficulty: int | None = None) -> Problem:
        """Problem `index` of a split with `difficulty` shapes (2 to 6)."""
        if difficulty is not None:
            shared.check_whole("difficulty", difficulty, low=_LEAST, high=_MOST)
        kind, question, plan = shared.draw(self, split, index, difficulty)
        record = events.describe(plan, self.fps)
        answer = questions.answer(question, record)
        columns = {
            "difficulty": len(plan.bodies),
            "answer_class": answer,
            "kind": kind,
            "question": dataclasses.asdict(question),
            "canvas_size": self.canvas_size,
            "frames": self.frames,
            "fps": self.fps,
            "bodies": [body.to_json() for body in plan.bodies],
            "facts": [fact.to_json() for fact in record],
        }
        return Problem(prompt=question.prompt(), answer=answer, columns=columns)

    def propose(self, rng: random.Random, difficulty: int) -> shared.Draft:
        """Draw an opening; a film that goes on from it and a question follow when it is wanted."""
        kind = rng.choice(self.questions)
        form = rng.choice(questions.KINDS[kind])
        looks = [Look(colour, shape) for colour in self.colours for shape in self.shapes]
        looks = rng.sample(looks, difficulty)
        start = events.begin(rng, looks, self.colours, self.canvas_size, self.frames)
        return shared.Draft(
            split=self.split_of(events.describe(start, self.fps)),
            finish=lambda: self._finish(rng, start, kind, form),
        )

    def _finish(
        self, rng: random.Random, start: events.Plan, kind: str, form: str
    ) -> shared.Candidate | None:
        for _ in range(_ATTEMPTS):
            plan = events.go_on(rng, start)
            record = events.describe(plan, self.fps)
            question = questions.ask(rng, form, record)
            if question is not None:
                return shared.Candidate(
                    canonical=f"{facts.write_facts(record)} {question.prompt()}",
                    split=self.split_of(record),
                    content=(kind, question, plan),
                )
        return None

    def split_of(self, record: Sequence[Fact]) -> Split:
        """Which split all films with the opening of these facts belong to."""
        return shared.hash_split(self.name, facts.opening(record), self.test_fraction)

    def facts(self, problem: Problem) -> tuple[Fact, ...]:
        """Everything that happens in the video of a problem, in order of time."""
        return tuple(map(Fact.from_json, problem.columns["facts"]))

    def media(self, problem: Problem) -> Media:
        """The video of a problem."""
        columns = problem.columns
        size, count = columns["canvas_size"], columns["frames"]
        bodies = tuple(map(motion.Body.from_json, columns["bodies"]))
        frames = [render.draw(size, motion.figures_at(bodies, count, k)) for k in range(count)]
        return Media(videos=(Video(frames=np.stack(frames), fps=float(columns["fps"])),))

    def trace(self, problem: Problem, style: Style) -> str:
        """A correct completion; `long` writes down all facts and then searches them."""
        shared.check_style(style)
        if style == "answer":
            return shared.write_completion("", problem.answer)
        thought = questions.thought(
            _question(problem.columns["question"]), self.facts(problem), long=style == "long"
        )
        return shared.write_completion(f"{thought} ; so {problem.answer}", problem.answer)

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Correct when the interval is right by `min_iou`, or the answer is the one expected.

        The verdict of an interval has its temporal IoU as its grade.
        """
        read = shared.read_completion(text)
        if read.answer is None:
            return Verdict(correct=False, formatted=False, answer=None, reason=read.reason)
        form = problem.columns["question"]["form"]
        answer = questions.usable(form, read.answer)
        if answer is None:
            reason = f"unusable: no answer to a question of the form {form!r}"
            return Verdict(correct=False, formatted=True, answer=None, reason=reason)
        correct, grade = answer == problem.answer, None
        if form == "interval":
            grade = temporal_iou(_interval(answer), _interval(problem.answer))
            correct = grade >= self.min_iou
        reason = "right" if correct else f"expected {problem.answer}"
        return Verdict(
            correct=correct, formatted=True, answer=read.answer, reason=reason, grade=grade
        )


def _question(value: dict[str, Any]) -> Question:
    return Question(**value)


def _interval(text: str) -> tuple[float, float]:
    interval = read_interval(text)
    assert interval is not None
    return interval
