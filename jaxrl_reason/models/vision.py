"""The vision encoder: patches of images and videos to features in the decoder's width.

Pure functions of a `ModelConfig` with a `vision` part and of the parameters `params["vision"]`. The
patches of a row's images and videos lie one after the other, those of a merged feature side by
side, padding at the end. Integer ids say who sees whom: the patches of a temporal slice share a
segment, those of a window a window number, and attention is among equal ids. So all blocks are
alike and run under one `lax.scan`. (Hugging Face reorders patches by window; results are the same.)

Einsum alphabet: R rows, P patches, C numbers of a patch, D width, F MLP width, N heads,
H head size, M merged features, K deepstack levels, T tokens.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxrl_reason.models.attention_equal import attend_equal
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.layers import PRODUCT, Projection, remat
from jaxrl_reason.models.mesh import on_every_device
from jaxrl_reason.models.rotary import Rotation, rotate
from jaxrl_reason.models.vision_config import VisionConfig

Params = dict[str, Any]
Inputs = Mapping[str, Array]
"""`patches` [R P C] float, and int32 `patch_coords` [R P 2] (row and column of the patch in its
image), `patch_grids` [R P 2] (rows and columns of that image), `patch_segments` and `patch_windows`
[R P], where 0 is padding. Grids and windows are read where the model has positions and windows."""

_EPS = 1e-6
_STACKED = ("layers", "deepstack")


class VisionFeatures(NamedTuple):
    """What the decoder takes from images and videos, in the compute dtype."""

    merged: Float[Array, "R M D"]
    """Stand for the embeddings of visual tokens."""
    deep: Float[Array, "K R M D"] | None
    """Added to the hidden states of visual tokens after each of the first K decoder layers."""


def vision_of(config: ModelConfig) -> VisionConfig:
    """The configuration of the encoder.

    Raises:
        ValueError: the model has none.
    """
    if config.vision is None:
        raise ValueError("this model reads no images: its configuration has no vision part")
    return config.vision


class VisionNorm(nn.Module):
    """RMSNorm, or LayerNorm (arXiv 1607.06450), over the last axis in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        centred = vision_of(self.config).norm == "layer"
        wide = x.astype(jnp.float32)
        if centred:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(mean_square + _EPS)
        wide = wide * self._vector("scale", nn.initializers.ones, x)
        if centred:
            wide = wide + self._vector("bias", nn.initializers.zeros, x)
        return wide.astype(x.dtype)

    def _vector(self, name: str, init, x: Array) -> Array:
        boxed: Any = nn.with_partitioning(init, ("embed_vector",))
        vector = self.param(name, boxed, (x.shape[-1],), jnp.dtype(self.config.param_dtype))
        return jnp.expand_dims(vector.astype(jnp.float32), tuple(range(x.ndim - 1)))


class VisionAttention(nn.Module):
    """Self-attention among patches with equal ids."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "R P D"], rotation: Rotation, ids: Int[Array, "R P"]
    ) -> Float[Array, "R P D"]:
        c = vision_of(self.config)
        into, out = (c.hidden_size, c.num_heads, c.head_dim), ("embed", "heads", "head")
        make = functools.partial(Projection, self.config, use_bias=True)
        q, k, v = (make("rpd,dnh->rpnh", into, out, name=name)(x) for name in "qkv")
        mixed = attend_equal(rotate(q, rotation), rotate(k, rotation), v, ids)
        back, axes = (*into[1:], into[0]), (*out[1:], out[0])
        return make("rpnh,nhd->rpd", back, axes, 2, name="o")(checkpoint_name(mixed, PRODUCT))


class VisionMLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "R P D"]) -> Float[Array, "R P D"]:
        c = vision_of(self.config)
        into, back = (c.hidden_size, c.intermediate_size), (c.intermediate_size, c.hidden_size)
        make = functools.partial(Projection, self.config, use_bias=True)
        act = {"silu": nn.silu, "gelu_tanh": nn.gelu}[c.hidden_act]
        up = make("rpd,df->rpf", into, ("embed", "mlp"), name="up")(x)
        if c.gated_mlp:
            up = act(make("rpd,df->rpf", into, ("embed", "mlp"), name="gate")(x)) * up
        else:
            up = act(up)
        return make("rpf,fd->rpd", back, ("mlp", "embed"), name="down")(up)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP with residual connections."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, rotation: Rotation, ids):
        c = self.config
        normed = VisionNorm(c, name="attention_norm")(x)
        x = x + VisionAttention(c, name="attention")(normed, rotation, ids)
        return x + VisionMLP(c, name="mlp")(VisionNorm(c, name="mlp_norm")(x))


class Merger(nn.Module):
    """The patches of a merged feature, side by side, through an MLP to the decoder's width."""

    config: ModelConfig
    norm_merged: bool = False
    """Normalise them together (deepstack), not each for itself."""

    @nn.compact
    def __call__(self, x: Float[Array, "R P D"]) -> Float[Array, "R M D"]:
        c = vision_of(self.config)
        wide = c.hidden_size * c.merge_unit
        norm = VisionNorm(self.config, name="norm")
        side_by_side = lambda x: x.reshape(x.shape[0], -1, wide)
        x = norm(side_by_side(x)) if self.norm_merged else side_by_side(norm(x))
        make = functools.partial(Projection, self.config, use_bias=True)
        x = make("rmd,df->rmf", (wide, wide), ("embed", "mlp"), name="up")(x)
        x = nn.gelu(x, approximate=False)
        return make("rmf,fd->rmd", (wide, c.out_hidden_size), ("mlp", "embed"), name="down")(x)


