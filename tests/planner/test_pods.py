"""Every full-scale configuration describes its programs on the slices that it is meant for."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
DESCRIBED = """
import json, sys
import jax

jax.config.update("jax_num_cpu_devices", 64)
from jaxrl_reason.errors import InputError
from jaxrl_reason.planner.described import load_described
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.pipeline import plan
from jaxrl_reason.stages.programs import stage_programs

found = {}
for path, count in json.load(sys.stdin):
    try:
        context = Context.describe(load_described(path, []), jax.devices()[:count])
        programs = {stage.name: len(stage_programs(stage)) for stage in plan(context)}
    except InputError as error:
        programs = str(error)
    found[f"{path} on {count}"] = programs
print(json.dumps(found))
"""


def slices() -> list[tuple[Path, str]]:
    """Configurations and slices of the first table of docs/pods.md."""
    text = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8").split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    found = []
    for name, _, _, meant in rows:
        path = re.search(r"\(\.\./configs/(.*?)\)", name)[1]
        found += [(CONFIGS / path, one) for one in re.findall(r"`(v\w+:[\dx]+)`", meant)]
    return found


def test_every_full_scale_configuration_has_its_slice():
    files = {*CONFIGS.glob("pods/*.yaml"), *CONFIGS.glob("papers/*/full.yaml")}
    assert {path for path, _ in slices()} == files


def test_every_stage_divides_over_its_slice():
    wanted = []
    for path, name in slices():
        sizes = name.partition(":")[2].split("x")
        wanted.append((str(path), math.prod(map(int, sizes))))
    ended = subprocess.run(
        [sys.executable, "-c", DESCRIBED],
        input=json.dumps(wanted),
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert len(found) == len({*map(tuple, wanted)})
    for name, programs in found.items():
        assert isinstance(programs, dict), f"{name}: {programs}"
        assert min(programs.values()) >= 1
