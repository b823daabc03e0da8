"""Counts the programs that JAX compiles, by the name of the jitted function.

A steady state compiles nothing: a program that is compiled after the first steps is a shape or a
dtype that changes from step to step, and costs seconds each time. Programs of the sampling engine
are counted and not warned of: they are of a closed set, and without `precompile` each is compiled
when it is first needed. With it, the engine itself tells of one that it had not foreseen.
"""

import collections
import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

from jax import monitoring

from jaxrl_reason.sampling import PROGRAM_PREFIX
from jaxrl_reason.stages.breakdown import WARM_UP_STEPS

_logger = logging.getLogger(__name__)
_SAMPLING = f"jit({PROGRAM_PREFIX}"
_EVENT = "/jax/core/compile/backend_compile_duration"


class Compile(NamedTuple):
    """One program that was compiled, or read from the compilation cache."""

    name: str
    seconds: float


class CompileWatch:
    """Looks at each step of a stage; warns once when a step after the first ones compiles."""

    def __init__(self, stage: str):
        self._stage = stage
        self._steps, self._before, self._told = 0, 0, False

    def start(self) -> None:
        """A step begins."""
        self._before = len(_compiled())

    def look(self, step: int, shape: Sequence[int]) -> int:
        """The step of this number has ended, whose update had tokens of this shape.

        Returns:
            How many programs were compiled since it began.
        """
        new = _compiled()[self._before :]
        self._steps += 1
        unforeseen = [compile for compile in new if not compile.name.startswith(_SAMPLING)]
        if unforeseen and self._steps > WARM_UP_STEPS and not self._told:
            self._told = True
            _logger.warning(
                "%s, step %d: compiled %s after the first steps; the update had tokens of shape "
                "%s. Each new shape costs such time once. Further cases are only counted, in the "
                "metric compiles.",
                self._stage,
                step,
                _described(unforeseen),
                list(shape),
            )
        return len(new)


def _described(compiles: list[Compile]) -> str:
    """Names with how often each was compiled and for how long, the slowest first."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for compile in compiles:
        seconds[compile.name] += compile.seconds
    counts = collections.Counter(compile.name for compile in compiles)
    slowest = sorted(seconds, key=lambda name: -seconds[name])
    return ", ".join(f"{name} ({_times(counts[name])}{seconds[name]:.1f} s)" for name in slowest)


def _times(count: int) -> str:
    return f"{count} times, " if count > 1 else ""


@functools.cache
def _compiled() -> list[Compile]:
    """All that was compiled since the first call: JAX has one listener for a whole process."""
    compiled: list[Compile] = []

    def listen(event: str, seconds: float, *, fun_name: str = "a program", **_) -> None:
        if event == _EVENT:
            compiled.append(Compile(fun_name, seconds))

    monitoring.register_event_duration_secs_listener(listen)
    return compiled
