"""The library of losses needs jax, NumPy and jaxtyping, and nothing else the package depends on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# jax, jaxtyping, and what those two require.
ALLOWED = ["jax", "jaxlib", "jaxtyping", "ml_dtypes", "numpy", "opt_einsum", "scipy"]
ALLOWED += ["wadler_lindig", "jaxrl_reason"]

BLOCK = f"""
import sys


class Filter:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        # The settings Python was built with are a module that bears the name of the machine.
        if top in sys.stdlib_module_names | set({ALLOWED}) or top.startswith("_sysconfigdata"):
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = map(Filter, sys.meta_path)
"""

CALL_EVERY_CASE = """
from jaxrl_reason.conformance.cases import CASES
from jaxrl_reason.conformance.checks import check_value
from jaxrl_reason.conformance.implementation import own

functions = own().functions
for case in CASES:
    check_value(functions[case.function], case)
print(len(CASES), "cases")
"""


def run(python, program, folder):
    """Runs a program with a folder of its own as working directory."""
    # PYTHONPATH would lead a fresh environment back to the packages of this one.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", program]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_blocker_blocks(tmp_path):
    done = run(sys.executable, f"{BLOCK}\nimport pytest", tmp_path)
    assert "No module named 'pytest'" in done.stderr


def test_every_loss_without_any_other_package(tmp_path):
    done = run(sys.executable, BLOCK + CALL_EVERY_CASE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 200


@pytest.mark.slow
def test_every_loss_in_an_environment_of_its_own(tmp_path):
    python = tmp_path / "bare" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "bare"], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ["--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, *constraints, "jax", "jaxtyping", "numpy"], check=True)
    subprocess.run([*pip, "--no-deps", ROOT], check=True)
    done = run(python, CALL_EVERY_CASE, tmp_path)
    assert done.returncode == 0, done.stderr

    # With pytest the suite itself runs, from the installed package and through its entry point.
    subprocess.run([*pip, *constraints, "pytest"], check=True)
    suite = [python, "-m", "pytest", "--pyargs", "jaxrl_reason.conformance", "-q"]
    (tmp_path / "theirs.py").write_text("from jaxrl_reason.losses import dpo_loss, ipo_loss\n")
    done = subprocess.run(
        [*suite, "--impl", "theirs", "-k", "dpo or ipo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    assert "conformance of theirs: 2 functions checked" in done.stdout
