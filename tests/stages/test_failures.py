"""What ends a run that cannot go on: one message, and nothing that was saved is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxrl_reason import checkpoint
from jaxrl_reason.cli import main

SFT = {
    "kind": "sft",
    "steps": 8,
    "batch_size": 8,
    "max_length": 40,
    "data": {"kind": "traces", "num_examples": 64, "styles": {"answer": 1.0}},
    "optimizer": {"learning_rate": 1e-3},
    "save_steps": 1,
}
# Files may not grow beyond a limit, as on a full disk, from some checkpoint on.
LIMITED = """
import resource, signal, sys
from jaxrl_reason import checkpoint, cli

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = checkpoint.Checkpoints.save

def save_until(self, step, **more):
    if step == 3:
        self.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    save(self, step, **more)

checkpoint.Checkpoints.save = save_until
sys.exit(cli.main(sys.argv[1:]))
"""


def write(tiny: dict, folder: Path, stage: dict, **more) -> str:
    """A run of one stage; returns its file."""
    path = folder / "run.yaml"
    config = {**tiny, "name": "failing", "stages": {"cold": stage}, **more}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


def test_a_stage_that_only_skips_ends_and_leaves_the_batch(tiny, tmp_path, capsys):
    exploding = SFT | {"optimizer": {"learning_rate": 1e30, "max_grad_norm": 1e30}}
    config = write(tiny, tmp_path, exploding, nonfinite_limit=3)
    assert main(["run", config, f"output_dir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "3 updates in a row" in said
    assert "lower optimizer.learning_rate" in said
    stage = tmp_path / "failing" / "cold"
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    skipped = [row["nonfinite_steps"] for row in rows]
    ended = len(rows) + 1
    assert skipped[-2:] == [1, 1]
    (file,) = stage.glob("nonfinite_step_*.npz")
    assert file.name == f"nonfinite_step_{ended}.npz"
    batch = np.load(file)
    assert batch["tokens"].shape == (1, 8, 40)
    assert batch["completion_mask"].any()
    assert checkpoint.latest(stage / "checkpoints") == ended - 1


def test_the_row_of_skipped_updates_goes_on_behind_a_checkpoint(tiny, tmp_path, capsys):
    exploding = SFT | {"optimizer": {"learning_rate": 1e30, "max_grad_norm": 1e30}}
    config = write(tiny, tmp_path, exploding, nonfinite_limit=4)
    assert main(["run", config, f"output_dir={tmp_path}"]) == 2
    capsys.readouterr()
    # Started again, it has no four more to waste.
    assert main(["run", config, f"output_dir={tmp_path}"]) == 2
    assert "4 updates in a row" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of files are those of POSIX")
def test_a_full_disk_leaves_the_last_checkpoint(tiny, tmp_path):
    config = write(tiny, tmp_path, SFT | {"save_total_limit": 4})
    command = [sys.executable, "-c", LIMITED, "run", config, f"output_dir={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    # TensorStore may add a stack of its own, of a write that was still waiting.
    assert "error: a checkpoint could not be written to" in run.stderr
    assert "the last one is 2; make room" in run.stderr
    assert "File too large" in run.stderr
    checkpoints = tmp_path / "failing" / "cold" / "checkpoints"
    assert checkpoint.steps(checkpoints) == [1, 2]
    assert main(["run", config, f"output_dir={tmp_path}"]) == 0
    assert checkpoint.steps(checkpoints)[-1] == 8
    assert not list(checkpoints.glob("*tmp*"))
