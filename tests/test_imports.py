"""The import rules: which room may import which, and which outside library enters by which door.

A room is a file or folder directly under `jaxrl_reason/`. The rules are read off the syntax tree,
so imports inside functions count too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxrl_reason"
FILES = sorted(PACKAGE.rglob("*.py"))

LEAVES = {"arrays", "checkpoint", "config", "data", "metrics"}
LEAVES |= {"models", "rewards", "sharding", "tasks"}
LIBRARY = {"advantages", "arrays", "logprobs", "losses", "objectives"}
STEPS = LIBRARY | {"models", "sharding"}

# Room -> the rooms it may import, besides itself and those that are open to all.
OPEN = {"errors", "files", "plugins", "processes"}
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "files": set(),
    "plugins": set(),
    "processes": set(),
    **{leaf: set() for leaf in LEAVES},
    "advantages": {"arrays"},
    "losses": {"arrays"},
    "objectives": {"arrays"},
    "logprobs": {"arrays"},
    "conformance": LIBRARY,
    "models": {"sharding"},
    "sampling": {"arrays", "models", "sharding"},
    "steps": STEPS,
    "stages": LEAVES | STEPS | {"sampling", "steps"},
    "report": {"data", "metrics"},
    "bench": LEAVES | STEPS | {"sampling", "stages", "steps"},
    "papers": LEAVES | LIBRARY | {"sampling", "stages", "steps"},
    "reproduce": {"checkpoint", "config", "metrics", "objectives", "report", "stages", "tasks"},
    "planner": {"config", "models", "stages"},
    "launch": set(),
    "cli": {"bench", "config", "launch", "planner", "report", "reproduce", "stages"},
}

# Outside library -> the folders and files that may import it.
DOORS: dict[str, set[str]] = {
    "PIL": {"data.vision"},
    "av": {"data.vision"},
    "datasets": {"data"},
    "flax": {"models"},
    "grain": {"data"},
    "huggingface_hub": {"models.convert"},
    "math_verify": {"rewards"},
    "matplotlib": {"report"},
    "optax": {"steps"},
    "orbax": {"checkpoint"},
    "pydantic": {"config", "reproduce", "stages"},
    "pydantic_core": {"config", "reproduce", "stages"},
    "pytest": {"conformance"},
    "rich": {"cli", "metrics", "planner", "report"},
    "safetensors": {"models.convert"},
    "scipy": {"reproduce"},
    "tensorboardX": {"metrics"},
    "tensorflow_datasets": {"data"},
    "tokenizers": {"data.tokenizer", "models.convert"},
    "transformers": {"data.tokenizer", "models.convert"},
    "wandb": {"metrics"},
    "yaml": {"config"},
}
EVERYWHERE = {"jax", "jaxtyping", "numpy"} | sys.stdlib_module_names


def dotted(file: Path) -> str:
    """The name of a file of the package below `jaxrl_reason`, as in `models.attention`."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported(file: Path, source: str) -> Iterator[str]:
    """Full names of all that a file imports; a relative import is made absolute."""
    package = ("jaxrl_reason", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(file: Path, source: str) -> list[str]:
    """One line for every import of a file that breaks a rule."""
    name = dotted(file)
    room = name.partition(".")[0]
    found = []
    for target in imported(file, source):
        top, _, rest = target.partition(".")
        if top == "jaxrl_reason":
            goal = rest.partition(".")[0]
            if goal != "__version__" and goal not in ALLOWED[room] | OPEN | {room}:
                found.append(f"{name} imports {target}; {room} may import {sorted(ALLOWED[room])}")
        elif top in DOORS:
            if not any(name == door or name.startswith(f"{door}.") for door in DOORS[top]):
                found.append(f"{name} imports {target}; the door of {top} is {sorted(DOORS[top])}")
        elif top not in EVERYWHERE:
            found.append(f"{name} imports {target}; {top} has no door, declare one in DOORS")
    return found


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_file_keeps_the_rules(file):
    assert dotted(file).partition(".")[0] in ALLOWED, "a new room: declare it in ALLOWED"
    assert violations(file, file.read_text(encoding="utf-8")) == []


def test_arrows_point_down():
    """Repeatedly leaving out the rooms that need none of the rest must leave nothing."""
    left = dict(ALLOWED)
    while left:
        lowest = {room for room, needs in left.items() if not needs & left.keys()}
        assert lowest, f"a circle among {sorted(left)}"
        left = {room: needs for room, needs in left.items() if room not in lowest}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("losses/policy.py", "from jaxrl_reason.models import decoder"),
        ("losses/policy.py", "from jaxrl_reason import models"),
        ("losses/policy.py", "from ..models import decoder"),
        ("models/layers.py", "import jaxrl_reason.data.tokenizer"),
        ("steps/sft.py", "def f():\n    import flax.linen"),
        ("data/batching.py", "from transformers import AutoTokenizer"),
        ("metrics.py", "import torch"),
        ("losses/policy.py", "import pytest"),
        ("conformance/checks.py", "from jaxrl_reason.steps import policy"),
    ],
)
def test_a_broken_rule_is_found(file, source):
    assert len(violations(PACKAGE / file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("losses/policy.py", "from jaxrl_reason.arrays import WeightedMean"),
        ("losses/policy.py", "from .divergence import kl_estimate"),
        ("stages/grpo.py", "from jaxrl_reason import steps, sampling"),
        ("models/layers.py", "import flax.linen as nn"),
        ("data/tokenizer.py", "from transformers import PreTrainedTokenizerFast"),
        ("tasks/countdown.py", "from jaxrl_reason.errors import InputError"),
    ],
)
def test_a_kept_rule_is_not(file, source):
    assert violations(PACKAGE / file, source) == []


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (
            sorted(LIBRARY),
            ["flax", "optax", "orbax", "transformers", "datasets", "grain", "matplotlib"],
        ),
        (["conformance.plugin"], ["jax", "numpy"]),
        # Read in environments that have NumPy and another library.
        (["bench.machine", "bench.results", "bench.worker"], ["jax", "jaxtyping", "flax", "rich"]),
        (
            ["models", "sampling", "steps"],
            ["transformers", "tokenizers", "datasets", "grain", "matplotlib", "pydantic"],
        ),
    ],
    ids=["library", "plugin", "bench", "steps"],
)
def test_importing_loads_nothing_heavy(modules, forbidden):
    imports = "; ".join(f"import jaxrl_reason.{module}" for module in modules)
    probe = f"{imports}; import sys; print(*sorted(sys.modules.keys() & set({forbidden})))"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == []
