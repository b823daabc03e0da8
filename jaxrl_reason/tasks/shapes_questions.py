"""Questions about a scene: their wording, their answers from the scene, and the way to them.

A question names figures by their looks. The forms `quarter`, `side` and `edge` are three ways of
asking where something is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl_reason.tasks.render import PALETTE, SHAPES, Figure
from jaxrl_reason.tasks.scene import (
    QUARTERS,
    Look,
    gap,
    plain,
    quarter,
    tenths,
    unique,
    within_quarter,
)

FORMS = ("count", "compare", "quarter", "side", "edge")
SIDES = ("left", "right", "above", "below")
EDGES = ("left", "right", "top", "bottom")
_RELATIONS = {">": "more", "<": "fewer", "=": "equal"}
_PROMPTS = {
    "count": "How many {first} are there?",
    "compare": "Are there more {first} than {second}? Answer more, fewer or equal.",
    "quarter": (
        "In which quarter is the {first}: top left, top right, bottom left or bottom right?"
    ),
    "side": "Where is the {first} as seen from the {second}: left, right, above or below?",
    "edge": "Which shape is closest to the {edge} edge? Answer with its colour and shape.",
}
WORDS = (
    *_PROMPTS.values(),
    *(f"{first} {second}" for first, second in zip(SIDES, EDGES, strict=True)),
    "see count find largest smallest yes no best across down by so : ; > < =",
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A form of question, the looks it names (one or two), and the edge that `edge` asks for."""

    form: str
    looks: tuple[Look, ...] = ()
    edge: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Question":
        """What `to_json` wrote."""
        looks = tuple(Look(*look) for look in value["looks"])
        return cls(form=value["form"], looks=looks, edge=value["edge"])

    def to_json(self) -> dict[str, Any]:
        """Strings and lists."""
        return {
            "form": self.form,
            "looks": [list(look) for look in self.looks],
            "edge": self.edge,
        }

    def prompt(self) -> str:
        """The text of the user's turn."""
        many = self.form in ("count", "compare")
        names = [look.plural if many else str(look) for look in self.looks]
        parts = dict(zip(("first", "second"), names, strict=False))
        return _PROMPTS[self.form].format(edge=self.edge, **parts)


def answer(question: Question, figures: Sequence[Figure], size: int) -> str | None:
    """The answer; None when a viewer could doubt it, so that the question cannot be asked.

    A figure that is asked about looks like no other and keeps clear of the middle lines; one that
    is to the left is at least twice as far to the left as it is above or below; the one closest
    to an edge is closest by its centre and by its rim. All holds in tenths of the canvas too.
    """
    found = [[figure for figure in figures if look.fits(figure)] for look in question.looks]
    if question.form == "count":
        return str(len(found[0]))
    if question.form == "compare":
        return _RELATIONS[_relation(len(found[0]), len(found[1]))]
    if question.form == "edge":
        return _closest(question.edge, figures, size)
    if any(len(fitting) != 1 for fitting in found):
        return None
    first = found[0][0]
    if question.form == "quarter":
        clear = within_quarter(first.x, first.y, first.radius, size)
        return quarter(first.x, first.y, size) if clear else None
    return _side(first, found[1][0], size)


def usable(form: str, text: str) -> str | None:
    """An answer in normal form if it is of the kind that this form asks for."""
    text = plain(text)
    if form == "count":
        return str(int(text)) if text.isdecimal() and len(text) < 10 else None
    kinds = {"compare": _RELATIONS.values(), "quarter": QUARTERS, "side": SIDES}
    if form in kinds:
        return text if text in kinds[form] else None
    words = text.split()
    return text if len(words) == 2 and words[1] in SHAPES and words[0] in PALETTE else None


