"""Plans of runs: programs of the sizes that runs have, and what a terminal shows of them."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from tpu_compiler import tpu_compiler

from jaxrl_reason import checkpoint
from jaxrl_reason.config import to_json, validate
from jaxrl_reason.data.batching import fill_rows, microbatches
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import ModelConfig, preset
from jaxrl_reason.models.lora import trainable
from jaxrl_reason.models.vision import init_vision, vision_features
from jaxrl_reason.models.vision_config import VisionConfig
from jaxrl_reason.planner import plan as plan_module
from jaxrl_reason.planner import search, tables, topology
from jaxrl_reason.planner.chips import CHIPS
from jaxrl_reason.planner.hlo import program_cost
from jaxrl_reason.planner.plan import (
    Memory,
    ProgramPlan,
    StagePlan,
    active_parameters,
    bytes_per_device,
    kernel_flops,
    model_flops,
    plan_stages,
)
from jaxrl_reason.planner.roofline import Times
from jaxrl_reason.planner.search import _remats, _rows_at_once, _splits
from jaxrl_reason.sampling import Rollout
from jaxrl_reason.sharding import MeshConfig
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.grpo import policy_rows
from jaxrl_reason.stages.pipeline import plan as stages_of
from jaxrl_reason.stages.programs import Program, stage_programs
from jaxrl_reason.stages.training import fresh_state, stage_optimizer
from jaxrl_reason.steps import partition

TINY = (Path(__file__).parents[1] / "tiny_run.yaml").read_text(encoding="utf-8")
TINY = TINY.replace("num_key_value_heads: 1", "num_key_value_heads: 2")  # to be cut over tensor
STAGES = """
name: planned
mesh: {data: 2, fsdp: 2, tensor: 2}
stages:
  cold:
    kind: sft
    steps: 4
    batch_size: 8
    gradient_accumulation_steps: 2
    max_length: 32
    data: {kind: traces, num_examples: 16}
    optimizer: {learning_rate: 1.0e-3}
  prefer:
    kind: dpo
    parent: cold
    steps: 4
    batch_size: 8
    max_length: 32
    data: {kind: sampled, num_prompts: 16, num_generations: 4}
    optimizer: {learning_rate: 1.0e-3}
  reason:
    kind: grpo
    parent: prefer
    steps: 4
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 12
    num_iterations: 2
    beta: 0.1
    rewards: [{kind: accuracy}]
    optimizer: {learning_rate: 1.0e-3}
  balance:
    kind: morl
    parent: prefer
    steps: 4
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 12
    aggregator: weighted_sum
    rewards: [{kind: accuracy}, {kind: format}]
    conflict_steps: 3
    mismatch: {action: stop}
    optimizer: {learning_rate: 1.0e-3}
  keep:
    kind: reject
    parent: reason
    num_prompts: 8
    num_generations: 4
    max_completion_length: 12
