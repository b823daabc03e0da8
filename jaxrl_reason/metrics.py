"""A run's scalars on their way to disk, trackers and the terminal; the only door to trackers.

Called by the stages: a `MetricLog` per stage directory and a `Progress` per training loop. The JSON
lines are the record that everything else (plots, tests, resume) reads; TensorBoard and W&B are
copies of it. Metric names are TRL's.
"""

import collections
import contextlib
import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, SupportsFloat, TextIO

from jaxrl_reason import files
from jaxrl_reason.errors import InputError, StorageError

VERL_NAMES: Mapping[str, str] = {
    "loss": "actor/loss",
    "policy_loss": "actor/pg_loss",
    "kl": "actor/kl_loss",
    "entropy": "actor/entropy",
    "grad_norm": "actor/grad_norm",
    "learning_rate": "actor/lr",
    "clip_ratio/region_mean": "actor/pg_clipfrac",
    "reward": "critic/rewards/mean",
    "completions/mean_length": "response_length/mean",
    "completions/min_length": "response_length/min",
    "completions/max_length": "response_length/max",
    "completions/clipped_ratio": "response_length/clip_ratio",
    "sampling/importance_sampling_ratio/mean": "rollout_corr/rollout_is_mean",
    "sampling/importance_sampling_ratio/min": "rollout_corr/rollout_is_min",
    "sampling/importance_sampling_ratio/max": "rollout_corr/rollout_is_max",
    "num_gen_batches": "train/num_gen_batches",
    "step_time": "timing_s/step",
    "time/rollout": "timing_s/gen",
    "time/rewards": "timing_s/reward",
    "time/update": "timing_s/update_actor",
}
"""TRL's (and our `time/<phase>`) names to verl's, where both mean the same number."""

_ALIASES = {"verl": VERL_NAMES}
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_logger = logging.getLogger(__name__)


def with_aliases(metrics: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    """`metrics` followed by a copy under `names[key]` of each key that has one."""
    aliases = {names[key]: value for key, value in metrics.items() if key in names}
    return {**metrics, **{key: value for key, value in aliases.items() if key not in metrics}}


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """Read a `metrics.jsonl`: one dict a line, `"step"` an int, every other value a float.

    A last line cut off by a killed process is left out with a logged warning.

    Raises:
        InputError: no such file, or a line that `MetricLog` did not write (file and line).
    """
    return [row for _, row in _read_lines(Path(path))]


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, float]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(
            f"cannot read metrics from {path}: {error.strerror}; give the metrics.jsonl of a stage"
        ) from error
    kept = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            kept.append((line, _parse(line)))
        except ValueError as error:
            if number < len(lines):
                raise InputError(
                    f"{path}:{number}: not a line of metrics ({error}); delete that line"
                ) from error
            # Logged, not warned: it is the normal trace of a killed run, no mistake in any code.
            _logger.warning("%s:%d: dropped a line cut off while it was written", path, number)
    return kept


def _parse(line: bytes) -> dict[str, float]:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("want an object with an integer 'step'")
    for key, value in row.items():
        if isinstance(value, str) and value in _NON_FINITE:
            row[key] = _NON_FINITE[value]
        elif not isinstance(value, int | float):
            raise ValueError(f"{key!r} is no number")
    return row


def _dumps(row: Mapping[str, float]) -> str:
    """Strict JSON: NaN and infinities become the strings that `read_metrics` turns back."""
    strict = {k: v if math.isfinite(v) else json.dumps(v) for k, v in row.items()}
    return json.dumps(strict, allow_nan=False)


def _resume_file(path: Path, from_step: int) -> None:
    """Cut `path` back to the rows of steps 1..from_step, whole lines only, in one rename."""
    if not path.exists():
        return
    kept = [] if from_step == 0 else _read_lines(path)
    content = b"".join(line + b"\n" for line, row in kept if row["step"] <= from_step)
    if content == path.read_bytes():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check_trackers(*, wandb_project: str | None) -> None:
    """Import what a run's trackers need.

    Raises:
        InputError: one of them is not installed.
    """
    if wandb_project is not None:
        _import_wandb(wandb_project)


