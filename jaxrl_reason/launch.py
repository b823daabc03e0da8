"""`jaxrl-reason run --local-processes N`: the processes of a pod, on one machine.

They are started as a launcher of a cluster starts them and find each other in the same way. Each
has a share of the machine's GPUs; without GPUs, each has CPU devices of its own. If one fails, the
others end too.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from jaxrl_reason.errors import InputError
from jaxrl_reason.processes import ADDRESS, COUNT, NUMBER

_HUNG = re.compile(r"^Timeout \([\d:.]+\)!$", re.MULTILINE)
"""What Python writes before the stacks of all threads."""

_GRACE = 20.0
"""Seconds that the others have to end by themselves when one has failed."""


def run_here(arguments: Sequence[str], count: int) -> int:
    """Run a command of `jaxrl-reason` as several processes; returns its exit code.

    Args:
        arguments: of the command line.
        count: of processes.

    Raises:
        InputError: fewer than one process, or GPUs that do not divide among them.
    """
    if count < 1:
        raise InputError(f"--local-processes {count} must be 1 or more")
    shares = _device_shares(count)
    common = {ADDRESS: f"localhost:{_free_port()}", COUNT: str(count)}
    command = [sys.executable, "-m", "jaxrl_reason.cli", *arguments]
    with contextlib.ExitStack() as stack:  # the others say what the first one says
        said = [None, *(stack.enter_context(tempfile.TemporaryFile("w+")) for _ in shares[1:])]
        started = []
        for number, quiet in enumerate(said):
            environment = {**os.environ, **common, NUMBER: str(number), **shares[number]}
            started.append(subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet))
        with _passed_on(started):
            codes = _wait(started)
        for number, file in enumerate(said):
            if file is not None and any(codes):
                file.seek(0)
                sys.stderr.write(_worth_telling(number, file.read(), codes))
    return _together(codes)


def _worth_telling(number: int, text: str, codes: Sequence[int]) -> str:
    """What the user has to see of what a process said that has no terminal.

    All of it where the first one did not fail by itself, and any stacks: where a process hangs no
    other knows.
    """
    hung = _HUNG.search(text)
    if not text or (codes[0] > 0 and hung is None):
        return ""
    told = text[hung.start() :] if hung is not None and codes[0] > 0 else text
    return f"process {number}:\n{told}"


def _together(codes: Sequence[int]) -> int:
    """One exit code for all: a mistake, which no restart mends, before failures, before signals."""
    failed = [code for code in codes if code > 0]
    if 2 in failed:
        return 2
    return next(iter(failed), 0) or next((128 - code for code in codes if code < 0), 0)


def _wait(started: Sequence[subprocess.Popen]) -> list[int]:
    """Exit codes, once all have ended."""
    end = None
    while any(process.poll() is None for process in started):
        if end is None and any(process.poll() not in (None, 0) for process in started):
            end = time.monotonic() + _GRACE
        if end is not None and time.monotonic() > end:
            for process in started:
                process.kill()
        time.sleep(0.05)
    return [process.returncode for process in started]


@contextlib.contextmanager
def _passed_on(started: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Within, SIGTERM and Ctrl-C go to all of them."""

    def pass_on(signum: int, frame: object) -> None:
        for process in started:
            process.send_signal(signum)

    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, pass_on) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _device_shares(count: int) -> list[dict[str, str]]:
    """Variables of the environment that give each process its share of the GPUs."""
    gpus = _gpus()
    if not gpus or os.environ.get("JAX_PLATFORMS") == "cpu":
        return [{} for _ in range(count)]
    if len(gpus) % count:
        raise InputError(
            f"--local-processes {count} must divide the {len(gpus)} GPUs of this machine; name "
            "some of them in CUDA_VISIBLE_DEVICES, or use another number"
        )
    size = len(gpus) // count
    shares = [gpus[k * size : (k + 1) * size] for k in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    try:
        found = os.listdir("/proc/driver/nvidia/gpus")
    except OSError:
        return []
    return [str(number) for number in range(len(found))]


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return opened.getsockname()[1]
