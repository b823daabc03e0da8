"""A decoder-only language model as two pure functions of its parameters.

`Model` is static and hashable; parameters are nested dicts with the layers of a kind stacked along
a leading axis. Whole rows run through the blocks under one `lax.scan`, which keeps compile time and
program size independent of depth; in decoding they are unrolled, so that the pages of every layer
are arrays of their own, which are read in place. Nothing outside `models/` sees Flax.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models.attention import Attention, Mix
from jaxrl_reason.models.attention_rows import ALONG_LENGTH, BY_ROW, Axes, row_attention
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.layers import GatedMLP, RMSNorm, remat
from jaxrl_reason.models.lora import ADAPTER
from jaxrl_reason.models.mesh import LENGTH_AXIS, along_length, from_width, size_of
from jaxrl_reason.models.moe import MoE, RouterStats
from jaxrl_reason.models.paged import OpenPages, Pages, PageTable, Place, attend_pages
from jaxrl_reason.models.rotary import Rotation, rotation
from jaxrl_reason.models.vision import (
    init_vision,
    place_deep,
    splice_features,
    vision_axes,
    vision_features,
)

Params = dict[str, Any]
Visual = Mapping[str, Array]
"""Images and videos among the tokens of rows; see `Model.forward`."""
_ROUNDED = {"kernel", "bias", "embedding", "head", *ADAPTER}
"""Parameters that are rounded to the compute dtype where they are used, but not in routers."""


class Block(nn.Module):
    """Pre-norm attention and MLP with residual connections; `sandwich_norms` adds norms after."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, rotation: Rotation, mix: Mix, mask: Bool[Array, "B T"] | None = None):
        """The new x, what `mix` kept, and what a mixture of experts counted under the mask."""
        c = self.config
        after = lambda name, x: RMSNorm(c, name=name)(x) if c.sandwich_norms else x
        normed = RMSNorm(c, name="attention_norm")(x)
        mixed, kept = Attention(c, name="attention")(normed, rotation, mix)
        x = x + after("post_attention_norm", mixed)
        normed, stats = RMSNorm(c, name="mlp_norm")(x), None
        if c.num_experts:
            mapped, stats = MoE(c, name="moe")(normed, mask)
        else:
            mapped = GatedMLP(c, name="mlp")(normed)
        return x + after("post_mlp_norm", mapped), kept, stats


class Ends(nn.Module):
    """What lies before and after the blocks: embedding, final norm, head."""

    config: ModelConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.param_dtype)
        normal = nn.initializers.normal(c.initializer_range)
        axes = ("vocab", "embed")
        shape = (c.vocab_size, c.hidden_size)
        self.embedding = self.param("embedding", nn.with_partitioning(normal, axes), shape, dtype)
        if not c.tie_word_embeddings:
            self.head = self.param("head", nn.with_partitioning(normal, axes), shape, dtype)
        self.final_norm = RMSNorm(c)

    def embed(self, tokens):
        x = jnp.take(self.embedding, tokens, axis=0).astype(jnp.dtype(self.config.dtype))
        if self.config.scale_embeddings:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        return x

    def norm(self, x):
        return self.final_norm(x)

    def __call__(self, tokens):
        return self.norm(self.embed(tokens))


