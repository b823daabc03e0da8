"""A process that hangs ends itself, with the stacks of all threads, and can be started again.

A step must end, and what samples outside of steps must get on, within the run's `step_timeout`.
Python keeps one such timer for a process, and runs it in a thread that needs no lock of Python's.
"""

import contextlib
import faulthandler
import time
from collections.abc import Iterator
from typing import NamedTuple

from jaxrl_reason import processes

COMPILING = 10
"""How much longer than others that may take which compiles, or writes all of a checkpoint."""

_OFTEN = 0.02
"""The timer is set again at most once in this share of its time, as each time starts a thread."""

_LATER = 2.0
"""Seconds that the first of several processes waits longer: with it all end, and some of them
before they have said where they hang."""


class _Watch(NamedTuple):
    """What is watched."""

    seconds: float
    """Since its beginning, or the last sign of progress."""
    compiling: float
    """While a program is compiled."""


class _Timer:
    """Of this process."""

    def __init__(self):
        self.watch: _Watch | None = None
        self.set_at = 0.0

    def set(self, seconds: float) -> None:
        """From now on."""
        self.set_at = time.monotonic()
        waits = processes.count() > 1 and processes.is_first()
        faulthandler.dump_traceback_later(seconds + _LATER if waits else seconds, exit=True)


_timer = _Timer()


@contextlib.contextmanager
def deadline(
    seconds: float | None, *, times: float = 1, before_progress: float | None = None
) -> Iterator[None]:
    """End the process, with the stacks of all threads, if what is within takes longer.

    Whatever is within and calls `progress` has as long again. Of several within each other the
    innermost counts; behind it the one around it begins anew.

    Args:
        seconds: None for no deadline.
        times: as many times as long.
        before_progress: the same until the first sign of progress.
    """
    if seconds is None:
        yield
        return
    before, watch = _timer.watch, _Watch(times * seconds, max(times, COMPILING) * seconds)
    _timer.watch = watch
    _timer.set((before_progress or times) * seconds)
    try:
        yield
    finally:
        _timer.watch = before
        if before is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            _timer.set(before.seconds)


def progress() -> None:
    """What is watched gets on: its time begins again."""
    watch = _timer.watch
    if watch is not None and time.monotonic() - _timer.set_at > _OFTEN * watch.seconds:
        _timer.set(watch.seconds)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Within, a program is compiled: what is watched has longer, and begins anew behind it."""
    watch = _timer.watch
    if watch is not None:
        _timer.set(watch.compiling)
    yield
    if watch is not None:
        _timer.set(watch.seconds)
