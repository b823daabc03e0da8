"""A decoder-only language model as two pure functions of its parameters.

`Model` is static and hashable; parameters are nested dicts with the layers of a kind stacked along
a leading axis. Whole rows run through the blocks under one `lax.scan`, which keeps compile time and
program size independent of depth; in decoding they are unrolled, so that the pages of every layer
are arrays of their own and a step updates them in place. Nothing outside `models/` sees Flax.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxrl_reason.models.attention import Attention, Mix
from jaxrl_reason.models.attention_rows import row_attention
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.layers import PRODUCT, GatedMLP, RMSNorm
from jaxrl_reason.models.paged import Pages, PageTable, attend_pages

Params = dict[str, Any]


class Block(nn.Module):
    """Pre-norm attention and MLP with residual connections."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, positions, mix: Mix):
        c = self.config
        normed = RMSNorm(c, name="attention_norm")(x)
        mixed, kept = Attention(c, name="attention")(normed, positions, mix)
        x = x + mixed
        x = x + GatedMLP(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x))
        return x, kept


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
        return jnp.take(self.embedding, tokens, axis=0).astype(jnp.dtype(self.config.dtype))

    def norm(self, x):
        return self.final_norm(x)

    def __call__(self, tokens):
        return self.norm(self.embed(tokens))


def _remat(function, policy: str):
    if policy == "none":
        return function
    # The barriers against common subexpressions are for code that no loop separates.
    checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)
    return checkpoint(function) if policy == "full" else checkpoint(function, policy=_products)


_by_name = jax.checkpoint_policies.save_only_these_names(PRODUCT)


def _products(primitive, *args, **params) -> bool:
    """Whether the backward pass keeps a result: of projections and of attention kernels."""
    cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return cudnn or _by_name(primitive, *args, **params)


@dataclasses.dataclass(frozen=True)
class Model:
    """The functions of a decoder; holds its configuration and nothing else."""

    config: ModelConfig

    def init(self, key: Array) -> Params:
        """Fresh parameters. Run it under `jax.jit` with `out_shardings` to create them sharded."""
        return _values(self._init_boxed(key))

    def axes(self) -> Params:
        """For every parameter the tuple of its logical axis names, in the structure of `init`."""
        boxed = jax.eval_shape(self._init_boxed, jax.random.key(0))
        is_box = lambda x: isinstance(x, nn.Partitioned)
        names = jax.tree.map(lambda box: box.names, boxed, is_leaf=is_box)
        layers = jax.tree.map(lambda n: ("layers", *n), names["layers"], is_leaf=_is_names)
        return {**names, "layers": layers}

    def _init_boxed(self, key: Array) -> Params:
        ends_key, layers_key = jax.random.split(key)
        tokens = jnp.zeros((1, 1), jnp.int32)
        x = jnp.zeros((1, 1, self.config.hidden_size), jnp.dtype(self.config.dtype))
        mix = lambda q, k, v: (q, (k, v))
        ends = Ends(self.config).init(ends_key, tokens)["params"]
        init_block = lambda k: Block(self.config).init(k, x, tokens, mix)["params"]
        keys = jax.random.split(layers_key, self.config.num_hidden_layers)
        return {**ends, "layers": jax.vmap(init_block)(keys)}

    def forward(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        branch_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm.

        Args:
            params: from `init`, a checkpoint, or a conversion.
            tokens: token ids.
            positions: position of each token in its own document, from 0; in a branch counted along
                the trunk and the branch.
            segment_ids: document of each token, 0 for padding; tokens see their own document only.
            branch_ids: branch of each token, 0 for the trunk that every branch of the document
                continues; branches of a row are numbered from 1. All 0 by default.
        """
        x = Ends(self.config).apply({"params": _ends(params)}, tokens, method="embed")
        x = self._scan_blocks(params["layers"], x, positions, segment_ids, branch_ids)
        return Ends(self.config).apply({"params": _ends(params)}, x, method="norm")

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
    ) -> tuple[Float[Array, "L B S K H"], Float[Array, "L B S K H"]]:
        """Keys and values of all layers for rows of packed tokens; arguments as in `forward`."""
        x = Ends(self.config).apply({"params": _ends(params)}, tokens, method="embed")
        mix = _mix_rows(self.config, segment_ids, None)
        block = Block(self.config)
        body = lambda x, layer: block.apply({"params": layer}, x, positions, mix)
        return jax.lax.scan(body, x, params["layers"])[1]

    def decode(
        self,
        params: Params,
        tokens: Int[Array, " R"],
        *,
        positions: Int[Array, " R"],
        pages: Pages,
        table: PageTable,
        before: Int[Array, " R"],
        boundary: Int[Array, " R"],
    ) -> tuple[Float[Array, "R D"], Pages]:
        """Hidden states of one more token of every row, and the pages with it.

        Layers are unrolled, so that the pages of each are arrays of their own and are updated in
        place; `table`, `before` and `boundary` are those of `attend_pages`.
        """
        x = Ends(self.config).apply({"params": _ends(params)}, tokens[:, None], method="embed")
        block = Block(self.config)
        own = []
        for i, layer in enumerate(self.unstack(params)["layers"]):
            mix = functools.partial(
                attend_pages, layer=i, pages=pages, table=table, before=before, boundary=boundary
            )
            x, kept = block.apply({"params": layer}, x, positions[:, None], mix)
            own.append(kept)
        keys, values = zip(*own, strict=True)
        x = Ends(self.config).apply({"params": _ends(params)}, x, method="norm")
        return x[:, 0], pages._replace(own_keys=keys, own_values=values)

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

    def _scan_blocks(self, layers, x, positions, segment_ids, branch_ids):
        mix = _mix_rows(self.config, segment_ids, branch_ids)
        block = Block(self.config)

        def body(x, layer):
            return block.apply({"params": layer}, x, positions, mix)[0], None

        return jax.lax.scan(_remat(body, self.config.remat), x, layers)[0]


def _mix_rows(config: ModelConfig, segment_ids, branch_ids) -> Mix:
    mix = row_attention(config, segment_ids, branch_ids)
    return lambda q, k, v: (mix(q, k, v), (k, v))


def _ends(params: Params) -> Params:
    return {name: value for name, value in params.items() if name != "layers"}


def _is_names(x) -> bool:
    return isinstance(x, tuple)


def _values(boxed: Params) -> Params:
    return jax.tree.map(
        lambda box: box.value, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
