"""A step that hangs ends its process, and the same command goes on from the last checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_reason import checkpoint

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
