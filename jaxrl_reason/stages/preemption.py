"""SIGTERM is a notice that the machine will be taken away: save what there is, and end well.

Between steps, and while a run samples for an evaluation or makes its data, nothing would be lost,
and it ends at once. A step that has begun is finished and saved. A second SIGTERM does not wait.
"""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from jaxrl_reason.errors import Preemption


class _Notices:
    """Of this process, which has one handler of signals."""

    def __init__(self):
        self.came, self.waits = False, False

    def take(self, signum: int, frame: object) -> None:
        """The handler."""
        first, self.came = not self.came, True
        if self.waits and first:
            return
        raise Preemption("the step that was running is lost" if self.waits else "nothing is lost")


_notices = _Notices()
_steps = itertools.count(1)
"""Of all stages of this process: the number of a stage's step begins again with every stage."""


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Within, SIGTERM raises `Preemption`.

    In the main thread alone, as Python has it. In a run of several processes JAX takes the signal,
    since all of them have to end after the same step.
    """
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield
        return
    _notices.came = False
    before = signal.signal(signal.SIGTERM, _notices.take)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def after_a_step() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM waits; gives a function that says after each step whether it has come.

    Of several processes it says the same in all of them, for the same step.
    """
    if jax.process_count() > 1:
        # JAX agrees on the number behind the last that any process asked about, 0 before the first.
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_steps))
        return
    _notices.waits = True
    try:
        yield lambda: _notices.came
    finally:
        _notices.waits = False
    if _notices.came:  # behind the last step
        raise Preemption("nothing is lost")
