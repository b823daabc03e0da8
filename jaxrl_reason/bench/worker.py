"""The protocol between a driver and the contestants, each in a process and environment of its own.

A driver writes one JSON object a line and reads one a line back:

    {"do": "prepare", "workload": "W2", "shape": "tiny", "changes": {}}  ->  what was set up
    {"do": "run", "repeat": 3}                                           ->  a `Measurement`

A contestant stays alive between repeats, so that contestants can take turns. An error ends it and
leaves as {"error": traceback}. Imports the standard library and `workloads` only.
"""

import dataclasses
import json
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jaxrl_reason.bench.workloads import SHAPES, WORKLOADS, Shape, Workload, changed

Info = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a contestant did in one repeat."""

    useful_tokens: int
    """Completion tokens up to and including the one that ends it, or tokens of documents."""
    computed_tokens: int
    """Row-steps of decoding, or tokens of packed rows, with all that was thrown away."""
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Seconds of rollout, rewards and update, where the contestant can tell."""
    counts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Whatever else it counts, such as programs compiled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement(Work):
    """What a worker answers: the work, and what it took."""

    seconds: float
    cpu_seconds: float
    """Of all threads of the process, children that have ended included."""
    peak_rss_mb: float
    """Highest resident memory while it ran."""


class Contestant(Protocol):
    """A library set up for one workload."""

    info: Info
    """Versions and settings, for the record."""

    def run(self, repeat: int) -> Work:
        """Do the work of one repeat."""
        ...


def serve(make: Callable[[Workload, Shape], Contestant]) -> None:
    """Answer a driver on standard input and output until it closes them."""
    _die_first()
    # What libraries print must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    contestant: Contestant | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["do"] == "prepare":
                workload = changed(WORKLOADS[request["workload"]], request.get("changes", {}))
                contestant = make(workload, SHAPES[request["shape"]])
                answer = dict(contestant.info)
            elif contestant is None:
                raise ValueError("the first request must be `prepare`")
            else:
                answer = dataclasses.asdict(measure(contestant, request["repeat"]))
        except Exception:
            print(json.dumps({"error": traceback.format_exc()}), file=answers)
            break
        print(json.dumps(answer), file=answers)
    answers.flush()
    # Threads of a trainer that waits for its next turn would keep the process alive.
    os._exit(0)


def measure(contestant: Contestant, repeat: int) -> Measurement:
    """Run one repeat and take its time and memory."""
    reset_peak()
    cpu = sum(os.times()[:4])
    start = time.perf_counter()
    work = contestant.run(repeat)
    seconds = time.perf_counter() - start
    return Measurement(
        useful_tokens=work.useful_tokens,
        computed_tokens=work.computed_tokens,
        parts=work.parts,
        counts=work.counts,
        seconds=seconds,
        cpu_seconds=sum(os.times()[:4]) - cpu,
        peak_rss_mb=peak_rss_mb(),
    )


def _die_first() -> None:
    """Where memory runs out, let the system end this process rather than another (Linux)."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        return


def reset_peak() -> None:
    """Let the peak of resident memory start anew, where the system can (Linux)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return


def peak_rss_mb() -> float:
    """Peak of resident memory since `reset_peak`, or since the process began."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) * 1024 / 1e6
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Turns:
    """Lets a trainer that owns its loop take one step at a time.

    `loop(pause)` runs in a thread and calls `pause()` before its first step and after every step;
    `step` lets it go on until the next pause.
    """

    def __init__(self, loop: Callable[[Callable[[], None]], object]):
        self._go = threading.Semaphore(0)
        self._paused = threading.Semaphore(0)
        self._error: BaseException | None = None
        threading.Thread(target=self._run, args=(loop,), daemon=True).start()
        self._wait()

    def step(self) -> None:
        """Let the loop run to its next pause; raises what it raised."""
        self._go.release()
        self._wait()

    def _pause(self) -> None:
        self._paused.release()
        self._go.acquire()

    def _wait(self) -> None:
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def _run(self, loop: Callable[[Callable[[], None]], object]) -> None:
        try:
            loop(self._pause)
            self._error = RuntimeError("the trainer's loop has ended; it has no more steps")
        except BaseException as error:
            self._error = error
        self._paused.release()
