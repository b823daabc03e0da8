"""Coloured shapes as pixels: whole numbers only, so that an image is the same on every machine."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

BACKGROUND = (16, 16, 16)
PALETTE = {
    "red": (230, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 90, 255),
    "yellow": (250, 220, 40),
    "purple": (160, 50, 200),
    "cyan": (60, 220, 230),
    "orange": (255, 130, 0),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
MIN_CANVAS, MAX_CANVAS = 32, 512


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A shape on a canvas: its centre, x to the right and y down, and its reach to each side."""

    colour: str
    shape: str
    radius: int
    x: int
    y: int

    @property
    def name(self) -> str:
        """Colour and shape, as in `red circle`."""
        return f"{self.colour} {self.shape}"


@functools.cache
def outline(shape: str, radius: int) -> Bool[np.ndarray, "S S"]:
    """The pixels of a shape in the square of 2 * radius + 1 pixels around its centre.

    Every shape touches all four sides of that square. A diamond of radius 2:

        . . # . .
        . # # # .
        # # # # #
        . # # # .
        . . # . .
    """
    steps = np.arange(-radius, radius + 1)
    across, down = np.abs(steps)[None, :], steps[:, None]
    if shape == "square":
        pixels = (across <= radius) & (np.abs(down) <= radius)
    elif shape == "circle":
        pixels = 4 * (across**2 + down**2) <= (2 * radius + 1) ** 2
    elif shape == "triangle":
        pixels = 2 * across <= down + radius
    elif shape == "cross":
        pixels = (across <= radius // 3) | (np.abs(down) <= radius // 3)
    elif shape == "diamond":
        pixels = across + np.abs(down) <= radius
    else:
        raise KeyError(shape)
    pixels.setflags(write=False)  # it is cached
    return pixels


def draw(size: int, figures: Iterable[Figure]) -> UInt8[np.ndarray, "H W 3"]:
    """A canvas of `size` x `size` pixels with figures on it, later ones in front."""
    canvas = np.empty((size, size, 3), np.uint8)
    canvas[...] = BACKGROUND
    for figure in figures:
        top, left, side = figure.y - figure.radius, figure.x - figure.radius, 2 * figure.radius + 1
        part = canvas[top : top + side, left : left + side]
        part[outline(figure.shape, figure.radius)] = PALETTE[figure.colour]
    return canvas
