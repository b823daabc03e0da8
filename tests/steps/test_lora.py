"""Updates of a part of the parameters: the rest keeps its bits, its place, and costs nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_reason.data.batching import fill_rows, microbatches
from jaxrl_reason.data.groups import Document, fill_groups
from jaxrl_reason.models import Model, ModelConfig
from jaxrl_reason.models.lora import ADAPTER, LoRAConfig, trainable, without_adapter
from jaxrl_reason.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    place_batch,
    replicated,
    tree_shardings,
)
from jaxrl_reason.steps import (
    Optimizer,
    OptimizerConfig,
    PolicyObjective,
    combine,
    count_parameters,
    init_state,
    make_optimizer,
    make_policy_step,
    make_preference_step,
    make_sft_step,
    partition,
    state_shardings,
)

V, T = 32, 16
PLAIN = ModelConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    tie_word_embeddings=False,
    qkv_bias=True,
)
CONFIG = dataclasses.replace(PLAIN, lora=LoRAConfig(r=2, lora_alpha=4.0))
MODEL = Model(CONFIG)
ADAPTERS = trainable(CONFIG)
# The step is the gradient itself.
PLAIN_SGD = optax.sgd(1.0)
SGD = Optimizer(*PLAIN_SGD, ADAPTERS)
ADAMW = make_optimizer(OptimizerConfig(learning_rate=1e-2, weight_decay=0.1), 10, ADAPTERS)


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def params(fresh):
    """Adapters as after some training, so that A has a gradient."""
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.1), x.dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: draw(x) if path[-1].key == "lora_b" else x, fresh
    )


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    ids = lambda low, high: rng.integers(2, V, rng.integers(low, high)).tolist()
    return fill_rows([[(ids(2, 6), ids(1, 7))] for _ in range(count)], T, pad_id=0)


def pairs():
    batch = {name: x.reshape(4, 2, T) for name, x in rows(8).items()}
    return batch | {"ref_logprobs": np.full((4, 2), -3.0, np.float32)}


def completions():
    """Four prompts in a row each, with two completions."""
    rng = np.random.default_rng(0)
    tokens = {i: rng.integers(2, V, 4) for i in range(8)}
    made = fill_groups(
        [[Document(g, (2 * g, 2 * g + 1))] for g in range(4)],
        [rng.integers(2, V, 3).tolist() for _ in range(4)],
        tokens,
        {i: np.ones(4, bool) for i in tokens},
        T,
        pad_id=0,
        num_rows=4,
    )
    mask = made.batch["completion_mask"]
    filled = lambda values: np.where(mask, values, 0).astype(np.float32)
    old = filled(rng.normal(-3.4, 0.1, mask.shape))
    none = np.zeros(4, np.int32)
    return made.batch | {
        "advantages": filled(rng.normal(size=8)[made.numbers]),
        "old_logprobs": old,
        "sampling_logprobs": old,
        "ref_logprobs": old,
        "importance_weights": filled(1.0),
        "dropped_sequences": none,
        "dropped_tokens": none,
    }


def sft(optimizer, model=MODEL, chunk_size=64):
    return make_sft_step(model, optimizer, logprob_chunk_size=chunk_size)


def preference(optimizer):
    return make_preference_step(
        MODEL,
        optimizer,
        loss_type=("sigmoid",),
        loss_weights=(1.0,),
        beta=0.5,
        options={},
        logprob_chunk_size=64,
    )


def policy(optimizer, model=MODEL, chunk_size=64):
    objective = PolicyObjective(
        loss_type="dapo",
        options={"epsilon": 0.2, "epsilon_high": 0.3},
        beta=0.05,
        temperature=0.9,
        max_completion_length=8,
    )
    return make_policy_step(model, optimizer, objective, logprob_chunk_size=chunk_size)


KINDS = {
    "sft": (sft, rows(8)),
    "preference": (preference, pairs()),
    "policy": (policy, completions()),
}
slow = lambda *kinds: [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]
run = functools.cache(lambda kind, optimizer: jax.jit(KINDS[kind][0](optimizer)))


def update(kind, optimizer, params, count=1):
    state, metrics = run(kind, optimizer)(
        init_state(params, optimizer), microbatches(KINDS[kind][1], count)
    )
    return state, jax.device_get(metrics)


def moved(state, params):
    return jax.device_get(jax.tree.map(lambda new, old: new - old, state.params, params))


def assert_same(got, expected):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        close = 2e-5 * np.abs(y).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=close, err_msg=str(path))


def test_the_parts_of_a_tree_make_the_whole(params):
    trained, frozen = partition(params, ADAPTERS)
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)} == {*ADAPTER}
    assert jax.tree.leaves(frozen) == jax.tree.leaves(without_adapter(params))
    whole = combine(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(map(lambda x, y: x is y, jax.tree.leaves(whole), jax.tree.leaves(params)))
    # Two layers; A and B of q, k, v, o, gate, up and down.
    sizes = [32 + 32, 32 + 16, 32 + 16, 32 + 32, 32 + 48, 32 + 48, 48 + 32]
    assert count_parameters(params, ADAPTERS) == 2 * 2 * sum(sizes)
    adapters = count_parameters(params, ADAPTERS)
    assert count_parameters(params) == CONFIG.num_parameters + adapters
    both = (params, {"more": params["head"]})
    first, second = partition(both, lambda path: path[0] == "1")
    assert jax.tree.leaves(first) == [params["head"]]
    assert jax.tree.structure(combine(first, second)) == jax.tree.structure(both)


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_change(params, kind):
    state, metrics = update(kind, ADAMW, params)
    assert metrics["nonfinite_steps"] == 0
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(params), strict=True
    ):
        same = np.asarray(new).tobytes() == np.asarray(old).tobytes()
        assert same == (path[-1].key not in ADAPTER), path
    sizes = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert sizes == 2 * count_parameters(params, ADAPTERS)


def test_the_gradient_is_that_part_of_the_whole_gradient(params):
    state, metrics = update("sft", SGD, params)
    whole, whole_metrics = update("sft", PLAIN_SGD, params)
    part, _ = partition(moved(state, params), ADAPTERS)
    assert_same(part, partition(moved(whole, params), ADAPTERS)[0])
    assert metrics["loss"] == pytest.approx(whole_metrics["loss"], rel=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(part)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["grad_norm"] < 0.9 * whole_metrics["grad_norm"]
    assert min(np.abs(x).max() for x in jax.tree.leaves(part)) > 1e-6


def test_parts_can_be_frozen(params):
    trains = trainable(dataclasses.replace(PLAIN, freeze=("embedding", "head")))
    plain = without_adapter(params)
    sgd = Optimizer(*PLAIN_SGD, trains)
    state, _ = update("sft", sgd, plain)
    whole, _ = update("sft", PLAIN_SGD, plain)
    change = moved(state, plain)
    assert not change["embedding"].any()
    assert not change["head"].any()
    assert_same(partition(change, trains)[0], partition(moved(whole, plain), trains)[0])


@pytest.mark.parametrize("kind", ["sft", *slow("preference", "policy")])
def test_microbatches_give_the_update_of_one_batch(params, kind):
    whole, metrics = update(kind, SGD, params)
    cut, cut_metrics = update(kind, SGD, params, 4)
    assert_same(
        partition(moved(cut, params), ADAPTERS)[0], partition(moved(whole, params), ADAPTERS)[0]
    )
    assert not any(x.any() for x in jax.tree.leaves(without_adapter(moved(cut, params))))
    for name in ("loss", "grad_norm"):
        assert cut_metrics[name] == pytest.approx(metrics[name], rel=1e-4)


def test_eight_devices_give_the_update_of_one(params):
    one, metrics = update("sft", SGD, params, 2)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    places = tree_shardings(mesh, MODEL.axes(), params)
    momentum = Optimizer(*optax.chain(optax.trace(0.0), PLAIN_SGD), ADAPTERS)
    states = state_shardings(params, momentum, places, replicated(mesh))
    kept = [s for s in jax.tree.leaves(states.opt_state) if s.spec != replicated(mesh).spec]
    assert len(kept) > len(ADAPTER) * 3
    step = jax.jit(
        sft(momentum),
        in_shardings=(states, batch_sharding(mesh, batch_axis=1)),
        out_shardings=(states, replicated(mesh)),
    )
    start = jax.device_put(init_state(params, momentum), states)
    state, many = step(start, place_batch(microbatches(rows(8), 2), mesh, batch_axis=1))
    assert_same(moved(jax.device_get(state), params), moved(one, params))
    assert float(many["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    for x, place in zip(jax.tree.leaves(state.params), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)


def test_an_untrained_adapter_starts_at_the_base_and_moves_by_b_first(fresh):
    state, metrics = update("sft", SGD, fresh)
    base = jax.jit(sft(PLAIN_SGD))
    plain = without_adapter(fresh)
    _, of_base = base(init_state(plain, PLAIN_SGD), microbatches(rows(8), 1))
    assert metrics["loss"] == of_base["loss"]
    assert metrics["entropy"] == of_base["entropy"]
    for path, x in jax.tree_util.tree_leaves_with_path(moved(state, fresh)):
        assert np.any(x) == (path[-1].key == "lora_b"), path


def test_a_gradient_that_is_not_finite_changes_nothing(params):
    batch = microbatches(completions(), 1)
    batch["advantages"] = np.where(batch["completion_mask"], np.inf, 0).astype(np.float32)
    start = init_state(params, ADAMW)
    state, metrics = run("policy", ADAMW)(start, batch)
    assert metrics["nonfinite_steps"] == 1
    for x, y in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((start.params, start.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


# What is compiled: weights are large and rows few, so that a copy of a weight would show.
WIDE = dataclasses.replace(
    CONFIG, vocab_size=1024, hidden_size=128, intermediate_size=512, head_dim=32, remat="full"
)


def compiled(make, config, batch, chunk_size):
    trains = trainable(config)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), 10, trains)
    model = Model(config)
    state = jax.eval_shape(lambda key: init_state(model.init(key), optimizer), jax.random.key(0))
    step = jax.jit(make(optimizer, model, chunk_size), donate_argnums=0)
    frozen = num_bytes(partition(state.params, trains)[1])
    return step.lower(state, batch).compile(), num_bytes(state), frozen


def num_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("make", "batch", "chunk_size"),
    [
        pytest.param(sft, rows(2), None, id="sft"),
        pytest.param(policy, completions(), 8, id="policy", marks=pytest.mark.slow),
    ],
)
def test_frozen_parameters_stay_in_place_and_have_no_gradient(make, batch, chunk_size):
    batch = microbatches(batch, 2)
    part, size, frozen = compiled(make, WIDE, batch, chunk_size)
    memory = part.memory_analysis()
    # Every array of the state is written where it was read, and there is no room for gradients.
    assert size <= memory.alias_size_in_bytes <= size + 64
    whole, whole_size, _ = compiled(make, dataclasses.replace(WIDE, lora=None), batch, chunk_size)
    of_whole = whole.memory_analysis()
    assert whole_size > 2.8 * size
    assert memory.temp_size_in_bytes < of_whole.temp_size_in_bytes - 0.9 * frozen
    assert part.cost_analysis()["flops"] < 0.8 * whole.cost_analysis()["flops"]


# The optimiser


def test_weight_decay_spares_vectors():
    tree = {
        "layers": {
            "q": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 3, 4))},
            "norm": {"scale": jnp.ones((2, 3))},
            "o": {"lora_a": jnp.ones((2, 3, 1)), "lora_b": jnp.ones((2, 1, 3))},
        }
    }
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.1)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    changes = {}
    for trains in (lambda path: True, lambda path: path[-1] != "lora_b"):
        optimizer = make_optimizer(config, 1, trains)
        state = init_state(tree, optimizer)
        trained, _ = partition(tree, trains)
        with jax.numpy_dtype_promotion("standard"):
            changes, _ = optimizer.update(partition(zeros, trains)[0], state.opt_state, trained)
        layers = changes["layers"]
        assert not layers["q"]["bias"].any()
        assert not layers["norm"]["scale"].any()
        np.testing.assert_allclose(layers["q"]["kernel"], -0.1, rtol=1e-6)
        np.testing.assert_allclose(layers["o"]["lora_a"], -0.1, rtol=1e-6)
    assert changes["layers"]["o"]["lora_b"] is None


def test_training_nothing_is_refused(params):
    with pytest.raises(
        ValueError, match=r"no parameter is trained: .* its parts are embedding, fi"
    ):
        init_state(without_adapter(params), ADAMW)