@dataclasses.dataclass(frozen=True)
class Model:
    """The functions of a decoder; holds its configuration and nothing else."""

    config: ModelConfig

    def init(self, key: Array) -> Params:
        """Fresh parameters. Run it under `jax.jit` with `out_shardings` to create them sharded."""
        params = _values(self._init_boxed(key))
        if self.config.vision is not None:
            params["vision"] = init_vision(self.config, jax.random.fold_in(key, 1))
        return params

    def axes(self) -> Params:
        """For every parameter the tuple of its logical axis names, in the structure of `init`."""
        boxed = jax.eval_shape(self._init_boxed, jax.random.key(0))
        is_box = lambda x: isinstance(x, nn.Partitioned)
        names = jax.tree.map(lambda box: box.names, boxed, is_leaf=is_box)
        layers = jax.tree.map(lambda n: ("layers", *n), names["layers"], is_leaf=_is_names)
        vision = {} if self.config.vision is None else {"vision": vision_axes(self.config)}
        return {**names, "layers": layers, **vision}

    def _init_boxed(self, key: Array) -> Params:
        ends_key, layers_key = jax.random.split(key)
        tokens = jnp.zeros((1, 1), jnp.int32)
        x = jnp.zeros((1, 1, self.config.hidden_size), jnp.dtype(self.config.dtype))
        turn, mix = rotation(self.config, tokens), lambda q, k, v: (q, (k, v))
        ends = Ends(self.config).init(ends_key, tokens)["params"]
        init_block = lambda k: Block(self.config).init(k, x, turn, mix)["params"]
        keys = jax.random.split(layers_key, self.config.num_hidden_layers)
        return {**ends, "layers": jax.vmap(init_block)(keys)}

    def forward(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | Int[Array, "B T 3"],
        segment_ids: Int[Array, "B T"],
        branch_ids: Int[Array, "B T"] | None = None,
        visual: Visual | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm.

        Args:
            params: from `init`, a checkpoint, or a conversion.
            tokens: token ids.
            positions: position of each token in its own document, from 0; in a branch counted along
                the trunk and the branch. Three of each where images are among the tokens and the
                model has `mrope_section`: time, row and column.
            segment_ids: document of each token, 0 for padding; tokens see their own document only.
            branch_ids: branch of each token, 0 for the trunk that every branch of the document
                continues; branches of a row are numbered from 1, and the slots of each are
                neighbours. All 0 by default.
            visual: images and videos among the tokens: `visual_index` [B T], the merged feature of
                its row that a token takes, -1 for text; and what `visual_features` takes or gives.
        """
        return self.forward_with_stats(
            params,
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            branch_ids=branch_ids,
            visual=visual,
        )[0]

    def forward_with_stats(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | Int[Array, "B T 3"],
        segment_ids: Int[Array, "B T"],
        branch_ids: Int[Array, "B T"] | None = None,
        visual: Visual | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """`forward`, and what the routers of all layers counted; None without experts.

        On a mesh with an axis `context` the tokens of a row are cut over it.
        """
        length = tokens.shape[1]
        tokens, positions, segment_ids, branch_ids, visual = _even(
            tokens, positions, segment_ids, branch_ids, visual
        )
        x, deep = self._embed(params, tokens, visual, ALONG_LENGTH)
        layer_of = self._layers(positions, segment_ids, branch_ids, deep, ALONG_LENGTH)

        def body(x, layer):
            x, _, stats = layer_of(along_length(x), layer)
            return along_length(x), stats

        layers = self._scanned(params["layers"])
        x, stats = jax.lax.scan(remat(body, self.config.remat), x, layers)
        x = Ends(self.config).apply({"params": _ends(params)}, x, method="norm")
        return x[:, :length], stats

    def visual_features(self, params: Params, visual: Visual) -> dict[str, Array]:
        """`features` [B M D] of images and videos, and with deepstack `deep_features` [B K M D].

        Args:
            params: of the whole model.
            visual: the arrays that `models.vision.vision_features` reads, [B P ...].
        """
        found = vision_features(self.config, params["vision"], visual)
        features = {"features": found.merged}
        if found.deep is not None:
            features["deep_features"] = jnp.moveaxis(found.deep, 0, 1)
        return features

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"] | Int[Array, "B S 3"],
        segment_ids: Int[Array, "B S"],
        visual: Visual | None = None,
    ) -> tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]]:
        """Keys and values of all layers for rows of packed tokens; arguments as in `forward`."""
        x, deep = self._embed(params, tokens, visual, BY_ROW)
        layer_of = self._layers(positions, segment_ids, None, deep, BY_ROW)
        body = lambda x, layer: layer_of(x, layer)[:2]
        return jax.lax.scan(body, x, self._scanned(params["layers"]))[1]

    def decode(
        self,
        params: Params,
        tokens: Int[Array, " R"],
        *,
        pages: Pages,
        opened: OpenPages | None,
        table: PageTable,
        place: Place,
    ) -> tuple[Float[Array, "R D"], Pages | OpenPages]:
        """Hidden states of one more token of every row, and the open pages with it; or all pages.

        Layers are unrolled, so that the pages of each are arrays of their own; all but `params` and
        `tokens` are those of `attend_pages`.
        """
        x = Ends(self.config).apply({"params": _ends(params)}, tokens[:, None], method="embed")
        block, sliding = Block(self.config), self.config.sliding_layers
        turns = {
            s: rotation(self.config, place.positions[:, None], sliding=s) for s in set(sliding)
        }
        written = []
        for i, layer in enumerate(self.unstack(params)["layers"]):
            mix = functools.partial(
                attend_pages,
                pages=pages.of_layer(i),
                opened=None if opened is None else (opened.keys[i], opened.values[i]),
                table=table,
                place=place,
                window=self.config.sliding_window if sliding[i] else None,
            )
            x, kept, _ = block.apply({"params": layer}, x, turns[sliding[i]], mix)
            written.append(kept)
        keys, values = zip(*written, strict=True)
        x = Ends(self.config).apply({"params": _ends(params)}, x, method="norm")
        if opened is None:
            return x[:, 0], pages._replace(own_keys=keys, own_values=values)
        return x[:, 0], OpenPages(keys, values)

    def to_sample(self, params: Params) -> Params:
        """What `prefill` and `decode` read, in the dtype that they read it in.

        Matrices and embeddings are rounded to the compute dtype once and not at every step, which
        changes no result. Norms and routers stay as they are. Only `parts_to_sample` are there.
        """
        dtype = jnp.dtype(self.config.dtype)

        def read(path, leaf):
            *above, name = (key.key for key in path)
            rounded = name in _ROUNDED and "router" not in above
            return leaf.astype(dtype) if rounded and dtype.itemsize < leaf.dtype.itemsize else leaf

        return jax.tree_util.tree_map_with_path(read, self.parts_to_sample(params))

    @staticmethod
    def parts_to_sample(params: Params) -> Params:
        """The parameters that `prefill` and `decode` read: all but those that see images."""
        return {name: part for name, part in params.items() if name != "vision"}

    def unstack(self, params: Params) -> Params:
        """Parameters with a tuple of layers in place of their stack; `decode` takes them too.

        Outside a loop over decode steps this copies every layer once, inside it at every step
        where the compiler does not read a layer where it lies.
        """
        layers = params["layers"]
        if isinstance(layers, tuple):
            return params
        at = lambda i: jax.tree.map(lambda stack: stack[i], layers)
        return {**params, "layers": tuple(map(at, range(self.config.num_hidden_layers)))}

    def unembed(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Float32 logits of hidden states; use `logprobs.py` to avoid the whole [B, T, V]."""
        return jnp.einsum(
            "...d,dv->...v",
            hidden,
            self.unembedding(params).astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )

    def unembedding(self, params: Params) -> Float[Array, "D V"]:
        """The output head as a matrix; the transposed embedding when tied."""
        return (params["embedding"] if self.config.tie_word_embeddings else params["head"]).T

    def _embed(
        self, params: Params, tokens: Int[Array, "B T"], visual: Visual | None, axes: Axes
    ) -> tuple[Float[Array, "B T D"], Float[Array, "K B T D"] | None]:
        """What the blocks begin with, and what is added after each of the first K."""
        x = Ends(self.config).apply({"params": _ends(params)}, tokens, method="embed")
        x = from_width(x) if axes.length else x
        if visual is None:
            return x, None
        index = visual["visual_index"]
        found = visual if "features" in visual else self.visual_features(params, visual)
        x, deep = splice_features(x, found["features"], index), found.get("deep_features")
        if deep is None:
            return x, None
        deep = place_deep(jnp.moveaxis(deep, 1, 0).astype(x.dtype), index)
        return x, along_length(deep, before=1) if axes.length else deep

    def _scanned(self, layers: Params) -> tuple[Params, Int[Array, " L"], Bool[Array, " L"]]:
        """What a loop over layers reads: parameters, number, and whether the layer slides."""
        numbers = jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32)
        return layers, numbers, jnp.asarray(self.config.sliding_layers)

    def _layers(self, positions, segment_ids, branch_ids, deep, axes: Axes) -> Callable:
        """One block on rows, as a function of x and of an entry of `_scanned`."""
        kinds = set(self.config.sliding_layers)
        mix_of = row_attention(self.config, segment_ids, branch_ids, positions, axes=axes)
        turns = {kind: rotation(self.config, positions, sliding=kind) for kind in kinds}
        block, mask = Block(self.config), segment_ids > 0

        def layer_of(x, layer):
            layer, number, sliding = layer
            if len(kinds) == 1:
                (kind,) = kinds
                turn, rows = turns[kind], mix_of(kind)
            else:
                choose = lambda some, all: jnp.where(sliding, some, all)
                turn, rows = jax.tree.map(choose, turns[True], turns[False]), mix_of(sliding)
            mix = lambda q, k, v: (rows(q, k, v), (k, v))
            x, kept, stats = block.apply({"params": layer}, x, turn, mix, mask)
            if deep is not None:
                add = lambda x: x + jax.lax.dynamic_index_in_dim(deep, number, keepdims=False)
                x = jax.lax.cond(number < deep.shape[0], add, lambda x: x, x)
            return x, kept, stats

        return layer_of


def _even(tokens, positions, segment_ids, branch_ids, visual):
    """The same with padding at the end, so that `LENGTH_AXIS` divides the tokens of a row."""
    missing = -tokens.shape[1] % size_of(jax.sharding.get_abstract_mesh(), (LENGTH_AXIS,))
    if not missing:
        return tokens, positions, segment_ids, branch_ids, visual

    def pad(x, value=0):
        widths = ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2))
        return jnp.pad(x, widths, constant_values=value)

    ids = (tokens, positions, segment_ids, branch_ids)
    if visual is not None:
        visual = {**visual, "visual_index": pad(visual["visual_index"], -1)}
    return (*(None if x is None else pad(x) for x in ids), visual)


def _ends(params: Params) -> Params:
    return {name: value for name, value in params.items() if name not in ("layers", "vision")}


def _is_names(x) -> bool:
    return isinstance(x, tuple)


def _values(boxed: Params) -> Params:
    return jax.tree.map(
        lambda box: box.value, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
