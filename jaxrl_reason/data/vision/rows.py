"""Patches of a row of tokens, its documents one after another, and batches of such rows.

Segments, windows and features are numbered within a row: segments and windows from 1, with 0 for
padding, features from 0, with -1 for tokens that take none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxrl_reason.data.vision.config import VisionProcessorConfig
from jaxrl_reason.data.vision.patches import Visual
from jaxrl_reason.data.vision.positions import rope_index, spans
from jaxrl_reason.errors import InputError


class VisionRow(NamedTuple):
    """What a vision tower reads for one row of T tokens, and which token takes which feature."""

    patches: Float[np.ndarray, "P d"]
    patch_coords: Int[np.ndarray, "P 2"]
    """Row and column in the grid of the image or frame."""
    patch_grids: Int[np.ndarray, "P 2"]
    """Height and width of that grid."""
    patch_segments: Int[np.ndarray, " P"]
    """One number for every temporal slice of an image or video."""
    patch_windows: Int[np.ndarray, " P"]
    """One number for every window of a segment; a segment without windows is one."""
    visual_index: Int[np.ndarray, " T"]
    """The merged feature a token takes; feature m is made of patches m * merge_size**2 onwards."""
    positions: Int[np.ndarray, "T 3"]
    """For M-RoPE."""
    next_position: int
    """Of the first token generated behind the last document, on all axes."""


def vision_row(
    tokens: Sequence[int] | Int[np.ndarray, " T"],
    images: Sequence[Visual],
    videos: Sequence[Visual],
    config: VisionProcessorConfig,
) -> VisionRow:
    """The row of one document, whose placeholders are expanded; text alone has no patches.

    Raises:
        InputError: the tokens are not those of these images and videos.
    """
    ids = np.asarray(tokens, np.int64)
    found = spans(ids, images, videos, config)
    index = np.full(len(ids), -1, np.int32)
    for span in found:
        index[span.start : span.start + span.size] = span.first + np.arange(span.size)
    rope = rope_index(len(ids), found)
    parts = [_geometry(visual.grid, config) for visual in (*images, *videos)]
    empty = np.zeros((0, config.patch_dim), np.float32)
    return VisionRow(
        np.concatenate([empty, *(visual.patches for visual in (*images, *videos))]),
        *_joined(parts),
        index,
        rope.positions,
        len(ids) + rope.delta,
    )


def join_rows(
    documents: Sequence[VisionRow],
    *,
    starts: Sequence[int] | None = None,
    row_length: int | None = None,
) -> VisionRow:
    """Several documents in one row; their positions restart, their patches stand in their order.

    Args:
        starts: the place of each document's first token; one behind the other if left out.
        row_length: tokens of the row; up to the end of the last document if left out.

    Raises:
        InputError: no document, documents that overlap, or that the row does not hold.
    """
    if not documents:
        raise InputError("no documents to join; `vision_row` makes a row of text alone")
    lengths = [len(document.visual_index) for document in documents]
    if starts is None:
        starts = [0, *np.cumsum(lengths[:-1]).tolist()]
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    if row_length is None:
        row_length = ends[-1]
    if any(end > start for end, start in zip(ends, [*starts[1:], row_length], strict=True)):
        raise InputError(
            f"documents of {lengths} tokens at {list(starts)} overlap or leave the row of "
            f"{row_length}; raise row_length or move them"
        )
    index = np.full(row_length, -1, np.int32)
    positions = np.zeros((row_length, 3), np.int32)
    first = 0
    for document, start, end in zip(documents, starts, ends, strict=True):
        own = document.visual_index
        index[start:end] = np.where(own >= 0, own + first, -1)
        positions[start:end] = document.positions
        first += int(own.max(initial=-1)) + 1
    parts = [(d.patch_coords, d.patch_grids, d.patch_segments, d.patch_windows) for d in documents]
    patches = np.concatenate([document.patches for document in documents])
    following = documents[-1].next_position
    return VisionRow(patches, *_joined(parts), index, positions, following)


def without_patches(row: VisionRow) -> VisionRow:
    """A row whose features are known, so that nobody reads its patches; tokens keep their places.

    Joined with others, it would shift the features of those behind it: it has to stand alone.
    """
    names = [name for name in row._fields if name.startswith("patch")]
    return row._replace(**{name: getattr(row, name)[:0] for name in names})


def pack_vision(
    rows: Sequence[VisionRow], num_patches: int, *, row_length: int | None = None
) -> dict[str, np.ndarray]:
    """Rows as arrays [R, P, ...] and [R, T], padded behind.

    Args:
        num_patches: P, the patches that each row has room for.
        row_length: T; as long as the longest row if left out.

    Returns:
        `patches` float32 [R, P, d]; `patch_coords`, `patch_grids` [R, P, 2], `patch_segments`,
        `patch_windows` [R, P] and `visual_index` [R, T], all int32.

    Raises:
        InputError: no rows, or one of more patches or tokens than there is room for.
    """
    if not rows:
        raise InputError("no rows to pack")
    lengths = [len(row.visual_index) for row in rows]
    row_length = max(lengths) if row_length is None else row_length
    sizes = [len(row.patches) for row in rows]
    for have, room, what, name in (
        (sizes, num_patches, "patches", "num_patches"),
        (lengths, row_length, "tokens", "row_length"),
    ):
        if max(have) > room:
            r = int(np.argmax(have))
            raise InputError(
                f"row {r} has {have[r]} {what} but a row holds {name}={room} "
                f"({sum(n > room for n in have)} such rows); raise {name}, or show fewer or "
                "smaller images and videos (max_pixels, fps)"
            )
    packed = {name: _padded([getattr(row, name) for row in rows], num_patches) for name in _FIELDS}
    index = np.full((len(rows), row_length), -1, np.int32)
    for r, row in enumerate(rows):
        index[r, : lengths[r]] = row.visual_index
    return {**packed, "visual_index": index}


_FIELDS = ("patches", "patch_coords", "patch_grids", "patch_segments", "patch_windows")
_Geometry = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _padded(arrays: Sequence[np.ndarray], size: int) -> np.ndarray:
    out = np.zeros((len(arrays), size, *arrays[0].shape[1:]), arrays[0].dtype)
    for r, array in enumerate(arrays):
        out[r, : len(array)] = array
    return out


def _geometry(grid: tuple[int, int, int], config: VisionProcessorConfig) -> _Geometry:
    """Coordinates, grids, segments and windows of the patches of one visual, in their order."""
    t, h, w = grid
    m = config.merge_size
    block = np.indices((h // m, w // m, m, m), dtype=np.int32).reshape(4, -1)
    coords = np.stack([block[0] * m + block[2], block[1] * m + block[3]], axis=1)
    windows = np.zeros(h * w, np.int32)
    across = 1
    if config.window_size is not None:
        side = config.window_size // m // config.patch_size
        columns = -(-w // (m * side))
        windows = block[0] // side * columns + block[1] // side
        across = columns * -(-h // (m * side))
    slices = np.repeat(np.arange(t, dtype=np.int32), h * w)
    return (
        np.tile(coords, (t, 1)),
        np.tile(np.asarray([h, w], np.int32), (t * h * w, 1)),
        slices + 1,
        slices * across + np.tile(windows, t) + 1,
    )


def _joined(parts: Sequence[_Geometry]) -> _Geometry:
    """Parts behind each other, with segments and windows numbered on."""
    coords, grids = [np.zeros((0, 2), np.int32)], [np.zeros((0, 2), np.int32)]
    segments, windows = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    segment = window = 0
    for part in parts:
        coords.append(part[0])
        grids.append(part[1])
        segments.append(part[2] + np.int32(segment))
        windows.append(part[3] + np.int32(window))
        segment += int(part[2].max(initial=0))
        window += int(part[3].max(initial=0))
    return (
        np.concatenate(coords),
        np.concatenate(grids),
        np.concatenate(segments),
        np.concatenate(windows),
    )
