"""Runs of published models: text with an adapter, images, video; and back to transformers."""

import dataclasses
import json
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from PIL import Image

from jaxrl_reason import checkpoint
from jaxrl_reason.cli import main
from jaxrl_reason.config import validate
from jaxrl_reason.data.vision import VisionRow
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Model
from jaxrl_reason.models.convert import load_params, write
from jaxrl_reason.models.lora import without_adapter
from jaxrl_reason.sampling import Rollout, SamplingConfig, sample
from jaxrl_reason.sharding import OnMesh
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.load import load
from jaxrl_reason.stages.policy_rows import PolicyRows
from jaxrl_reason.steps import make_batch_logprobs

PUBLISHED = Path(__file__).parents[2] / "configs" / "published"
OPTIMIZER = {"learning_rate": 1.0e-2}
VARIETY = {"kind": "python", "name": "variety", "function": "rewards_of_tests:variety"}
REWARDS = [{"kind": "accuracy"}, VARIETY]
POLICY = {
    "steps": 2,
    "prompts_per_step": 2,
    "num_generations": 2,
    "max_completion_length": 12,
    "rewards": REWARDS,
    "optimizer": OPTIMIZER,
}
PAIRS = [
    {"prompt": f"{n} + 1 ?", "chosen": f"#### {n + 1}", "rejected": f"#### {n + 2}"}
    for n in range(6)
]
ROWS = [{"question": f"What is {n} + 2?", "answer": f"Two more. #### {n + 2}"} for n in range(30)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(folder, config):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    assert main(["run", str(path), f"output_dir={folder}"]) == 0
    return folder / config["name"]


def text_run(folder, directory, **changes):
    rows = write_rows(folder / "rows.jsonl", ROWS)
    columns = {"prompt": "question", "completion": "answer"}
    stages = {
        "cold": {
            "kind": "sft",
            "steps": 2,
            "batch_size": 4,
            "max_length": 128,
            "data": {"kind": "file", "path": rows, "columns": columns},
            "optimizer": OPTIMIZER,
        },
        "prefer": {
            "kind": "dpo",
            "parent": "cold",
            "steps": 2,
            "batch_size": 4,
            "max_length": 128,
            "data": {"kind": "file", "path": write_rows(folder / "pairs.jsonl", PAIRS)},
            "optimizer": OPTIMIZER,
        },
        "reason": {"kind": "grpo", "parent": "prefer", "beta": 0.1, **POLICY},
        "balance": {
            "kind": "morl",
            "parent": "reason",
            "aggregator_options": {"min_std": 0.01},
            **POLICY,
        },
    }
    return {
        "name": "text",
        "task": {
            "name": "dataset",
            "options": {"source": rows, "columns": {"prompt": "question"}, "test_fraction": 0.3},
        },
        "model": {"path": str(directory)},
        "chat": {"system_prompt": "Put the answer after ####."},
        "max_prompt_length": 100,
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "evaluation": {"problems": 4, "max_completion_length": 12},
        "stages": stages,
        **changes,
    }


def visual_run(directory, task, **changes):
    return {
        "name": "visual",
        "task": {"name": task},
        "model": {"path": str(directory)},
        "max_prompt_length": 500,
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "max_visual_tokens": 64,
        "evaluation": {"problems": 3, "max_completion_length": 12},
        "stages": {
            "cold": {
                "kind": "sft",
                "steps": 2,
                "batch_size": 4,
                "max_length": 700,
                "data": {"kind": "traces", "num_examples": 6, "styles": {"answer": 1.0}},
                "optimizer": OPTIMIZER,
            },
            "reason": {"kind": "grpo", "parent": "cold", "beta": 0.1, **POLICY},
            "balance": {
                "kind": "morl",
                "parent": "reason",
                "aggregator_options": {"min_std": 0.01},
                **POLICY,
            },
        },
        **changes,
    }


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def differences(folder, stage):
    """Largest differences between the log-probs of sampling and of training, by step."""
    lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["sampling/sampling_logp_difference/max"] for line in lines]


def logits(loaded, tokens):
    model = loaded.context.model
    ids = jnp.asarray([tokens], jnp.int32)
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    hidden = model.forward(loaded.params, ids, positions=positions, segment_ids=jnp.ones_like(ids))
    return np.asarray(model.unembed(loaded.params, hidden))[0]


