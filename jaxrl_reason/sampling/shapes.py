"""The closed set of array sizes that the engine compiles for, and the compiled programs."""

import contextlib
import dataclasses
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import ClassVar

import jax

_logger = logging.getLogger(__name__)


PROGRAM_PREFIX = "sampling_"
"""Names of the engine's compiled functions begin with it, in profiles and in JAX's compile logs."""


def named(name: str, function: Callable) -> Callable:
    """The function under a name that says whose program it becomes."""

    def program(*args):
        return function(*args)

    program.__name__ = program.__qualname__ = PROGRAM_PREFIX + name
    return program


@dataclasses.dataclass(frozen=True)
class Level:
    """Sizes while at most `rows` completions are in flight."""

    rows: int
    context_pages: int
    readers: int
    """Rows that may read one context page; a context with more has copies."""
    own_pages: tuple[int, ...]
    """The numbers of own pages to choose from, ascending."""
    devices: int
    """Devices over which rows and pages are cut, all alike."""

    def least_own_pages(self, need: int) -> int:
        """The smallest number of own pages that is enough."""
        return min(pages for pages in self.own_pages if pages >= need)

    @property
    def of_device(self) -> "Level":
        """Those of one device."""
        return Level(
            rows=self.rows // self.devices,
            context_pages=self.context_pages // self.devices,
            readers=self.readers,
            own_pages=tuple(pages // self.devices for pages in self.own_pages),
            devices=1,
        )


def make_levels(
    *,
    rows: int,
    group_size: int,
    contexts: int,
    pages_per_context: int,
    longest_context: int,
    pages_per_row: int,
    devices: int,
    fewest_rows: int,
) -> tuple[Level, ...]:
    """From the largest down; each has half the rows of the one before.

    Args:
        rows: completions in flight at most.
        group_size: completions of a prompt that read its pages together.
        contexts: prompts in flight at most.
        pages_per_context: of the longest prompt.
        longest_context: pages of the longest prompt with the longest completion, to be resumed.
        pages_per_row: own pages of the longest completion.
        devices: over which rows and pages are cut; each has room for the longest context.
        fewest_rows: rows of the smallest level.
    """
    up = lambda n: -(-n // devices) * devices
    most = up(rows)
    levels, size = [], most
    while True:
        of_row = [1]
        while of_row[-1] < pages_per_row:
            of_row.append(min(2 * of_row[-1], pages_per_row))
        of_device = min(up(contexts), size) // devices
        levels.append(
            Level(
                rows=size,
                context_pages=devices * max(longest_context, of_device * pages_per_context),
                # Few are left of each group when few rows are left.
                readers=min(group_size, max(1, 2 * size * group_size // most)),
                own_pages=tuple(size * n for n in of_row),
                devices=devices,
            )
        )
        if up(size // 2) == size or size // 2 < fewest_rows:
            return tuple(levels)
        size = up(size // 2)


class Programs:
    """Compiled programs by key, shared by all engines of a process; the oldest are dropped.

    A program takes about 140 maps of memory on a CPU, and Linux kills a process that has more than
    65,530: the programs kept here take a fourth of them.
    """

    _compiled: ClassVar[OrderedDict[Hashable, jax.stages.Compiled]] = OrderedDict()
    _capacity = 128

    def __init__(
        self,
        prefix: Hashable,
        within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """Programs of a prefix, each compiled within a context."""
        self._prefix, self._within = prefix, within
        self.compiled = 0
        """Programs that had to be compiled."""
        self.seconds = 0.0
        """Seconds that it took."""
        self.warm = False
        """Whether no more are expected: each one is then reported."""

    def get(self, key: Hashable, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        """The program of a key; `lower` makes it when there is none yet.

        Args:
            key: name and sizes.
            lower: returns what `jax.jit(...).lower(...)` returns.
        """
        whole = (self._prefix, key)
        program = self._compiled.get(whole)
        if program is None:
            began = time.monotonic()
            with self._within():
                program = self._compiled[whole] = lower().compile()
            took = time.monotonic() - began
            self.compiled += 1
            self.seconds += took
            if self.warm:
                _logger.warning("sampling compiled %s after warm-up, in %.1f s", key, took)
            while len(self._compiled) > self._capacity:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(whole)
        return program

    @classmethod
    def forget_all(cls) -> None:
        """Drop the programs of all engines; those in use compile theirs again."""
        cls._compiled.clear()

    def forget(self) -> None:
        """Drop the programs of this prefix, to give their memory back."""
        for whole in [whole for whole in self._compiled if whole[0] == self._prefix]:
            del self._compiled[whole]
