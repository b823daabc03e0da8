"""Tokens of a row cut over the mesh axis `context`: exact, and with less memory on each device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_reason.models import Model, ModelConfig
from jaxrl_reason.models.attention_rows import choose_backend
from jaxrl_reason.sharding import (
    MeshConfig,
    OnMesh,
    batch_axes,
    make_mesh,
    place_batch,
    tree_shardings,
)
from jaxrl_reason.steps.forward import target_logprobs

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
SLIDING = {"sliding_window": 5, "layer_types": ("sliding_attention", "full_attention")}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MESHES = {
    "beside data": {"data": 2, "context": 4},
    "beside fsdp and tensor": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
    "more than key heads": {"data": 1, "context": 8},
}


def rows(length, count=8, seed=0):
    """Rows of a document, of a prompt with two continuations, and of padding."""
    rng = np.random.default_rng(seed)
    slot = np.broadcast_to(np.arange(length), (count, length))
    first, prompt, split, end = length // 4, length // 2, 3 * length // 4, length - 2
    segments = np.where(slot < first, 1, np.where(slot < end, 2, 0))
    branches = np.where((slot < prompt) | (slot >= end), 0, np.where(slot < split, 1, 2))
    positions = np.where(slot < first, slot, slot - first)
    positions = np.where(branches == 2, positions - (split - prompt), positions)
    targets = np.tile(np.arange(prompt, end), (count, 1))
    return {
        "tokens": rng.integers(0, 64, (count, length)).astype(np.int32),
        "positions": np.where(segments > 0, positions, 0).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "branch_ids": branches.astype(np.int32),
        "targets": rng.integers(0, 64, targets.shape).astype(np.int32),
        "sources": np.where(targets == split, prompt - 1, targets - 1).astype(np.int32),
        "completion_mask": np.ones(targets.shape, bool),
    }


def losses(model):
    """Log-probs of the targets, and gradients of a sum in which every one has its own weight."""

    def loss(params, batch):
        found, _ = target_logprobs(model, params, batch, temperature=1.0, chunk_size=16)
        weights = jnp.cos(batch["targets"].astype(found.dtype))
        return jnp.sum(found * weights), found

    return jax.value_and_grad(loss, has_aux=True)


def on_mesh(model, mesh, params, batch):
    shardings = tree_shardings(mesh, model.axes(), params)
    compute = OnMesh(jax.jit(losses(model), out_shardings=(None, shardings)), mesh)
    return compute(jax.device_put(params, shardings), place_batch(batch, mesh))


@pytest.mark.parametrize("length", [45, 203])
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_values_and_gradients_are_those_of_one_device(sizes, length):
    model = Model(CONFIG)
    params, batch = jax.jit(model.init)(jax.random.key(0)), rows(length)
    (_, expected), gradients = jax.jit(losses(model))(params, batch)
    (_, found), found_gradients = on_mesh(model, make_mesh(MeshConfig(**sizes)), params, batch)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(found_gradients), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-5 * float(jnp.max(jnp.abs(x))) + 1e-7)


@pytest.mark.parametrize("changes", [SLIDING, EXPERTS, {"attention": "plain"}])
def test_other_layers_too(changes):
    model = Model(dataclasses.replace(CONFIG, **changes))
    params, batch = jax.jit(model.init)(jax.random.key(0)), rows(80)
    (_, expected), gradients = jax.jit(losses(model))(params, batch)
    mesh = make_mesh(MeshConfig(data=1, expert=2, context=4))
    (_, found), found_gradients = on_mesh(model, mesh, params, batch)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(found_gradients), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-5 * float(jnp.max(jnp.abs(x))) + 1e-7)


def test_features_of_images_among_the_tokens():
    model, rng = Model(CONFIG), np.random.default_rng(1)
    params, batch = jax.jit(model.init)(jax.random.key(0)), rows(45)
    index = np.full((8, 45), -1, np.int32)
    index[:, 12:20] = np.arange(8)
    batch["visual_index"] = index
    batch["features"] = rng.normal(size=(8, 8, 32)).astype(np.float32)
    batch["deep_features"] = rng.normal(size=(8, 1, 8, 32)).astype(np.float32)

    def hidden(params, batch):
        names = ("tokens", "positions", "segment_ids", "branch_ids")
        visual = {name: batch[name] for name in ("visual_index", "features", "deep_features")}
        tokens, *rest = (batch[name] for name in names)
        return model.forward(
            params, tokens, visual=visual, **dict(zip(names[1:], rest, strict=True))
        )

    expected = jax.jit(hidden)(params, batch)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=4))
    placed = jax.device_put(params, tree_shardings(mesh, model.axes(), params))
    found = OnMesh(jax.jit(hidden), mesh)(placed, place_batch(batch, mesh))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_heads_that_do_not_divide_leave_the_plain_backend():
    mesh = make_mesh(MeshConfig(data=1, context=8)).abstract_mesh
    odd = dataclasses.replace(CONFIG, num_attention_heads=6, attention="blockwise")
    with pytest.raises(ValueError, match="6 heads do not divide over 8 devices along tensor and"):
        choose_backend(odd, (8, 256), mesh)
    auto = dataclasses.replace(odd, attention="auto")
    assert choose_backend(auto, (8, 256), mesh) == "plain"
    model = Model(auto)
    params, batch = jax.jit(model.init)(jax.random.key(0)), rows(48)
    (_, expected), _ = jax.jit(losses(model))(params, batch)
    (_, found), _ = on_mesh(model, make_mesh(MeshConfig(data=1, context=8)), params, batch)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_device_holds_its_part_of_the_tokens():
    """Of one row with 512 tokens an eighth of what one device needs, and a little more."""
    model = Model(dataclasses.replace(CONFIG, num_hidden_layers=4, remat="full"))
    like = lambda tree, place: jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, place
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.eval_shape(lambda: rows(512, count=1))

    def temporaries(mesh):
        params = tree_shardings(mesh, model.axes(), shapes)
        by_row = NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))
        arguments = like(shapes, params), {k: like(x, by_row) for k, x in batch.items()}
        compute = OnMesh(jax.jit(losses(model), out_shardings=(None, params)), mesh)
        return compute.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    one = temporaries(make_mesh(MeshConfig(), jax.devices()[:1]))
    eight = temporaries(make_mesh(MeshConfig(data=1, context=8)))
    assert eight < one / 4
