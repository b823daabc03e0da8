"""What ends a run that cannot go on: one message, and nothing that was saved is lost."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxrl_reason import checkpoint, files
from jaxrl_reason.cli import main
from jaxrl_reason.errors import InputError, StorageError

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
# A permission is lost at some checkpoint; patched, since root may write anywhere.
REFUSED = """
import errno, os, sys
from pathlib import Path
from jaxrl_reason import checkpoint, cli

call = sys.argv[1]
plain, save = getattr(os, call), checkpoint.Checkpoints.save

def save_until(self, step, **more):
    def refuse(path, *given, **options):
        if Path(path).is_relative_to(self.directory):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, *given, **options)

    if step == 3:
        self.wait()
        setattr(os, call, refuse)
    save(self, step, **more)

checkpoint.Checkpoints.save = save_until
sys.exit(cli.main(sys.argv[2:]))
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
    assert "the last one is 2; what was written before is kept" in run.stderr
    assert "make room" in run.stderr
    assert "File too large" in run.stderr
    checkpoints = tmp_path / "failing" / "cold" / "checkpoints"
    assert checkpoint.steps(checkpoints) == [1, 2]
    assert main(["run", config, f"output_dir={tmp_path}"]) == 0
    assert checkpoint.steps(checkpoints)[-1] == 8
    assert not list(checkpoints.glob("*tmp*"))


KEEP = {
    "kind": "reject",
    "parent": "init",
    "num_prompts": 8,
    "num_generations": 2,
    "max_completion_length": 8,
    "builder": "rows_of_failures:pairs",
}
PAIRS = '''
"""Any two texts of a problem."""


def pairs(groups, rng):
    return [{"problem": group.number, "chosen": "1", "rejected": "2"} for group in groups]
'''


@pytest.fixture
def refusing(monkeypatch):
    """Makes storage refuse a file, by the end of its path."""
    put = os.replace

    def refuse(name: str, code: int) -> None:
        def replace(source, target):
            if str(target).endswith(name):
                raise OSError(code, os.strerror(code))
            put(source, target)

        monkeypatch.setattr(files.os, "replace", replace)

    return refuse


def test_whatever_storage_refuses_is_one_message_and_the_run_goes_on(
    tiny, tmp_path, capsys, refusing, monkeypatch
):
    (tmp_path / "rows_of_failures.py").write_text(PAIRS)
    monkeypatch.syspath_prepend(tmp_path)
    stages = {"keep": KEEP, "cold": SFT | {"steps": 2}}
    path = tmp_path / "run.yaml"
    config = {**tiny, "name": "failing", "stages": stages}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    command = ["run", str(path), f"output_dir={tmp_path}"]
    full, closed = errno.ENOSPC, errno.EACCES
    refused = [
        ("failing/config.json", full),
        ("init/samples.jsonl", full),
        ("init/eval.json", closed),
        ("keep/config.json", closed),
        ("keep/rows.jsonl", full),
        ("keep/pairs.jsonl", closed),
        ("keep/data.json", full),
        ("failing/summary.json", closed),
        ("cold/eval.json", full),
        ("failing/report.html", full),
    ]
    for name, code in refused:
        refusing(name, code)
        assert main(command) == 1, name
        said = capsys.readouterr().err
        (line,) = (line for line in said.splitlines() if line.startswith("error: "))
        assert f": {os.strerror(code)}; what was written before is kept" in line
        assert (name in line) or name == "failing/config.json"
        assert "make room" in line
        assert "Traceback" not in said
        assert not list(tmp_path.rglob("*.unfinished"))
    checkpoints = tmp_path / "failing" / "cold" / "checkpoints"
    written = [(step, (checkpoints / str(step)).stat().st_mtime) for step in (1, 2)]
    refusing("nothing", full)
    assert main(command) == 0
    assert written == [(step, (checkpoints / str(step)).stat().st_mtime) for step in (1, 2)]


def test_a_batch_that_cannot_be_kept_is_told(tiny, tmp_path, capsys, refusing):
    exploding = SFT | {"optimizer": {"learning_rate": 1e30, "max_grad_norm": 1e30}}
    config = write(tiny, tmp_path, exploding, nonfinite_limit=3)
    refusing(".npz", errno.ENOSPC)
    assert main(["run", config, f"output_dir={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert "the last of 3 batches whose loss was not finite, could not be written: No sp" in said
    assert not list((tmp_path / "failing" / "cold").glob("*.npz*"))


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.EACCES, InputError, "cannot write x: Permission denied; choose another file"),
        (errno.ENOSPC, StorageError, "cannot write x: No space left on device"),
    ],
)
def test_a_place_that_was_chosen_badly_is_a_mistake(code, error, message):
    with pytest.raises(error, match=f"^{message}$"), files.chosen("x", "choose another file"):
        raise OSError(code, os.strerror(code))


def test_a_folder_that_may_no_longer_be_written_leaves_the_last_checkpoint(tiny, tmp_path):
    config = write(tiny, tmp_path, SFT | {"save_total_limit": 2})
    checkpoints = tmp_path / "failing" / "cold" / "checkpoints"
    for call in ("mkdir", "rename"):  # where a save begins, and where it ends
        command = [sys.executable, "-c", REFUSED, call, "run", config, f"output_dir={tmp_path}"]
        # Its programs are those that this process compiles, or has compiled.
        cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
        run = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | cache, timeout=240
        )
        assert run.returncode == 1, run.stderr
        assert f"error: a checkpoint could not be written to {checkpoints}: " in run.stderr
        assert "Permission denied" in run.stderr
        assert "the last one is 2" in run.stderr
        assert checkpoint.steps(checkpoints) == [1, 2]
        assert all(checkpoint.is_sound(checkpoints / str(step)) for step in (1, 2))
    assert main(["run", config, f"output_dir={tmp_path}"]) == 0
    assert checkpoint.steps(checkpoints) == [7, 8]
    assert not list(checkpoints.glob("*tmp*"))
