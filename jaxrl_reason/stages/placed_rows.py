"""Rows of a step on the mesh: each process reads and fills those of its own devices."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrl_reason.data.batching import Batch, microbatches
from jaxrl_reason.processes import gather
from jaxrl_reason.sharding import own_rows, place_batch

T = TypeVar("T")


class PlacedRows(NamedTuple):
    """The arrays [k, rows, ...] of an update, and what all processes' rows hold."""

    batch: dict[str, jax.Array]
    num_tokens: int
    """Tokens that are no padding."""
    counted: int
    """Tokens under the mask of the loss."""
    padding_share: float


def place_rows(
    mesh: Mesh, rows: Sequence[T] | np.ndarray, fill: Callable[[list[T]], Batch], count: int
) -> PlacedRows:
    """Fill and place the rows of a step.

    Args:
        mesh: where to.
        rows: what rows are filled from, the same in all processes.
        fill: makes arrays [rows, ...] of some of them.
        count: microbatches k, into which the rows divide.
    """
    size = len(rows) // count
    own = own_rows(mesh, size)
    # As `microbatches` spreads them: row i is number i // k of microbatch i % k.
    batch = fill([rows[at * count + m] for at in own.tolist() for m in range(count)])
    per_row = lambda x: np.count_nonzero(x.reshape(len(own), -1), axis=1).tolist()
    counts = zip(per_row(batch["segment_ids"]), per_row(batch["completion_mask"]), strict=True)
    # Devices of two processes may have the same rows, which count once.
    of_rows: dict[int, tuple[int, int]] = {}
    for found in gather(dict(zip(own.tolist(), counts, strict=True))):
        of_rows |= found
    placed = place_batch(microbatches(batch, count), mesh, batch_axis=1, rows=size)
    num_tokens, counted = (sum(counts) for counts in zip(*of_rows.values(), strict=True))
    return PlacedRows(placed, num_tokens, counted, 1 - num_tokens / placed["tokens"].size)
