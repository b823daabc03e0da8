"""Runs the seeds of an experiment: one after the other here, or several at once in processes."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrl_reason import files
from jaxrl_reason.errors import InputError, StorageError
from jaxrl_reason.reproduce.experiment import Experiment
from jaxrl_reason.reproduce.records import examples, rounded, stage_record
from jaxrl_reason.reproduce.results import provenance
from jaxrl_reason.stages import pipeline

Say = Callable[[str], None]
Done = Callable[[int, dict[str, Any]], None]

_RECORD = "record.json"
_TAIL = 15
_CACHE_SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
_REFUSED = 2
"""Exit code of a command that refused its input."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A seed that ended with an error."""

    seed: int
    message: str
    was_refused: bool
    """Whether it was the input that was wrong."""


def run_seed(
    experiment: Experiment, seed: int, stages: Sequence[str], output_dir: Path, say: Say
) -> dict[str, Any]:
    """Train and evaluate some stages of a seed, those excepted that its folder has already.

    Returns:
        Its entry in the results, which is written to `record.json` in its folder as well.

    Raises:
        InputError: as `pipeline.run`.
        StorageError: as well.
    """
    run = experiment.run_of(seed, stages, output_dir)
    rows = pipeline.run(run, say=say)
    folder = Path(run.output_dir) / run.name
    series = experiment.series()
    entry = {
        **provenance(),
        "seconds": {row["stage"]: round(row["seconds"], 1) for row in rows},
        "stages": {name: stage_record(folder / name, series) for name in ["init", *stages]},
        "examples": {},
    }
    arm, first = next(iter(experiment.config.arms.items()))
    if first.stage in stages:
        before = experiment.config.run.stages[first.stage].parent
        entry["examples"] = {arm: examples(folder, before, first.stage)}
    with files.storing(folder / _RECORD):
        files.replace(folder / _RECORD, json.dumps(rounded(entry)) + "\n")
    return entry


def run_here(
    experiment: Experiment,
    seeds: Sequence[int],
    stages: Sequence[str],
    *,
    output_dir: Path,
    say: Say,
    done: Done,
) -> list[Failure]:
    """Run seeds one after the other in this process.

    Args:
        experiment: what to run.
        seeds: which.
        stages: that a result needs.
        output_dir: folder of runs.
        say: receives lines about what happens.
        done: receives each finished seed and its entry.

    Returns:
        The seeds that failed; the others went on.
    """
    failures = []
    for seed in seeds:
        say(f"seed {seed}")
        try:
            entry = run_seed(experiment, seed, stages, output_dir, say)
        except (InputError, StorageError) as error:
            refused = isinstance(error, InputError)
            failures.append(Failure(seed=seed, message=str(error), was_refused=refused))
        except Exception:  # of a stage, a reward or a builder: the other seeds may still do
            tail = traceback.format_exc().splitlines()[-_TAIL:]
            failures.append(Failure(seed=seed, message="\n".join(tail), was_refused=False))
        else:
            done(seed, entry)
            continue
        say(f"seed {seed} failed: {failures[-1].message}")
    return failures


def run_in_processes(
    experiment: Experiment,
    seeds: Sequence[int],
    *,
    jobs: int,
    arguments: Sequence[str],
    output_dir: Path,
    say: Say,
    done: Done,
) -> list[Failure]:
    """Run seeds in up to `jobs` processes, each on its share of the cores.

    Args:
        experiment: what to run.
        seeds: which.
        jobs: processes at once.
        arguments: of the command line, without a seed.
        output_dir: folder of runs.
        say: receives lines about what happens.
        done: receives each finished seed and its entry.

    Returns:
        The seeds that failed; the others went on.
    """
    folder = output_dir / experiment.name / experiment.scale
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running, failures = list(seeds), {}, []
    cores = _shares(jobs)
    try:
        while waiting or running:
            free = [slot for slot in range(jobs) if slot not in running]
            for slot in free[: len(waiting)]:
                seed = waiting.pop(0)
                running[slot] = _Job.start(seed, arguments, folder, cores[slot])
                say(f"seed {seed}: started, output in {running[slot].log}")
            time.sleep(0.2)
            for slot, job in list(running.items()):
                if job.process.poll() is None:
                    job.tell(say)
                    continue
                del running[slot]
                failure = job.finish(folder, say, done)
                failures += [] if failure is None else [failure]
    finally:
        for job in running.values():
            job.process.terminate()
        for job in running.values():
            job.process.wait()
    return failures


@dataclasses.dataclass(kw_only=True)
class _Job:
    """A seed in a process of its own."""

    seed: int
    process: subprocess.Popen
    log: Path
    began: float
    told: float
    """When a line of it was last shown."""
    line: str = ""

    @classmethod
    def start(cls, seed: int, arguments: Sequence[str], folder: Path, cores: set[int]) -> "_Job":
        log = folder / f"seed_{seed}.log"
        (folder / f"seed_{seed}" / _RECORD).unlink(missing_ok=True)
        command = [sys.executable, "-m", "jaxrl_reason.cli", "reproduce", *arguments]
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [*command, f"--only-seed={seed}"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        # In time: threads inherit it, and those of jax start after seconds of importing.
        if cores and sys.platform == "linux":
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, cores)
        now = time.monotonic()
        return cls(seed=seed, process=process, log=log, began=now, told=now)

    def tell(self, say: Say, every: float = 30.0) -> None:
        """Show the last line of the log now and then."""
        now = time.monotonic()
        if now - self.told < every:
            return
        self.told = now
        lines = self._tail(1)
        if lines and lines[0] != self.line:
            self.line = lines[0]
            say(f"seed {self.seed}: {self.line}")

    def finish(self, folder: Path, say: Say, done: Done) -> Failure | None:
        """Report the end of the process."""
        minutes = (time.monotonic() - self.began) / 60
        record = folder / f"seed_{self.seed}" / _RECORD
        code = self.process.returncode
        if code == 0 and record.exists():
            done(self.seed, json.loads(record.read_text(encoding="utf-8")))
            say(f"seed {self.seed}: finished after {minutes:.1f} min")
            return None
        message = "\n".join(self._tail(_TAIL))
        say(f"seed {self.seed} failed with exit code {code}; the end of {self.log}:\n{message}")
        return Failure(seed=self.seed, message=message, was_refused=code == _REFUSED)

    def _tail(self, count: int) -> list[str]:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()][-count:]


def _shares(jobs: int) -> list[set[int]]:
    """The cores of each job; some share one where there are fewer. Empty: all of them."""
    if sys.platform != "linux":
        return [set()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[slot::jobs]) or {cores[slot % len(cores)]} for slot in range(jobs)]


@contextlib.contextmanager
def compilation_cache(folder: Path) -> Iterator[None]:
    """Programs compiled inside are kept in a folder, since seeds and arms share them.

    A cache that the user has chosen already stays in its place.
    """
    before = {name: jax.config.values[name] for name in _CACHE_SETTINGS}
    if before["jax_compilation_cache_dir"] is not None:
        yield
        return
    for name, value in zip(_CACHE_SETTINGS, (str(folder.absolute()), 0.2), strict=True):
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
