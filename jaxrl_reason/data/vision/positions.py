"""Where images and videos stand among expanded tokens, and the three positions of every token.

Text counts up on all three axes. A token of an image or video has the position behind the text
before it, plus its slice, row and column; text behind it goes on after the larger side:

    tokens    a b [2 x 3 features] c          a video: slices lie `interval` apart on the first axis
    temporal  0 1 2 2 2 2 2 2 5
    height    0 1 2 2 2 3 3 3 5
    width     0 1 2 3 4 2 3 4 5
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_reason.data.vision.config import VisionProcessorConfig
from jaxrl_reason.data.vision.patches import Visual
from jaxrl_reason.errors import InputError


class RopeIndex(NamedTuple):
    """Positions for M-RoPE, equal to `get_rope_index` of transformers."""

    positions: Int[np.ndarray, "T 3"]
    """Temporal, height and width."""
    delta: int
    """Position of the first generated token, on all axes, minus T."""


class Span(NamedTuple):
    """Consecutive tokens of one image, video, or temporal slice of a video."""

    start: int
    grid: tuple[int, int, int]
    """Slices, rows and columns of tokens."""
    interval: np.float32
    """Temporal positions between slices."""
    first: int
    """Its first feature, among those of the images and then of the videos."""

    @property
    def size(self) -> int:
        """Number of its tokens."""
        t, h, w = self.grid
        return t * h * w


def mrope_positions(
    tokens: Sequence[int] | Int[np.ndarray, " T"],
    images: Sequence[Visual],
    videos: Sequence[Visual],
    config: VisionProcessorConfig,
) -> RopeIndex:
    """Positions of expanded tokens without padding.

    Raises:
        InputError: the tokens are not those of these images and videos.
    """
    ids = np.asarray(tokens, np.int64)
    return rope_index(len(ids), spans(ids, images, videos, config))


def rope_index(length: int, found: Sequence[Span]) -> RopeIndex:
    """Positions of `length` tokens, with images and videos at spans."""
    positions = np.empty((length, 3), np.int64)
    at = position = 0
    for span in found:
        text = span.start - at
        positions[at : span.start] = position + np.arange(text)[:, None]
        position += text
        positions[span.start : span.start + span.size] = position + _offsets(span)
        position += max(span.grid[1:])
        at = span.start + span.size
    positions[at:] = position + np.arange(length - at)[:, None]
    delta = int(positions.max()) + 1 - length if length else 0
    return RopeIndex(positions.astype(np.int32), delta)


def _offsets(span: Span) -> Int[np.ndarray, "n 3"]:
    t, h, w = span.grid
    # float32, as the reference has it: what stands behind the point is cut off.
    slices = (np.arange(t, dtype=np.float32) * span.interval).astype(np.int64)
    return np.stack(np.meshgrid(slices, np.arange(h), np.arange(w), indexing="ij"), -1).reshape(
        -1, 3
    )


def spans(
    ids: Int[np.ndarray, " T"],
    images: Sequence[Visual],
    videos: Sequence[Visual],
    config: VisionProcessorConfig,
) -> list[Span]:
    """Where images and videos stand, by their place among the tokens."""
    image_spans, first = _spans_of(ids, "image", config.image_token_id, images, config, 0)
    video_spans, _ = _spans_of(ids, "video", config.video_token_id, videos, config, first)
    return sorted([*image_spans, *video_spans], key=lambda span: span.start)


def _spans_of(
    ids: Int[np.ndarray, " T"],
    kind: str,
    pad: int,
    visuals: Sequence[Visual],
    config: VisionProcessorConfig,
    first: int,
) -> tuple[list[Span], int]:
    places = np.flatnonzero(ids == pad)
    pieces = [piece for visual in visuals for piece in _pieces(visual, config)]
    wanted = sum(piece.size for piece in pieces)
    if wanted != len(places):
        raise InputError(
            f"{len(places)} {kind} tokens but {len(visuals)} {kind}s with {wanted} features; "
            "expand the placeholders of these very tokens with these very images and videos"
        )
    found, at = [], 0
    for piece in pieces:
        here = places[at : at + piece.size]
        if here[-1] - here[0] + 1 != piece.size:
            raise InputError(
                f"the {piece.size} tokens of one {kind} do not stand together: they begin at "
                f"{here[0]} and end at {here[-1]}"
            )
        found.append(piece._replace(start=int(here[0]), first=first + at))
        at += piece.size
    return found, first + at


def _pieces(visual: Visual, config: VisionProcessorConfig) -> list[Span]:
    """What of a visual stands together: all of it, or for a video of Qwen3-VL each slice."""
    t, h, w = visual.grid
    grid = (t, h // config.merge_size, w // config.merge_size)
    if visual.kind == "image":
        return [Span(0, grid, np.float32(1), 0)]
    if config.tokens_per_second is None or config.family == "qwen3_vl":
        return [Span(0, (1, *grid[1:]), np.float32(1), 0)] * t
    interval = np.float32(config.tokens_per_second) * np.float32(visual.seconds_per_slice)
    return [Span(0, grid, interval, 0)]
