"""Token lists to NumPy batches: pad, pack, and the order of examples as a function of the step.

Nothing here holds state: which examples a step sees follows from (seed, step) alone, so a resumed
run continues exactly and the data cursor of a checkpoint is its step.
"""

import hashlib
import heapq
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_reason.data.vision import VisionRow, join_rows, pack_vision
from jaxrl_reason.errors import InputError

Batch = dict[str, np.ndarray]


class Example(NamedTuple):
    """Token ids of a prompt and of its completion."""

    prompt: list[int]
    completion: list[int]
    counted: list[bool] | None = None
    """Which tokens of the completion count in the loss; all if None."""
    shown: VisionRow | None = None
    """Images and videos among all these tokens, and their positions, for models that see."""

    @property
    def size(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.completion)

    @property
    def num_patches(self) -> int:
        """Patches of its images and videos."""
        return 0 if self.shown is None else len(self.shown.patches)

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits that tell it from others."""
        text = json.dumps([self.prompt, self.completion, self.counted])
        digest = hashlib.sha256(text.encode())
        if self.shown is not None:
            row = self.shown
            for array in (row.patches, row.patch_grids, row.patch_segments, row.visual_index):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """A permutation of `size` examples, a function of (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def step_indices(seed: int, step: int, *, size: int, batch_size: int) -> np.ndarray:
    """Examples of one step: consecutive entries of the endless sequence of shuffled epochs."""
    flat = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(flat, size)
    orders = {epoch: epoch_order(seed, epoch, size) for epoch in np.unique(epochs)}
    return np.asarray([orders[e][i] for e, i in zip(epochs, places, strict=True)])


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit-decreasing: which examples share a row of `row_length` tokens.

    Raises:
        InputError: an example is longer than a row.
    """
    too_long = [i for i, n in enumerate(lengths) if n > row_length]
    if too_long:
        raise InputError(
            f"example {too_long[0]} has {lengths[too_long[0]]} tokens but a row holds "
            f"max_length={row_length} ({len(too_long)} such examples); raise max_length or drop it"
        )
    rows: list[list[int]] = []
    # Rows by the room that is left in them, the oldest first; room is a small integer.
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = next((r for r in range(lengths[i], row_length + 1) if with_room[r]), None)
        if room is None:
            row, room = len(rows), row_length
            rows.append([])
        else:
            row = heapq.heappop(with_room[room])
        rows[row].append(i)
        heapq.heappush(with_room[room - lengths[i]], row)
    return rows


def fill_rows(
    rows: Sequence[Sequence[Example]],
    row_length: int,
    *,
    pad_id: int,
    num_rows: int | None = None,
    num_patches: int | None = None,
) -> Batch:
    """Rows of one or several documents as arrays.

    Args:
        rows: for each row its documents, in order; plain (prompt, completion) pairs will do.
        row_length: tokens in a row.
        pad_id: id of unused tokens.
        num_rows: pad with empty rows up to this many.
        num_patches: patches of images and videos that a row has room for, in runs of a model that
            sees; every document then says what it shows.

    Returns:
        `tokens, positions, segment_ids` int32 and `completion_mask` bool, all [rows, row_length].
        Positions restart with every document; segment ids count from 1 and are 0 on padding. With
        `num_patches` positions are [rows, row_length, 3], and there is what `pack_vision` gives.
    """
    shape = (num_rows or len(rows), row_length)
    batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "completion_mask": np.zeros(shape, bool),
    }
    documents = [[Example(*document) for document in row] for row in rows]
    for r, row in enumerate(documents):
        at = 0
        for number, document in enumerate(row, start=1):
            size = document.size
            if at + size > row_length:
                raise ValueError(f"row {r} needs {at + size} tokens but holds {row_length}")
            here = slice(at, at + size)
            batch["tokens"][r, here] = [*document.prompt, *document.completion]
            batch["positions"][r, here] = np.arange(size)
            batch["segment_ids"][r, here] = number
            counted = True if document.counted is None else document.counted
            batch["completion_mask"][r, at + len(document.prompt) : at + size] = counted
            at += size
    if num_patches is None:
        return batch
    shown = [[document.shown for document in row] for row in documents]
    return batch | visual_rows(shown, shape, num_patches)


def visual_rows(
    rows: Sequence[Sequence[VisionRow]],
    shape: tuple[int, int],
    num_patches: int,
    *,
    like: VisionRow | None = None,
) -> Batch:
    """Positions [R, T, 3] and the arrays of `pack_vision` of documents one after another.

    Args:
        rows: for each row its documents, in order.
        shape: (R, T); rows beyond those given are empty.
        num_patches: P, patches that a row has room for.
        like: any document, where there may be no row.
    """
    joined = [join_rows(row, row_length=shape[1]) for row in rows]
    one = like if like is not None else joined[0]
    empty = one._replace(
        **{name: getattr(one, name)[:0] for name in one._fields if name != "next_position"}
    )
    joined += [empty] * (shape[0] - len(rows))
    packed = pack_vision(joined, num_patches, row_length=shape[1])
    positions = np.zeros((*shape, 3), np.int32)
    for r, row in enumerate(joined):
        positions[r, : len(row.positions)] = row.positions
    return {**packed, "positions": positions}


def microbatches(batch: Batch, count: int) -> Batch:
    """Arrays [rows, ...] cut to [count, rows / count, ...], neighbouring rows spread over the cuts.

    Raises:
        InputError: the rows do not divide.
    """
    rows = next(iter(batch.values())).shape[0]
    if rows % count:
        raise InputError(
            f"a batch of {rows} rows does not divide into gradient_accumulation_steps={count}"
        )
    cut = lambda x: x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1)
    return {name: cut(x) for name, x in batch.items()}
