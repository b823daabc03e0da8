"""What hangs ends its process, and the same command goes on from the last checkpoint."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxrl_reason import checkpoint
from jaxrl_reason.cli import main
from jaxrl_reason.sampling.shapes import Programs
from jaxrl_reason.stages import deadline as watch
from jaxrl_reason.stages.deadline import COMPILING, compiling, deadline, progress

TINY = (Path(__file__).parents[1] / "tiny_run.yaml").read_text(encoding="utf-8")
STAGE = """
name: hangs
step_timeout: 5
stages:
  reason:
    kind: grpo
    steps: 4
    save_steps: 1
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 12
    rewards: [{kind: python, name: slow, function: "rewards_that_hang:slow"}]
    optimizer: {learning_rate: 1.0e-3}
"""
REWARDS = '''
"""Waits in the third step, until there is a file; an evaluation has fewer completions."""

import time
from pathlib import Path

calls = 0


def slow(prompts, completions, **_):
    global calls
    calls += len(completions) == 32
    if calls == 3 and not Path("woken").exists():
        time.sleep(100)
    return [float(len(text)) for text in completions]
'''


@pytest.mark.slow
def test_a_step_that_hangs_is_ended_and_started_again(tmp_path):
    (tmp_path / "hangs.yaml").write_text(TINY + STAGE, encoding="utf-8")
    (tmp_path / "rewards_that_hang.py").write_text(REWARDS, encoding="utf-8")

    def run() -> subprocess.CompletedProcess:
        code = "import sys; from jaxrl_reason.cli import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, "-c", code, "run", "hangs.yaml"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=200,
        )

    done = run()
    assert done.returncode == 1
    assert "Timeout (0:00:05)!" in done.stderr
    assert "in slow" in done.stderr  # where it hung
    stage = tmp_path / "runs" / "hangs" / "reason" / "checkpoints"
    assert checkpoint.latest(stage) == 2
    (tmp_path / "woken").touch()
    done = run()
    assert done.returncode == 0, done.stderr
    assert "reason: going on after step 2" in done.stdout
    assert checkpoint.latest(stage) == 4


@pytest.fixture
def timer(monkeypatch) -> list[tuple[float | None, set[str]]]:
    """Seconds that the timer is set to, None where it ends, with the functions that are running."""
    calls: list[tuple[float | None, set[str]]] = []

    def note(seconds: float | None, **_) -> None:
        frame, names = sys._getframe(1), set()
        while frame is not None:
            names.add(frame.f_code.co_qualname)
            frame = frame.f_back
        calls.append((seconds, names))

    monkeypatch.setattr(watch.faulthandler, "dump_traceback_later", note)
    monkeypatch.setattr(watch.faulthandler, "cancel_dump_traceback_later", lambda: note(None))
    return calls


def test_progress_begins_the_time_anew_and_not_too_often(timer, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress()
    with deadline(None):
        progress()
    assert timer == []
    with deadline(5.0):
        for now[0] in (0.01, 0.05, 0.2, 0.25, 1.0):
            progress()
    assert [seconds for seconds, _ in timer] == [5.0, 5.0, 5.0, None]


def test_the_one_around_goes_on_behind_the_one_within(timer):
    with deadline(5.0, times=3):
        with deadline(2.0):
            pass
        with pytest.raises(KeyError), deadline(1.0):
            raise KeyError
    assert [seconds for seconds, _ in timer] == [15.0, 2.0, 15.0, 1.0, 15.0, None]


def test_compiling_and_what_comes_before_progress_have_longer(timer):
    program = lambda: jax.jit(lambda x: x * 3).lower(7)
    with compiling():
        pass
    assert timer == []
    programs = Programs("of this test", compiling)
    with deadline(5.0, before_progress=4):
        programs.get("thrice", program)
        programs.get("thrice", program)
    programs.forget()
    assert [seconds for seconds, _ in timer] == [20.0, 5.0 * COMPILING, 5.0, None]


def test_the_first_of_several_processes_ends_last(timer, monkeypatch):
    for first in (True, False):
        monkeypatch.setattr(watch.processes, "count", lambda: 2)
        monkeypatch.setattr(watch.processes, "is_first", lambda first=first: first)
        with deadline(5.0):
            pass
    assert timer[0][0] > timer[2][0] == 5.0


SAMPLING = """
name: watched
step_timeout: 600
stages:
  keep:
    kind: reject
    parent: init
    num_prompts: 8
    num_generations: 4
    max_completion_length: 8
    builder: "rows_of_deadlines:pairs"
  prefer:
    kind: dpo
    parent: init
    steps: 2
    batch_size: 8
    max_length: 40
    data: {kind: stage, stage: keep, num_examples: 8}
    optimizer: {learning_rate: 1.0e-3}
    save_steps: 1
