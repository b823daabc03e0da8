"""A decoder-only language model as two pure functions of its parameters.

`Model` is static and hashable; parameters are nested dicts with the layers of a kind stacked along
a leading axis. Without a cache the blocks run under one `lax.scan`, which keeps compile time and
program size independent of depth; with a cache they are unrolled, so that every layer's cache is
its own array and a step of decoding updates it in place. Nothing outside `models/` sees Flax.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxrl_reason.models.attention import Attention, KVCache, attention_mask, empty_cache
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.layers import GatedMLP, RMSNorm

Params = dict[str, Any]


class Block(nn.Module):
    """Pre-norm attention and MLP with residual connections."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, positions, mask, past=None, slot=None):
        c = self.config
        normed = RMSNorm(c, name="attention_norm")(x)
        mixed, past = Attention(c, name="attention")(normed, positions, mask, past, slot)
        x = x + mixed
        x = x + GatedMLP(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x))
        return x, past


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
    if policy == "full":
        return jax.checkpoint(function)
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(function, policy=dots)


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
        mask = jnp.ones((1, 1, 1), bool)
        ends = Ends(self.config).init(ends_key, tokens)["params"]
        init_block = lambda k: Block(self.config).init(k, x, tokens, mask)["params"]
        keys = jax.random.split(layers_key, self.config.num_hidden_layers)
        return {**ends, "layers": jax.vmap(init_block)(keys)}

    def init_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache with room for `length` tokens in each of `batch_size` rows."""
        return empty_cache(self.config, batch_size, length)

    def forward(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Hidden states after the final norm, and the cache with these tokens appended.

        Args:
            params: from `init`, a checkpoint, or a conversion.
            tokens: token ids.
            positions: position of each token in its own document, from 0.
            segment_ids: document of each token, 0 for padding; tokens see their own document only.
            cache: earlier tokens and their segment ids; the caller sees to room for T more.
        """
        x = Ends(self.config).apply({"params": _ends(params)}, tokens, method="embed")
        if cache is None:
            x = self._scan_blocks(params["layers"], x, positions, segment_ids)
        else:
            x, cache = self._unrolled_blocks(params["layers"], x, positions, segment_ids, cache)
        return Ends(self.config).apply({"params": _ends(params)}, x, method="norm"), cache

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

    def _scan_blocks(self, layers, x, positions, segment_ids):
        mask = attention_mask(segment_ids, segment_ids, 0)
        block = Block(self.config)

        def body(x, layer):
            return block.apply({"params": layer}, x, positions, mask)[0], None

        return jax.lax.scan(_remat(body, self.config.remat), x, layers)[0]

    def _unrolled_blocks(self, layers, x, positions, segment_ids, cache: KVCache):
        slot = cache.length
        filled = jax.lax.dynamic_update_slice_in_dim(
            cache.segment_ids, segment_ids.astype(jnp.int32), slot, axis=1
        )
        mask = attention_mask(segment_ids, filled, slot)
        block = Block(self.config)
        keys, values = [], []
        for i in range(self.config.num_hidden_layers):
            layer = jax.tree.map(lambda p, i=i: p[i], layers)
            past = (cache.keys[i], cache.values[i])
            x, (k, v) = block.apply({"params": layer}, x, positions, mask, past, slot)
            keys.append(k)
            values.append(v)
        return x, KVCache(tuple(keys), tuple(values), filled, slot + segment_ids.shape[1])


def _ends(params: Params) -> Params:
    return {name: value for name, value in params.items() if name != "layers"}


def _is_names(x) -> bool:
    return isinstance(x, tuple)


def _values(boxed: Params) -> Params:
    return jax.tree.map(
        lambda box: box.value, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
