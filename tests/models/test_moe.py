"""Experts: every way to compute them, the router's statistics, and the mesh axis `expert`."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from tpu_compiler import tpu_compiler

from jaxrl_reason.models import ModelConfig, experts
from jaxrl_reason.models.experts import Way, choose_way, make_layout, mix_experts
from jaxrl_reason.models.layers import PRODUCT
from jaxrl_reason.models.lora import LoRAConfig, merge_lora, without_adapter
from jaxrl_reason.models.moe import MoE, RouterStats, load_balancing_loss
from jaxrl_reason.sharding import MeshConfig, make_mesh, tree_shardings

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
)
WAYS = {
    "dense": Way("dense"),
    "ragged": Way("ragged", 2),
    "rows": Way("blocks"),
    "blocks": Way("blocks", 4),
    "chunks": Way("blocks", 4, 3),
    "one chunk": Way("blocks", 1, 33),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def given(tokens=11, num_experts=8, per_token=3, width=24, inner=16, seed=0):
    """Tokens, experts of which one has many and some have none, weights, and parameters."""
    rng = np.random.default_rng(seed)
    likely = np.array([6.0, 1, 1, 0.2, 1, 1, 1, 0.2])[:num_experts]
    chosen = [
        rng.choice(num_experts, per_token, replace=False, p=likely / likely.sum())
        for _ in range(tokens)
    ]
    shapes = {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    projections = {
        name: {"kernel": rng.normal(size=(num_experts, *shape)) / shape[0] ** 0.5}
        for name, shape in shapes.items()
    }
    return (
        rng.normal(size=(tokens, width)),
        np.asarray(chosen, np.int32),
        rng.uniform(0.1, 1, (tokens, per_token)),
        projections,
    )


def reference(x, chosen, weights, projections):
    """Token by token in NumPy."""
    gate, up, down = (projections[name]["kernel"] for name in ("gate", "up", "down"))
    out = np.zeros_like(x)
    for s in range(len(x)):
        for e, weight in zip(chosen[s], weights[s], strict=True):
            if e < len(gate):
                a = x[s] @ gate[e]
                out[s] += weight * ((a / (1 + np.exp(-a)) * (x[s] @ up[e])) @ down[e])
    return out


def plain(x, chosen, weights, projections):
    """The same for autodiff: all experts on all tokens."""
    gate, up, down = (projections[name]["kernel"] for name in ("gate", "up", "down"))
    all_experts = jnp.einsum(
        "esf,efd->sed",
        jax.nn.silu(jnp.einsum("sd,edf->esf", x, gate)) * jnp.einsum("sd,edf->esf", x, up),
        down,
    )
    factor = jnp.sum(jax.nn.one_hot(chosen, len(gate), dtype=x.dtype) * weights[..., None], axis=1)
    return jnp.sum(all_experts * factor[..., None], axis=1)


@functools.partial(jax.jit, static_argnames="way")
def mix(x, chosen, weights, projections, way):
    return mix_experts(x, chosen, weights, projections, activation=jax.nn.silu, way=way)


@every_way
def test_every_way_equals_token_by_token(way):
    with jax.enable_x64(True):
        x, chosen, weights, projections = given()
        chosen[0, 1] = 8  # nobody
        same = np.tile(np.asarray([7, 0, 3], np.int32), (len(x), 1))
        for experts_of in (chosen, same):
            got = mix(x, experts_of, weights, projections, way)
            wanted = reference(x, experts_of, weights, projections)
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


@every_way
def test_every_way_takes_a_single_token(way):
    x, chosen, weights, projections = given(tokens=1)
    single = jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), (x, weights, projections))
    got = mix(single[0], chosen, *single[1:], way)
    np.testing.assert_allclose(got, reference(x, chosen, weights, projections), atol=1e-5)


@jax.jit
def plain_gradients(x, chosen, weights, projections, direction):
    loss = lambda x, w, p: jnp.sum(plain(x, chosen, w, p) * direction)
    return jax.grad(loss, argnums=(0, 1, 2))(x, weights, projections)


@every_way
def test_every_way_has_the_gradients_of_the_plain_product(way):
    with jax.enable_x64(True):
        x, chosen, weights, projections = given()
        chosen[2] = 8
        direction = np.random.default_rng(1).normal(size=x.shape)
        loss = lambda x, w, p: jnp.sum(mix(x, chosen, w, p, way) * direction)
        got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weights, projections)
        wanted = plain_gradients(x, chosen, weights, projections, direction)
        near = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
        jax.tree.map(near, got, wanted)
        assert min(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(wanted)) > 0.1


lay_out = jax.jit(make_layout, static_argnums=(1, 2, 3))


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_layout_gives_every_assignment_a_row_in_a_block_of_its_expert(block, chunk):
    rng = np.random.default_rng(0)
    cases = [rng.integers(0, 6, (7, 2)), np.zeros((7, 2), int), np.full((7, 2), 5)]
    cases += [np.arange(14).reshape(7, 2) % 5, rng.integers(3, 9, (7, 2))]
    for chosen in cases:
        layout = lay_out(np.minimum(chosen, 5), 5, block, chunk)
        row, assignment, sizes, expert, count = map(np.asarray, layout)
        assert expert.size % chunk == 0
        assert row.max() <= assignment.size == expert.size * block
        some = (np.minimum(chosen, 5) < 5).reshape(-1)
        rows = row.reshape(-1)[some]
        assert len(set(rows)) == len(rows)
        np.testing.assert_array_equal(assignment[rows], np.flatnonzero(some))
        np.testing.assert_array_equal(expert[rows // block], chosen.reshape(-1)[some])
        np.testing.assert_array_equal(row.reshape(-1)[~some], assignment.size)
        assert np.sum(assignment < chosen.size) == len(rows)
        assert np.all(np.delete(assignment, rows) == chosen.size)
        numbers = np.bincount(np.minimum(chosen, 5).reshape(-1), minlength=6)[:5]
        np.testing.assert_array_equal(sizes, -(-numbers // block) * block)
        assert count * block == sizes.sum()


def test_unchosen_experts_and_padding_cost_nothing():
    # The loop ends with the last block in use.
    few = lay_out(np.asarray([[0, 1], [8, 8], [8, 8]]), 8, 2)
    many = lay_out(np.asarray([[0, 1], [2, 3], [4, 5]]), 8, 2)
    assert (int(few.count), int(many.count)) == (2, 6)


@pytest.mark.parametrize(
    ("platform", "tokens", "per_token", "num_experts", "way"),
    [
        ("cpu", 4096, 8, 128, Way("blocks", 64)),
        ("cpu", 512, 4, 64, Way("blocks", 16)),
        ("cpu", 1, 8, 128, Way("blocks", 1)),
        ("tpu", 4096, 8, 128, Way("ragged", 128)),
        ("gpu", 8192, 8, 128, Way("blocks", 128, 32)),
        ("gpu", 64, 8, 128, Way("dense")),
        ("gpu", 2, 8, 128, Way("blocks", 1, 16)),
        ("rocm", 512, 8, 128, Way("blocks", 16, 32)),
    ],
)
def test_the_way_suits_the_platform(monkeypatch, platform, tokens, per_token, num_experts, way):
    monkeypatch.setattr(experts, "platform_of", lambda mesh: platform)
    mesh = AbstractMesh((8,), ("data",))
    assert choose_way((tokens, per_token), num_experts, num_experts, mesh) == way
    # Arrays may be cut over devices that nobody told of.
    nobody = AbstractMesh((), ())
    assert choose_way((tokens, per_token), num_experts, num_experts, nobody) == Way("dense")


def test_the_way_is_chosen_for_what_a_device_computes(monkeypatch):
    seen = []

    def choose(*args):
        seen.append(args[:3])
        return Way("dense")

    monkeypatch.setattr(experts, "choose_way", choose)
    x, chosen, weights, projections = given(tokens=64)
    run = lambda *args: mix_experts(*args, activation=jax.nn.silu)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=4))):
        narrow = jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), (weights, projections))
        jax.eval_shape(run, jnp.asarray(x, jnp.float32), jnp.asarray(chosen), *narrow)
    # The tokens of four devices, for two of eight experts.
    assert seen == [((32, 3), 8, 2)]


# The module


def make(config=CONFIG, seed=0, way=None):
    module = MoE(config, way=way)
    x = jnp.zeros((1, 1, config.hidden_size), jnp.dtype(config.dtype))
    boxed = jax.jit(module.init)(jax.random.key(seed), x)["params"]
    return module, jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda b: hasattr(b, "names"))


def hidden(shape=(4, 6), seed=3, width=24):
    return jax.random.normal(jax.random.key(seed), (*shape, width))


def apply(module, params, x, mask=None):
    return jax.jit(lambda p, x, mask: module.apply({"params": p}, x, mask))(params, x, mask)


def test_parameters_have_the_shapes_and_axes_of_the_layer():
    boxed = jax.eval_shape(MoE(CONFIG).init, jax.random.key(0), hidden())["params"]
    is_box = lambda x: hasattr(x, "names")
    boxes = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=is_box)[0]
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (box.value.shape, box.names)
        for path, box in boxes
    }
    assert found == {
        "router/kernel": ((24, 8), ("embed", "router")),
        "gate/kernel": ((8, 24, 16), ("experts", "embed", "mlp")),
        "up/kernel": ((8, 24, 16), ("experts", "embed", "mlp")),
        "down/kernel": ((8, 16, 24), ("experts", "mlp", "embed")),
    }


def test_initial_kernels_have_the_variance_of_their_own_inputs():
    wide = dataclasses.replace(CONFIG, hidden_size=96, moe_intermediate_size=64)
    params = make(wide)[1]
    for name, inputs in (("gate", 96), ("up", 96), ("down", 64), ("router", 96)):
        assert float(jnp.std(params[name]["kernel"])) == pytest.approx(inputs**-0.5, rel=0.1)


@pytest.mark.parametrize("normalised", [True, False])
def test_padding_goes_nowhere_and_is_not_counted(normalised):
    module, params = make(dataclasses.replace(CONFIG, norm_topk_prob=normalised))
    x = hidden((2, 5))
    mask = jnp.asarray([[True] * 5, [True, True, False, False, False]])
    mixed, stats = apply(module, params, x, mask)
    whole, _ = apply(module, params, x)
    np.testing.assert_allclose(mixed[0], whole[0], atol=1e-6)
    np.testing.assert_allclose(mixed[1, :2], whole[1, :2], atol=1e-6)
    np.testing.assert_array_equal(mixed[1, 2:], 0)
    assert float(jnp.min(jnp.max(jnp.abs(whole), axis=-1))) > 1e-3
    alone = [apply(module, params, x[:1])[1], apply(module, params, x[1:, :2])[1]]
    summed = jax.tree.map(jnp.add, *alone)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), stats, summed)
    assert (float(stats.num_tokens), float(jnp.sum(stats.tokens_per_expert))) == (7, 21)


def test_gelu_is_another_function():
    module, params = make()
    other = MoE(dataclasses.replace(CONFIG, hidden_act="gelu_tanh"))
    x = hidden()
    a, b = apply(module, params, x)[0], apply(other, params, x)[0]
    assert float(jnp.max(jnp.abs(a - b))) > 0.01


def test_bfloat16_routes_and_counts_in_float32():
    narrow = dataclasses.replace(CONFIG, dtype="bfloat16")
    module, params = make(narrow)
    x = hidden((3, 7)).astype(jnp.bfloat16)
    mixed, stats = apply(module, params, x)
    wide, exact = apply(MoE(CONFIG), params, x.astype(jnp.float32))
    assert mixed.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in stats} == {jnp.dtype("float32")}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), stats, exact)
    np.testing.assert_allclose(mixed.astype(jnp.float32), wide, atol=0.02)


few_ways = pytest.mark.parametrize("way", [WAYS["dense"], WAYS["blocks"]], ids=["dense", "blocks"])


@few_ways
def test_layers_are_scanned_and_computed_again(way):
    module = MoE(CONFIG, way=way)
    params = jax.tree.map(lambda *xs: jnp.stack(xs), *(make(seed=s)[1] for s in range(2)))
    x = hidden((2, 5))
    named = jax.checkpoint_policies.save_only_these_names(PRODUCT)

    def gradients(remat):
        def loss(params):
            layer = lambda x, p: module.apply({"params": p}, x)
            body = lambda x, p: (x + layer(x, p)[0], layer(x, p)[1])
            out, stats = jax.lax.scan(remat(body), x, params)
            return jnp.mean(out**2) + load_balancing_loss(stats)

        return jax.jit(jax.grad(loss))(params)

    wanted = gradients(lambda body: body)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    for policy in (None, named):
        remat = functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
        jax.tree.map(near, gradients(remat), wanted)
    assert float(jnp.max(jnp.abs(wanted["router"]["kernel"]))) > 1e-3


LORA = LoRAConfig(r=3, lora_alpha=6.0, target_modules=("gate_proj", "down_proj"))


@few_ways
def test_adapters_of_experts_equal_merged_kernels(way):
    config = dataclasses.replace(CONFIG, lora=LORA)
    module, params = make(config, way=way)
    assert {name for name in params if "lora_a" in params[name]} == {"gate", "down"}
    assert params["gate"]["lora_a"].shape == (8, 24, 3)
    assert params["down"]["lora_b"].shape == (8, 3, 24)
    x = hidden()
    fresh = apply(module, params, x)[0]
    random = lambda name: jax.random.normal(jax.random.key(9), params[name]["lora_b"].shape)
    params = params | {n: params[n] | {"lora_b": random(n)} for n in ("gate", "down")}
    adapted = apply(module, params, x)[0]
    np.testing.assert_allclose(apply(module, without_adapter(params), x)[0], fresh, atol=1e-6)
    np.testing.assert_allclose(apply(module, merge_lora(params, LORA), x)[0], adapted, atol=2e-5)
    assert float(jnp.max(jnp.abs(adapted - fresh))) > 0.1


# The load-balancing loss


def stats_of(probabilities, mask, per_token):
    """By definition, in NumPy: probabilities [L, B, T, E]."""
    layers, _, _, num_experts = probabilities.shape
    counts, sums = np.zeros((layers, num_experts)), np.zeros((layers, num_experts))
    for layer in range(layers):
        for p in probabilities[layer][mask]:
            counts[layer, np.argsort(-p)[:per_token]] += 1
            sums[layer] += p
    return RouterStats(counts, sums, np.full(layers, float(mask.sum())))


def test_the_loss_is_that_of_its_definition_and_pulls_the_load_apart():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(3, 2, 5, 8))
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        mask = rng.uniform(size=(2, 5)) < 0.7
        stats = stats_of(probabilities, mask, 2)
        rows = 3.0 * mask.sum()
        wanted = 8 * np.sum(
            stats.tokens_per_expert.sum(0) / rows * stats.probabilities.sum(0) / rows
        )
        np.testing.assert_allclose(load_balancing_loss(stats), wanted, rtol=1e-12)
        whole = RouterStats(*(np.sum(leaf, axis=0) for leaf in stats))
        np.testing.assert_allclose(load_balancing_loss(whole), wanted, rtol=1e-12)
        even = RouterStats(np.full(8, 5.0), np.full(8, 2.5), np.asarray(20.0))
        np.testing.assert_allclose(load_balancing_loss(even), 2, rtol=1e-12)
        none = RouterStats(np.zeros(8), np.zeros(8), np.asarray(0.0))
        assert float(load_balancing_loss(none)) == 0


def test_descending_the_loss_balances_the_load():
    module, params = make()
    # All tokens alike but for a little: the router sends them to the same experts.
    x = 2 + 0.3 * hidden((4, 64))

    @jax.jit
    def step(params):
        def loss(params):
            stats = module.apply({"params": params}, x)[1]
            return load_balancing_loss(stats), stats

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        shares = stats.tokens_per_expert / stats.num_tokens
        return jax.tree.map(lambda p, g: p - 0.003 * g, params, gradient), value, jnp.max(shares)

    _, first, largest = step(params)
    for _ in range(20):
        params, value, share = step(params)
    assert float(largest) > 0.95
    assert float(first) > 5
    # At best 3 / 8 and 3.
    assert float(share) < 0.6
    assert float(value) < 3.7


# Parity with transformers


def qwen3_moe(normalised):
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    torch.manual_seed(0)
    block = Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=24,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=normalised,
        )
    ).eval()
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return torch, block


def from_qwen3_moe(weights):
    """Fused as in transformers 5: [E, 2 F, D] with the gate before the up projection."""
    get = lambda name: weights[name].numpy()
    gate, up = np.split(get("experts.gate_up_proj"), 2, axis=1)
    return {
        "router": {"kernel": get("gate.weight").T},
        "gate": {"kernel": gate.swapaxes(1, 2)},
        "up": {"kernel": up.swapaxes(1, 2)},
        "down": {"kernel": get("experts.down_proj").swapaxes(1, 2)},
    }


@few_ways
@pytest.mark.parametrize("normalised", [True, False])
def test_parity_with_transformers(way, normalised):
    torch, block = qwen3_moe(normalised)
    x = torch.randn(2, 9, 24, requires_grad=True)
    wanted = block(x)
    direction = torch.randn_like(wanted)
    (wanted * direction).sum().backward()

    module = MoE(dataclasses.replace(CONFIG, norm_topk_prob=normalised), way=way)
    params = from_qwen3_moe({k: v.detach() for k, v in block.state_dict().items()})
    loss = lambda p, x: jnp.sum(module.apply({"params": p}, x)[0] * direction.numpy())
    # Float32 on both sides.
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    near(apply(module, params, x.detach().numpy())[0], wanted.detach().numpy())
    of_params, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x.detach().numpy())
    assert min(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(of_params)) > 1e-2
    near(of_x, x.grad.numpy())
    jax.tree.map(near, of_params, from_qwen3_moe({k: p.grad for k, p in block.named_parameters()}))


@pytest.mark.parametrize("padded", [True, False])
def test_the_loss_is_that_of_transformers(padded):
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    xs = [hidden((3, 5), seed=s) for s in range(2)]
    mask = np.ones((3, 5), bool)
    if padded:
        mask[0, 3:] = mask[2, :2] = False
    layers = [make(seed=s) for s in range(2)]
    logits = tuple(
        torch.from_numpy(np.array(x.reshape(-1, 24) @ params["router"]["kernel"]))
        for x, (_, params) in zip(xs, layers, strict=True)
    )
    wanted = load_balancing_loss_func(
        logits, 8, 3, torch.from_numpy(mask).long() if padded else None
    )
    of_layer = lambda x, layer: apply(*layer, x, jnp.asarray(mask) if padded else None)[1]
    stats = [of_layer(x, layer) for x, layer in zip(xs, layers, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)
    np.testing.assert_allclose(load_balancing_loss(stacked), wanted.item(), rtol=1e-6)


# On a mesh


def on_mesh(sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    module, params = make()
    boxed = jax.eval_shape(module.init, jax.random.key(0), hidden())["params"]
    axes = jax.tree.map(lambda b: b.names, boxed, is_leaf=lambda b: hasattr(b, "names"))
    return mesh, params, jax.device_put(params, tree_shardings(mesh, axes, params))


def objective(way):
    module = MoE(CONFIG, way=way)
    named = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    run = jax.checkpoint(lambda p, *xs: module.apply({"params": p}, *xs), policy=named)

    def function(params, x, mask):
        mixed, stats = run(params, x, mask)
        return jnp.sum(jnp.sin(mixed)) + load_balancing_loss(stats), (mixed, stats)

    return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))


MESHES = [
    ({"data": 1, "expert": 4, "tensor": 2}, None),
    ({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, None),
    ({"data": 2, "fsdp": 2, "expert": 2}, Way("dense")),
    ({"data": 1, "expert": 8}, Way("ragged", 2)),
    pytest.param({"data": 1, "fsdp": 2, "expert": 4}, Way("blocks", 2, 3), marks=pytest.mark.slow),
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, None, marks=pytest.mark.slow),
]
name_mesh = lambda x: "-".join(f"{k}{v}" for k, v in x.items()) if isinstance(x, dict) else None


@pytest.mark.parametrize(("sizes", "way"), MESHES, ids=name_mesh)
def test_eight_devices_equal_one_and_experts_stay_where_they_are(sizes, way):
    mesh, params, cut = on_mesh(sizes)
    x, mask = hidden((8, 5)), jnp.arange(40).reshape(8, 5) % 6 > 0
    wanted = objective(Way("dense"))(params, x, mask)
    by_row = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    placed = cut, *jax.device_put((x, mask), by_row)
    with jax.set_mesh(mesh):
        compiled = objective(way).lower(*placed).compile()
    got = compiled(*placed)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(near, got, wanted)

    found = collectives(compiled.as_text())
    shapes = set().union(*found.values())
    here = 8 // sizes.get("expert", 1)
    # Tokens are gathered over `expert`, kernels and their gradients at most over other axes.
    assert {shape[0] for shape in shapes if len(shape) == 3 and 24 in shape[1:]} <= {here}
    assert not {(8, 5, 8), (40, 8)} & shapes  # probabilities
    assert "all-to-all" not in found
    if "expert" in sizes:
        rows = 40 // (sizes["data"] * sizes.get("fsdp", 1))
        assert (rows, 24) in found["all-gather"]
        assert (rows // sizes["expert"], 24) in found["reduce-scatter"]
    for name in ("gate", "down"):
        gradient = got[1][0][name]["kernel"]
        assert gradient.addressable_shards[0].data.shape[0] == here


@pytest.mark.parametrize("rows", [1, 6])
def test_rows_that_do_not_divide_are_computed_too(rows):
    mesh, params, cut = on_mesh({"data": 2, "expert": 2, "tensor": 2})
    x, mask = hidden((rows, 1)), jnp.ones((rows, 1), bool)
    wanted = objective(Way("dense"))(params, x, mask)
    with jax.set_mesh(mesh):
        got = objective(None)(cut, x, mask)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(near, got, wanted)


COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(program: str) -> dict[str, set[tuple[int, ...]]]:
    """Shapes of the results of every kind of collective."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for result, kind in COLLECTIVE.findall(program):
        for sizes in re.findall(r"\w+\[([\d,]*)\]", result):
            found.setdefault(kind, set()).add(tuple(map(int, filter(None, sizes.split(",")))))
    return found


