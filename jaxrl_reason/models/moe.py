"""Mixture of experts in place of the MLP, and the loss that keeps its load balanced.

A router gives every token a distribution over E small gated MLPs; the token goes through the k
likeliest. `experts.py` computes them, on one device or cut over the mesh axis `expert`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models.attention import wide_dtype
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.experts import Way, mix_experts
from jaxrl_reason.models.layers import PRODUCT, activation
from jaxrl_reason.models.mesh import by_rows


class RouterStats(NamedTuple):
    """Sums over tokens, padding left out. Add them up leaf by leaf: over layers, over devices."""

    tokens_per_expert: Float[Array, "*L E"]
    """Tokens that each expert got."""
    probabilities: Float[Array, "*L E"]
    """Sums of the router's probabilities; the only leaf with a gradient."""
    num_tokens: Float[Array, "*L"]
    """Number of tokens."""


def load_balancing_loss(stats: RouterStats) -> Float[Array, ""]:
    """E * sum_e f_e P_e, with f_e the tokens of expert e and P_e its probability per token.

    Sums and tokens of all layers are added up first, as in transformers, so the least value is the
    number of experts of a token. Without tokens it is 0. arXiv 2101.03961, equations 4 to 6.

    Args:
        stats: of one layer, or of several along leading axes.
    """
    num_experts = stats.probabilities.shape[-1]
    received, probabilities = (
        jnp.sum(x.reshape(-1, num_experts), axis=0)
        for x in (stats.tokens_per_expert, stats.probabilities)
    )
    tokens = jnp.maximum(jnp.sum(stats.num_tokens), 1)
    return num_experts * jnp.sum(received / tokens * (probabilities / tokens))


class MoE(nn.Module):
    """Sum over a token's experts e of its weight for e times down_e(act(gate_e(x)) * up_e(x))."""

    config: ModelConfig
    way: Way | None = None
    """How the experts are computed; by default what suits the device."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Where the mask is false a token goes through no expert, gives 0, and is not counted."""
        c = self.config
        width, ends = (c.hidden_size, c.moe_intermediate_size), ("embed", "mlp")
        probabilities = Router(c, name="router")(x)
        probabilities = probabilities.reshape(-1, c.num_experts)
        counted = jnp.ones(x.shape[:2], bool) if mask is None else mask
        counted = counted.reshape(-1, 1)
        weights, experts = route(c, probabilities)
        experts = jnp.where(counted, experts, c.num_experts)
        mixed = mix_experts(
            x.reshape(-1, c.hidden_size).astype(jnp.dtype(c.dtype)),
            experts,
            weights,
            {
                "gate": ExpertProjection(c, width, ends, name="gate")(),
                "up": ExpertProjection(c, width, ends, name="up")(),
                "down": ExpertProjection(c, width[::-1], ends[::-1], name="down")(),
            },
            activation=activation(c),
            adapter_scale=c.lora.lora_alpha / c.lora.r if c.lora else 1.0,
            way=self.way,
        )
        return mixed.reshape(x.shape), _stats(probabilities, experts, counted)


class Router(nn.Module):
    """softmax(x W) over experts, in float32 throughout."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        c = self.config
        kernel = self.param(
            "kernel",
            nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "router")),
            (c.hidden_size, c.num_experts),
            jnp.dtype(c.param_dtype),
        )
        wide = wide_dtype(x)
        highest = jax.lax.Precision.HIGHEST
        logits = jnp.einsum("btd,de->bte", x.astype(wide), kernel.astype(wide), precision=highest)
        return jax.nn.softmax(logits, axis=-1)


def route(
    config: ModelConfig, probabilities: Float[Array, "S E"]
) -> tuple[Float[Array, "S k"], Int[Array, "S k"]]:
    """The weights of the likeliest experts of each token, and the experts."""

    def choose(probabilities):
        experts = jax.lax.top_k(probabilities, config.num_experts_per_tok)[1]
        # Kept for the backward pass: computed again, rounding might choose others.
        experts = checkpoint_name(experts, PRODUCT)
        return jnp.take_along_axis(probabilities, experts, axis=-1), experts

    # The compiler would gather the probabilities of all rows to sort them.
    weights, experts = by_rows(choose, probabilities.shape[0])(probabilities)
    if config.norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts


class ExpertProjection(nn.Module):
    """The parameters of one projection of all experts."""

    config: ModelConfig
    shape: tuple[int, int]
    axes: tuple[str, str]

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        c = self.config
        (inputs, outputs), (into, out_of) = self.shape, self.axes
        fan_in = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=1, out_axis=2, batch_axis=(0,)
        )
        leaves = {"kernel": self._param("kernel", fan_in, (inputs, outputs), (into, out_of))}
        wanted = c.lora is not None and c.lora.targets(self.name)
        if c.lora is not None and (
            wanted if self.is_initializing() else self.has_variable("params", "lora_a")
        ):
            a, b = (inputs, c.lora.r), (c.lora.r, outputs)
            leaves["lora_a"] = self._param("lora_a", fan_in, a, (into, "rank"))
            leaves["lora_b"] = self._param("lora_b", nn.initializers.zeros, b, ("rank", out_of))
        return leaves

    def _param(self, name: str, init, shape: tuple[int, int], axes: tuple[str, str]) -> Array:
        init = nn.with_partitioning(init, ("experts", *axes))
        shape = (self.config.num_experts, *shape)
        return self.param(name, init, shape, jnp.dtype(self.config.param_dtype))


def _stats(
    probabilities: Float[Array, "S E"], experts: Int[Array, "S k"], counted: Bool[Array, "S 1"]
) -> RouterStats:
    dtype = probabilities.dtype
    chosen = jax.nn.one_hot(experts, probabilities.shape[1], dtype=dtype)
    return RouterStats(
        jnp.sum(chosen, axis=(0, 1)),
        jnp.sum(jnp.where(counted, probabilities, 0), axis=0),
        jnp.sum(counted, dtype=dtype),
    )
