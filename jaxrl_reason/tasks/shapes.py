"""Coloured shapes on a canvas: how many, more or fewer, and where.

Problems are built from their answer (counting, comparing) or from a scene in which the answer is
beyond doubt (locating), and the other figures are chosen to be mistaken for those asked about.
Difficulty is the number of figures. The split belongs to the scene, not to the question: no scene
of training is asked about in the test split.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from jaxrl_reason.errors import InputError
from jaxrl_reason.tasks import problem as shared
from jaxrl_reason.tasks import render, scene
from jaxrl_reason.tasks import shapes_questions as questions
from jaxrl_reason.tasks.problem import Media, Problem, Split, Style, Verdict
from jaxrl_reason.tasks.render import Figure
from jaxrl_reason.tasks.scene import Look
from jaxrl_reason.tasks.shapes_questions import Question

_KINDS = ("count", "compare", "locate")
_LEAST, _MOST = 2, 10
_ATTEMPTS = 60  # scenes tried for a form of question
_ALIKE = 3  # how much likelier a filler is that shares colour or shape with what is asked about


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Options of the task."""

    seed: int = 0
    """Seed of the streams of problems; the split of a problem does not depend on it."""
    min_shapes: int = 3
    """Fewest shapes when difficulties are mixed."""
    max_shapes: int = 6
    """Most shapes when difficulties are mixed."""
    canvas_size: int = 64
    """Height and width of the image in pixels, a multiple of 4."""
    colours: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "white")
    """Colours to draw from."""
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "cross")
    """Shapes to draw from."""
    questions: tuple[str, ...] = _KINDS
    """Kinds of questions, equally often; one named twice comes twice as often."""
    test_fraction: float = 0.1
    """Share of all scenes that is held out."""

    name = "shapes"

    def __post_init__(self) -> None:
        """Check ranges."""
        shared.check_whole("seed", self.seed, low=0, high=2**63 - 1)
        shared.check_whole("min_shapes", self.min_shapes, low=_LEAST, high=_MOST)
        shared.check_whole("max_shapes", self.max_shapes, low=self.min_shapes, high=_MOST)
        check_picture(self.canvas_size, self.colours, self.shapes)
        shared.check_names("questions", self.questions, _KINDS, repeats=True)
        shared.check_rate("test_fraction", self.test_fraction, low=0.001, high=0.9)

    def difficulties(self) -> tuple[int, ...]:
        """Numbers of shapes that are mixed."""
        return tuple(range(self.min_shapes, self.max_shapes + 1))

    def words(self) -> tuple[str, ...]:
        """Colours, shapes, numbers up to ten, and the words of questions and traces."""
        names = (*self.shapes, *map(scene.plural, (*self.shapes, "shape")))
        numbers = " ".join(map(str, range(_MOST + 1)))
        text = shared.split_words((*questions.WORDS, *self.colours, *names, numbers))
        return tuple(word for word in text if word not in ("{", "}", "first", "second"))

    def generate(self, split: Split, index: int, difficulty: int | None = None) -> Problem:
        """Problem `index` of a split with `difficulty` shapes (2 to 10)."""
        if difficulty is not None:
            shared.check_whole("difficulty", difficulty, low=_LEAST, high=_MOST)
        question, figures = shared.draw(self, split, index, difficulty)
        answer = questions.answer(question, figures, self.canvas_size)
        assert answer is not None
        columns = {
            "difficulty": len(figures),
            "answer_class": answer,
            "kind": question.form if question.form in _KINDS else "locate",
            "question": question.to_json(),
            "canvas_size": self.canvas_size,
            "figures": [[f.colour, f.shape, f.radius, f.x, f.y] for f in figures],
        }
        return Problem(prompt=question.prompt(), answer=answer, columns=columns)

    def propose(self, rng: random.Random, difficulty: int) -> shared.Candidate | None:
        """Draw a form of question, then a question and a scene that fit each other."""
        kind = rng.choice(self.questions)
        form = rng.choice(("quarter", "side", "edge")) if kind == "locate" else kind
        for _ in range(_ATTEMPTS):
            question, looks = self._plan(rng, difficulty, form)
            figures = scene.place(rng, looks, self.canvas_size)
            if figures and questions.answer(question, figures, self.canvas_size) is not None:
                break
        else:
            return None
        canonical = scene.coarse(figures, self.canvas_size)
        return shared.Candidate(
            canonical=f"{canonical} : {question.prompt()}",
            split=shared.hash_split(self.name, canonical, self.test_fraction),
            content=(question, figures),
        )

    def _plan(self, rng: random.Random, number: int, form: str) -> tuple[Question, list[Look]]:
        if form == "count":
            return self._count(rng, number)
        return self._compare(rng, number) if form == "compare" else self._locate(rng, number, form)

    def _count(self, rng: random.Random, number: int) -> tuple[Question, list[Look]]:
        """Each count from none to all is equally likely."""
        asked = rng.choice((self._look(rng), self._look(rng), *self._look(rng).halves()))
        count = rng.randint(0, number)
        looks = [self._fitting(rng, asked) for _ in range(count)]
        looks += [self._filler(rng, (asked,)) for _ in range(number - count)]
        return Question(form="count", looks=(asked,)), looks

    def _compare(self, rng: random.Random, number: int) -> tuple[Question, list[Look]]:
        """More, fewer and equal are equally likely, and at least one of the two kinds is there."""
        asked = rng.choice((self._look(rng), self._look(rng), *self._look(rng).halves()))
        second = rng.choice([look for look in self._likes(asked) if look != asked])
        difference = rng.choice((-1, 0, 1))
        pairs = [
            (a, b)
            for a in range(number + 1)
            for b in range(number + 1 - a)
            if a + b and (a > b) - (a < b) == difference
        ]
        a, b = rng.choice(pairs)
        looks = [self._fitting(rng, asked) for _ in range(a)]
        looks += [self._fitting(rng, second) for _ in range(b)]
        looks += [self._filler(rng, (asked, second)) for _ in range(number - a - b)]
        return Question(form="compare", looks=(asked, second)), looks

    def _locate(self, rng: random.Random, number: int, form: str) -> tuple[Question, list[Look]]:
        """The figures that are named look like no other; for `edge` any figure may be asked for."""
        if form == "edge":
            question = Question(form="edge", edge=rng.choice(questions.EDGES))
            return question, [self._look(rng) for _ in range(number)]
        asked = tuple(rng.sample(self._looks(), 2 if form == "side" else 1))
        looks = [*asked, *(self._filler(rng, asked) for _ in range(number - len(asked)))]
        return Question(form=form, looks=asked), looks

    def _looks(self) -> list[Look]:
        return [Look(colour, shape) for colour in self.colours for shape in self.shapes]

    def _look(self, rng: random.Random) -> Look:
        return Look(rng.choice(self.colours), rng.choice(self.shapes))

    def _likes(self, look: Look) -> list[Look]:
        """Kinds that are named in the same way: by colour, by shape or by both."""
        colours = self.colours if look.colour else ("",)
        shapes = self.shapes if look.shape else ("",)
        return [Look(colour, shape) for colour in colours for shape in shapes]

    def _fitting(self, rng: random.Random, kind: Look) -> Look:
        return Look(kind.colour or rng.choice(self.colours), kind.shape or rng.choice(self.shapes))

    def _filler(self, rng: random.Random, kinds: Sequence[Look]) -> Look:
        """A look of none of these kinds, more often than not like one of them in part."""
        looks = [look for look in self._looks() if not any(kind.fits(look) for kind in kinds)]
        alike = lambda look: any(set(look) & set(kind) for kind in kinds)
        return rng.choices(looks, [_ALIKE if alike(look) else 1 for look in looks])[0]

    def media(self, problem: Problem) -> Media:
        """The image of a problem."""
        facts = problem.columns
        return Media(images=(render.draw(facts["canvas_size"], _figures(problem)),))

    def trace(self, problem: Problem, style: Style) -> str:
        """A correct completion; `long` lists every figure and looks at each in turn."""
        shared.check_style(style)
        if style == "answer":
            return shared.write_completion("", problem.answer)
        question = Question.from_json(problem.columns["question"])
        size = problem.columns["canvas_size"]
        thought = questions.thought(question, _figures(problem), size, long=style == "long")
        return shared.write_completion(f"{thought} ; so {problem.answer}", problem.answer)

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Correct when the answer is the one expected, whatever its case."""
        read = shared.read_completion(text)
        if read.answer is None:
            return Verdict(correct=False, formatted=False, answer=None, reason=read.reason)
        form = problem.columns["question"]["form"]
        answer = questions.usable(form, read.answer)
        if answer is None:
            reason = f"unusable: no answer to a question of the form {form!r}"
            return Verdict(correct=False, formatted=True, answer=None, reason=reason)
        correct = answer == problem.answer
        reason = "right" if correct else f"expected {problem.answer}"
        return Verdict(correct=correct, formatted=True, answer=read.answer, reason=reason)


def check_picture(canvas_size: int, colours: tuple[str, ...], shapes: tuple[str, ...]) -> None:
    """Refuse a canvas, colours or shapes that cannot be drawn."""
    low, high = render.MIN_CANVAS, render.MAX_CANVAS
    shared.check_whole("canvas_size", canvas_size, low=low, high=high)
    if canvas_size % 4:
        raise InputError(f"canvas_size={canvas_size} must be a multiple of 4")
    shared.check_names("colours", colours, render.PALETTE, least=3)
    shared.check_names("shapes", shapes, render.SHAPES, least=3)


def _figures(problem: Problem) -> list[Figure]:
    names = ("colour", "shape", "radius", "x", "y")
    return [
        Figure(**dict(zip(names, values, strict=True))) for values in problem.columns["figures"]
    ]
