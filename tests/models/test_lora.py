"""Adapters: what they compute, what is trained, and what is left when they are off or merged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.models import Model, ModelConfig
from jaxrl_reason.models.layers import Projection
from jaxrl_reason.models.lora import (
    ADAPTER,
    MODULES,
    LoRAConfig,
    has_adapter,
    merge_lora,
    trainable,
    without_adapter,
)
from jaxrl_reason.sharding import tree_shardings

LORA = LoRAConfig(r=3, lora_alpha=4.5)
CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    tie_word_embeddings=False,
    lora=LORA,
)
MODEL = Model(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12))


def noisy(params, seed=1):
    """Adapters as after some training: B is no longer 0."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.1), x.dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: draw(x) if path[-1].key == "lora_b" else x, params
    )


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def trained(fresh):
    return noisy(fresh)


@jax.jit
def hidden(params):
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], (2, 12))
    tokens = jnp.asarray(TOKENS, jnp.int32)
    ones = jnp.ones((2, 12), jnp.int32)
    return MODEL.forward(params, tokens, positions=positions, segment_ids=ones)


def test_names_and_scale():
    some = LoRAConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    assert [name for name in MODULES if some.targets(name)] == ["q", "down"]
    assert all(map(LORA.targets, MODULES))
    assert not LORA.targets("router")
    assert some.scale == 1.5
    assert hash(some) == hash(dataclasses.replace(some, target_modules=("q_proj", "down_proj")))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 0}, "r=0 must be at least 1"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be positive"),
        ({"target_modules": ("q", "k_proj")}, r"\['q'\]; allowed are q_proj, .* or 'all-linear'"),
        ({"target_modules": "q_proj"}, "'q_proj' must be a list of names"),
        ({"target_modules": ()}, "target_modules is empty"),
    ],
)
def test_what_makes_no_adapter_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        LoRAConfig(**{"r": 2, "lora_alpha": 4.0, **fields})


def paths(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [tuple(key.key for key in path) for path, _ in leaves]


def test_with_an_adapter_it_alone_is_trained(fresh):
    trains = trainable(CONFIG)
    found = [path for path in paths(fresh) if trains(path)]
    assert found == [path for path in paths(fresh) if path[-1] in ADAPTER]
    assert len(found) == 2 * len(MODULES)


def test_parts_can_be_frozen(fresh):
    plain = dataclasses.replace(CONFIG, lora=None, freeze=("embedding", "final_norm"))
    trains = trainable(plain)
    assert {path[0] for path in paths(fresh) if trains(path)} == {"head", "layers"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"freeze": ("layer",)}, r"\['layer'\]; the parts .* are embedding, final_norm, head, lay"),
        ({"freeze": ("head",), "tie_word_embeddings": True}, "the parts of this model"),
        ({"freeze": ("layers",), "lora": LORA}, "adapters are in the layers, which freeze names"),
        ({"freeze": ("embedding", "final_norm", "head", "layers")}, "freeze names all parts"),
    ],
)
def test_training_nothing_or_what_is_not_there_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        trainable(dataclasses.replace(CONFIG, **{"lora": None, **fields}))


def test_without_the_adapter_the_arrays_are_the_same(fresh):
    off = without_adapter(fresh)
    assert has_adapter(fresh)
    assert not has_adapter(off)
    plain = Model(dataclasses.replace(CONFIG, lora=None))
    assert jax.tree.structure(off) == jax.tree.structure(plain.axes(), is_leaf=_is_names)
    kept = {id(x) for x in jax.tree.leaves(off)}
    assert kept <= {id(x) for x in jax.tree.leaves(fresh)}
    cut = MODEL.unstack(fresh)
    assert not has_adapter(without_adapter(cut))
    assert len(without_adapter(cut)["layers"]) == 2


def _is_names(x):
    return isinstance(x, tuple)


def test_an_untrained_adapter_changes_no_bit(fresh, trained):
    np.testing.assert_array_equal(hidden(fresh), hidden(without_adapter(fresh)))
    moved = np.abs(hidden(trained) - hidden(without_adapter(trained)))
    assert moved.max() > 0.05


