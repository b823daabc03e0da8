"""The experiments about papers run: `jaxrl-reason reproduce NAME --smoke`, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_reason.papers.factum_film import make_film_model

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(
    (path.parent.name, path.stem)
    for path in (ROOT / "configs" / "papers").glob("*/*.yaml")
    if path.stem != "full"  # needs the hub; tests/papers/test_full_scale.py has stand-ins
)


def test_every_paper_has_an_experiment_that_fits_a_laptop():
    folders = {path.name for path in (ROOT / "configs" / "papers").iterdir() if path.is_dir()}
    assert {name for name, scale in EXPERIMENTS if scale == "small"} == folders


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), EXPERIMENTS)
def test_a_paper_runs(tmp_path, name, scale):
    command = [sys.executable, "-m", "jaxrl_reason.cli", "reproduce", name, "--smoke"]
    command += ["--scale", scale, "--output-dir", str(tmp_path)]
    if scale == "video":
        command.append(f"model.path={make_film_model(tmp_path / 'film_model')}")
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = tmp_path / ".smoke" / "results" / name
    stages = json.loads((results / f"{scale}.json").read_text(encoding="utf-8"))["seeds"]["0"]
    assert all("accuracy" in record or "data" in record for record in stages["stages"].values())
    assert (results.parent / f"{name}.md").exists()
