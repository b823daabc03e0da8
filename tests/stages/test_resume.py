"""A run that is killed and started again ends in the same bits as one that never stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_reason import checkpoint
from jaxrl_reason.metrics import read_metrics
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.steps import init_state, make_optimizer

# Runs the command line, and gets a signal in the middle of `step` of `stage`: that step's metrics
# are written, its checkpoint is not, and the checkpoint before it is complete.
DRIVER = """
import os, sys, time
from pathlib import Path

import jax
jax.config.update("jax_num_cpu_devices", 8)

from jaxrl_reason.cli import main
from jaxrl_reason.metrics import MetricLog

stage, step, saved, sent = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
opened, logged = MetricLog.__init__, MetricLog.log

def open_log(self, directory, **options):
    opened(self, directory, **options)
    self.of_stage = Path(directory)

def log(self, number, metrics):
    logged(self, number, metrics)
    if self.of_stage.name == stage and number == step:
        while not (self.of_stage / "checkpoints" / saved).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), sent)

MetricLog.__init__, MetricLog.log = open_log, log
sys.exit(main(sys.argv[5:]))
"""

PACKAGE = str(Path(checkpoint.__file__).parents[1])
KILLS = {
    "cold": (47, 40),
    "prefer": (3, 2),
    "reason": (4, 2),
    "balance": (3, 2),
    "ahead": (4, 2),
    "refill": (3, 2),
}
STOPS = {"cold": (47, 40), "balance": (3, 2), "ahead": (3, 2)}
"""Where a checkpoint is written before its time; `ahead` has sampled its next batch by then."""
TIMES = ("step_time", "time/", "tokens_per_second", "compiles")


@pytest.fixture(scope="module")
def start(four, rewards_folder):
    """Start the run of `four` in another folder, to get a signal in a stage or to end."""

    def start(
        folder: Path, stage="", step=0, saved=0, number: int = signal.SIGKILL
    ) -> subprocess.CompletedProcess:
        run = ["run", str(four.yaml), f"output_dir={folder}"]
        place = [stage, str(step), str(saved), str(int(number))]
        return subprocess.run(
            [sys.executable, "-c", DRIVER, *place, *run],
            env=os.environ
            | {
                # Programs compiled by this process need not be compiled five times more.
                "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": os.pathsep.join([str(rewards_folder), PACKAGE]),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )

    return start


@pytest.fixture(scope="module")
def killed(start, tmp_path_factory) -> Path:
    """The folder of the run after a kill in each stage and an end."""
    folder = tmp_path_factory.mktemp("killed")
    for stage, (step, saved) in KILLS.items():
        done = start(folder, stage, step, saved)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert checkpoint.latest(folder / "four" / stage / "checkpoints") == saved
        assert read_metrics(folder / "four" / stage / "metrics.jsonl")[-1]["step"] == step
    done = start(folder)
    assert done.returncode == 0, done.stderr
    assert f"refill: going on after step {KILLS['refill'][1]}" in done.stdout
    return folder / "four"


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory) -> Path:
    """The folder of the run after SIGTERM in some stages and an end."""
    folder = tmp_path_factory.mktemp("stopped")
    for stage, (step, saved) in STOPS.items():
        done = start(folder, stage, step, saved, signal.SIGTERM)
        assert done.returncode == 0, done.stderr
        assert f"SIGTERM: {stage} is saved after step {step}; the same command" in done.stdout
        assert checkpoint.latest(folder / "four" / stage / "checkpoints") == step
    done = start(folder)
    assert done.returncode == 0, done.stderr
    return folder / "four"


def whole_checkpoint(config: RunConfig, folder: Path, name: str):
    """Parameters and optimiser state of the last checkpoint of a stage."""
    context, stage = Context.create(config), config.stages[name]
    updates = stage.steps * (stage.num_iterations if isinstance(stage, PolicyConfig) else 1)
    optimizer = make_optimizer(stage.optimizer, updates)
    like = jax.eval_shape(lambda p: init_state(p, optimizer), context.params_shapes)
    state = {"opt_state": like.opt_state, "step": like.step}
    return checkpoint.restore(folder / name, params=like.params, state=state)


@pytest.mark.parametrize("stage", [*STOPS, "refill"])
def test_a_notice_in_a_step_changes_no_bit(four, stopped, stage):
    assert_same_bits(four, stopped, stage)


@pytest.mark.parametrize("stage", KILLS)
def test_checkpoints_have_the_same_bits(four, killed, stage):
    assert_same_bits(four, killed, stage)


def assert_same_bits(four, folder: Path, stage: str) -> None:
    expected = whole_checkpoint(four.config, four.directory, stage)
    actual = whole_checkpoint(four.config, folder, stage)
    assert actual.step == expected.step == four.config.stages[stage].steps
    assert int(actual.state["step"]) == (10 if stage == "reason" else actual.step)
    differ = []
    for part in ("params", "state"):
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(vars(expected)[part]),
            jax.tree.leaves(vars(actual)[part]),
            strict=True,
        )
        for (path, want), got in pairs:
            if np.asarray(want).tobytes() != np.asarray(got).tobytes():
                differ.append(part + jax.tree_util.keystr(path))
    assert differ == []


@pytest.mark.parametrize("stage", KILLS)
def test_metrics_are_the_same_but_for_time(four, killed, stage):
    def rows(folder):
        return [
            {k: v for k, v in row.items() if not k.startswith(TIMES)}
            for row in read_metrics(folder / stage / "metrics.jsonl")
        ]

    assert rows(killed) == rows(four.directory)


@pytest.mark.parametrize("stage", ["init", *KILLS])
def test_evaluations_and_samples_are_the_same(four, killed, stage):
    def evaluation(folder):
        result = json.loads((folder / stage / "eval.json").read_text())
        assert result.pop("seconds") > 0
        return result, (folder / stage / "samples.jsonl").read_bytes()

    assert evaluation(killed) == evaluation(four.directory)


def test_lineage_is_the_same(four, killed):
    def told(folder):
        leave = ("path", "parent", "seconds")
        metas = checkpoint.lineage(folder / "refill")
        return [{k: v for k, v in meta.items() if k not in leave} for meta in metas]

    assert told(killed) == told(four.directory)
    assert [meta["stage"] for meta in told(killed)] == [*reversed(KILLS), "init"]
