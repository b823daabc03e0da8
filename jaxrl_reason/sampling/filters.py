"""Which tokens may be drawn, and drawing one.

Truncation (top-k, top-p, min-p) samples from q = p / m on the kept tokens, where m is the kept
mass. Both log q(token) and log m are recorded, so that log p(token) = log q + log m is known
without another forward pass and importance ratios stay unbiased.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.sampling.tree import Value, first_where, invert_cdf, row_totals

FLOOR = -87.0
"""Tokens whose logits lie further below the highest have probability 0; exp of less underflows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How completions are drawn."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int | None = None
    """Keep the k most likely tokens (and those tied with the last of them)."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one."""

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or null for no limit")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1]")
        if self.temperature == 0 and self.truncates:
            raise ValueError(
                "temperature=0 takes the most likely token, so top_k, top_p and min_p cannot act; "
                "remove them or raise the temperature"
            )

    @property
    def truncates(self) -> bool:
        """Whether some tokens may be left out."""
        return self.top_k is not None or self.top_p < 1 or self.min_p > 0


def kept_tokens(probabilities: Float[Array, "B V"], config: SamplingConfig) -> Bool[Array, "B V"]:
    """True for tokens that survive top-k, then top-p of what is left, then min-p.

    The most likely token always survives, and one of probability 0 never does. The order is that of
    Hugging Face's processors. Tokens as likely as the last one kept are kept.
    """
    highest = jnp.max(probabilities, axis=-1, keepdims=True)
    return probabilities >= smallest_kept(probabilities, highest, config)


def smallest_kept(
    weights: Float[Array, "B V"], highest: Float[Array, "B 1"], config: SamplingConfig
) -> Float[Array, "B 1"]:
    """The bound that kept weights reach and others do not, for weights p / c with `highest` <= 1.

    A token is kept by top-k if fewer than k are more likely, and by top-p if those that are more
    likely have less than `top_p` of the mass that top-k left. Both counts fall as the bound rises,
    so that bisection finds the lowest bound without sorting. The mass is summed in float32: the
    choice can differ from an exact sum's only for a token at which the cumulative probability
    comes within 1e-6 of `top_p`.
    """
    bound = jnp.full_like(highest, jnp.finfo(jnp.float32).tiny)
    if config.top_k is not None and config.top_k < weights.shape[-1]:
        bound = _lowest_bound(weights, jnp.ones_like, bound, highest, float(config.top_k))
    if config.top_p < 1:
        left = row_totals(weights, lambda w: jnp.where(w >= bound, w, 0))
        bound = _lowest_bound(weights, lambda w: w, bound, highest, config.top_p * left)
    if config.min_p > 0:
        bound = jnp.maximum(bound, config.min_p * highest)
    return bound


def draw(
    logits: Float[Array, "B V"], uniforms: Float[Array, " B"], config: SamplingConfig
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """One token per row by inverting the cumulative distribution at a uniform number in [0, 1).

    One number per row, where the Gumbel trick draws one per vocabulary entry. What a row yields is
    the same in any batch. A row without a finite highest logit yields NaN log-probs.

    Returns:
        `(tokens, logprobs, kept_logmass)`: log q(token) under the truncated, renormalised
        distribution at this temperature, and the log of the mass that truncation kept. Greedy
        decoding is the point mass: log q = 0 and the kept mass is p(token) at temperature 1.
    """
    logits = logits.astype(jnp.float32)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    scaled = lambda x: (x - highest) / (config.temperature or 1.0)

    def weight(x: Array) -> Array:
        """p(token) relative to that of the most likely one."""
        return jnp.where(scaled(x) < FLOOR, 0, jnp.exp(scaled(x)))

    if config.temperature == 0:
        tokens = first_where(logits, lambda x: x == highest)[:, 0]
        tokens = jnp.minimum(tokens, logits.shape[-1] - 1)
        zeros = jnp.zeros(tokens.shape, jnp.float32)
        return tokens, zeros, -jnp.log(row_totals(logits, weight)[:, 0])
    if config.truncates:
        weights = weight(logits)
        bound = smallest_kept(weights, jnp.ones_like(highest), config)
        tokens, mass = invert_cdf(weights, lambda w: jnp.where(w >= bound, w, 0), uniforms)
        log_kept = jnp.log(mass) - jnp.log(row_totals(weights, lambda w: w)[:, 0])
    else:
        tokens, mass = invert_cdf(logits, weight, uniforms)
        log_kept = jnp.zeros(tokens.shape, jnp.float32)
    log_weight = scaled(jnp.take_along_axis(logits, tokens[:, None], axis=-1))[:, 0]
    return tokens, log_weight - jnp.log(mass), log_kept


def _lowest_bound(
    weights: Float[Array, "B V"],
    value: Value,
    low: Float[Array, "B 1"],
    high: Float[Array, "B 1"],
    limit: Float[Array, "B 1"] | float,
) -> Float[Array, "B 1"]:
    """The lowest float32 in [low, high] such that the `value` of all greater weights is < `limit`.

    Non-negative floats are ordered as their bit patterns, and those up to 1 are below 2^30.
    """
    bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)
    number = lambda x: jax.lax.bitcast_convert_type(x, jnp.float32)

    def halve(_, bracket):
        low, high = bracket
        middle = high - (high - low) // 2
        bound = number(middle)
        enough = row_totals(weights, lambda w: jnp.where(w > bound, value(w), 0)) < limit
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    return number(jax.lax.fori_loop(0, 30, halve, (bits(low) - 1, bits(high)))[1])
