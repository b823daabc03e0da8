"""A profile of some steps: the files that are there afterwards."""

import subprocess
import sys

import pytest
import yaml

from jaxrl_reason.errors import InputError
from jaxrl_reason.stages.config import RunConfig

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


@pytest.mark.parametrize("span", ["3", "0:2", "5:4", "a:b"])
def test_a_span_that_is_none_is_refused(tiny, tmp_path, span):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**tiny, "name": "seen", "stages": {"reason": STAGE}}))
    with pytest.raises(InputError, match="profile"):
        RunConfig.load(str(path), [f"tracking.profile='{span}'"])