"""
CHIP = CHIPS["v5e"]


def config_of(text: str = TINY + STAGES) -> RunConfig:
    return validate(RunConfig, yaml.safe_load(text), "test")


@pytest.fixture(scope="module")
def context() -> Context:
    return Context.describe(config_of(), jax.devices())


@pytest.fixture(scope="module")
def plans(context):
    """The plan of each stage for the devices of this process, as if they were TPUs."""
    here = topology.Topology("here", CHIP, jax.devices())
    return {stage.name: stage for stage in plan_stages(context, here)}


def test_every_program_of_a_step_is_there(plans):
    sampling = ["weight sync", "prefill, 8 x 64", "decode, 32 rows"]
    found = {name: [program.name for program in plan.programs] for name, plan in plans.items()}
    assert found["cold"] == ["update"]
    training = ["reference log-probs", "policy log-probs", "update"]
    assert found["reason"] == [*sampling, *training]
    compared = ["objective's gradient", "gradients' products"]
    assert found["balance"] == [*sampling, *compared, "update"]
    assert found["evaluation"] == ["weight sync", "prefill, 16 x 64", "decode, 16 rows"]
    assert found["keep"] == sampling
    assert found["prefer"][0] == "weight sync"
    assert found["prefer"][-2:] == ["reference log-probs", "update"]
    often = {program.name: program.per_step for program in plans["reason"].programs}
    assert often == dict(zip(found["reason"], [1, 1, 2, 1, 0, 2], strict=True))
    often = [program.per_step for program in plans["balance"].programs]
    assert often == [1, 1, 2, 3 / 3, 1 / 3, 1]
    # Of what the run begins with, and of its four stages that train.
    assert plans["evaluation"].steps == 5
    # Two gradients wait for the third, and then there are three of the parameters' size.
    held = [program.memory.arrays for program in plans["balance"].programs[3:5]]
    assert held[0]["gradients"] == 2 * held[0]["parameters"]
    assert held[1]["gradients"] == 3 * held[1]["parameters"]
    assert "optimizer" in held[0]


@pytest.mark.parametrize("adapter", ["", "  lora: {r: 2, lora_alpha: 4}\n"])
def test_gradients_of_objectives_lie_where_the_parameters_do(adapter):
    """As the plan takes them to, and as those of an update do."""
    text = (TINY + STAGES).replace("model:\n", f"model:\n{adapter}")
    made = Context.describe(config_of(text), jax.devices())
    (balance,) = (stage for stage in stages_of(made) if stage.name == "balance")
    (program,) = (p for p in stage_programs(balance) if p.work == "gradient")
    trained = partition(made.params_like, trainable(made.model.config))[0]
    lies = lambda like, place: place.is_equivalent_to(like.sharding, like.ndim)
    assert all(jax.tree.leaves(jax.tree.map(lies, trained, program.compile().output_shardings)))


def test_links_are_those_between_the_places_of_the_mesh(context, monkeypatch):
    """Programs number devices as the mesh has them, which on TPUs is by the network's links."""
    seen = []
    bound = lambda cost, chip, devices: seen.append(devices) or Times(1.0, 1.0, 1.0)
    monkeypatch.setattr(plan_module, "times", bound)
    here = topology.Topology("here", CHIP, jax.devices()[::-1])
    plan_stages(context, here, names=["cold"])
    (devices,) = seen
    assert devices == list(context.mesh.devices.flat)


def shapes(batch) -> dict:
    return {name: (x.shape, x.dtype) for name, x in batch.items()}


def programs_of(context: Context, name: str):
    stage = next(stage for stage in stages_of(context) if stage.name == name)
    return stage, {program.name: program for program in stage_programs(stage)}


def test_arrays_of_fine_tuning_are_those_of_a_run(context):
    stage, programs = programs_of(context, "cold")
    rows = [[([1, 2], [3, 4])] for _ in range(8)]
    made = microbatches(fill_rows(rows, 32, pad_id=context.pad_id), 2)
    arguments = programs["update"].arguments
    assert shapes(arguments["batch"]) == shapes(made)
    state = fresh_state(stage, stage_optimizer(stage), context.init_params())
    like = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    planned = jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding),
        state._replace(params=arguments["parameters"], opt_state=arguments["optimizer"]),
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, planned, like))


def test_arrays_of_reinforcement_learning_are_those_of_a_run(context):
    stage, programs = programs_of(context, "reason")
    rng, count = np.random.default_rng(0), 32
    lengths = rng.integers(1, 13, count)
    mask = np.arange(12)[None] < lengths[:, None]
    rollout = Rollout(
        prompts=[[1] * int(n) for n in rng.integers(2, 20, 8)],
        num_generations=4,
        tokens=np.ones((count, 12), np.int32),
        completion_mask=mask,
        sampled=mask,
        sampling_logprobs=np.zeros((count, 12), np.float32),
        kept_logmass=np.zeros((count, 12), np.float32),
        versions=np.zeros((count, 12), np.int32),
        finished=np.ones(count, bool),
    )
    placed, _ = policy_rows(stage).place(rollout, rng.normal(size=count).astype(np.float32))
    planned = programs["reference log-probs"].arguments["batch"]
    assert shapes(planned) == shapes(placed)
    assert {name: x.sharding for name, x in planned.items()} == {
        name: x.sharding for name, x in placed.items()
    }
    more = shapes(programs["update"].arguments["batch"])
    assert more.pop("ref_logprobs") == (placed["old_logprobs"].shape, np.float32)
    assert more == shapes(placed)


def test_memory_is_that_of_the_arrays(context, plans):
    params = context.init_params()
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    (update,) = plans["cold"].programs
    assert update.memory.arrays["parameters"] == held
    assert bytes_per_device(context.params_like) == held
    assert update.memory.total > 3 * held
    decode = next(p for p in plans["reason"].programs if p.work == "decode")
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    # Gathered over fsdp to sample, and still cut over tensor.
    assert whole / 2 <= decode.memory.arrays["parameters to sample"] < whole
    assert decode.memory.arrays["reference"] == held


