"""A whole run: what it writes, that it is not done twice, and that it is not overwritten."""

import hashlib
import itertools
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest

from jaxrl_reason import checkpoint
from jaxrl_reason.cli import main
from jaxrl_reason.config import load_yaml, to_json, validate
from jaxrl_reason.data.records import read_jsonl
from jaxrl_reason.metrics import read_metrics
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.load import load

STAGES = ("init", "cold", "prefer", "reason", "balance", "ahead", "refill")
PLOTS = {"curves.png", "accuracy_length.png", "pareto.png"}


def contents(directory, *, leave=()):
    """A digest of every file below a folder."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in leave
    }


def again(four, *overrides, folder=None):
    """The run's command once more, with overrides."""
    where = folder or four.directory.parent
    return main(["run", str(four.yaml), f"output_dir={where}", *overrides])


# What a run writes


def test_the_summary_has_a_row_for_every_stage_in_order(four):
    rows = json.loads((four.directory / "summary.json").read_text())
    assert [row["stage"] for row in rows] == list(STAGES)
    assert [row["kind"] for row in rows] == ["init", "sft", "dpo", "grpo", "morl", "grpo", "grpo"]
    for row in rows:
        assert list(row) == [
            "stage",
            "kind",
            "accuracy",
            "accuracy_ci95",
            "format_rate",
            "mean_length",
            "problems",
            "seconds",
        ]
        low, high = row["accuracy_ci95"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
        assert row["problems"] == 24
        assert row["seconds"] > 0
        result = json.loads((four.directory / row["stage"] / "eval.json").read_text())
        same = row.keys() - {"seconds"}
        assert {name: result[name] for name in same} == {name: row[name] for name in same}


def test_stages_start_from_what_their_parent_learned(four):
    init, *rest = json.loads((four.directory / "summary.json").read_text())
    assert init["format_rate"] == 0
    # Of five updates alone, without the parent's sixty, no stage would know the format.
    assert [row["stage"] for row in rest if row["format_rate"] < 0.6] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_samples_and_a_checkpoint(four, stage):
    assert len(read_jsonl(four.directory / stage / "samples.jsonl", ("prompt",))) == 24
    meta = checkpoint.read_meta(four.directory / stage)
    assert meta["complete"]
    assert meta["step"] == (four.config.stages[stage].steps if stage != "init" else 0)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_stage_writes_its_configuration_and_metrics(four, stage):
    config = four.config.stages[stage]
    saved = validate(RunConfig, load_yaml(four.directory / stage / "config.json"), "json")
    assert saved == four.config
    rows = read_metrics(four.directory / stage / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, config.steps + 1))
    # The weights of a correction are told from the step on at which it begins.
    names = lambda row: frozenset(n for n in row if "importance_sampling_ratio" not in n)
    assert len(set(map(names, rows))) == 1
    assert all(row["nonfinite_steps"] == 0 for row in rows)
    assert list((four.directory / stage / "tensorboard").glob("events*"))
    kept = checkpoint.steps(four.directory / stage / "checkpoints")
    assert kept == {"cold": [40, 60]}.get(stage, [4, 5])


EVERY = {"step_time", "tokens_per_second", "padding_share", "compiles"}
POLICY = {
    "loss",
    "grad_norm",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "sampling/sampling_logp_difference/mean",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "frac_reward_zero_std",
    "num_tokens",
    "rewards/accuracy/mean",
    "rewards/accuracy/std",
    "time/rollout",
    "time/rewards",
    "time/logprobs",
    "time/update",
    "time/sync",
    "tokens_per_second/rollout",
    "tokens_per_second/update",
    "sampling/staleness/mean",
    "wasted_share",
}
FORMAT = {"rewards/format/mean", "rewards/format/std"}
NAMES = {
    "cold": {"loss", "grad_norm", "entropy", "num_tokens"} | EVERY,
    "prefer": {
        "loss",
        "grad_norm",
        "logps/chosen",
        "logps/rejected",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
    }
    | EVERY,
    "reason": POLICY | EVERY | FORMAT | {"kl", "reward", "reward_std"},
    "ahead": POLICY | EVERY | {"rewards/ones/mean", "rewards/asked/mean"},
    "refill": POLICY | EVERY | {"rewards/overlong/mean", "num_gen_batches"},
    "balance": POLICY
    | EVERY
    | FORMAT
    | {"rewards/length/mean", "rewards/ones/mean"}
    | {f"objectives/weights/{name}" for name in ("accuracy", "format", "length", "ones")},
}


