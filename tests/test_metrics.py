import io
import itertools
import json
import logging
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.errors import InputError, StorageError
from jaxrl_reason.metrics import (
    VERL_NAMES,
    MetricLog,
    Progress,
    format_seconds,
    read_metrics,
    with_aliases,
)


def row(step):
    return {"loss": 1 / step, "rewards/format/mean": 0.1 * step, "num_tokens": 10 * step}


def write(directory, steps, **options):
    with MetricLog(directory, tensorboard=False, **options) as log:
        for step in steps:
            log.log(step, row(step))
    return directory / "metrics.jsonl"


# The JSON lines


def test_a_line_is_the_step_and_then_plain_floats(tmp_path):
    with MetricLog(tmp_path / "new" / "stage", tensorboard=False) as log:
        log.log(3, {"loss": 2, "reward": True, "kl": 0.25})
    text = (tmp_path / "new" / "stage" / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "loss": 2.0, "reward": 1.0, "kl": 0.25}\n'


def test_scalars_of_numpy_and_jax_keep_their_exact_value(tmp_path):
    third = np.float32(1 / 3)
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.log(1, {"numpy": third, "jax": jnp.asarray(third), "array": np.asarray(third)})
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert read == {"step": 1, "numpy": float(third), "jax": float(third), "array": float(third)}
    assert isinstance(read["step"], int)


def test_non_finite_values_stay_strict_json_and_come_back(tmp_path):
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.log(1, {"a": float("nan"), "b": float("inf"), "c": -np.inf})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "metrics.jsonl"
    strict = json.loads(path.read_text(), parse_constant=refuse)
    assert strict == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    (read,) = read_metrics(path)
    assert np.isnan(read["a"])
    assert (read["b"], read["c"]) == (np.inf, -np.inf)


def test_a_line_is_on_disk_when_log_returns(tmp_path):
    log = MetricLog(tmp_path, tensorboard=False)
    for step in (1, 2):
        log.log(step, row(step))
        assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")][-1] == step
    log.close()


def test_what_log_refuses_is_not_written(tmp_path):
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.log(5, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 4 after step 5"):
            log.log(4, {"loss": 1.0})
        with pytest.raises(ValueError, match='may not be called "step"'):
            log.log(6, {"step": 1.0})
        with pytest.raises(TypeError, match="'logprobs' must be a scalar"):
            log.log(6, {"logprobs": np.zeros(2)})
        with pytest.raises(TypeError, match="'loss' must be a scalar, got None"):
            log.log(6, {"loss": None})
        log.log(5, {"accuracy": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


# Resuming


@pytest.mark.parametrize("kept", [1, 4, 7])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, kept):
    whole = write(tmp_path / "whole", range(1, 11))
    cut = write(tmp_path / "cut", range(1, 8))
    assert cut.read_bytes() != whole.read_bytes()
    write(tmp_path / "cut", range(kept + 1, 11), from_step=kept)
    assert cut.read_bytes() == whole.read_bytes()
    assert os.listdir(tmp_path / "cut") == ["metrics.jsonl"]


@pytest.mark.parametrize("bytes_left", [1, 9, 30])
def test_a_torn_last_line_is_dropped_with_a_warning(tmp_path, caplog, bytes_left):
    whole = write(tmp_path / "whole", range(1, 6)).read_bytes()
    path = write(tmp_path / "torn", range(1, 5))
    complete = path.read_bytes()
    path.write_bytes(complete + whole.splitlines(keepends=True)[4][:bytes_left])
    with caplog.at_level(logging.WARNING):
        assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
    assert f"{path}:5: dropped a line cut off" in caplog.text
    write(tmp_path / "torn", [5], from_step=4)
    assert path.read_bytes() == whole


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path, caplog):
    path = write(tmp_path, range(1, 4))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with MetricLog(tmp_path, tensorboard=False, from_step=3):
        pass
    assert path.read_bytes() == whole
    assert not caplog.records


def test_from_step_zero_starts_afresh_even_over_a_damaged_file(tmp_path):
    path = write(tmp_path, [1, 2])
    once = path.read_bytes()
    path.write_bytes(b"garbage\n" + once)
    write(tmp_path, [1, 2])
    assert path.read_bytes() == once


def test_a_damaged_line_inside_names_file_and_line_and_changes_nothing(tmp_path):
    path = write(tmp_path, range(1, 4))
    lines = path.read_bytes().splitlines(keepends=True)
    for damage in (b'{"step": 2, "lo\n', b"[2]\n", b'{"loss": 1.0}\n', b'{"step": 2, "a": "x"}\n'):
        damaged = lines[0] + damage + lines[2]
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"metrics\.jsonl:2: not a line of metrics"):
            MetricLog(tmp_path, tensorboard=False, from_step=2)
        assert path.read_bytes() == damaged