def test_sampling_sends_no_keys_and_values():
    config = config_of((TINY + STAGES).replace("fsdp: 2, tensor: 2", "fsdp: 4"))
    here = topology.Topology("here", CHIP, jax.devices())
    found = plan_stages(Context.describe(config, jax.devices()), here, names=["reason"])
    by_work = {program.work: program for program in found[0].programs}
    cache = by_work["decode"].memory.arrays["cache"]
    # What was drawn goes to every device, and each step the number of live rows.
    tokens, steps = by_work["decode"].tokens, 8
    assert by_work["decode"].cost.collective_bytes <= 16 * tokens + 64 * steps
    assert by_work["decode"].cost.collective_bytes < cache / 4
    assert by_work["prefill"].cost.collective_bytes == 0


def test_products_are_those_of_the_model(plans):
    for name in ("cold", "prefer", "reason"):
        for program in plans[name].programs:
            if program.work in ("update", "forward"):
                assert program.cost is not None
                assert program.mfu is not None
                products = program.times.products
                # No more than what the model is for, what the backward pass does again, and
                # attention over the whole of a row; a toy has little besides.
                useful = program.mfu * program.times.total / products
                assert 0.2 < useful <= 1.05, (name, program.name)
                assert program.cost.endless == ()


def test_experts_that_a_token_does_not_visit_do_not_count():
    dense = preset("3m", vocab_size=64)
    sparse = preset(
        "3m",
        vocab_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=dense.intermediate_size // 2,
    )
    router = sparse.num_hidden_layers * sparse.hidden_size * 8
    assert active_parameters(sparse) == active_parameters(dense) + router


def test_the_embedding_is_no_product():
    tied, free = (preset("3m", vocab_size=64, tie_word_embeddings=t) for t in (True, False))
    assert active_parameters(tied) == active_parameters(free)


@pytest.mark.parametrize("deepstack", [(), (0, 2)])
def test_products_of_images_are_those_of_the_compiled_encoder(deepstack):
    vision = VisionConfig(
        depth=3,
        hidden_size=128,
        intermediate_size=320,
        num_heads=2,
        out_hidden_size=256,
        patch_size=4,
        num_position_embeddings=49,
        deepstack_visual_indexes=deepstack,
    )
    config = preset("3m", vocab_size=64, vision=vision)
    rows, patches = 2, 64
    params = jax.eval_shape(functools.partial(init_vision, config), jax.random.key(0))
    of = lambda *shape: jax.ShapeDtypeStruct((rows, patches, *shape), np.int32)
    pairs = {name: of(2) for name in ("patch_coords", "patch_grids")}
    ids = {name: of() for name in ("patch_segments", "patch_windows")}
    seen = {"patches": jax.ShapeDtypeStruct((rows, patches, vision.patch_dim), np.float32)}
    seen |= pairs | ids
    compiled = jax.jit(functools.partial(vision_features, config)).lower(params, seen).compile()
    among = 4 * patches * vision.hidden_size * vision.depth
    found = program_cost(compiled.as_text()).flops / (rows * patches) - among
    program = Program(
        name="encode",
        work="encode",
        compile=lambda: compiled,
        per_step=1,
        tokens=rows * patches,
        length=patches,
        arguments={"batch": seen},
    )
    flops = model_flops(config, program)
    # Biases and norms, a hundredth of the parameters, are added and not multiplied.
    assert found == pytest.approx(flops / (rows * patches), rel=0.015)
    asked = dataclasses.replace(program, work="forward", length=8)
    text = model_flops(config, dataclasses.replace(asked, arguments={}))
    assert model_flops(config, asked) == pytest.approx(text + flops)
    update = dataclasses.replace(asked, work="update", trains_encoder=True)
    assert model_flops(config, update) == pytest.approx(3 * (text + flops))
    frozen = dataclasses.replace(update, trains_encoder=False)
    assert model_flops(config, frozen) == pytest.approx(3 * text + flops)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", "kinds are v4, v5e, v5p, v6e and cpu"),
        ("v5e", "for example v5e:8x8"),
        ("v5e:2x2x2", "has 2 dimensions"),
        ("cpu:0", "has no device"),
        ("cpu:2x4", "is unknown"),
        ("2*cpu:4", "is unknown"),
    ],
)
def test_topologies_that_are_none_are_refused(name, message, monkeypatch):
    monkeypatch.setattr(topology, "_find_compiler", lambda: None)
    with pytest.raises(InputError, match=message):
        topology.open_topology(name)


