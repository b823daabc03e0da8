"""Shapes found again in pixels, without any of the code that drew them."""

import functools
from typing import NamedTuple

import numpy as np

NAMES = {
    (230, 40, 40): "red",
    (40, 170, 60): "green",
    (50, 90, 255): "blue",
    (250, 220, 40): "yellow",
    (160, 50, 200): "purple",
    (60, 220, 230): "cyan",
    (255, 130, 0): "orange",
    (245, 245, 245): "white",
}
BACKGROUND = (16, 16, 16)


class Blob(NamedTuple):
    """A connected part of one colour: its name, the middle of its box, its pixels (row, column)."""

    colour: str
    shape: str
    x: float
    y: float
    pixels: frozenset

    @property
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def box(self):
        """Left, right, top, bottom."""
        rows, columns = zip(*self.pixels, strict=True)
        return min(columns), max(columns), min(rows), max(rows)


def blobs(image):
    """All connected parts of an image; every pixel is background or has a known colour."""
    return _blobs(image.tobytes(), image.shape)


@functools.lru_cache(maxsize=512)
def _blobs(content, shape):
    image = np.frombuffer(content, np.uint8).reshape(shape)
    colours = {
        (row, column): tuple(map(int, image[row, column]))
        for row, column in np.argwhere((image != BACKGROUND).any(axis=2)).tolist()
    }
    found = []
    while colours:
        start, colour = next(iter(colours.items()))
        part, front = set(), [start]
        while front:
            row, column = front.pop()
            if colours.get((row, column)) == colour:
                del colours[row, column]
                part.add((row, column))
                front += [
                    (row + down, column + across) for down in (-1, 0, 1) for across in (-1, 0, 1)
                ]
        found.append(_blob(NAMES[colour], frozenset(part)))
    return found


def _blob(colour, pixels):
    rows, columns = zip(*pixels, strict=True)
    top, bottom, left, right = min(rows), max(rows), min(columns), max(columns)
    assert bottom - top == right - left, "every shape fills a square box"
    widths = [rows.count(row) for row in range(top, bottom + 1)]
    return Blob(colour, _shape(widths), (left + right) / 2, (top + bottom) / 2, pixels)


def _shape(widths):
    side = len(widths)
    if set(widths) == {side}:
        return "square"
    if widths[0] < widths[-1]:
        return "triangle"
    if widths[: side // 2 + 1] == list(range(1, side + 1, 2)):
        return "diamond"
    # The rows of a cross have two widths, with a jump between them.
    return "cross" if len(set(widths)) == 2 and max(widths) > 2 * min(widths) else "circle"


def near(first, second, distance):
    """Whether a pixel of one is at most so many rows and columns away from a pixel of the other."""
    a, b = (np.array(sorted(blob.pixels)) for blob in (first, second))
    return bool((np.abs(a[:, None] - b[None]).max(axis=2) <= distance).any())


def touch(first, second):
    """Whether a pixel of one lies directly beside, above or below a pixel of the other."""
    sides = ((0, 1), (1, 0), (0, -1), (-1, 0))
    return any(
        (row + down, column + across) in second.pixels
        for row, column in first.pixels
        for down, across in sides
    )


def quarter(blob, size):
    """The quarter of the image that a whole blob is in; None if it is in two."""
    left, right, top, bottom = blob.box
    half = size // 2
    if left < half <= right or top < half <= bottom:
        return None
    return f"{'top' if bottom < half else 'bottom'} {'left' if right < half else 'right'}"