class VisionEnds(nn.Module):
    """What lies before and after the blocks: embedding of patches and merger."""

    config: ModelConfig

    def setup(self):
        c, v = self.config, vision_of(self.config)
        shape, axes = (v.patch_dim, v.hidden_size), ("patch", "embed")
        self.patch_embed = Projection(c, "rpc,cd->rpd", shape, axes, use_bias=v.patch_bias)
        if v.num_position_embeddings:
            init: Any = nn.with_partitioning(nn.initializers.normal(c.initializer_range), axes)
            shape = (v.num_position_embeddings, v.hidden_size)
            self.position_embedding = self.param(
                "position_embedding", init, shape, jnp.dtype(c.param_dtype)
            )
        self.merger = Merger(c)

    def embed(self, inputs: Inputs) -> Float[Array, "R P D"]:
        x = self.patch_embed(inputs["patches"])
        side = vision_of(self.config).position_side
        if not side:
            return x
        coords, grids = inputs["patch_coords"], inputs["patch_grids"]
        # Cut by their width, as parameters are, they would gather the patches of all rows.
        table = on_every_device(self.position_embedding)
        return x + interpolate(table, coords, grids, side).astype(x.dtype)

    def merge(self, x: Float[Array, "R P D"]) -> Float[Array, "R M D"]:
        return self.merger(x)

    def __call__(self, inputs: Inputs):
        return self.merge(self.embed(inputs))


def interpolate(
    table: Float[Array, "S D"], coords: Int[Array, "R P 2"], grids: Int[Array, "R P 2"], side: int
) -> Float[Array, "R P D"]:
    """A square of `side` x `side` vectors, stretched over every grid so that corners coincide."""
    steps = jnp.maximum(grids - 1, 1).astype(jnp.float32)
    places = coords.astype(jnp.float32) * (side - 1) / steps
    low = jnp.floor(places)
    total = jnp.zeros((*coords.shape[:-1], table.shape[-1]), jnp.float32)
    for down in (0, 1):
        for right in (0, 1):
            corner = low + jnp.asarray([down, right], low.dtype)[None, None]
            weight = jnp.prod(1 - jnp.abs(places - corner), axis=-1, keepdims=True)
            # Past the last row or column only with weight 0.
            row, column = jnp.moveaxis(jnp.minimum(corner, side - 1).astype(jnp.int32), -1, 0)
            total += jnp.take(table, row * side + column, axis=0).astype(jnp.float32) * weight
    return total


def patch_rotation(config: ModelConfig, coords: Int[Array, "R P 2"]) -> Rotation:
    """The rotation of patches: half of a head's channels by the row, half by the column."""
    v = vision_of(config)
    quarter = v.head_dim // 4
    turns = (float(v.rope_theta) ** (-np.arange(quarter) / quarter)).astype(np.float32)
    angles = coords.astype(jnp.float32)[..., None] * jnp.asarray(turns)[None, None, None]
    angles = angles.reshape(*coords.shape[:-1], 2 * quarter)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def vision_features(config: ModelConfig, params: Params, inputs: Inputs) -> VisionFeatures:
    """Merged features, and those of deepstack levels where the model has them.

    Args:
        config: of a model with a `vision` part.
        params: `params["vision"]`.
        inputs: patches and their ids. Features of padding are finite and mean nothing.
    """
    c, v = _without_adapters(config), vision_of(config)
    _check_inputs(config, inputs)
    x = _apply(VisionEnds(c), _ends(params), inputs, method="embed")
    x, levels = _scan_blocks(c, params["layers"], x, inputs)
    merged = _apply(VisionEnds(c), _ends(params), x, method="merge")
    if not v.deepstack_visual_indexes:
        return VisionFeatures(merged, None)
    deep = jax.vmap(functools.partial(_apply, Merger(c, norm_merged=True)))
    return VisionFeatures(merged, deep(params["deepstack"], levels))


def _scan_blocks(config: ModelConfig, layers: Params, x: Float[Array, "R P D"], inputs: Inputs):
    """The last hidden states, and [K R P D] of the blocks whose states are merged too."""
    v = vision_of(config)
    rotation = patch_rotation(config, inputs["patch_coords"])
    deep = v.deepstack_visual_indexes
    # States are written into one slot a level; those of other blocks into a slot that nobody reads.
    slots = [deep.index(i) if i in deep else len(deep) for i in range(v.depth)]

    def block(x, layer, full):
        ids = inputs["patch_segments"]
        if v.window_size is not None:
            ids = jnp.where(full, ids, inputs["patch_windows"])
        return _apply(VisionBlock(config), layer, x, rotation, ids)

    block = remat(block, config.remat)

    def body(carry, of_layer):
        x, levels = carry
        layer, full, slot = of_layer
        x = block(x, layer, full)
        if deep:
            levels = jax.lax.dynamic_update_index_in_dim(levels, x, slot, axis=0)
        return (x, levels), None

    levels = jnp.zeros((len(deep) + 1 if deep else 0, *x.shape), x.dtype)
    each = (layers, jnp.asarray(v.full_layers), jnp.asarray(slots, jnp.int32))
    (x, levels), _ = jax.lax.scan(body, (x, levels), each)
    return x, levels[: len(deep)]