"""
PAIRS = """
def pairs(groups, rng):
    return [{"problem": group.number, "chosen": "1", "rejected": "2"} for group in groups]
"""


def test_what_is_outside_of_steps_is_watched(tmp_path, timer, monkeypatch):
    (tmp_path / "watched.yaml").write_text(TINY + SAMPLING, encoding="utf-8")
    (tmp_path / "rows_of_deadlines.py").write_text(PAIRS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(watch, "_OFTEN", 0.0)
    assert main(["run", str(tmp_path / "watched.yaml"), f"output_dir={tmp_path}"]) == 0
    assert timer[-1][0] is None
    of = lambda *names: [seconds for seconds, running in timer if {*names} <= running]
    for sampling in ("_answers", "_write"):  # of an evaluation, of rejection
        signs = of(sampling, "sample_groups", "progress")
        assert len(signs) > 3
        assert {*signs} == {600.0}
        assert {*of(sampling, "sample_groups")} == {600.0, 600.0 * COMPILING, None}
    assert 600.0 * COMPILING in of("evaluate.<locals>.judged")
    assert 600.0 * COMPILING in of("Checkpoints.wait", "train")
    assert 600.0 * COMPILING in of("Checkpoints.save", "train")
    assert 600.0 * COMPILING in of("Checkpoints.close", "train")
    assert 600.0 in of("train")
    for reads in ("_evaluated", "_write", "Stage.parent_params"):
        assert 600.0 * COMPILING in of(reads, "Context.restore_params")
    assert 600.0 * COMPILING in of("resume")
    assert of("reference_logprobs", "progress") == [600.0]
    assert 600.0 * COMPILING in of("reference_logprobs")


HANGING = """
import sys, time
from pathlib import Path
import orbax.checkpoint as ocp
from jaxrl_reason.cli import main
from jaxrl_reason.sampling.session import Session

where = sys.argv.pop(1)
advance, waits = Session._advance, ocp.AsyncCheckpointer.wait_until_finished

def is_within(*names):
    frame, found = sys._getframe(2), set()
    while frame is not None:
        found.add(frame.f_code.co_name)
        frame = frame.f_back
    return {*names} <= found and not Path("woken").exists()

def hanging_dispatch(self):
    advance(self)
    if self._counts["dispatches"] == 1 and is_within({"reject": "run_reject"}.get(where, where)):
        time.sleep(500)

def hanging_wait(self):
    if is_within(where, "wait"):
        time.sleep(500)
    waits(self)

Session._advance = hanging_dispatch
ocp.AsyncCheckpointer.wait_until_finished = hanging_wait
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("_evaluated", "in hanging_dispatch"),
        ("reject", "in hanging_dispatch"),
        ("train", "in hanging_wait"),
    ],
)
def test_what_hangs_outside_of_steps_is_ended(tmp_path, where, said):
    (tmp_path / "watched.yaml").write_text(TINY + SAMPLING, encoding="utf-8")
    (tmp_path / "rows_of_deadlines.py").write_text(PAIRS, encoding="utf-8")

    def run(timeout: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", HANGING, where, "run", "watched.yaml"]
        return subprocess.run(
            [*command, f"step_timeout={timeout}"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run("4")
    assert done.returncode == 1, done.stderr
    waits = "0:00:40" if where == "train" else "0:00:04"
    assert f"Timeout ({waits})!" in done.stderr
    assert said in done.stderr
    (tmp_path / "woken").touch()
    done = run("60")
    assert done.returncode == 0, done.stderr


IN_THE_SECOND = '''
"""Waits in the second of two processes, in its second step."""

import time

import jax

calls = 0


def slow(prompts, completions, **_):
    global calls
    calls += 1
    if jax.process_index() == 1 and calls > 20:
        time.sleep(500)
    return [float(len(text)) for text in completions]
'''


@pytest.mark.slow
def test_the_stacks_of_every_local_process_are_shown(tmp_path):
    stage = STAGE.replace(':slow"}', ':slow", scope: completion}')
    (tmp_path / "hangs.yaml").write_text(TINY + stage, encoding="utf-8")
    (tmp_path / "rewards_that_hang.py").write_text(IN_THE_SECOND, encoding="utf-8")
    command = [sys.executable, "-m", "jaxrl_reason.cli", "run", "hangs.yaml"]
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [*command, "--local-processes", "2"],
        cwd=tmp_path,
        env=os.environ | environment | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    _, _, second = done.stderr.partition("process 1:\n")
    assert "Timeout (0:00:05)!" in second
    assert "in slow" in second