@pytest.mark.parametrize("stage", NAMES)
def test_metrics_have_the_names_of_trl(four, stage):
    rows = read_metrics(four.directory / stage / "metrics.jsonl")
    assert NAMES[stage] - rows[0].keys() == set()


def test_the_loss_of_the_cold_start_falls(four):
    losses = [row["loss"] for row in read_metrics(four.directory / "cold" / "metrics.jsonl")]
    assert losses[-1] < losses[0] / 5


def test_plots_are_pictures(four):
    for name in PLOTS:
        assert (four.directory / name).read_bytes().startswith(b"\x89PNG")


def test_the_lineage_reaches_the_untrained_model(four):
    entries = checkpoint.lineage(four.directory / STAGES[-1])
    assert [entry["stage"] for entry in entries] == list(reversed(STAGES))
    for child, parent in itertools.pairwise(entries):
        assert child["parent"] == parent["path"]
        assert child["parent_hash"] == parent["hash"]
    assert entries[-1]["parent"] is None
    assert len({entry["hash"] for entry in entries}) == len(entries)


def test_stages_differ_in_their_parameters(four):
    """A stage that saved its parent's parameters would pass everything above."""
    context = load(four.directory / "cold").context
    restore = checkpoint.restore_params
    embeddings = {
        np.asarray(restore(four.directory / stage, context.params_like)["embedding"]).tobytes()
        for stage in STAGES
    }
    assert len(embeddings) == len(STAGES)


# A second time


def test_a_second_run_skips_everything_and_changes_nothing(four, capsys):
    before = contents(four.directory, leave=PLOTS)
    times = {path: path.stat().st_mtime_ns for path in four.directory.rglob("checkpoints/**/*")}
    assert again(four) == 0
    said = capsys.readouterr().out
    for stage in STAGES[1:]:
        assert f"{stage}: complete, skipped" in said
    assert "evaluating" not in said
    assert contents(four.directory, leave=PLOTS) == before
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stages.cold.steps=70", "cold .*steps: 60 -> 70"),
        ("stages.prefer.beta=0.3", "prefer .*beta: 0.1 -> 0.3"),
        ("stages.prefer.optimizer.weight_decay=0.1", r"prefer .*optimizer.weight_decay: 0.0 -> "),
        ("stages.balance.rewards.2.high=11", "balance .*rewards: .*'high': 12.*'high': 11"),
        ("seed=3", "init .*seed: 0 -> 3"),
        ("model.changes.hidden_size=48", "init .*model.changes.hidden_size: 32 -> 48"),
        ("task.options.modulus=4", "init .*task.options.modulus: 3 -> 4"),
        ("max_prompt_length=19", "cold .*max_prompt_length"),
    ],
)
def test_another_configuration_is_refused_and_overwrites_nothing(four, capsys, override, named):
    before = contents(four.directory)
    assert again(four, override) == 2
    said = capsys.readouterr()
    assert_one_error(said, rf"four/{named}.*nothing was overwritten")
    assert said.out == ""
    assert contents(four.directory) == before


def assert_one_error(said, pattern):
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    assert re.search(pattern, said.err), said.err


def test_a_copy_is_evaluated_anew_and_trained_further(four, tmp_path, capsys):
    """Other settings of the evaluation touch no training; a new stage starts from an old one."""
    copy = tmp_path / "four"
    shutil.copytree(four.directory, copy)
    leave = {*PLOTS, "config.json", "summary.json", "eval.json", "samples.jsonl", "report.html"}
    before = contents(copy, leave=leave)
    more = "{kind: sft, parent: cold, steps: 1, batch_size: 8, max_length: 40, \
        data: {num_examples: 64, styles: {answer: 1.0}}, optimizer: {learning_rate: 2.0e-2}}"
    assert again(four, "evaluation.problems=16", f"stages.more={more}", folder=tmp_path) == 0
    said = capsys.readouterr().out
    assert "balance: complete, skipped" in said
    rows = json.loads((copy / "summary.json").read_text())
    assert [row["stage"] for row in rows] == [*STAGES, "more"]
    assert {row["problems"] for row in rows} == {16}
    after = contents(copy, leave=leave)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("more/") for name in after.keys() - before.keys())
    entries = checkpoint.lineage(copy / "more")
    assert [entry["stage"] for entry in entries] == ["more", "cold", "init"]


