"""A run that goes on with other devices: it says so, and ends the same but for rounding."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_reason import checkpoint
from jaxrl_reason.config import validate
from jaxrl_reason.errors import Preemption
from jaxrl_reason.metrics import MetricLog, read_metrics
from jaxrl_reason.stages import pipeline, training
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.preemption import heeded

# Adam's updates are about g / (|g| + epsilon), which makes the sign of a gradient of nothing but
# rounding a whole step where epsilon is small. With this one an update is as near as its gradient.
OPTIMIZER = {"learning_rate": 1e-2, "adam_epsilon": 1e-2}
STAGES = {
    "cold": {
        "kind": "sft",
        "steps": 4,
        "batch_size": 8,
        "max_length": 40,
        "data": {"kind": "traces", "num_examples": 64, "styles": {"answer": 1.0}},
        "optimizer": OPTIMIZER,
    },
    "reason": {
        "kind": "grpo",
        "parent": "cold",
        "steps": 3,
        "prompts_per_step": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "rewards": [
            {"kind": "python", "name": "variety", "function": "rewards_of_tests:variety"},
            {"kind": "format"},
        ],
        "optimizer": OPTIMIZER,
    },
}
ROUNDING = 1e-5
"""Of an array's largest value. Gradients on different meshes agree to that (`test_processes.py`),
and an update moves no parameter by more than `learning_rate / adam_epsilon` = 1 times its gradient,
so a few steps add up to a few times the rounding of one gradient, which is less than its bound."""

SAID = "results equal those of an uninterrupted run to rounding, not to the bit"

# A mesh, and its devices.
EIGHT = ({"data": 8}, 8)
CUT = ({"data": 2, "fsdp": 4}, 8)
FOUR = ({"data": 1, "fsdp": 2, "tensor": 2}, 4)
ONE = ({"data": 1}, 1)


class Log(MetricLog):
    """A notice comes while it writes the metrics of step `at` of a stage."""

    at: tuple[str, int] | None = None

    def __init__(self, directory, **options):
        super().__init__(directory, **options)
        self.stage = Path(directory).name

    def log(self, step, metrics):
        super().log(step, metrics)
        if self.at == (self.stage, step):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def go_on(tiny, rewards_folder):
    """Start a run on some devices, or go on with it; `stop`: a stage and the step of a notice."""

    def go_on(folder: Path, on: tuple[dict, int], stop: tuple[str, int] | None = None) -> None:
        mesh, devices = on
        changes = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = tiny["model"] | {"changes": tiny["model"]["changes"] | changes}
        raw = {**tiny, "name": "moving", "output_dir": str(folder), "model": model, "mesh": mesh}
        raw |= {
            "stages": STAGES,
            "evaluation": tiny["evaluation"] | {"problems": 8, "batch_size": 8},
        }
        config = validate(RunConfig, raw, "test")
        with pytest.MonkeyPatch.context() as patch, heeded():
            patch.setattr(training, "MetricLog", Log)
            patch.setattr(Log, "at", stop)
            pipeline._run(Context.create(config, jax.devices()[:devices]), lambda line: None)

    return go_on


@pytest.fixture(scope="module")
def stayed(go_on, tmp_path_factory) -> Path:
    """The run that was never interrupted."""
    folder = tmp_path_factory.mktemp("stayed")
    go_on(folder, EIGHT)
    return folder


def parameters(folder: Path, stage: str, step: int) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    path = folder / "moving" / stage / "checkpoints" / str(step) / "params"
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        shapes = handler.metadata(path).tree
        empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        tree = handler.restore(path, args=ocp.args.StandardRestore(empty))
    return {jax.tree_util.keystr(at): x for at, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_equal_to_rounding(folder: Path, stayed: Path, stages: tuple[str, ...]) -> None:
    for stage in stages:
        step = STAGES[stage]["steps"]
        before = parameters(stayed, "init", 0)
        expected, found = (parameters(run, stage, step) for run in (stayed, folder))
        assert found.keys() == expected.keys() != set()
        for name, value in found.items():
            within = ROUNDING * np.abs(expected[name]).max()
            np.testing.assert_allclose(value, expected[name], rtol=0, atol=within, err_msg=name)
            moved = np.abs(expected[name] - before[name]).max()
            assert moved > 20 * within, name  # or the comparison would say nothing


def said(caplog) -> list[str]:
    """Stages that said it, with what was made elsewhere."""
    told = [record.getMessage() for record in caplog.records if SAID in record.getMessage()]
    caplog.clear()
    return [line.partition(" was made by")[0] for line in told]


@pytest.mark.slow
def test_a_stage_goes_on_with_other_devices(go_on, stayed, tmp_path, caplog):
    with pytest.raises(Preemption, match="cold is saved after step 2"):
        go_on(tmp_path, EIGHT, ("cold", 2))
    assert said(caplog) == []
    with pytest.raises(Preemption, match="reason is saved after step 1"):
        go_on(tmp_path, CUT, ("reason", 1))
    # Its parent was finished by the devices that it begins with.
    assert said(caplog) == ["cold: its checkpoint"]
    go_on(tmp_path, ONE)
    assert said(caplog) == ["reason: its checkpoint"]
    assert_equal_to_rounding(tmp_path, stayed, ("cold", "reason"))
    now = checkpoint.read_meta(tmp_path / "moving" / "reason")["devices"]
    assert (now["mesh"], now["processes"]) == ({}, 1)
    for stage, options in STAGES.items():
        rows = read_metrics(tmp_path / "moving" / stage / "metrics.jsonl")
        assert [row["step"] for row in rows] == [*range(1, options["steps"] + 1)]


@pytest.mark.slow
def test_a_stage_begins_with_other_devices_than_its_parent(go_on, stayed, tmp_path, caplog):
    shutil.copytree(stayed, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "moving" / "reason")
    go_on(tmp_path, FOUR)
    assert said(caplog) == ["reason: cold, its parent,"]
    assert_equal_to_rounding(tmp_path, stayed, ("reason",))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_stage_says_that_its_parent_was_trained_elsewhere(
    make_context, tmp_path, caplog, elsewhere
):
    context = make_context(tmp_path)
    pipeline._prepare_folder(context)
    cold, prefer, *_ = pipeline.plan(context)
    meta = cold.meta(step=60)
    if elsewhere:
        meta["devices"] = meta["devices"] | {"processes": 4}
    checkpoint.save(cold.checkpoints, 60, params=context.init_params(), state={}, meta=meta)
    training.resume(prefer, training.stage_optimizer(prefer), data_hash="")
    assert said(caplog) == (["prefer: cold, its parent,"] if elsewhere else [])