class MetricLog:
    """Appends a step's scalars to `<directory>/metrics.jsonl`, TensorBoard and W&B.

    A line is `{"step": 3, "loss": 0.5, ...}`: the step first, plain floats, and the strings
    "NaN", "Infinity", "-Infinity" for what JSON cannot write; each is on disk when `log` returns.

    Args:
        tensorboard: also write event files under `<directory>/tensorboard`.
        wandb_project: also log to this W&B project; needs the `[wandb]` extra.
        from_step: the last finished step of a resumed run. Rows of later steps are dropped, so
            that the file ends like an uninterrupted run's. 0 starts the file afresh.
        aliases: log each metric under its name in another framework as well.

    Raises:
        InputError: the directory cannot be written, its file is damaged, or W&B is missing.
        StorageError: storage refuses what is written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        from_step: int = 0,
        aliases: Literal["verl"] | None = None,
    ):
        if from_step < 0:
            raise ValueError(f"from_step={from_step} must be 0 or the last finished step")
        if aliases is not None and aliases not in _ALIASES:
            raise ValueError(f"aliases={aliases!r} must be None or one of {sorted(_ALIASES)}")
        wandb = None if wandb_project is None else _import_wandb(wandb_project)
        self._names = {} if aliases is None else _ALIASES[aliases]
        self._last_step = from_step
        directory = Path(directory)
        with files.chosen(f"metrics to {directory}", "choose an output folder you may write to"):
            directory.mkdir(parents=True, exist_ok=True)
            _resume_file(directory / "metrics.jsonl", from_step)
            self._file = (directory / "metrics.jsonl").open("a", encoding="utf-8")
            self._events = _Events(directory / "tensorboard", from_step) if tensorboard else None
        self._run = (
            None if wandb is None else _start_run(wandb, wandb_project, directory, from_step)
        )

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Write one row; `metrics` are scalars (Python, NumPy or JAX).

        Raises:
            ValueError: the step goes back, or a metric is called "step".
            TypeError: a value is no scalar.
            StorageError: storage refuses the row.
        """
        if step < self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}; rows are written in order")
        if "step" in metrics:
            raise ValueError('a metric may not be called "step"; pass it as the first argument')
        row = with_aliases({k: _scalar(k, value) for k, value in metrics.items()}, self._names)
        self._last_step = step
        with files.storing(f"metrics of step {step}, to {self._file.name},"):
            self._file.write(_dumps({"step": int(step), **row}) + "\n")
            self._file.flush()
            if self._events is not None:
                self._events.write(step, row)
        if self._run is not None:
            self._run.log({"step": int(step), **row})

    def close(self) -> None:
        """Close every sink; closing twice is harmless.

        Raises:
            StorageError: storage refuses what was still to be written.
        """
        events, run = self._events, self._run
        self._events = self._run = None
        with contextlib.ExitStack() as stack:
            if run is not None:
                stack.callback(run.finish)
            stack.enter_context(files.storing(self._file.name))
            if events is not None:
                stack.callback(events.close)
            stack.callback(self._file.close)

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, kind, *_) -> None:
        # What storage refused is told once: a row that could not be written is tried again here.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(StorageError):
            self.close()


class NoLog:
    """Takes what a `MetricLog` takes, and writes nothing: for all processes of a run but one."""

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Nothing."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_) -> None:
        pass


class Silence(io.StringIO):
    """A stream that keeps nothing of what is written."""

    def write(self, text: str) -> int:
        """Forget it."""
        return len(text)


def _scalar(name: str, value: SupportsFloat) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name!r} must be a scalar, got {value!r:.80}") from error


class _Events:
    """One TensorBoard event file, written synchronously.

    `tensorboardX.SummaryWriter` hands events to a queue and a thread, and a killed process loses
    what is still in them; the classes below it write the same file at once.
    """

    def __init__(self, directory: Path, from_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        self._event = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        self._scalar = scalar
        directory.mkdir(parents=True, exist_ok=True)
        # Names count whole seconds: two logs opened in the same one would overwrite each other.
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}.{time.time_ns()}")
        # TensorBoard hides the earlier files' events from this step on (SummaryWriter: purge_step).
        start = self._event(step=from_step + 1 if from_step else 0, wall_time=time.time())
        start.session_log.status = start.session_log.START
        self._writer.write_event(start)
        self._writer.flush()

    def write(self, step: int, row: Mapping[str, float]) -> None:
        event = self._event(step=step, wall_time=time.time())
        for name, value in row.items():
            event.summary.MergeFrom(self._scalar(name, value))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _import_wandb(project: str) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"wandb_project={project!r} needs the package wandb, which is not installed; "
            "run `pip install 'jaxrl-reason[wandb]'` or leave wandb_project unset"
        ) from error
    return wandb


def _start_run(wandb: Any, project: str | None, directory: Path, from_step: int) -> Any:
    """Open the W&B run of this directory; a resumed stage continues the run it was."""
    record = directory / "wandb_run_id"
    if from_step == 0 or not record.exists():
        with files.storing(record):
            files.replace(record, os.urandom(4).hex() + "\n")
    run = wandb.init(
        project=project,
        id=record.read_text().strip(),
        name="/".join(directory.resolve().parts[-2:]),
        dir=str(directory),
        resume="allow",
    )
    # W&B ignores rows whose own step goes back, as it does after a resume; a plain metric may.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


