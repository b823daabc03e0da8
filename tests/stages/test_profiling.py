"""A profile of some steps: the files that are there afterwards."""

import errno
import os
import subprocess
import sys

import jax
import pytest
import yaml

from jaxrl_reason.cli import main
from jaxrl_reason.errors import InputError
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.profiling import Profile

STAGE = {
    "kind": "grpo",
    "steps": 4,
    "prompts_per_step": 8,
    "num_generations": 2,
    "max_completion_length": 8,
    "rewards": [{"kind": "format"}],
    "optimizer": {"learning_rate": 1e-3},
}


def test_a_profile_has_trace_memory_and_programs(tiny, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**tiny, "name": "seen", "stages": {"reason": STAGE}}))
    command = [sys.executable, "-m", "jaxrl_reason.cli", "run", str(path), "--profile", "2:3"]
    run = subprocess.run([*command, f"output_dir={tmp_path}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "profile" in run.stdout
    folder = tmp_path / "seen" / "reason" / "profile"
    (trace,) = folder.glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 1000
    assert (folder / "memory.pprof").stat().st_size > 0
    programs = {file.name.split(".")[1] for file in (tmp_path / "seen" / "programs").glob("*.txt")}
    assert {"jit_step", "jit_sampling_decode", "jit_sampling_prefill"} <= programs


def write(tiny, tmp_path, **stage) -> str:
    path = tmp_path / "run.yaml"
    stages = {"reason": STAGE | stage}
    path.write_text(yaml.safe_dump({**tiny, "name": "seen", "stages": stages}))
    return str(path)


def test_a_stage_that_ends_early_leaves_what_was_traced(tiny, tmp_path, caplog):
    run = ["run", write(tiny, tmp_path), f"output_dir={tmp_path}"]
    assert main([*run, "tracking.profile=3:9"]) == 0
    folder = tmp_path / "seen" / "reason" / "profile"
    assert len(list(folder.glob("plugins/profile/*/*.xplane.pb"))) == 1
    assert (folder / "memory.pprof").stat().st_size > 0
    told = f"reason: steps 3 to 9 were to be profiled, and {folder} has steps 3 to 4 alone"
    assert caplog.messages.count(told) == 1


def test_steps_that_a_stage_does_not_have_are_told(tiny, tmp_path, caplog):
    with Profile("reason", tmp_path, (7, 9)) as profile:
        profile.begin(1)
        profile.end(1)
    with Profile("reason", tmp_path, (0, 0)) as profile:
        profile.begin(1)
        profile.end(1)
    (told,) = caplog.messages
    assert told.endswith("7 to 9 were to be profiled, and this start of the stage did none of them")


def test_an_exception_leaves_what_was_traced_and_is_raised(tmp_path, caplog, monkeypatch):
    def fail() -> None:
        with Profile("reason", tmp_path, (2, 3)) as profile:
            profile.begin(2)
            raise KeyError("the step's own")

    with pytest.raises(KeyError, match="the step's own"):
        fail()
    assert (tmp_path / "memory.pprof").stat().st_size > 0
    assert caplog.messages[-1].endswith(f"and {tmp_path} has a part of step 2 alone")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(jax.profiler, "save_device_memory_profile", full)
    with pytest.raises(KeyError, match="the step's own"):
        fail()
    assert "its profile was lost" in caplog.messages[-1]
    assert "No space left on device" in caplog.messages[-1]


@pytest.mark.slow
def test_each_process_has_a_profile_and_programs_of_its_own(tiny, tmp_path):
    run = [sys.executable, "-m", "jaxrl_reason.cli", "run", write(tiny, tmp_path, steps=2)]
    run += [f"output_dir={tmp_path}", "--profile", "1:2", "--local-processes", "2"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "seen"
    for number in range(2):
        own = folder / "reason" / "profile" / f"process_{number}"
        assert len(list(own.glob("plugins/profile/*/*.xplane.pb"))) == 1
        assert (own / "memory.pprof").stat().st_size > 0
        made = (folder / "programs" / f"process_{number}").glob("*after_optimizations.txt")
        programs = {file.name.split(".")[1] for file in made}
        assert {"jit_step", "jit_sampling_decode", "jit_sampling_prefill"} <= programs


@pytest.mark.parametrize("span", ["3", "0:2", "5:4", "a:b"])
def test_a_span_that_is_none_is_refused(tiny, tmp_path, span):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**tiny, "name": "seen", "stages": {"reason": STAGE}}))
    with pytest.raises(InputError, match="profile"):
        RunConfig.load(str(path), [f"tracking.profile='{span}'"])
