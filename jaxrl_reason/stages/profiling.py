"""A profile of some steps of a stage: where the time of the devices goes, and what is in memory."""

from pathlib import Path

import jax

MEMORY = "memory.pprof"


class Profile:
    """Traces the steps of a span, counted from 1, that this process does.

    Args:
        folder: where the trace goes, for xprof and TensorBoard, and `memory.pprof`.
        span: first and last step; (0, 0) for none.
    """

    def __init__(self, folder: Path, span: tuple[int, int]):
        self._folder, (self._first, self._last) = folder, span
        self._is_open = False

    def begin(self, step: int) -> None:
        """Before a step."""
        if self._first <= step <= self._last and not self._is_open:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._is_open = True

    def end(self, step: int) -> None:
        """After a step whose results are there."""
        if self._is_open and step >= self._last:
            self.close()
            jax.profiler.save_device_memory_profile(str(self._folder / MEMORY))

    def close(self) -> None:
        """Write what was traced; closing twice is harmless."""
        if self._is_open:
            jax.profiler.stop_trace()
            self._is_open = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        self.close()