def test_merged_is_the_adapter(trained):
    merged = merge_lora(trained, LORA)
    assert not has_adapter(merged)
    np.testing.assert_allclose(hidden(merged), hidden(trained), atol=1e-5)
    in_jit = jax.jit(lambda params: merge_lora(params, LORA))(trained)
    for x, y in zip(jax.tree.leaves(in_jit), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
    plain = merge_lora(merged, LORA)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(x, y)


def test_merging_rounds_once_and_knows_stacks_of_stacks():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    experts = {"kernel": draw(2, 3, 8, 6), "lora_a": draw(2, 3, 8, 3), "lora_b": draw(2, 3, 3, 6)}
    heads = {"kernel": draw(2, 4, 5, 6), "lora_a": draw(2, 4, 5, 3), "lora_b": draw(2, 3, 6)}
    merged = merge_lora({"up": experts, "o": heads}, LORA)
    wide = lambda x: np.asarray(x, np.float64)
    for name, given, einsum in (
        ("up", experts, "leir,lero->leio"),
        ("o", heads, "lnhr,lrd->lnhd"),
    ):
        change = np.einsum(einsum, wide(given["lora_a"]), wide(given["lora_b"]))
        exact = wide(given["kernel"]) + LORA.scale * change
        got = merged[name]["kernel"]
        assert got.dtype == jnp.bfloat16
        # Half a unit in the last of eight bits.
        assert np.all(np.abs(wide(got) - exact) <= 2.0**-8 * np.abs(exact) + 1e-5)


@pytest.mark.parametrize("donate", [False, True])
def test_merged_parameters_lie_where_they_lay(trained, mesh8, donate):
    places = tree_shardings(mesh8, MODEL.axes(), trained)
    placed = jax.device_put(jax.device_get(trained), places)
    expected = merge_lora(trained, LORA)
    merged = merge_lora(placed, LORA, donate=donate)
    for x, y, place in zip(
        jax.tree.leaves(merged),
        jax.tree.leaves(expected),
        jax.tree.leaves(without_adapter(places)),
        strict=True,
    ):
        assert x.sharding.is_equivalent_to(place, x.ndim)
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
    gone = [x.is_deleted() for x in jax.tree.leaves(without_adapter(placed))]
    assert all(gone) if donate else not any(gone)


@pytest.mark.parametrize(
    ("name", "einsum", "shape", "num_inputs"),
    [("q", "btd,dnh->btnh", (8, 3, 4), 1), ("o", "btnh,nhd->btd", (3, 4, 8), 2)],
)
def test_gradients_are_those_of_the_merged_kernel_by_the_chain_rule(
    name, einsum, shape, num_inputs
):
    """In float64: dA = scale dW B^T and dB = scale A^T dW, with dW at W + scale A B."""
    inputs, outputs = shape[:num_inputs], shape[num_inputs:]
    with jax.enable_x64(True):
        config = dataclasses.replace(CONFIG, dtype="float64", param_dtype="float64")
        axes = ("embed",) * len(shape)
        layer = Projection(config, einsum, shape, axes, num_inputs, name=name)
        rng = np.random.default_rng(0)
        x, like = rng.normal(size=(2, 5, *inputs)), rng.normal(size=(2, 5, *outputs))
        params = {
            "kernel": jnp.asarray(rng.normal(size=shape)),
            "lora_a": jnp.asarray(rng.normal(size=(*inputs, 3))),
            "lora_b": jnp.asarray(rng.normal(size=(3, *outputs))),
        }
        loss = lambda p: jnp.sum(jnp.tanh(layer.apply({"params": p}, jnp.asarray(x))) * like)
        of = jax.grad(loss)(params)

        merged = merge_lora({"q": params}, LORA)["q"]["kernel"]
        a, b = params["lora_a"].reshape(-1, 3), params["lora_b"].reshape(3, -1)
        exact = params["kernel"] + LORA.scale * (a @ b).reshape(shape)
        np.testing.assert_allclose(merged, exact, rtol=1e-12)
        slope = jax.grad(lambda w: jnp.sum(jnp.tanh(jnp.einsum(einsum, x, w)) * like))(exact)
        np.testing.assert_allclose(of["kernel"], slope, rtol=1e-10)
        slope = LORA.scale * slope.reshape(a.shape[0], b.shape[1])
        np.testing.assert_allclose(of["lora_a"].reshape(a.shape), slope @ b.T, rtol=1e-10)
        np.testing.assert_allclose(of["lora_b"].reshape(b.shape), a.T @ slope, rtol=1e-10)


def test_gradients_of_a_model_are_those_of_its_merged_kernels(trained):
    """Every adapter of every layer, at float32."""
    like = jnp.asarray(np.random.default_rng(2).normal(size=(2, 12, 32)), jnp.float32)
    slope = jax.jit(jax.grad(lambda params: jnp.sum(hidden(params) * like)))
    adapters, kernels = slope(trained)["layers"], slope(merge_lora(trained, LORA))["layers"]
    for part, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            given = trained["layers"][part][name]
            inputs = given["lora_a"].ndim - 2
            a = np.asarray(given["lora_a"], np.float64).reshape(2, -1, 3)
            b = np.asarray(given["lora_b"], np.float64).reshape(2, 3, -1)
            of_kernel = np.asarray(kernels[part][name]["kernel"], np.float64)
            of_kernel = LORA.scale * of_kernel.reshape(2, a.shape[1], b.shape[2])
            got = adapters[part][name]
            for leaf, wanted in (
                ("lora_a", of_kernel @ b.swapaxes(1, 2)),
                ("lora_b", a.swapaxes(1, 2) @ of_kernel),
            ):
                found = np.asarray(got[leaf]).reshape(wanted.shape)
                close = 2e-5 * np.abs(wanted).max()
                np.testing.assert_allclose(found, wanted, rtol=0, atol=close, err_msg=name + leaf)
            assert inputs == (2 if name == "o" else 1)