def thought(question: Question, figures: Sequence[Figure], size: int, *, long: bool) -> str:
    """The way to the answer; the long way looks at every figure, the short one at those that count.

    Both end before the answer.
    """
    at = lambda figure: "{} {}".format(*tenths(figure, size))
    lines = []
    if long:
        lines += ["see " + " ; ".join(f"{figure.name} {at(figure)}" for figure in figures)]
    if question.form == "edge":
        lines += _race(question.edge, figures, size, long=long)
        return " ; ".join(lines)
    many = question.form in ("count", "compare")
    found = []
    for look in question.looks:
        fitting = [figure for figure in figures if look.fits(figure)]
        found.append(fitting)
        if not long:
            lines += [f"{figure.name} {at(figure)}" for figure in fitting]
            lines += [f"{look.plural} {len(fitting)}"] * many
            continue
        steps, seen = [], 0
        for figure in figures:
            seen += look.fits(figure)
            mark = (seen if many else at(figure)) if look.fits(figure) else ""
            steps.append(f"{figure.name} {'yes' if look.fits(figure) else 'no'} {mark}".strip())
            if seen and not many:
                break  # it is the only one
        heading = f"count {look.plural}" if many else f"find {look}"
        lines.append(f"{heading} : {' ; '.join(steps)}")
    if question.form == "compare":
        first, second = map(len, found)
        lines.append(f"{first} {_relation(first, second)} {second}")
    if long and question.form == "quarter":
        words = quarter(found[0][0].x, found[0][0].y, size).split()
        across, down = tenths(found[0][0], size)
        lines.append(f"{across} {words[1]} ; {down} {words[0]}")
    if long and question.form == "side":
        lines.append(_distances(found[0][0], found[1][0], size))
    return " ; ".join(lines)


def _relation(first: int, second: int) -> str:
    return ">" if first > second else "<" if first < second else "="


def _side(first: Figure, second: Figure, size: int) -> str | None:
    if gap(first, second) < 1:
        return None
    offsets = [
        (first.x - second.x, first.y - second.y),
        tuple(a - b for a, b in zip(tenths(first, size), tenths(second, size), strict=True)),
    ]
    sides = set()
    for across, down in offsets:
        if abs(across) >= max(2 * abs(down), 2):
            sides.add("left" if across < 0 else "right")
        elif abs(down) >= max(2 * abs(across), 2):
            sides.add("above" if down < 0 else "below")
        else:
            return None
    return sides.pop() if len(sides) == 1 else None


def _distances(first: Figure, second: Figure, size: int) -> str:
    """Both offsets in tenths, and which is larger."""
    parts, amounts = [], []
    for name, a, b in zip(
        ("across", "down"), tenths(first, size), tenths(second, size), strict=True
    ):
        amounts.append(abs(a - b))
        parts.append(f"{name} {a} {_relation(a, b)} {b} by {abs(a - b)}")
    return " ; ".join([*parts, f"{amounts[0]} {_relation(*amounts)} {amounts[1]}"])


def _closest(edge: str, figures: Sequence[Figure], size: int) -> str | None:
    axis, sign = EDGES.index(edge) // 2, 1 if edge in ("left", "top") else -1
    centre = lambda figure: sign * (figure.x, figure.y)[axis]
    first, *rest = sorted(figures, key=centre)
    for other in rest:
        if centre(first) + size // 16 > centre(other):
            return None
        if centre(first) - first.radius + size // 16 > centre(other) - other.radius:
            return None
        if sign * tenths(first, size)[axis] >= sign * tenths(other, size)[axis]:
            return None
    return first.name if first in unique(figures) else None


def _race(edge: str, figures: Sequence[Figure], size: int, *, long: bool) -> list[str]:
    """The figures one by one, each compared with the best so far."""
    axis, sign = EDGES.index(edge) // 2, 1 if edge in ("left", "top") else -1
    extreme = "smallest" if sign == 1 else "largest"
    heading = f"{extreme} {('across', 'down')[axis]} :"
    best, steps = None, []
    for figure in figures:
        value = tenths(figure, size)[axis]
        better = best is None or sign * value < sign * best
        best = value if better else best
        steps.append(f"{figure.name} {value} {'best' if better else 'no'}")
    if long:
        return [f"{heading} {' ; '.join(steps)}"]
    last = [step for step in steps if step.endswith("best")][-1]
    return [f"{heading} {last.removesuffix(' best')}"]