@pytest.mark.slow
def test_an_adapter_goes_through_all_stages_and_out_again(directories, rewards_folder, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    lora = {"r": 2, "lora_alpha": 4.0}
    source = directories["qwen3"]
    folder = run(tmp_path, text_run(tmp_path, source, model={"path": str(source), "lora": lora}))
    assert max(differences(folder, "reason") + differences(folder, "balance")) < 1e-5
    before = None
    for stage in ("init", "cold", "prefer", "reason", "balance"):
        loaded = load(folder / stage)
        now = leaves(loaded.params)
        base = leaves(load_params_of(loaded, source))
        assert {name for name in now if "lora" not in name} == base.keys()
        for name, value in base.items():
            np.testing.assert_array_equal(now[name], value, err_msg=name)
        if before is not None:
            moved = [name for name in now if (now[name] != before[name]).any()]
            assert moved
            assert all("lora" in name for name in moved)
        before = now
    out = tmp_path / "exported"
    assert main(["export", str(folder / "balance"), str(out)]) == 0
    tokens = list(range(40, 60))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(torch.tensor([tokens])).logits[0]
    np.testing.assert_allclose(logits(loaded, tokens), theirs.numpy(), atol=1e-4)
    adapter = tmp_path / "adapter"
    assert main(["export", str(folder / "balance"), str(adapter), "--adapter"]) == 0
    assert (adapter / "adapter_model.safetensors").is_file()


def load_params_of(loaded, source):
    """The published parameters, without an adapter."""
    shapes = without_adapter(loaded.params)
    config = loaded.context.model.config
    params = load_params(Model(dataclasses.replace(config, lora=None)), source)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    return params


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "llama", "mistral", "gemma3"])
def test_a_family_goes_through_all_stages(directories, rewards_folder, tmp_path, family):
    source = directories[family]
    more = {"expert": 2} if family == "qwen3_moe" else {"data": 2}
    mesh = {"data": 1, "fsdp": 2, "tensor": 2, **more}
    folder = run(tmp_path, text_run(tmp_path, source, mesh=mesh))
    assert max(differences(folder, "reason") + differences(folder, "balance")) < 2e-5
    was = leaves(load(folder / "init").params)
    for stage in ("cold", "prefer", "reason", "balance"):
        now = leaves(load(folder / stage).params)
        still = [name for name in now if (now[name] == was[name]).all()]
        assert not still, (stage, still)
        was = now
    assert main(["export", str(folder / "balance"), str(tmp_path / "exported")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task", "freeze"),
    [
        ("qwen2_5_vl", "shapes", ()),
        ("qwen2_5_vl", "moving_shapes", ("vision",)),
        ("qwen3_vl", "moving_shapes", ()),
        ("qwen3_vl", "shapes", ("vision",)),
    ],
)
def test_a_model_that_sees_is_trained_and_written(
    directories, rewards_folder, tmp_path, family, task, freeze
):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForImageTextToText

    model = {"path": str(directories[family]), "freeze": list(freeze)}
    folder = run(tmp_path, visual_run(directories[family], task, model=model))
    assert max(differences(folder, "reason") + differences(folder, "balance")) < 1e-5
    first, last = load(folder / "init"), load(folder / "balance")
    was, now = leaves(first.params), leaves(last.params)
    moved = {name.split("/")[0] for name in now if (now[name] != was[name]).any()}
    assert ("vision" in moved) == (not freeze)
    assert "layers" in moved
    out = tmp_path / "exported"
    assert main(["export", str(folder / "balance"), str(out)]) == 0
    theirs = AutoModelForImageTextToText.from_pretrained(out)
    assert sum(p.numel() for p in theirs.parameters()) == last.context.model.config.num_parameters
    tokens = list(range(40, 60))
    with torch.no_grad():
        found = theirs(input_ids=torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(logits(last, tokens), found, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_pairs_with_images_in_files(directories, tmp_path, family):
    """Supervised rows and pairs show images of a folder, and a broken one is named."""
    images = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(images):
        Image.fromarray(np.full((40, 30 + 9 * i, 3), 60 * i + 40, np.uint8)).save(path)
    shown = [{"images": [str(path)]} for path in images]
    pairs = [{"prompt": "How many?", "chosen": "one", "rejected": "two", **s} for s in shown]
    rows = [{"prompt": "How many?", "completion": "one", **s} for s in shown]
    config = visual_run(directories[family], "shapes")
    common = {"steps": 2, "batch_size": 4, "max_length": 200, "optimizer": OPTIMIZER}
    file = lambda name, rows: {"kind": "file", "path": write_rows(tmp_path / name, rows)}
    config["stages"] = {
        "cold": {"kind": "sft", **common, "data": file("rows.jsonl", rows)},
        "prefer": {"kind": "dpo", **common, "data": file("pairs.jsonl", pairs), "parent": "cold"},
    }
    folder = run(tmp_path, config)
    line = json.loads((folder / "prefer" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(np.log(2), abs=1e-5)
    images[1].write_bytes(b"no image")
    config["name"] = "broken"
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main(["run", str(path), f"output_dir={tmp_path}"]) == 2


def make(directory, task="shapes", **model):
    raw = visual_run(directory, task, model={"path": str(directory), **model})
    return Context.create(validate(RunConfig, raw | {"output_dir": "unused"}, "test"))


def alike(prompts):
    """Two prompts that differ in what they show and in nothing else."""
    first = {}
    for prompt in prompts:
        before = first.setdefault(tuple(prompt.tokens), prompt)
        if before is not prompt:
            return [before, prompt]
    raise AssertionError("no two prompts have the same text")


@pytest.fixture(scope="module")
def sampled(directories):
    """Completions of two prompts of a model that sees, and what the prompts show."""
    context = make(directories["qwen3_vl"], freeze=["vision"])
    params = context.init_params()
    prompts = alike(context.prompts([context.task.generate("train", i) for i in range(40)]))
    shown, sights = context.look(params, prompts)
    engine = context.engine(SamplingConfig(), 10, max_rows=4, group_size=2)
    rollout = sample(
        engine,
        params,
        [prompt.tokens for prompt in prompts],
        jax.random.key(0),
        num_generations=2,
        pad_id=context.pad_id,
        shown=shown,
    )
    return context, params, sights, rollout


def rows_of(context, rollout: Rollout, **changes):
    return PolicyRows(
        mesh=context.mesh,
        pad_id=context.pad_id,
        max_prompt_length=context.config.max_prompt_length,
        max_completion_length=10,
        completions=4,
        num_generations=2,
        row_length=None,
        drop=False,
        visual_tokens=context.visual_tokens,
        patches_per_token=context.patches_per_token,
        **{"microbatch_tokens": None, **changes},
    )


def test_sampling_and_training_agree_about_what_they_see(sampled):
    """With features that were kept, and with patches that are encoded again."""
    context, params, sights, rollout = sampled
    logprobs = OnMesh(
        jax.jit(make_batch_logprobs(context.model, temperature=1.0, logprob_chunk_size=None)),
        context.mesh,
    )
    advantages = np.ones(4, np.float32)
    found = []
    for given in (sights, [sight._replace(features=None, deep_features=None) for sight in sights]):
        batch, _ = rows_of(context, rollout).place(rollout, advantages, None, given)
        assert ("patches" in batch) == (given is not sights)
        found.append((batch, np.asarray(logprobs(params, batch))))
    for batch, trained in found:
        mask = np.asarray(batch["completion_mask"])
        assert mask.sum() == rollout.lengths.sum()
        sampling = np.asarray(batch["sampling_logprobs"])
        np.testing.assert_allclose(trained[mask], sampling[mask], atol=2e-5)
    # Other images give other log-probs: they are looked at.
    swapped, _ = rows_of(context, rollout).place(rollout, advantages, None, sights[::-1])
    other = np.asarray(logprobs(params, swapped))
    assert np.abs(other - found[0][1]).max() > 1e-4


def test_a_process_fills_its_own_rows_alone(sampled):
    context, _, sights, rollout = sampled
    for given in (sights, [sight._replace(features=None, deep_features=None) for sight in sights]):
        rows = rows_of(context, rollout, microbatch_tokens=1)
        every, info = rows.arrays(rollout, np.arange(4.0), None, given)
        assert every["tokens"].shape[:2] == (1, 4)
        for own in ([0, 1], [1, 3], [2, 3]):
            some, same = rows.arrays(rollout, np.arange(4.0), None, given, own=np.array(own))
            assert same == info
            assert some.keys() == every.keys()
            for name, x in every.items():
                np.testing.assert_array_equal(some[name], x[:, own], err_msg=name)


@pytest.mark.parametrize(
    ("family", "task", "changes", "message"),
    [
        ("qwen3_vl", "shapes", {"max_visual_tokens": None}, "shows images or videos; set max_vis"),
        ("qwen3", "shapes", {"max_visual_tokens": None}, "the model reads text only; set model.p"),
        ("qwen3", "arithmetic", {}, "max_visual_tokens=64 cannot act: the model reads text only"),
    ],
)
def test_a_task_and_a_model_that_do_not_see_alike_are_refused(
    directories, family, task, changes, message
):
    raw = visual_run(directories[family], task) | {"output_dir": "unused"} | changes
    with pytest.raises(InputError, match=message):
        Context.create(validate(RunConfig, raw, "test"))


def test_prompts_of_a_file_that_show_images_need_room(directories, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(path)
    row = {"images": [str(path)], "answer": "1"}
    raw = visual_run(directories["qwen3_vl"], "dataset", stages={}, max_visual_tokens=None)
    rows = [{**row, "prompt": f"How many are larger than {n}?"} for n in range(12)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    raw["task"]["options"] = {"source": source, "test_fraction": 0.5}
    context = Context.create(validate(RunConfig, raw | {"output_dir": "unused"}, "test"))
    with pytest.raises(InputError, match="a prompt shows images or videos; set max_visual_tokens"):
        context.look({}, context.prompts([context.task.generate("train", 0)]))


def test_a_row_without_its_columns_is_named_also_with_a_system_prompt(
    directories, tmp_path, capsys
):
    config = text_run(tmp_path, directories["qwen3"])
    data = {"kind": "file", "path": write_rows(tmp_path / "odd.jsonl", [{"answer": "2"}])}
    config["stages"]["cold"]["data"] = data
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    assert main(["run", str(path), f"output_dir={tmp_path}"]) == 2
    assert "odd.jsonl:1: got columns answer; needed" in capsys.readouterr().err.replace("\n", "")


def test_a_prompt_is_encoded_once_for_its_group_and_a_frozen_encoder_remembers(directories):
    for freeze, again in ((["vision"], 2), ([], 4)):
        context = make(directories["qwen2_5_vl"], freeze=freeze)
        params = context.init_params()
        prompts = context.prompts([context.task.generate("train", i) for i in range(2)])
        shown, sights = context.look(params, prompts)
        assert context.eyes.encoded == 2
        context.look(params, prompts)
        assert context.eyes.encoded == again
        assert (sights[0].features is not None) == bool(freeze)
        assert all(isinstance(sight.row, VisionRow) for sight in sights)
        assert shown[0].features.shape == (prompts[0].shown.visual_index.max() + 1, 32)


def test_an_imported_model_can_be_sampled_and_exported_unchanged(directories, tmp_path, capsys):
    folder = tmp_path / "imported"
    source = directories["qwen3"]
    overrides = ["max_prompt_length=64", "evaluation.max_completion_length=8"]
    assert main(["import", str(source), str(folder), *overrides]) == 0
    assert "parameters" in capsys.readouterr().out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello?\n", encoding="utf-8")
    assert main(["sample", str(folder / "init"), "--file", str(prompts)]) == 0
    assert json.loads(capsys.readouterr().out)["length"] <= 8
    out = tmp_path / "out"
    assert main(["export", str(folder / "init"), str(out)]) == 0
    same = load(folder / "init")
    for name, value in leaves(load_params(same.context.model, out)).items():
        np.testing.assert_array_equal(value, leaves(same.params)[name])
    assert checkpoint.lineage(folder / "init")[0]["stage"] == "init"


@pytest.mark.parametrize("adapter", [False, True])
def test_an_export_without_room_is_one_message(directories, tmp_path, capsys, monkeypatch, adapter):
    folder, out = tmp_path / "imported", tmp_path / "out"
    overrides = ["max_prompt_length=64", "evaluation.max_completion_length=8"]
    overrides += ["model.lora={r: 2, lora_alpha: 4}"] if adapter else []
    assert main(["import", str(directories["qwen3"]), str(folder), *overrides]) == 0
    (tmp_path / "file").touch()
    command = ["export", str(folder / "init"), *(["--adapter"] if adapter else [])]
    capsys.readouterr()
    assert main([*command, str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err == (
        f"error: cannot write to {tmp_path}/file/out: Not a directory; choose another directory\n"
    )
    save, before = write.save_file, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments, **more):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            save(*arguments, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(write, "save_file", limited)
    assert main([*command, str(out)]) == 1
    assert capsys.readouterr().err == (
        f"error: cannot write to {out}: File too large; make room, and start the same command "
        "again\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"imported", "file"}
    monkeypatch.undo()
    assert main([*command, str(out)]) == 0


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_of_a_published_model_is_valid(directories, tmp_path, path):
    """With local copies in the place of what it fetches from the hub."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    sees = "VL" in config["model"]["path"]
    overrides = [f"model.path={directories['qwen2_5_vl' if sees else 'qwen3']}"]
    overrides += [f"output_dir={tmp_path}", "model.changes={max_position_embeddings: 4096}"]
    if config["task"]["name"] == "dataset":
        train, test = (write_rows(tmp_path / f"{n}.jsonl", ROWS[n:]) for n in (5, 0))
        rows = write_rows(tmp_path / "test.jsonl", ROWS[:5])
        overrides += [f"task.options.source={train}", f"task.options.test_source={rows}"]
        overrides += [f"stages.cold_start.data.path={test}"]
    context = Context.create(RunConfig.load(path, overrides))
    problem = context.task.generate("test", 0)
    assert len(context.prompts([problem])[0].tokens) > 20
