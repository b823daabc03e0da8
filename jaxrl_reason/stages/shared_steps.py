"""Jitted functions that the stages of a run share.

Tracing and lowering an update takes seconds, also where the compiler's cache has the program. The
arms of an experiment are stages with equal losses and optimisers, and use one jitted function.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class SharedSteps:
    """Functions by what they were made of; those used longest ago are dropped."""

    _capacity = 8

    def __init__(self):
        self._made: OrderedDict[tuple[str, ...], Callable] = OrderedDict()

    def get(self, make: Callable[[], Callable], *of: Any) -> Callable:
        """What `make` returns, or has returned for equal `of`.

        Args:
            make: builds and jits the function; within a run it may depend on nothing but `of`.
            of: values whose `repr` is all there is to say of them.
        """
        key = tuple(repr(value) for value in of)
        if key not in self._made:
            self._made[key] = make()
            if len(self._made) > self._capacity:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]
