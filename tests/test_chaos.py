"""A few runs of `scripts/chaos.py`: killed, damaged, started again, and compared bit by bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KINDS = ("saving", "shortened", "notice")
SHORTER = (
    "evaluation.problems=8",
    "evaluation.batch_size=8",
    "evaluation.max_completion_length=24",
    "stages.reason.max_completion_length=24",
    "stages.balance.max_completion_length=24",
)


@pytest.mark.slow
def test_runs_that_are_killed_end_with_the_same_bits(tmp_path):
    table = tmp_path / "table.json"
    command = [sys.executable, ROOT / "scripts" / "chaos.py", "--runs", str(len(KINDS))]
    command += ["--seed", "1", "--folder", tmp_path / "runs", "--out", table]
    command += [*SHORTER, "--kinds", *KINDS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    told = json.loads(table.read_text())
    assert [run["kind"] for run in told["runs"]] == list(KINDS)
    assert all(run["same"] for run in told["runs"])
    # Otherwise nothing was tested.
    assert sum(len(run["struck"]) for run in told["runs"]) >= len(KINDS)
    assert told["table"]["shortened"]["damaged"] == 1
    for run in told["runs"]:
        if run["kind"] == "notice":
            assert [strike["exit"] for strike in run["struck"]] == [0]
