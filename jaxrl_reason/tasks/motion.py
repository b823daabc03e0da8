"""Shapes through time: where each is in every frame, and when two of them touch.

A shape moves in straight lines and rests in between. Positions are whole pixels, found with whole
numbers only, so that a film is the same on every machine.
"""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_reason.tasks.render import PALETTE, Figure, outline

DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
_HUES = ("", *PALETTE)


@dataclass(frozen=True)
class Body:
    """A shape and its fate.

    Attributes:
        shape: name of the shape.
        radius: its reach to each side.
        knots: (frame, x, y): between two of them it moves, after the last it rests.
        looks: (frame, colour): from that frame on it has that colour; "" is invisible.
    """

    shape: str
    radius: int
    knots: tuple[tuple[int, int, int], ...]
    looks: tuple[tuple[int, str], ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Body":
        """What `to_json` wrote."""
        knots, looks = (tuple(map(tuple, value[name])) for name in ("knots", "looks"))
        return cls(value["shape"], value["radius"], knots, looks)

    def to_json(self) -> dict[str, Any]:
        """Strings, numbers and lists."""
        lists = {
            name: [list(entry) for entry in getattr(self, name)] for name in ("knots", "looks")
        }
        return {"shape": self.shape, "radius": self.radius, **lists}

    @property
    def last(self) -> tuple[int, int]:
        """Where it is in the end."""
        return self.knots[-1][1:]

    def colour(self, frame: int) -> str:
        """The colour in a frame, "" if it cannot be seen."""
        return [colour for start, colour in self.looks if start <= frame][-1]

    def name(self, frame: int) -> str:
        """Colour and shape in a frame."""
        return f"{self.colour(frame)} {self.shape}"

    def moved(self, start: int, end: int, place: tuple[int, int]) -> "Body":
        """The same with a move at the end."""
        return replace(self, knots=(*self.knots, (start, *self.last), (end, *place)))

    def turned(self, frame: int, colour: str) -> "Body":
        """The same with another colour, or none, from a frame on."""
        return replace(self, looks=(*self.looks, (frame, colour)))


def radius_of(size: int) -> int:
    """The reach of every shape on a canvas."""
    return 5 * size // 64


def gap_of(size: int) -> int:
    """The least distance of shapes that do not touch, and the least step of one that moves."""
    return max(2, size // 20)


def lines_of(size: int) -> tuple[int, ...]:
    """The coordinates on which shapes begin and to which they move freely.

    The two in the middle are such that shapes on them touch across the middle line: one that hits
    another from the other half of the canvas then still rests in its own half.
    """
    outer, inner = size // 8, size // 2 - 1 - radius_of(size)
    return outer, inner, size - 1 - inner, size - 1 - outer


class Track(NamedTuple):
    """Centre and colour of a body in each frame; colour 0 is invisible."""

    x: Int[np.ndarray, "F"]
    y: Int[np.ndarray, "F"]
    hue: Int[np.ndarray, "F"]


@functools.lru_cache(maxsize=256)
def track(body: Body, frames: int) -> Track:
    """Where a body is in each frame; halves are rounded up."""
    made = Track(*(np.zeros(frames, np.int64) for _ in Track._fields))
    for axis, values in enumerate(made[:2], start=1):
        values[:] = body.knots[0][axis]
        for before, after in itertools.pairwise(body.knots):
            span, way = after[0] - before[0], after[axis] - before[axis]
            gone = np.arange(span + 1)
            values[before[0] : after[0] + 1] = before[axis] + (2 * way * gone + span) // (2 * span)
            values[after[0] :] = after[axis]
    for start, colour in body.looks:
        made.hue[start:] = _HUES.index(colour)
    for values in made:
        values.setflags(write=False)  # it is cached
    return made


def figures_at(bodies: tuple[Body, ...], frames: int, frame: int) -> list[Figure]:
    """What is drawn in a frame."""
    made = []
    for body in bodies:
        x, y, hue = (int(values[frame]) for values in track(body, frames))
        if hue:
            made.append(Figure(colour=_HUES[hue], shape=body.shape, radius=body.radius, x=x, y=y))
    return made


@functools.cache
def reach(first: str, second: str, direction: str, radius: int) -> int:
    """How far apart the centres are when a shape that moves in a direction touches another.

    They touch when a pixel of one lies next to a pixel of the other.
    """
    across, down = DIRECTIONS[direction]
    pixels = [outline(shape, radius) for shape in (first, second)]
    if down:
        pixels = [values.T for values in pixels]
    if across + down < 0:
        pixels = [values[:, ::-1] for values in pixels]
    front = 2 * radius - pixels[0][:, ::-1].argmax(axis=1)  # last column of each row
    back = pixels[1].argmax(axis=1)  # first column of each row
    return int((front - back).max()) + 1


def course(mover: Body, target: Body) -> tuple[str, int] | None:
    """The direction in which a resting body would hit another, and how far it is to the touch.

    None unless they stand in one row or one column, apart from each other.
    """
    (x, y), (to_x, to_y) = mover.last, target.last
    if (x == to_x) == (y == to_y):
        return None
    for direction, (across, down) in DIRECTIONS.items():
        way = (to_x - x) * across + (to_y - y) * down
        if way > 0:
            far = way - reach(mover.shape, target.shape, direction, mover.radius)
            return (direction, far) if far > 0 else None
    raise AssertionError((mover, target))


def room(first: Body, second: Body, frames: int) -> Int[np.ndarray, "F"]:
    """Empty pixels between two bodies in each frame, 0 where they touch, visible or not.

    Off a common row and column it is the distance of the boxes around them.
    """
    one, two = track(first, frames), track(second, frames)
    across, down = two.x - one.x, two.y - one.y
    side = 2 * first.radius + 1
    space = np.maximum(np.abs(across), np.abs(down)) - side
    reaches = [reach(first.shape, second.shape, name, first.radius) for name in DIRECTIONS]
    right, left, below, above = reaches
    space = np.where(down == 0, np.abs(across) - np.where(across > 0, right, left), space)
    return np.where(across == 0, np.abs(down) - np.where(down > 0, below, above), space)