def test_a_moved_run_is_found_where_it_is(four, tmp_path):
    copy = tmp_path / "moved" / "renamed"
    shutil.copytree(four.directory, copy)
    loaded = load(copy / "reason")
    assert loaded.context.directory == copy
    assert loaded.meta["stage"] == "reason"
    assert checkpoint.lineage(copy / "reason")[-1]["path"] == str(copy / "init/checkpoints/0")
    config = to_json(loaded.context.config) | {"name": "four", "output_dir": str(tmp_path)}
    assert config == to_json(four.config) | {"output_dir": str(tmp_path)}


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ({"data": 1, "fsdp": 16, "context": 2}, {"data": 1, "fsdp": 8}),
        ({"data": 2, "fsdp": 6, "tensor": 3}, {"data": 4, "fsdp": 2}),
        ({"data": 1, "fsdp": -1, "tensor": 3}, {"data": 1, "fsdp": 8}),
        ({"data": 2, "fsdp": -1}, {"data": 2, "fsdp": 4}),
    ],
)
def test_a_model_can_be_read_on_fewer_devices(four, tmp_path, caplog, mesh, expected):
    copy = tmp_path / "copied"
    shutil.copytree(four.directory, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"mesh": config["mesh"] | mesh}))
    caplog.clear()
    loaded, trained = load(copy / "cold"), load(four.directory / "cold")
    found = {axis: size for axis, size in loaded.context.mesh.shape.items() if size > 1}
    assert found == {axis: size for axis, size in expected.items() if size > 1}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained.params)
    said = ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)
    told = [message for message in caplog.messages if "does not fit the 8 devices here" in message]
    assert len(told) == (mesh != {"data": 2, "fsdp": -1})
    assert all(said in message for message in told)


def test_other_names_of_metrics_and_no_tensorboard(four, tmp_path):
    """Sinks are no part of what a stage computes."""
    copy = tmp_path / "four"
    shutil.copytree(four.directory, copy)
    shutil.rmtree(copy / "cold" / "checkpoints" / "60")
    shutil.rmtree(copy / "cold" / "tensorboard")
    for stage in STAGES[2:]:
        shutil.rmtree(copy / stage)
    overrides = ["tracking.verl_names=true", "tracking.tensorboard=false"]
    stages = json.dumps({"cold": to_json(four.config)["stages"]["cold"]})
    assert again(four, *overrides, f"stages={stages}", folder=tmp_path) == 0
    assert not (copy / "cold" / "tensorboard").exists()
    rows = read_metrics(copy / "cold" / "metrics.jsonl")
    assert "actor/loss" not in rows[39]
    assert rows[40]["actor/loss"] == rows[40]["loss"]
    expected = read_metrics(four.directory / "cold" / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]


# What is wrong with the folder


def test_a_folder_that_cannot_be_written_is_refused(four, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert again(four, folder=tmp_path / "file" / "runs") == 2
    assert_one_error(capsys.readouterr(), r"cannot write to .*file/runs/four: Not a directory")
    assert os.listdir(tmp_path) == ["file"]


def test_a_prompt_longer_than_the_longest_is_refused(four, tmp_path, capsys):
    assert again(four, "max_prompt_length=10", folder=tmp_path) == 2
    message = r"the prompt of problem \d+ has \d+ tokens; max_prompt_length=10 is the most"
    assert_one_error(capsys.readouterr(), message)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short_list", "reward 'mine' returned 23 values for 24 completions"),
        ("not_a_number", "reward 'mine' returned nan for completion 0; return a finite number"),
    ],
)
def test_a_bad_reward_stops_the_run_before_its_first_update(
    four, tmp_path, capsys, function, message
):
    mine = {"kind": "python", "name": "mine", "function": f"rewards_of_tests:{function}"}
    stage = to_json(four.config.stages["reason"]) | {"parent": "init", "rewards": [mine]}
    assert again(four, f"stages={json.dumps({'reason': stage})}", folder=tmp_path) == 2
    assert_one_error(capsys.readouterr(), message)
    assert checkpoint.latest(tmp_path / "four" / "reason" / "checkpoints") is None


def test_a_reward_that_is_not_there_is_noticed_before_any_training(four, tmp_path, capsys):
    override = "stages.balance.rewards.3.function=rewards_of_tests:one"
    assert again(four, override, folder=tmp_path) == 2
    assert_one_error(capsys.readouterr(), "no function 'one'; did you mean 'ones'")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_of_another_shape_is_refused(four, tmp_path, capsys):
    copy = tmp_path / "four"
    shutil.copytree(four.directory, copy)
    raw = json.loads((copy / "config.json").read_text())
    raw["model"]["changes"]["intermediate_size"] = 40
    (copy / "config.json").write_text(json.dumps(raw))
    before = contents(copy)
    assert main(["evaluate", str(copy / "cold")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: checkpoint ")
    assert "does not fit, params differ" in said
    assert "float32[1, 48, 32] in the checkpoint, float32[1, 40, 32] wanted" in said
    assert contents(copy) == before