def init_vision(config: ModelConfig, key: Array) -> Params:
    """Fresh parameters of the encoder, for `params["vision"]`."""
    return jax.tree.map(lambda box: box.value, _init_boxed(config, key), is_leaf=_is_box)


def vision_axes(config: ModelConfig) -> Params:
    """For every parameter the tuple of its logical axis names, in the tree of `init_vision`."""
    boxed = jax.eval_shape(functools.partial(_init_boxed, config), jax.random.key(0))
    names = jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_box)
    stack = lambda tree: jax.tree.map(
        lambda names: ("layers", *names), tree, is_leaf=lambda x: isinstance(x, tuple)
    )
    return {name: stack(tree) if name in _STACKED else tree for name, tree in names.items()}


def _init_boxed(config: ModelConfig, key: Array) -> Params:
    c, v = _without_adapters(config), vision_of(config)
    ends_key, layers_key, deep_key = jax.random.split(key, 3)
    ids = jnp.zeros((1, v.merge_unit), jnp.int32)
    pairs = jnp.zeros((*ids.shape, 2), jnp.int32)
    patches = jnp.zeros((*ids.shape, v.patch_dim), jnp.float32)
    inputs = {"patches": patches, "patch_coords": pairs, "patch_grids": pairs}
    x = jnp.zeros((*ids.shape, v.hidden_size), jnp.dtype(c.dtype))
    block = lambda key: VisionBlock(c).init(key, x, patch_rotation(c, pairs), ids)["params"]
    params = {
        **VisionEnds(c).init(ends_key, inputs)["params"],
        "layers": jax.vmap(block)(jax.random.split(layers_key, v.depth)),
    }
    if v.deepstack_visual_indexes:
        keys = jax.random.split(deep_key, len(v.deepstack_visual_indexes))
        merger = Merger(c, norm_merged=True)
        params["deepstack"] = jax.vmap(lambda key: merger.init(key, x)["params"])(keys)
    return params


def _without_adapters(config: ModelConfig) -> ModelConfig:
    """Adapters are for the decoder; the encoder has projections of the same names."""
    return dataclasses.replace(config, lora=None)


def _apply(module: nn.Module, params: Params, *args, method: str | None = None) -> Any:
    return module.apply({"params": params}, *args, method=method)


def _ends(params: Params) -> Params:
    return {name: value for name, value in params.items() if name not in _STACKED}


def _is_box(x) -> bool:
    return isinstance(x, nn.Partitioned)


def _check_inputs(config: ModelConfig, inputs: Inputs) -> None:
    v = vision_of(config)
    needed = {"patches", "patch_coords", "patch_segments"}
    needed |= {"patch_grids"} if v.num_position_embeddings else set()
    needed |= {"patch_windows"} if v.window_size is not None else set()
    if missing := sorted(needed - set(inputs)):
        raise ValueError(f"the vision inputs lack {missing}; they have {sorted(inputs)}")
    shape = inputs["patches"].shape
    if len(shape) != 3 or shape[1] % v.merge_unit or shape[2] != v.patch_dim:
        raise ValueError(
            f"patches has shape {shape}; expected [rows, patches, {v.patch_dim}] "
            f"with a multiple of {v.merge_unit} patches"
        )


def place_features(
    features: Float[Array, "R M D"], visual_index: Int[Array, "R T"]
) -> Float[Array, "R T D"]:
    """The feature that each visual token takes, and 0 for text (index -1)."""
    taken = jnp.take_along_axis(features, jnp.maximum(visual_index, 0)[..., None], axis=1)
    return jnp.where((visual_index >= 0)[..., None], taken, 0)


def splice_features(
    embeddings: Float[Array, "R T D"],
    features: Float[Array, "R M D"],
    visual_index: Int[Array, "R T"],
) -> Float[Array, "R T D"]:
    """Embeddings of text, and features in the places of visual tokens.

    With visual_index [-1, 0, 1, -1] token 1 becomes feature 0 of its row and token 2 feature 1. An
    index beyond the features gives NaN.
    """
    placed = place_features(features, visual_index).astype(embeddings.dtype)
    return jnp.where((visual_index >= 0)[..., None], placed, embeddings)


def place_deep(
    deep: Float[Array, "K R M D"], visual_index: Int[Array, "R T"]
) -> Float[Array, "K R T D"]:
    """What is added to the hidden states after each of the first K decoder layers; 0 for text."""
    return jax.vmap(place_features, in_axes=(0, None))(deep, visual_index)
