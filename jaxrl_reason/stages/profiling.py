"""A profile of some steps of a stage: where the time of the devices goes, and what is in memory."""

import logging
from pathlib import Path

import jax

from jaxrl_reason import files, processes
from jaxrl_reason.errors import StorageError

MEMORY = "memory.pprof"

_logger = logging.getLogger(__name__)


class Profile:
    """Traces the steps of a span, counted from 1, that this process does.

    What is traced is written when the span ends, or when the stage ends within it, by an exception
    too; a span that was not done as a whole is told.

    Args:
        stage: its name.
        folder: where the trace goes, for xprof and TensorBoard, and `memory.pprof`; of several
            processes each has a folder of its own in it, since they may share a machine.
        span: first and last step; (0, 0) for none.
    """

    def __init__(self, stage: str, folder: Path, span: tuple[int, int]):
        self._stage, (self._first, self._last) = stage, span
        several = processes.count() > 1
        self._folder = folder / f"process_{processes.number()}" if several else folder
        self._begun = self._done = 0
        self._is_over = self._first == 0

    def begin(self, step: int) -> None:
        """Before a step.

        Raises:
            StorageError: the folder cannot be made.
        """
        if self._first <= step <= self._last and not self._begun and not self._is_over:
            with files.storing(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._begun = step

    def end(self, step: int) -> None:
        """After a step whose results are there.

        Raises:
            StorageError: as `close`.
        """
        self._done = step
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """Write what was traced, and what is in memory; closing twice is harmless.

        Raises:
            StorageError: storage refuses it.
        """
        begun, self._begun = self._begun, 0
        was_over, self._is_over = self._is_over, True
        if begun:
            self._write()
        if was_over or (begun == self._first and self._done >= self._last):
            return
        asked = f"steps {self._first} to {self._last} were to be profiled"
        if not begun:
            found = "and this start of the stage did none of them"
        elif self._done < begun:
            found = f"and {self._folder} has a part of step {begun} alone"
        else:
            found = f"and {self._folder} has steps {begun} to {min(self._done, self._last)} alone"
        _logger.warning("%s: %s, %s", self._stage, asked, found)

    def _write(self) -> None:
        with files.storing(self._folder):
            try:
                jax.profiler.stop_trace()
            except jax.errors.JaxRuntimeError as error:
                raise StorageError(f"{self._folder} could not be written: {error}") from error
            jax.profiler.save_device_memory_profile(str(self._folder / MEMORY))

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except StorageError as error:  # what ended the stage is raised, not this
            _logger.warning("%s: its profile was lost: %s", self._stage, error)
