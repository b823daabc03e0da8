"""Figures side by side on a canvas: where they stand, what they are called, which fit a phrase.

Figures never touch or overlap. Where a text needs a position it has two digits, the tenths of the
canvas from the left and from the top, as in `red circle 2 7`.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_reason.tasks.render import Figure

QUARTERS = ("top left", "top right", "bottom left", "bottom right")
_PLURALS = {"cross": "crosses"}
_ATTEMPTS = 60  # places tried for one figure
_FEW = 5  # up to here figures may be large


class Look(NamedTuple):
    """Colour and shape of a figure, or of a kind of figures, where "" stands for any."""

    colour: str
    shape: str

    def __str__(self) -> str:
        """As in `red circle`."""
        return " ".join(filter(None, (self.colour, self.shape or "shape")))

    @property
    def plural(self) -> str:
        """As in `red circles`, `red shapes` or `circles`."""
        return " ".join(filter(None, (self.colour, plural(self.shape or "shape"))))

    def halves(self) -> "tuple[Look, Look]":
        """The kind of its colour and the kind of its shape."""
        return Look(self.colour, ""), Look("", self.shape)

    def fits(self, figure: "Look | Figure") -> bool:
        """Whether a figure is of this kind."""
        return self.colour in ("", figure.colour) and self.shape in ("", figure.shape)


def plural(shape: str) -> str:
    """More than one of a shape."""
    return _PLURALS.get(shape, f"{shape}s")


def place(rng: random.Random, looks: Sequence[Look], size: int) -> list[Figure] | None:
    """Figures of these looks at random places, in reading order; None where they did not fit.

    Between the boxes around two figures there are at least `size // 32` pixels.
    """
    largest = size // 8 if len(looks) <= _FEW else size // 11
    radii = sorted((rng.randint(size // 16, largest) for _ in looks), reverse=True)
    figures: list[Figure] = []
    for look, radius in zip(looks, radii, strict=True):
        for _ in range(_ATTEMPTS):
            x, y = (rng.randint(radius + 1, size - radius - 2) for _ in range(2))
            figure = Figure(colour=look.colour, shape=look.shape, radius=radius, x=x, y=y)
            if all(gap(figure, other) >= max(1, size // 32) for other in figures):
                figures.append(figure)
                break
        else:
            return None
    return sorted(figures, key=lambda figure: (figure.y, figure.x))


def gap(first: Figure, second: Figure) -> int:
    """Empty rows or columns between the boxes around two figures; negative if they overlap."""
    apart = max(abs(first.x - second.x), abs(first.y - second.y))
    return apart - first.radius - second.radius - 1


def tenths(figure: Figure, size: int) -> tuple[int, int]:
    """The position of a centre in tenths of the canvas, 0 to 9 each."""
    return 10 * figure.x // size, 10 * figure.y // size


def quarter(x: int, y: int, size: int) -> str:
    """The quarter of the canvas that a point is in."""
    return f"{'top' if 2 * y < size else 'bottom'} {'left' if 2 * x < size else 'right'}"


def within_quarter(x: int, y: int, radius: int, size: int) -> bool:
    """Whether all of a figure is in one quarter."""
    return all(abs(2 * value + 1 - size) >= 2 * radius + 1 for value in (x, y))


def unique(figures: Sequence[Figure]) -> list[Figure]:
    """The figures whose look no other figure has."""
    looks = [figure.name for figure in figures]
    return [figure for figure in figures if looks.count(figure.name) == 1]


def coarse(figures: Sequence[Figure], size: int) -> str:
    """Looks and places on a grid of 4 x 4, in any order: equal for scenes that look alike.

    Sizes and exact places are left out, and so is the size of the canvas.
    """
    cells = sorted(f"{f.name} {4 * f.x // size} {4 * f.y // size}" for f in figures)
    return " ; ".join(cells)


def plain(answer: str) -> str:
    """An answer in words without what does not matter: case, white space, `the`, a full stop."""
    return " ".join(answer.lower().rstrip(" .").split()).removeprefix("the ")