class Progress:
    """The progress of a training loop: a bar on a terminal, a plain line now and then elsewhere.

    Use as `with Progress("grpo", total=400) as bar: bar.update(step, tokens=n, reward=r)`. Away
    from a terminal (CI logs, files, notebooks) it prints the first and the last step and between
    them a line when a tenth of the steps or ten seconds have passed, with no carriage return.
    Tokens per second and time left are means over the last `WINDOW` updates and leave out the
    first, which compiles.

    Args:
        total: the step at which the loop ends.
        start: the last finished step of a resumed run.
        stream: where to show it; standard output when not given.
        clock: seconds that only grow.
    """

    WINDOW = 32
    PLAIN_SECONDS = 10.0

    def __init__(
        self,
        title: str,
        total: int,
        start: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._title, self._total, self._step = title, total, start
        self._stream = sys.stdout if stream is None else stream
        self._clock, self._opened = clock, clock()
        self._tokens, self._shown = 0, ""
        # (seconds, step, tokens so far) at the end of each update.
        self._marks = collections.deque(maxlen=self.WINDOW + 1)
        self._printed = (-math.inf, -1, start)  # seconds, tenth and step of the last plain line
        self._bar = None
        self._conclusion = ""

    def __enter__(self) -> "Progress":
        self._opened = self._clock()
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _start_bar(self._title, self._total, self._step, self._stream)
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._printed[2] != self._step:
            self._print()
        if self._conclusion:
            self._stream.write(f"{self._conclusion}\n")
            self._stream.flush()

    def conclude(self, text: str) -> None:
        """Show a text when the loop is left."""
        self._conclusion = text

    def update(self, step: int, *, tokens: int = 0, **shown: float | str) -> None:
        """Report that `step` is finished.

        Args:
            tokens: how many were processed since the last update.
            shown: what to display, e.g. `reward=0.4`; of a metric's path, `rewards/format/mean`,
                only the telling part, `format`. A JAX array is waited for.
        """
        now = self._clock()
        self._step, self._tokens = step, self._tokens + tokens
        self._shown = "  ".join(f"{_last(key)} {_short(value)}" for key, value in shown.items())
        self._marks.append((now, step, self._tokens))
        if self._bar is not None:
            fields = {"rate": self._rate(), "shown": self._shown, "left": self._left()}
            self._bar.update(self._bar.task_ids[0], completed=step, **fields)
            return
        seconds, tenth, _ = self._printed
        if now - seconds >= self.PLAIN_SECONDS or self._tenth() > tenth:
            self._print()

    def _tenth(self) -> int:
        return 10 * self._step // max(self._total, 1)

    def _rate(self) -> str:
        seconds = self._marks[-1][0] - self._marks[0][0]
        tokens = self._marks[-1][2] - self._marks[0][2]
        return f"{_thousands(tokens / seconds)} tok/s" if seconds > 0 and tokens > 0 else ""

    def _left(self) -> str:
        steps = self._marks[-1][1] - self._marks[0][1]
        if steps <= 0 or self._step >= self._total:
            return ""
        per_step = (self._marks[-1][0] - self._marks[0][0]) / steps
        return f"{format_seconds(per_step * (self._total - self._step))} left"

    def _print(self) -> None:
        now = self._clock()
        percent = 100 * self._step // max(self._total, 1)
        parts = [
            f"{self._title}: {self._step}/{self._total} ({percent}%)",
            self._rate(),
            self._shown,
            f"{format_seconds(now - self._opened)} elapsed",
            self._left(),
        ]
        self._stream.write(" | ".join(part for part in parts if part) + "\n")
        self._stream.flush()
        self._printed = (now, self._tenth(), self._step)


def _start_bar(title: str, total: int, start: int, stream: TextIO) -> Any:
    from rich import console, progress

    bar = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}", markup=False),
        progress.TextColumn("{task.fields[shown]}", markup=False),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[left]}", markup=False),
        console=console.Console(file=stream),
        refresh_per_second=4,
    )
    bar.add_task(title, total=total, completed=start, rate="", shown="", left="")
    bar.start()
    return bar


def _last(name: str) -> str:
    return name.removesuffix("/mean").rpartition("/")[2]


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    size = abs(float(value))
    # A fixed number of decimals where it fits, so that the text does not jump from step to step.
    return f"{float(value):.3f}" if size == 0 or 1e-3 <= size < 1e4 else f"{float(value):.2e}"


def _thousands(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 10_000 else f"{number:.0f}"


def format_seconds(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