def test_rows_that_do_not_divide_are_refused_as_in_a_run():
    text = (TINY + STAGES).replace(
        "gradient_accumulation_steps: 2", "gradient_accumulation_steps: 4"
    )
    made = Context.describe(config_of(text), jax.devices())
    with pytest.raises(InputError, match=r"stages\.cold\.batch_size=8 must be a multiple of 16"):
        programs_of(made, "cold")


def test_of_an_adapter_only_what_is_trained_is_held_twice():
    text = (TINY + STAGES).replace("model:\n", "model:\n  lora: {r: 2, lora_alpha: 4}\n")
    made = Context.describe(config_of(text), jax.devices())
    update = programs_of(made, "reason")[1]["update"]
    whole = bytes_per_device(update.arguments["parameters"])
    assert 0 < bytes_per_device(update.beside["reference"]) < whole / 2


def test_without_the_compiler_for_tpus_it_is_said_what_to_install(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jaxrl-reason\[plan\]'"):
        topology.open_topology("v5e:2x2")


def plan_command(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    path = folder / "planned.yaml"
    path.write_text(TINY + STAGES, encoding="utf-8")
    # A process of its own: the devices of this one are made already.
    code = "import sys; from jaxrl_reason.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, "plan", str(path), *arguments],
        env=os.environ | {"NPROC": "16"} | settings,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_the_command_plans_for_cpus(tmp_path):
    out = tmp_path / "plan.json"
    wanted = [
        "--topology",
        "cpu:4",
        "--stages",
        "cold",
        "reason",
        "mesh.data=1",
        "--json",
        str(out),
    ]
    done = plan_command(tmp_path, *wanted)
    assert done.returncode == 0, done.stderr
    assert "planned on 4 x a part of this machine (cpu:4), mesh fsdp 2 x tensor 2" in done.stdout
    assert "to spare; a step takes" in done.stdout
    columns = [line.split() for line in done.stdout.splitlines()]
    of_program = ["memory", "FLOP", "moved", "sent", "least", "limit", "MFU", "compiled", "in"]
    assert ["program", "a", "step", *of_program] in columns
    kept = ["parameters", "optimizer", "batch", "reference", "activations", "total"]
    assert ["stage", "fullest", "in", *kept] in columns
    made = json.loads(out.read_text())
    assert [stage["stage"] for stage in made["stages"]] == ["cold", "reason"]
    assert all(stage["fits"] for stage in made["stages"])
    update = made["stages"][1]["programs"][-1]
    assert update["collective_bytes"] > 0
    assert set(update["memory"]) == {"parameters", "optimizer", "batch", "reference", "temporary"}
    assert done.stdout.count("compiled in") >= 2  # lines while it compiles, and a column
    for stage in made["stages"]:
        programs = stage["programs"]
        assert stage["compile_seconds"] == sum(p["compile_seconds"] for p in programs) > 0
        rate = stage["tokens"] / stage["seconds"] / 4
        assert stage["tokens_per_second_per_chip"] == pytest.approx(rate)
        assert f"{rate:,.0f} tokens/s a chip" in done.stdout


def test_an_unknown_stage_is_refused(tmp_path):
    done = plan_command(tmp_path, "--topology", "cpu:8", "--stages", "warm")
    assert done.returncode == 2
    assert (
        "error: --stages warm: the run has cold, prefer, reason, balance, keep, evaluation"
        in done.stderr
    )


@pytest.mark.slow
@pytest.mark.skipif(tpu_compiler() is None, reason="libtpu is not installed")
def test_the_command_plans_for_tpus(tmp_path):
    done = plan_command(
        tmp_path, "--topology", "v6e:2x4", "--json", "-", TPU_LIBRARY_PATH=str(tpu_compiler())
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["chips"], made["chip"]["name"]) == (8, "TPU v6e")
    names = ["cold", "prefer", "reason", "balance", "keep", "evaluation"]
    assert [stage["stage"] for stage in made["stages"]] == names
    for stage in made["stages"]:
        assert stage["fits"]
        for program in stage["programs"]:
            assert program["seconds"]["memory"] > 0
            multiplies = program["program"] not in ("weight sync", "gradients' products")
            assert (program["flops"] > 0) == multiplies


DECODING = """
name: decoding
task: {name: arithmetic, options: {modulus: 3, max_constant: 2, min_steps: 1, max_steps: 2}}
model:
  preset: 0.3m
  changes:
    dtype: bfloat16
    num_hidden_layers: 4
    hidden_size: 1024
    num_attention_heads: 8
    num_key_value_heads: 4
    head_dim: 128
    max_position_embeddings: 1088
    num_experts: 16
    num_experts_per_tok: 2
    moe_intermediate_size: 512
mesh: {data: 1, fsdp: 4, tensor: 2}
max_prompt_length: 64
steps_per_dispatch: 16
evaluation: {problems: 8, max_completion_length: 8}
stages:
  reason:
    kind: grpo
    steps: 1
    prompts_per_step: 32
    num_generations: 8
    max_completion_length: 1024
    rewards: [{kind: accuracy}]
    optimizer: {learning_rate: 1.0e-3}
"""
MOVED = """
import sys
from jaxrl_reason.planner.topology import open_topology

devices = open_topology("v5e:2x4").devices
from jaxrl_reason.planner.described import load_described
from jaxrl_reason.planner.hlo import program_cost
from jaxrl_reason.planner.plan import bytes_per_device
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.pipeline import plan
from jaxrl_reason.stages.programs import stage_programs

context = Context.describe(load_described(sys.argv[1], []), devices)
(stage,) = plan(context)
decode = next(program for program in stage_programs(stage) if program.work == "decode")
read = sum(bytes_per_device(decode.arguments[name]) for name in ("parameters to sample", "cache"))
moved = program_cost(decode.compile().as_text()).memory_bytes / context.config.steps_per_dispatch
print(moved / read)
"""


@pytest.mark.slow
@pytest.mark.skipif(tpu_compiler() is None, reason="libtpu is not installed")
def test_decoding_moves_little_more_than_parameters_and_cache(tmp_path):
    """A copy of the cache or of the experts at each step would double what has to be read."""
    path = tmp_path / "run.yaml"
    path.write_text(DECODING, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", MOVED, str(path)],
        env={**os.environ, "TPU_LIBRARY_PATH": str(tpu_compiler())},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.25


@pytest.mark.slow
@pytest.mark.skipif(tpu_compiler() is None, reason="libtpu is not installed")
def test_what_does_not_fit_is_said(tmp_path):
    larger = ["model.changes.hidden_size=16384", "model.changes.intermediate_size=65536"]
    done = plan_command(
        tmp_path,
        *("--topology", "v5e:2x4", "--stages", "cold", *larger),
        TPU_LIBRARY_PATH=str(tpu_compiler()),
    )
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT by" in done.stdout


@pytest.mark.slow
def test_a_search_says_which_choice_is_best(tmp_path):
    done = plan_command(tmp_path, "--topology", "cpu:4", "--stages", "cold", "--search", "4")
    assert done.returncode == 0, done.stderr
    tried = [line for line in done.stdout.splitlines() if line.startswith("tried")]
    assert 2 <= len(tried) <= 4
    assert len({line.partition(": ")[2] for line in tried}) == len(tried)
    best = next(line for line in done.stdout.splitlines() if line.startswith("best: "))
    assert best.removeprefix("best: ") in {line.partition(": ")[2] for line in tried}


@pytest.mark.slow
def test_a_search_as_json_is_all_of_standard_output(tmp_path):
    command = ("--topology", "cpu:4", "--stages", "cold", "--search", "3", "--json", "-")
    done = plan_command(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert "tried 3 of at most 3" in done.stderr
    assert len(made["candidates"]) == 3
    assert made["chips"] == 4


@pytest.mark.parametrize("number", ["0", "-3"])
def test_a_search_for_nothing_is_refused(tmp_path, number):
    done = plan_command(tmp_path, "--topology", "cpu:4", f"--search={number}")
    assert done.returncode == 2
    assert f"error: --search {number} must be 1 or more" in done.stderr


def test_the_json_of_a_search_says_what_each_choice_is(tmp_path):
    path = tmp_path / "planned.yaml"
    path.write_text(TINY + STAGES, encoding="utf-8")
    here = topology.Topology("here", CHIP, jax.devices())
    trials = search.search(str(path), [], here, names=["cold", "keep"], most=2)
    made = json.loads(json.dumps(tables.search_json(trials, here), allow_nan=False))
    assert [choice["overrides"] for choice in made["candidates"]] == [t.overrides for t in trials]
    for choice in made["candidates"]:
        mesh = {f"mesh.{axis}={size}" for axis, size in choice["mesh"].items()}
        assert {word for word in choice["overrides"] if word.startswith("mesh.")} <= mesh
        assert choice["remat"] in ("none", "dots", "full")
        assert choice["fits"] is True
        assert choice["seconds"] == pytest.approx(sum(s["seconds"] for s in choice["stages"]))
        assert choice["memory"] == max(stage["memory"] for stage in choice["stages"])
        assert choice["microbatches"] == {"cold": 2}
        assert choice["rows_sampled"] == {"keep": 32}
        assert set(choice["mfu"]) == {"cold"}
        for stage in choice["stages"]:
            assert stage["compile_seconds"] > 0
            assert (stage["tokens_per_second_per_chip"] is None) == (stage["stage"] == "keep")
    with pytest.raises(InputError, match="most=0 must be 1 or more"):
        search.search(str(path), [], here, most=0)
    of = ["stages.cold.batch_size=1"]
    with pytest.raises(InputError, match=r"every mesh was left out; .* must be a multiple of"):
        search.search(str(path), of, here, names=["cold"], most=2)


def test_a_search_samples_fewer_at_once_where_sampling_is_full():
    reason, balance = "stages.reason.max_num_seqs", "stages.balance.max_num_seqs"
    config = config_of()
    assert _rows_at_once(config, None, 8, fits=True) == []
    assert _rows_at_once(config, ["cold"], 8, fits=False) == []
    assert _rows_at_once(config, ["reason"], 8, fits=False) == [{reason: n} for n in (4, 8, 16)]
    fewer = config_of((TINY + STAGES).replace("num_iterations: 2", "max_num_seqs: 8"))
    assert _rows_at_once(fewer, None, 8, fits=True) == [{reason: 32}]
    # A group is sampled at once, and no choice is tried twice.
    assert _rows_at_once(fewer, ["reason"], 8, fits=False) == [{reason: 4}]
    both = [{reason: 4, balance: n} for n in (4, 8, 16)]
    assert _rows_at_once(fewer, None, 8, fits=False) == both


@pytest.mark.parametrize(
    ("full", "tried"),
    [
        ("decode", ["stages.reason.max_num_seqs=4"]),
        ("update", ["model.changes.remat=full", "stages.reason.microbatch_tokens=32768"]),
    ],
)
def test_where_nothing_fits_a_search_tries_what_makes_room(tmp_path, monkeypatch, full, tried):
    path = tmp_path / "planned.yaml"
    path.write_text(TINY + STAGES, encoding="utf-8")

    def plan(context, *_, **__) -> list[StagePlan]:
        stage = context.config.stages["reason"]
        bytes_of = {"decode": 10 * (stage.max_num_seqs or 32), "update": 100}
        bytes_of[full] *= 1000
        programs = [
            ProgramPlan(
                name=work,
                work=work,
                per_step=1,
                tokens=8,
                memory=Memory(arrays={}, temporary=1e4 * count),
                compile_seconds=1.0,
            )
            for work, count in bytes_of.items()
        ]
        return [StagePlan(name="reason", kind="grpo", programs=programs, tokens=8, steps=1)]

    monkeypatch.setattr(search, "plan_stages", plan)
    small = topology.Topology("small", dataclasses.replace(CHIP, memory=5e8), jax.devices())
    said = []
    found = search.search(
        str(path), [], small, names=["reason"], most=1 + len(tried), say=said.append
    )
    assert found[0].fits == (full == "decode")
    assert [line.rpartition(" ")[2] for line in said[1:]] == tried


def test_a_search_that_found_no_room_tries_what_needs_less():
    config = config_of()
    with_room, without = (
        [option["model.changes.remat"] for option in _remats(config, None, 8, fits=fits)]
        for fits in (True, False)
    )
    assert config.model.resolve(vocab_size=8).remat not in with_room
    assert without == [remat for remat in with_room if remat == "full"]
    field = "stages.cold.gradient_accumulation_steps"
    with_room, without = (
        [option[field] for option in _splits(config, None, 8, fits=fits)] for fits in (True, False)
    )
    assert with_room == without[::-1] == [1, 2, 4, 8]


@pytest.mark.parametrize(("work", "passes", "of_experts"), [("prefill", 1, 1), ("update", 3, 2)])
def test_products_inside_of_kernels_are_those_of_theory(work, passes, of_experts):
    kinds = ("full_attention", "sliding_attention") * 2
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=kinds,
        sliding_window=5,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    rows, length = 3, 32
    program = Program(
        name=work,
        work=work,
        compile=lambda: None,
        per_step=1,
        tokens=rows * length,
        length=length,
        arguments={},
    )
    # Of a query and a key, one by one: their product, and that of a weight and a value.
    seen = sum(min(t + 1, window) for window in (length, 5) * 2 for t in range(length))
    attention = rows * seen * 2 * 2 * config.num_attention_heads * config.head_dim
    expert = 3 * 2 * config.hidden_size * config.moe_intermediate_size
    experts = rows * length * config.num_hidden_layers * config.num_experts_per_tok * expert
    of = lambda *names: kernel_flops(config, program, names)
    dots = "jit(step)/while/body/Block/moe/shard_map/ragged_dot_general/ragged-dot-none"
    splash = "jit(step)/while/body/Block/attention/jit(_splash_attention)/splash_mha_fwd_residuals"
    assert of("jit(step)/gather") == 0
    assert of(dots) == of_experts * experts
    assert of(splash, splash) == pytest.approx(passes * attention, rel=0.1)
    assert of(splash, dots) == of(splash) + of_experts * experts


JUDGED = """
name: judged
mesh: {data: 2, fsdp: 4}
stages:
  reason:
    kind: grpo
    steps: 4
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 12
    rewards:
      - {kind: accuracy}
      - kind: judge
        name: good
        backend: {kind: checkpoint, path: PATH, max_completion_length: 6, batch_size: 16}
      - kind: judge
        name: short
        backend: {kind: checkpoint, path: PATH, max_completion_length: 6, batch_size: 16}
    optimizer: {learning_rate: 1.0e-3}
"""


def test_a_judge_is_planned_beside_its_stage(tmp_path):
    path = tmp_path / "judge" / "init"
    text = (TINY + JUDGED).replace("PATH", str(path))
    topology_of = lambda: topology.Topology("here", CHIP, jax.devices())
    plan_of = lambda: plan_stages(Context.describe(config_of(text), jax.devices()), topology_of())
    without, _ = alone = plan_of()
    told = f"The judge at {path} is not here and was not planned: its parameters and a cache are on"
    assert [note for note in tables.notes(alone) if "judge" in note] == [f"{told} the chips too."]

    # A run of a wider model, on more devices than the stage has.
    wider = TINY.replace("hidden_size: 32", "hidden_size: 64")
    made = config_of(f"{wider}\nname: judge\nmesh: {{data: 1, fsdp: 16}}\n")
    nothing = {"params": {"none": np.zeros(1)}, "state": {}}
    checkpoint.save(path / "checkpoints", 0, **nothing, meta={"hash": "0"})
    (path.parent / "config.json").write_text(json.dumps(to_json(made)))
    mesh = MeshConfig(data=1, fsdp=8)
    judge = Context.describe(made.model_copy(update={"mesh": mesh}), jax.devices())
    held = plan_module.bytes_per_device(judge.params_like)

    stage, evaluation = plan_of()
    names = [program.name for program in stage.programs]
    sampling = ["judge: weight sync", "judge: prefill, 16 x 64", "judge: decode, 16 rows"]
    own = [program.name for program in without.programs]
    assert names == [*own[:3], *sampling, *own[3:]]
    assert own[2].startswith("decode")
    often = {program.name: program.per_step for program in stage.programs}
    # Two rewards ask it about each of 32 completions.
    assert [often[name] for name in sampling] == [2 * 1, 2 * 2, 2 * 2]
    for program in stage.programs:
        arrays = program.memory.arrays
        assert arrays["judges"] == held
        before = [p.memory for p in without.programs if p.name == program.name]
        assert [memory.arrays | {"judges": held} for memory in before] in ([], [arrays])
        assert ("optimizer" in arrays, "parameters" in arrays) == (True, True)
    assert [program.name for program in evaluation.programs][3:] == sampling
    assert "judges" not in evaluation.programs[0].memory.arrays
    assert stage.rows_sampled == without.rows_sampled == 32
    assert not any("judge" in note for note in tables.notes([stage, evaluation]))
