"""The vision encoder: parity with transformers' Qwen2.5-VL and Qwen3-VL, padding, memory, names."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxrl_reason.models import attention_equal
from jaxrl_reason.models.attention import attend
from jaxrl_reason.models.attention_equal import (
    attend_equal,
    attend_flash,
    attend_near,
    attend_some,
)
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.lora import LoRAConfig
from jaxrl_reason.models.vision import (
    init_vision,
    place_deep,
    place_features,
    splice_features,
    vision_axes,
    vision_features,
)
from jaxrl_reason.models.vision_config import VisionConfig
from jaxrl_reason.models.vision_names import (
    vision_config_from_hf,
    vision_config_to_hf,
    vision_from_hf,
    vision_tensors,
    vision_to_hf,
)
from jaxrl_reason.sharding import DEFAULT_RULES, tree_shardings

# Windows of 2 x 2 merged tokens, heads of 12 channels.
WINDOWED = VisionConfig(
    depth=4,
    hidden_size=36,
    intermediate_size=40,
    num_heads=3,
    out_hidden_size=20,
    patch_size=4,
    window_size=16,
    fullatt_block_indexes=(1, 3),
    tokens_per_second=2,
)
# A square of 7 x 7 positions, smaller than some images and larger than others.
DEEP = VisionConfig(
    depth=5,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    out_hidden_size=24,
    patch_size=4,
    hidden_act="gelu_tanh",
    norm="layer",
    gated_mlp=False,
    patch_bias=True,
    num_position_embeddings=49,
    deepstack_visual_indexes=(0, 3),
)
KINDS = pytest.mark.parametrize("v", [WINDOWED, DEEP], ids=["qwen2.5-vl", "qwen3-vl"])

# Slices of two frames, rows and columns of patches: three images and a video of 5 frames, whose
# last is then repeated; an image that no window divides and a video of 4 frames.
ROWS = (((1, 4, 6), (1, 12, 4), (1, 2, 2), (3, 6, 4)), ((1, 10, 6), (2, 4, 4)))
LENGTH = 168  # the first row has 148 patches, the second 92

features_of = jax.jit(vision_features, static_argnums=0)


def model_config(v, **changes):
    return ModelConfig(
        vocab_size=10,
        hidden_size=v.out_hidden_size,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        vision=v,
        **changes,
    )


def make(v, seed=0, **changes):
    config = model_config(v, **changes)
    params = jax.jit(init_vision, static_argnums=0)(config, jax.random.key(seed))
    # Unit scales and zero biases would hide what is applied twice or not at all.
    rng = np.random.default_rng(seed)
    bump = lambda x: np.asarray(x) + 0.1 * rng.normal(size=x.shape).astype(np.float32)
    return config, jax.tree.map(bump, params)


def layout(v, grids, length):
    """Coordinates, grids, segments and windows of a row's patches, by loops."""
    merge = v.spatial_merge_size
    side = (v.window_size or v.patch_size * merge) // (v.patch_size * merge)
    coords, sizes, segments, windows = [], [], [], []
    segment, numbers = 0, {}
    for t, h, w in grids:
        for _ in range(t):
            segment += 1
            inner = itertools.product(
                range(h // merge), range(w // merge), range(merge), range(merge)
            )
            for block_row, block_column, row, column in inner:
                coords.append((block_row * merge + row, block_column * merge + column))
                sizes.append((h, w))
                segments.append(segment)
                key = (segment, block_row // side, block_column // side)
                windows.append(numbers.setdefault(key, len(numbers) + 1))
    pad = lambda x: np.pad(
        np.asarray(x, np.int32), ((0, length - len(x)), *((0, 0),) * (np.ndim(x) - 1))
    )
    return pad(coords), pad(sizes), pad(segments), pad(windows)


def inputs_of(v, rows=ROWS, length=LENGTH, seed=0):
    patches = np.random.default_rng(seed).normal(size=(len(rows), length, v.patch_dim))
    for r, grids in enumerate(rows):
        patches[r, sum(t * h * w for t, h, w in grids) :] = 0
    names = ("patch_coords", "patch_grids", "patch_segments", "patch_windows")
    arrays = zip(*(layout(v, grids, length) for grids in rows), strict=True)
    ids = {name: np.stack(x) for name, x in zip(names, arrays, strict=True)}
    return {"patches": patches.astype(np.float32), **ids}


def merged_lengths(v, rows=ROWS):
    return [sum(t * h * w for t, h, w in grids) // v.merge_unit for grids in rows]


@functools.cache
def reference(v):
    """Transformers' encoder with random parameters, and ours with the same."""
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    encoder = hf_encoder(v).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    weights = {f"visual.{name}": x.numpy() for name, x in encoder.state_dict().items()}
    return encoder, weights, vision_from_hf(v, weights.__getitem__)


def hf_encoder(v):
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

    values = vision_config_to_hf(v)
    if values["model_type"] == "qwen2_5_vl_vision":
        made, encoder = qwen2_5.Qwen2_5_VLVisionConfig, "Qwen2_5_VisionTransformerPretrainedModel"
        return getattr(qwen2_5, encoder)(made(**values))
    return qwen3.Qwen3VLVisionModel(qwen3.Qwen3VLVisionConfig(**values))


def hf_features(encoder, inputs, rows):
    """Merged features of every row, and lists of those of deepstack levels."""
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    merged, deep = [], []
    for patches, grids in zip(inputs["patches"], rows, strict=True):
        count = sum(t * h * w for t, h, w in grids)
        out = encoder(torch.from_numpy(patches[:count]), torch.tensor(grids))
        merged.append(out.pooler_output)
        deep.append(getattr(out, "deepstack_features", None) or [])
    return merged, deep


@KINDS
def test_features_equal_those_of_transformers(v):
    encoder, _, params = reference(v)
    inputs = inputs_of(v)
    merged, deep = hf_features(encoder, inputs, ROWS)
    ours = features_of(model_config(v), params, inputs)
    levels = len(v.deepstack_visual_indexes)
    assert ours.merged.shape == (2, LENGTH // 4, v.out_hidden_size)
    assert (ours.deep is None) if not levels else ours.deep.shape == (levels, *ours.merged.shape)
    for r, count in enumerate(merged_lengths(v)):
        wanted = [merged[r], *deep[r]]
        got = [ours.merged[r, :count], *(ours.deep[k, r, :count] for k in range(levels))]
        for a, b in zip(got, wanted, strict=True):
            # Float32 on both sides, sums in another order. Features are of size 1.
            np.testing.assert_allclose(a, b.detach().numpy(), atol=2e-5, rtol=0)
            assert np.std(a) > 0.1


@KINDS
def test_gradients_equal_those_of_transformers(v):
    encoder, _, params = reference(v)
    inputs = inputs_of(v)
    rng = np.random.default_rng(1)
    counts = merged_lengths(v)
    levels = 1 + len(v.deepstack_visual_indexes)
    weights = rng.normal(size=(levels, 2, LENGTH // 4, v.out_hidden_size)).astype(np.float32)
    for r, count in enumerate(counts):
        weights[:, r, count:] = 0

    def loss(params):
        out = vision_features(model_config(v), params, inputs)
        stacked = out.merged[None]
        if out.deep is not None:
            stacked = jnp.concatenate([stacked, out.deep])
        return jnp.sum(stacked * weights)

    torch = pytest.importorskip("torch")
    encoder.zero_grad()
    merged, deep = hf_features(encoder, inputs, ROWS)
    total = sum(
        torch.sum(x * torch.from_numpy(weights[k, r, :count]))
        for r, count in enumerate(counts)
        for k, x in enumerate([merged[r], *deep[r]])
    )
    total.backward()
    theirs = {f"visual.{name}": p.grad.numpy() for name, p in encoder.named_parameters()}
    wanted = vision_from_hf(v, theirs.__getitem__)
    got = jax.jit(jax.grad(loss))(params)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        size = np.max(np.abs(b))
        assert size > 1e-3, path
        np.testing.assert_allclose(a, b, atol=1e-4 * size, rtol=0, err_msg=str(path))


@KINDS
def test_names_cover_both_sides_and_round_trips_are_the_identity(v):
    _, weights, params = reference(v)
    assert {t.name: t.shape for t in vision_tensors(v)} == {n: x.shape for n, x in weights.items()}
    shapes = jax.eval_shape(functools.partial(init_vision, model_config(v)), jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    back = dict(vision_to_hf(v, params))
    assert back.keys() == weights.keys()
    for name, x in weights.items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)
    again = vision_from_hf(v, back.__getitem__)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_names_keep_bits_of_bfloat16_and_refuse_other_shapes():
    _, weights, _ = reference(WINDOWED)
    small = {name: x.astype(ml_dtypes.bfloat16) for name, x in weights.items()}
    params = vision_from_hf(WINDOWED, small.__getitem__)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    for name, x in vision_to_hf(WINDOWED, params):
        np.testing.assert_array_equal(x.view(np.uint16), small[name].view(np.uint16))
    wrong = weights | {"visual.blocks.2.attn.qkv.weight": np.zeros((36, 108), np.float32)}
    with pytest.raises(ValueError, match=r"blocks\.2\.attn\.qkv\.weight has shape \(36, 108\)"):
        vision_from_hf(WINDOWED, wrong.__getitem__)


@KINDS
def test_configurations_survive_the_way_to_transformers_and_back(v):
    values = vision_config_to_hf(v)
    assert vision_config_from_hf(values) == v
    reference(v)  # skips without torch
    assert vision_config_from_hf(hf_encoder(v).config.to_dict()) == v
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        vision_config_from_hf(values | {"hidden_act": "relu"})
    with pytest.raises(ValueError, match="vision encoder 'siglip' is unknown"):
        vision_config_from_hf(values | {"model_type": "siglip"})
    with pytest.raises(ValueError, match="no encoder like"):
        vision_config_to_hf(dataclasses.replace(v, patch_bias=not v.patch_bias))


@KINDS
def test_padding_and_other_rows_change_nothing(v):
    config, params = make(v)
    inputs = inputs_of(v)
    whole = features_of(config, params, inputs)
    padding = inputs["patch_segments"][..., None] == 0
    noise = np.random.default_rng(5).normal(size=inputs["patches"].shape).astype(np.float32)
    noisy = inputs | {
        "patches": np.where(padding, noise, inputs["patches"]),
        "patch_coords": np.where(padding, 3, inputs["patch_coords"]),
    }
    other = features_of(config, params, noisy)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((whole, other)))
    for r, count in enumerate(merged_lengths(v)):
        row = {name: x[r : r + 1, : count * v.merge_unit] for name, x in inputs.items()}
        alone = features_of(config, params, row)
        for a, b, c in zip(*map(jax.tree.leaves, (whole, other, alone)), strict=True):
            a, b = (x[..., r, :count, :] for x in (a, b))
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(a, c[..., 0, :, :], atol=1e-5)


def test_a_row_of_padding_has_finite_gradients():
    for v in (WINDOWED, DEEP):
        config, params = make(v)
        inputs = jax.tree.map(np.zeros_like, inputs_of(v))
        loss = lambda p, v=v, i=inputs, c=config: jnp.sum(vision_features(c, p, i).merged)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_numbers_of_windows_and_segments_have_no_meaning_of_their_own():
    config, params = make(WINDOWED)
    inputs = inputs_of(WINDOWED)
    renamed = dict(inputs)
    for name in ("patch_windows", "patch_segments"):
        ids = inputs[name]
        renamed[name] = np.where(ids > 0, 7 * (ids.max() + 1 - ids), 0).astype(np.int32)
    a, b = (features_of(config, params, x).merged for x in (inputs, renamed))
    np.testing.assert_array_equal(a, b)
    joined = inputs | {"patch_windows": inputs["patch_segments"]}
    assert np.max(np.abs(a - features_of(config, params, joined).merged)) > 0.01


@KINDS
def test_some_queries_at_a_time_give_what_all_together_give(v, monkeypatch):
    config, params = make(v)
    inputs = inputs_of(v)

    def run():
        loss = lambda p: jnp.sum(jnp.sin(vision_features(config, p, inputs).merged))
        return jax.jit(jax.value_and_grad(loss))(params)

    whole = run()
    monkeypatch.setattr(attention_equal, "SCORES", 1)
    monkeypatch.setattr(attention_equal, "FEWEST_QUERIES", 40)  # does not divide 168
    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_no_array_has_a_score_for_every_pair_of_patches_of_a_long_row():
    length, heads, width = 4096, 2, 4
    x = jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    loss = lambda q, k, v, ids: jnp.sum(attend_equal(q, k, v, ids))
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, x, x, ids)
    shapes = re.findall(r"\b(?:f32|bool|i32)\[([\d,]+)\]", str(jaxpr))
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest == heads * attention_equal.SCORES < length**2


@pytest.mark.parametrize(("length", "width"), [(168, 12), (512, 80)])
def test_the_kernel_for_tpus_computes_what_the_plain_way_does(length, width):
    rng = np.random.default_rng(0)
    q, k, v, gradient = rng.normal(size=(4, 2, length, 2, width)).astype(np.float32)
    # Ids in any order, padding among them.
    ids = jnp.asarray(rng.integers(0, 6, (2, length)), jnp.int32)
    plain = lambda q, k, v, ids: attend(q, k, v, ids[:, :, None] == ids[:, None, :])

    def run(function):
        out, pull = jax.vjp(lambda *given: function(*given, ids), q, k, v)
        return out, *pull(gradient)

    with pltpu.force_tpu_interpret_mode():
        got = run(functools.partial(attend_near, attend_flash))
    for a, b in zip(got, run(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.max(np.abs(b))))


def frames(length, size, end):
    """Ids of frames of `size` patches, and padding behind `end`."""
    ids = 1 + np.arange(length) // size
    return np.where(np.arange(length) < end, ids, 0)


def windows(length, size, end):
    """Ids of windows two of which share every `2 * size` patches, one after the other."""
    ids = 1 + 2 * (np.arange(length) // (2 * size)) + np.arange(length) // 8 % 2
    return np.where(np.arange(length) < end, ids, 0)


@pytest.mark.parametrize("attend_given", [attend_flash, attend_some])
@pytest.mark.parametrize(
    ("ids", "way"),
    [
        ([frames(1100, 100, 850), frames(1100, 40, 300)], 0),
        ([windows(1100, 60, 1100), frames(1100, 128, 1088)], 0),
        ([frames(1100, 100, 850), frames(1100, 250, 1100)], 1),
        ([np.where(np.arange(1100) % 890 < 5, 9, frames(1100, 100, 850)), frames(1100, 9, 9)], 2),
    ],
)
def test_patches_that_lie_together_see_their_neighbours_alone(monkeypatch, ids, way, attend_given):
    monkeypatch.setattr(attention_equal, "NEAR", (128, 256))
    monkeypatch.setattr(attention_equal, "SCORES", 384 * 50)  # does not divide a part
    monkeypatch.setattr(attention_equal, "FEWEST_QUERIES", 16)
    ids = jnp.asarray(np.stack(ids), jnp.int32)
    assert attention_equal._ways(attend_given, ids)[0] == way
    rng = np.random.default_rng(0)
    q, k, v, gradient = rng.normal(size=(4, 2, 1100, 1, 8)).astype(np.float32)
    gradient *= np.asarray(ids > 0)[:, :, None, None]
    plain = lambda q, k, v, ids: attend(q, k, v, ids[:, :, None] == ids[:, None, :])

    def run(function):
        out, pull = jax.vjp(lambda *given: function(*given, ids), q, k, v)
        return np.where(gradient != 0, out, 0), *pull(gradient)

    with pltpu.force_tpu_interpret_mode():
        got = run(functools.partial(attend_near, attend_given))
    for a, b in zip(got, run(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.max(np.abs(b))))


def program(v, function=vision_features):
    config = model_config(v)
    params = jax.eval_shape(functools.partial(init_vision, config), jax.random.key(0))
    inputs = inputs_of(v, ROWS[1:], 96)
    return jax.jit(function, static_argnums=0).lower(config, params, inputs).as_text()


@KINDS
def test_a_block_is_compiled_once_for_all_layers(v):
    few, many = (program(dataclasses.replace(v, depth=depth)) for depth in (v.depth, 24))
    # Projections of a block, two products of attention, the patches' embedding, a merger's MLP.
    products = (7 if v.gated_mlp else 6) + 2 + 1 + 2 + (2 if v.deepstack_visual_indexes else 0)
    assert few.count("dot_general") == many.count("dot_general") == products
    assert abs(len(few) - len(many)) < 0.02 * len(few)


def saved(v, remat):
    """Shapes that the backward pass keeps of every block, of the activations of one patch."""
    config = model_config(v, remat=remat)
    params = jax.eval_shape(functools.partial(init_vision, config), jax.random.key(0))
    inputs = inputs_of(v, ROWS[1:], 96)
    loss = lambda p: jnp.sum(vision_features(config, p, inputs).merged)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    scan = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    shapes = [x.aval.shape for x in scan.outvars]
    return sorted(s[3:] for s in shapes if s[0] == v.depth and s[1:3] == (1, 96))


@KINDS
def test_the_backward_pass_keeps_products_only(v):
    d, f, heads = v.hidden_size, v.intermediate_size, (v.num_heads, v.head_dim)
    # The block's input and the output of attention's projection; q, k, v and the mixed values; MLP.
    wanted = [(d,)] * 2 + [heads] * 4 + [(f,)] * (2 if v.gated_mlp else 1)
    assert saved(v, "dots") == sorted(wanted)
    assert saved(v, "full") == [(d,)]
    assert len(saved(v, "none")) > 2 * len(wanted)


def test_remat_changes_no_gradient():
    config, params = make(DEEP)
    inputs = inputs_of(DEEP, ROWS[1:], 96)

    def gradient(config):
        loss = lambda p: sum(jnp.mean(x**2) for x in vision_features(config, p, inputs))
        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    some, every, none = (
        gradient(dataclasses.replace(config, remat=remat)) for remat in ("dots", "full", "none")
    )
    for a, b, c in zip(some, every, none, strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(b, c, rtol=1e-4, atol=1e-6)


@KINDS
def test_bfloat16_compute_stays_near_float32(v):
    config, params = make(v)
    inputs = inputs_of(v)
    wide = features_of(config, params, inputs)
    small = features_of(dataclasses.replace(config, dtype="bfloat16"), params, inputs)
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(wide), strict=True):
        assert a.dtype == jnp.bfloat16
        # bfloat16 has 8 bits; sums of 30 to 150 rounded numbers through 4 or 5 blocks.
        error = np.abs(a.astype(np.float32) - b) / np.std(b)
        assert np.mean(error) < 0.02
        assert np.max(error) < 0.25


@KINDS
def test_every_parameter_has_an_axis_name_for_every_dimension(v):
    config = model_config(v)
    shapes = jax.eval_shape(functools.partial(init_vision, config), jax.random.key(0))
    is_names = lambda x: isinstance(x, tuple)
    axes = vision_axes(config)
    ranks = jax.tree.map(len, axes, is_leaf=is_names)
    assert ranks == jax.tree.map(lambda x: len(x.shape), shapes)
    names = set(itertools.chain(*jax.tree.leaves(axes, is_leaf=is_names)))
    assert names <= DEFAULT_RULES.rules.keys()
    assert sum(x.size for x in jax.tree.leaves(shapes)) == v.num_parameters


def test_cut_over_devices_features_are_the_same(mesh8):
    v = dataclasses.replace(DEEP, deepstack_visual_indexes=(2,))
    config, params = make(v)
    inputs = inputs_of(v, ROWS * 2)
    shardings = tree_shardings(mesh8, vision_axes(config), params)
    rows = jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec(("data", "fsdp")))
    cut = features_of(config, jax.device_put(params, shardings), jax.device_put(inputs, rows))
    for a, b in zip(cut, features_of(config, params, inputs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_cut_over_devices_no_device_sees_all_rows():
    """The compiler would cut patches by their width, as `fsdp` cuts parameters, and gather rows."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=auto)
    v = dataclasses.replace(DEEP, hidden_size=64, num_heads=4, intermediate_size=128)
    config = model_config(v, remat="full")
    params = jax.eval_shape(functools.partial(init_vision, config), jax.random.key(0))
    shardings = tree_shardings(mesh, vision_axes(config), params)
    some = inputs_of(v, ROWS[1:], 96)
    inputs = jax.tree.map(lambda x: np.concatenate([x] * 8), some)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    on_mesh = lambda tree, sharding: jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding
    )
    loss = lambda p, x: sum(jnp.sum(jnp.sin(y)) for y in vision_features(config, p, x))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
        text = (
            step.lower(on_mesh(params, shardings), on_mesh(inputs, dict.fromkeys(inputs, place)))
            .compile()
            .as_text()
        )
    rows = {int(n) for n in re.findall(r"\[(\d+),96,", text)}
    assert 2 in rows
    assert 8 not in rows


PUBLISHED = {
    "Qwen2.5-VL-7B": VisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=3584,
        window_size=112,
        fullatt_block_indexes=(7, 15, 23, 31),
        tokens_per_second=2,
    ),
    "Qwen3-VL-8B": VisionConfig(
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        out_hidden_size=4096,
        patch_size=16,
        hidden_act="gelu_tanh",
        norm="layer",
        gated_mlp=False,
        patch_bias=True,
        num_position_embeddings=2304,
        deepstack_visual_indexes=(8, 16, 24),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_transformers(name):
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    v = PUBLISHED[name]
    with torch.device("meta"):
        theirs = {f"visual.{n}": tuple(p.shape) for n, p in hf_encoder(v).named_parameters()}
    assert {t.name: t.shape for t in vision_tensors(v)} == theirs
    shapes = jax.eval_shape(functools.partial(init_vision, model_config(v)), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == v.num_parameters
    assert sum(np.prod(shape) for shape in theirs.values()) == v.num_parameters


def test_adapters_of_the_decoder_are_not_for_the_encoder():
    config, params = make(WINDOWED, lora=LoRAConfig(r=2, lora_alpha=4.0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, make(WINDOWED)[1])
    inputs = inputs_of(WINDOWED, ROWS[1:], 96)
    plain = features_of(model_config(WINDOWED), params, inputs)
    np.testing.assert_array_equal(features_of(config, params, inputs).merged, plain.merged)


def test_features_take_the_places_of_visual_tokens():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(2, 6, 3)).astype(np.float32)
    features = rng.normal(size=(2, 4, 3)).astype(np.float32)
    index = np.asarray([[-1, 0, 1, -1, 2, -1], [3, 2, -1, -1, 0, 0]], np.int32)
    spliced, placed = splice_features(embeddings, features, index), place_features(features, index)
    for r, t in np.ndindex(2, 6):
        visual = index[r, t] >= 0
        np.testing.assert_array_equal(
            spliced[r, t], features[r, index[r, t]] if visual else embeddings[r, t]
        )
        np.testing.assert_array_equal(placed[r, t], features[r, index[r, t]] if visual else 0)
    deep = rng.normal(size=(3, 2, 4, 3)).astype(np.float32)
    for of_level, level in zip(place_deep(deep, index), deep, strict=True):
        np.testing.assert_array_equal(of_level, place_features(level, index))
    assert splice_features(embeddings.astype(jnp.bfloat16), features, index).dtype == jnp.bfloat16
    beyond = splice_features(embeddings, features, np.where(index == 3, 4, index))
    assert np.all(np.isnan(beyond[1, 0]))
    assert np.sum(np.isnan(beyond)) == 3


def test_gradients_of_features_are_those_of_their_tokens():
    rng = np.random.default_rng(0)
    embeddings, weights = (rng.normal(size=(1, 5, 2)).astype(np.float32) for _ in range(2))
    features = rng.normal(size=(1, 3, 2)).astype(np.float32)
    index = np.asarray([[-1, 1, 1, 0, -1]], np.int32)
    loss = lambda e, f: jnp.sum(splice_features(e, f, index) * weights)
    of_embeddings, of_features = jax.grad(loss, argnums=(0, 1))(embeddings, features)
    text = (index < 0)[..., None]
    np.testing.assert_array_equal(of_embeddings, np.where(text, weights, 0))
    wanted = np.stack([weights[0, 3], weights[0, 1] + weights[0, 2], np.zeros(2)])
    np.testing.assert_allclose(of_features[0], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"num_heads": 6}, "must be a multiple of 4 x num_heads=24"),
        ({"norm": "batch"}, "norm='batch' is unknown; one of rms, layer"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is unknown"),
        ({"fullatt_block_indexes": (1, 4)}, r"\(1, 4\) must increase and lie in 0\.\.3"),
        ({"deepstack_visual_indexes": (2, 1)}, r"\(2, 1\) must increase"),
        ({"window_size": None}, "needs a window_size"),
        ({"window_size": 7}, "window_size=7 must be at least .*=8"),
        ({"num_position_embeddings": 50}, "=50 must be a square"),
        ({"num_position_embeddings": -1}, "=-1 must be a square"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(WINDOWED, **change)


def test_lists_of_a_file_become_a_configuration_that_hashes():
    listed = dataclasses.replace(WINDOWED, fullatt_block_indexes=[1, 3])
    assert hash(listed) == hash(WINDOWED)
    assert WINDOWED.full_layers == (False, True, False, True)
    assert DEEP.full_layers == (True,) * 5


def test_inputs_of_another_model_are_refused():
    config, params = make(DEEP)
    inputs = inputs_of(DEEP)
    with pytest.raises(ValueError, match="no vision part"):
        vision_features(dataclasses.replace(config, vision=None), params, inputs)
    without = {name: x for name, x in inputs.items() if name != "patch_grids"}
    with pytest.raises(ValueError, match=r"lack \['patch_grids'\]"):
        vision_features(config, params, without)
    with pytest.raises(ValueError, match=r"expected \[rows, patches, 96\] with a multiple of 4"):
        vision_features(config, params, inputs | {"patches": inputs["patches"][:, :, :48]})
    with pytest.raises(ValueError, match=r"patches has shape \(2, 167, 96\)"):
        vision_features(config, params, inputs | {"patches": inputs["patches"][:, :167]})