def test_experts_run_within_a_shard_map_of_the_caller(mesh8):
    module, params = make()
    rows = PartitionSpec(("data", "fsdp", "tensor"))
    x = hidden((8, 3))

    @jax.jit
    @jax.shard_map(in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
    def run(params, x):
        return module.apply({"params": params}, x)[0]

    with jax.set_mesh(mesh8):
        got = run(params, x)
    np.testing.assert_allclose(got, apply(module, params, x)[0], atol=1e-6)


COMPILE_FOR_TPU = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxrl_reason.models.experts import mix_experts

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
axes = ("data", "fsdp", "expert", "tensor")
mesh = Mesh(np.asarray(devices).reshape(1, 1, 4, 1), axes, axis_types=(AxisType.Auto,) * 4)

def array(shape, dtype, *spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

x = array((2048, 256), jnp.bfloat16, "expert")
experts, weights = (array((2048, 4), dtype, "expert") for dtype in (jnp.int32, jnp.float32))
shapes = {"gate": (32, 256, 128), "up": (32, 256, 128), "down": (32, 128, 256)}
kernels = {name: {"kernel": array(s, jnp.bfloat16, "expert")} for name, s in shapes.items()}

def loss(x, experts, weights, kernels):
    mixed = mix_experts(x, experts, weights, kernels, activation=jax.nn.silu)
    return jnp.sum(mixed.astype(jnp.float32) ** 2)

with jax.set_mesh(mesh):
    gradients = jax.jit(jax.grad(loss, argnums=(0, 2, 3)))
    compiled = gradients.lower(x, experts, weights, kernels).compile()
print("tpu_custom_call" in compiled.as_text(), compiled.cost_analysis()["flops"])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    tpu_compiler() is None,
    reason="the compiler for TPUs is in libtpu, which is not installed (pip install libtpu)",
)
def test_experts_compile_for_a_tpu_without_a_product_over_all_of_them():
    settings = {
        "TPU_LIBRARY_PATH": str(tpu_compiler()),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_TPU],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    native, flops = done.stdout.split()
    assert native == "True"
    # Rows for the worst case, three products and three gradients; the loop's body counts once.
    rows = 2048 * 4 + 8 * 256
    assert float(flops) < 1.3 * 6 * 2 * rows * 256 * 128
