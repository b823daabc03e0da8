"""Stages that train an adapter: no second model as reference, and the same bits after a restart."""

import gc
import itertools
import json

import jax
import numpy as np
import pytest

from jaxrl_reason import checkpoint
from jaxrl_reason.models.lora import ADAPTER, trainable, without_adapter
from jaxrl_reason.stages import dpo, pipeline
from jaxrl_reason.stages.other_logprobs import OtherLogprobs, Reference
from jaxrl_reason.stages.pipeline import plan
from jaxrl_reason.stages.training import resume, stage_optimizer
from jaxrl_reason.steps import TrainState, count_parameters

LORA = {"r": 2, "lora_alpha": 4}
ONES = {"kind": "python", "name": "ones", "function": "rewards_of_tests:ones"}


@pytest.fixture
def stage(make_context, tiny, tmp_path):
    """A stage after `init`, whose checkpoint is written, of a run with or without an adapter."""

    def make(name, lora, *, trained_parent=False, **changes):
        raw = tiny["stages"][name] | {"parent": "init"} | changes
        model = tiny["model"] | {"lora": lora}
        folder = tmp_path / f"{bool(lora)}-{trained_parent}"
        (only,) = plan(make_context(folder, model=model, stages={"s": raw}))
        params = only.context.init_params()
        if trained_parent:
            params = noisy(params)
        checkpoints = only.context.directory / "init" / "checkpoints"
        checkpoint.save(checkpoints, 0, params=params, state={}, meta={"parent": None})
        return only

    return make


def noisy(params):
    rng = np.random.default_rng(0)
    draw = lambda x: jax.device_put(rng.normal(size=x.shape, scale=0.1).astype(x.dtype), x.sharding)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: draw(x) if path[-1].key in ADAPTER else x, params
    )


def num_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def live_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def updated(state: TrainState) -> TrainState:
    """As after an update: adapters differ, and the old state is gone."""
    step = jax.jit(
        lambda s: s._replace(
            params=jax.tree_util.tree_map_with_path(
                lambda path, x: x + 1 if path[-1].key in ADAPTER else x, s.params
            )
        ),
        donate_argnums=0,
    )
    return step(state)


@pytest.mark.parametrize("trained_parent", [False, True])
def test_a_reference_costs_the_parents_adapter_or_nothing(stage, trained_parent):
    made = stage("reason", LORA, trained_parent=trained_parent)
    before = live_bytes()
    optimizer = stage_optimizer(made)
    state = resume(made, optimizer, data_hash="").state
    of_state = live_bytes() - before
    adapter = 4 * count_parameters(state.params, trainable(made.context.model.config))
    base = num_bytes(without_adapter(state.params))
    # Parameters and two moments of the adapter, and counts.
    assert of_state < base + 3 * adapter + 64
    others = OtherLogprobs(made, None)
    of_reference = live_bytes() - before - of_state
    assert of_reference == (adapter if trained_parent else 0)

    parent = made.parent_params()
    state = updated(state)
    seen = others._reference.params(state.params)
    wanted = parent if trained_parent else without_adapter(parent)
    assert jax.tree.structure(seen) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(seen), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(x, y)
    shared = {id(x) for x in jax.tree.leaves(without_adapter(state.params))}
    assert {id(x) for x in jax.tree.leaves(without_adapter(seen))} == shared


def test_without_adapter_a_reference_is_a_whole_copy(stage):
    made = stage("reason", None)
    before = live_bytes()
    state = resume(made, stage_optimizer(made), data_hash="").state
    of_state = live_bytes() - before
    reference = Reference(made)
    assert live_bytes() - before - of_state == num_bytes(state.params)
    parent = jax.device_get(state.params)
    moved = jax.tree.map(lambda x: x + 1, state.params)
    for x, y in zip(jax.tree.leaves(reference.params(moved)), jax.tree.leaves(parent), strict=True):
        np.testing.assert_array_equal(x, y)


def pairs_data(folder):
    """The configuration of a file with pairs."""
    path = folder / "pairs.jsonl"
    rows = [
        {"prompt": "a = 1 ?", "chosen": f"{i % 3}", "rejected": f"{(i + 1) % 3}"} for i in range(16)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"kind": "file", "path": str(path)}


def test_dpo_trains_the_adapter_alone_and_goes_on_in_the_same_bits(stage, tmp_path, monkeypatch):
    data = pairs_data(tmp_path)
    made = stage("prefer", LORA, steps=3, save_steps=2, data=data)
    init = jax.device_get(made.parent_params())
    before, beside = live_bytes(), []
    train = dpo.train

    def watched(stage, begin, *given, **options):
        beside.append(live_bytes() - before - num_bytes(begin.state))
        train(stage, begin, *given, **options)

    monkeypatch.setattr(dpo, "train", watched)

    def trained():
        dpo.run_dpo(made)
        found = checkpoint.find(made.directory)
        assert found.name == "3"
        return found, checkpoint.restore_params(found, init)

    found, straight = trained()
    changed = 0
    for (key, new), old in zip(
        jax.tree_util.tree_leaves_with_path(straight), jax.tree.leaves(init), strict=True
    ):
        same = new.tobytes() == old.tobytes()
        assert same or key[-1].key in ADAPTER, key
        changed += not same
    assert changed > 7
    found.rename(tmp_path / "straight")  # as if killed after step 2
    _, again = trained()
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(straight), strict=True):
        assert x.tobytes() == y.tobytes()
    # The reference has been let go when training begins.
    assert max(beside) < 256


@pytest.mark.slow
def test_every_kind_of_stage_trains_the_adapter_alone(make_context, tiny, tmp_path):
    short = {
        name: tiny["stages"][name] | {"steps": 2}
        for name in ("cold", "prefer", "reason", "balance")
    }
    short["prefer"] |= {"loss_type": "sigmoid", "data": pairs_data(tmp_path)}
    # Other rewards are all 0 in a model that was hardly trained.
    short["reason"] |= {"rewards": [ONES]}
    model = tiny["model"] | {"lora": LORA}
    context = make_context(tmp_path, name="lora", model=model, stages=short)
    rows = pipeline.run(context.config, say=lambda line: None)
    assert [row["stage"] for row in rows] == ["init", *short]
    steps = [
        checkpoint.restore_params(context.directory / row["stage"], context.params_like)
        for row in rows
    ]
    for before, after in itertools.pairwise(map(jax.device_get, steps)):
        moved = 0
        for (key, new), old in zip(
            jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(before), strict=True
        ):
            same = new.tobytes() == old.tobytes()
            assert same or key[-1].key in ADAPTER, key
            moved += not same
        assert moved >= 7
