"""Rows of a step on the mesh: each process reads and fills those of its own devices."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrl_reason.data.batching import Batch, microbatches, step_indices
from jaxrl_reason.data.loading import read_batches
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


class StepRows(NamedTuple):
    """The rows of every step of a stage that learns from a fixed set of them."""

    mesh: Mesh
    seed: int
    """Of the order."""
    size: int
    """Rows of the whole set."""
    batch_size: int
    """Rows of a step, of all processes."""
    microbatches: int
    """Parts k of a step, into which its rows divide."""

    def read(
        self, row: Callable[[int], T], fill: Callable[[Sequence[T]], Batch], steps: range
    ) -> Iterator[Batch]:
        """This process's arrays [own rows, ...] of each step; the next step's are read ahead.

        Args:
            row: a row of the set by its number; called in threads.
            fill: makes arrays [rows, ...] of some rows.
            steps: in their order.
        """
        indices = functools.partial(step_indices, size=self.size, batch_size=self.batch_size)
        chosen = functools.lru_cache(maxsize=4)(functools.partial(indices, self.seed))
        own, count = own_rows(self.mesh, self.batch_size // self.microbatches), self.microbatches
        # As `microbatches` spreads them: row i is number i // k of microbatch i % k.
        numbers = [at * count + m for at in own.tolist() for m in range(count)]
        read = lambda step, number: row(int(chosen(step)[number]))
        return read_batches(read, fill, steps=steps, numbers=numbers)

    def place(self, batch: Batch) -> PlacedRows:
        """What `read` gave, on the devices; all processes call it."""
        size, count = self.batch_size // self.microbatches, self.microbatches
        own = own_rows(self.mesh, size)
        per_row = lambda x: np.count_nonzero(x.reshape(len(own), -1), axis=1).tolist()
        counts = zip(per_row(batch["segment_ids"]), per_row(batch["completion_mask"]), strict=True)
        # Devices of two processes may have the same rows, which count once.
        of_rows: dict[int, tuple[int, int]] = {}
        for found in gather(dict(zip(own.tolist(), counts, strict=True))):
            of_rows |= found
        placed = place_batch(microbatches(batch, count), self.mesh, batch_axis=1, rows=size)
        num_tokens, counted = (sum(counts) for counts in zip(*of_rows.values(), strict=True))
        padding = 1 - num_tokens / placed["tokens"].size
        return PlacedRows(placed, num_tokens, counted, padding)