def test_a_failed_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    path = write(tmp_path, range(1, 9))
    before = path.read_bytes()

    def no_space(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(StorageError, match="No space left on device"):
        MetricLog(tmp_path, tensorboard=False, from_step=3)
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full device is Linux's")
def test_a_full_disk_is_told_once(tmp_path):
    def fill() -> None:
        with MetricLog(tmp_path, tensorboard=False) as log:
            log.log(1, {"loss": 1.0})
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, log._file.fileno())  # what the file holds back fails again at its end
            os.close(full)
            log.log(2, {"loss": 1.0})

    with pytest.raises(StorageError, match=r"metrics of step 2, to .* No space left on device"):
        fill()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_bad_places_and_options_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write metrics to"):
        MetricLog(tmp_path / "file" / "stage")
    with pytest.raises(InputError, match="cannot read metrics from"):
        read_metrics(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="from_step=-1"):
        MetricLog(tmp_path, from_step=-1)
    with pytest.raises(ValueError, match="aliases='trl' must be None or one of \\['verl'\\]"):
        MetricLog(tmp_path, aliases="trl")


# TensorBoard


def read_events(directory):
    """(step, {tag: value}, starts a session) of each event, file by file in order of creation."""
    from tensorboardX.proto import event_pb2

    events = []
    for path in sorted(directory.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # a record: length, its checksum, the event, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            values = {value.tag: value.simple_value for value in event.summary.value}
            events.append((event.step, values, event.HasField("session_log")))
    return events


def test_tensorboard_has_every_value_and_purges_the_steps_done_again(tmp_path):
    with MetricLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": step / 2, "rewards/format/mean": 1.0})
    with MetricLog(tmp_path, from_step=2) as log:  # within the same second: a second file
        log.log(3, {"loss": 9.0})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    events = read_events(tmp_path / "tensorboard")
    assert [step for step, _, session in events if session] == [0, 3]
    assert [(step, values) for step, values, _ in events if values] == [
        (1, {"loss": 0.5, "rewards/format/mean": 1.0}),
        (2, {"loss": 1.0, "rewards/format/mean": 1.0}),
        (3, {"loss": 1.5, "rewards/format/mean": 1.0}),
        (3, {"loss": 9.0}),
    ]


def test_a_killed_process_loses_no_step(tmp_path):
    program = (
        "import os, sys; from jaxrl_reason.metrics import MetricLog\n"
        "log = MetricLog(sys.argv[1])\n"
        "for step in (1, 2, 3): log.log(step, {'loss': step})\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    events = read_events(tmp_path / "tensorboard")
    assert [step for step, values, _ in events if values] == [1, 2, 3]


# Names and W&B


def test_aliases_follow_the_names_and_never_replace_one(tmp_path):
    metrics = {"reward": 0.5, "kl": 0.1, "custom": 2.0, "actor/kl_loss": 7.0}
    assert with_aliases(metrics, VERL_NAMES) == {**metrics, "critic/rewards/mean": 0.5}
    with MetricLog(tmp_path, tensorboard=False, aliases="verl") as log:
        log.log(1, {"completions/mean_length": 30.0})
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert read == {"step": 1, "completions/mean_length": 30.0, "response_length/mean": 30.0}
    assert len(set(VERL_NAMES.values())) == len(VERL_NAMES)
    assert not set(VERL_NAMES.values()) & set(VERL_NAMES)


def test_wandb_without_its_package_says_which_extra_to_install(tmp_path, monkeypatch):
    path = write(tmp_path, [1, 2])
    before = path.read_bytes()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'jaxrl-reason\[wandb\]'"):
        MetricLog(tmp_path, wandb_project="mine")
    assert path.read_bytes() == before


def test_wandb_gets_each_row_and_a_resumed_stage_its_old_run(tmp_path, monkeypatch):
    opened, rows, axes, finished = [], [], [], []

    def init(**options):
        opened.append(options)
        return types.SimpleNamespace(
            log=rows.append,
            define_metric=lambda name, step_metric=None: axes.append((name, step_metric)),
            finish=lambda: finished.append(options["id"]),
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    stage = tmp_path / "run" / "grpo"
    for from_step in (0, 1, 0):
        log = MetricLog(stage, tensorboard=False, wandb_project="mine", from_step=from_step)
        log.log(from_step + 1, {"reward": 0.5})
        log.close()
        log.close()
    ids = [options["id"] for options in opened]
    assert ids[0] == ids[1] != ids[2]
    assert finished == ids
    assert {(o["project"], o["name"], o["resume"]) for o in opened} == {
        ("mine", "run/grpo", "allow")
    }
    assert rows == [{"step": step, "reward": 0.5} for step in (1, 2, 1)]
    assert ("*", "step") in axes


def test_importing_metrics_loads_nothing_of_weight():
    heavy = ("jax", "numpy", "rich", "matplotlib", "tensorboardX", "wandb")
    program = f"import sys, jaxrl_reason.metrics; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# Progress and stopwatch


class Clock:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_plain(total, seconds, *, start=0, tokens=0):
    """The lines of a loop whose step i takes `seconds(i)`."""
    stream, clock = io.StringIO(), Clock()
    with Progress("grpo", total, start, stream=stream, clock=clock) as bar:
        for step in range(start + 1, total + 1):
            clock.seconds += seconds(step)
            bar.update(step, tokens=tokens, reward=step / total)
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    return stream.getvalue().splitlines()


def test_plain_progress_of_a_fast_loop_prints_the_first_step_and_each_tenth():
    lines = run_plain(1000, lambda step: 0.001)
    assert [line.split(" ")[1] for line in lines] == [
        f"{step}/1000" for step in (1, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
    ]


def test_plain_progress_of_a_slow_loop_prints_every_ten_seconds():
    lines = run_plain(1000, lambda step: 4.0)
    steps = [int(line.split(" ")[1].split("/")[0]) for line in lines]
    assert (steps[0], steps[-1]) == (1, 1000)
    assert max(later - earlier for earlier, later in itertools.pairwise(steps)) == 3  # 12 seconds
    assert len(steps) <= 4000 / 12 + 11


def test_rate_and_time_left_leave_out_the_step_that_compiles():
    lines = run_plain(10, lambda step: 60.0 if step == 1 else 2.0, tokens=3000)
    assert lines[0] == "grpo: 1/10 (10%) | reward 0.100 | 1:00 elapsed"
    assert lines[1] == "grpo: 2/10 (20%) | 1500 tok/s | reward 0.200 | 1:02 elapsed | 0:16 left"
    assert lines[-1] == "grpo: 10/10 (100%) | 1500 tok/s | reward 1.000 | 1:18 elapsed"


def test_a_slow_start_fades_from_the_time_left():
    lines = run_plain(100, lambda step: 30.0 if step == 2 else 1.0)
    after = {line.split(" ")[1]: line for line in lines}
    assert after["60/100"].endswith("0:40 left")


def test_a_resumed_loop_counts_on_and_a_finished_one_prints_nothing():
    lines = run_plain(100, lambda step: 1.0, start=90)
    assert lines[0].startswith("grpo: 91/100 (91%)")
    assert lines[-1].startswith("grpo: 100/100 (100%)")
    assert run_plain(100, lambda step: 1.0, start=100) == []


def test_an_interrupted_loop_shows_how_far_it_came():
    stream = io.StringIO()
    bar = Progress("sft", 1000, stream=stream)

    def loop():
        with bar:
            for step in range(1, 42):
                bar.update(step, loss=float("nan"), state="warm-up")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert stream.getvalue().splitlines()[-1].startswith("sft: 41/1000 (4%)")
    assert "loss nan  state warm-up" in stream.getvalue()


def test_a_terminal_gets_a_bar_with_literal_text(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("NO_COLOR", "1")
    stream, clock = Terminal(), Clock()
    with Progress("grpo [bold]", 10, stream=stream, clock=clock) as bar:
        for step in (1, 2, 3):
            clock.seconds += 2.0
            bar.update(step, tokens=40_000, reward=0.25)
    last = stream.getvalue().split("\x1b[2K")[-1]
    assert "grpo [bold]" in last
    assert " 3/10 20.0k tok/s reward 0.250 " in last
    assert "0:14 left" in last
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress("grpo", 10, stream=stream) as bar:
        bar.update(1)
    assert stream.getvalue() == "grpo: 1/10 (10%) | 0:00 elapsed\n"


def test_progress_shows_the_telling_part_of_a_metric_path():
    stream = io.StringIO()
    with Progress("morl", 10, stream=stream) as bar:
        bar.update(1, **{"reward": 1.5, "rewards/format/mean": 1.0, "completions/mean_length": 41})
    assert "| reward 1.500  format 1.000  mean_length 41.000 |" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")]
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
