"""Which tokens may be drawn, and drawing one.

Truncation (top-k, top-p, min-p) samples from q = p / m on the kept tokens, where m is the kept
mass. Both log q(token) and log m are recorded, so that log p(token) = log q + log m is known
without another forward pass and importance ratios stay unbiased.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
        truncates = self.top_k is not None or self.top_p < 1 or self.min_p > 0
        if self.temperature == 0 and truncates:
            raise ValueError(
                "temperature=0 takes the most likely token, so top_k, top_p and min_p cannot act; "
                "remove them or raise the temperature"
            )


def kept_tokens(probabilities: Float[Array, "B V"], config: SamplingConfig) -> Bool[Array, "B V"]:
    """True for tokens that survive top-k, then top-p of what is left, then min-p.

    The most likely token always survives. The order is that of Hugging Face's processors.
    """
    kept = jnp.ones(probabilities.shape, bool)
    vocab_size = probabilities.shape[-1]
    if config.top_k is not None and config.top_k < vocab_size:
        kth = jax.lax.top_k(probabilities, config.top_k)[0][:, -1:]
        kept &= probabilities >= kth
    if config.top_p < 1:
        left = jnp.where(kept, probabilities, 0)
        descending = -jnp.sort(-left, axis=-1)
        before = jnp.cumsum(descending, axis=-1) - descending
        inside = before < config.top_p * jnp.sum(left, axis=-1, keepdims=True)
        smallest = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
        kept &= left >= smallest
    if config.min_p > 0:
        kept &= probabilities >= config.min_p * jnp.max(probabilities, axis=-1, keepdims=True)
    return kept


def draw(
    logits: Float[Array, "B V"], uniforms: Float[Array, " B"], config: SamplingConfig
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """One token per row by inverting the cumulative distribution at a uniform number in [0, 1).

    One number per row, where the Gumbel trick draws one per vocabulary entry.

    Returns:
        `(tokens, logprobs, kept_logmass)`: log q(token) under the truncated, renormalised
        distribution at this temperature, and the log of the mass that truncation kept. Greedy
        decoding is the point mass: log q = 0 and the kept mass is p(token) at temperature 1.
    """
    logits = logits.astype(jnp.float32)
    if config.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return tokens, jnp.zeros(tokens.shape, jnp.float32), _pick(_log_softmax(logits), tokens)
    log_p = _log_softmax(logits / config.temperature)
    p = jnp.exp(log_p)
    kept = kept_tokens(p, config)
    cumulative = jnp.cumsum(jnp.where(kept, p, 0), axis=-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    tokens = jnp.sum((cumulative <= target).astype(jnp.int32), axis=-1)
    # Rounding can put the target on the total; the last kept token is then the right one.
    last = p.shape[-1] - 1 - jnp.argmax(kept[:, ::-1], axis=-1).astype(jnp.int32)
    tokens = jnp.minimum(tokens, last)
    truncates = config.top_k is not None or config.top_p < 1 or config.min_p > 0
    log_mass = jnp.log(cumulative[:, -1]) if truncates else jnp.zeros(tokens.shape, jnp.float32)
    return tokens, _pick(log_p, tokens) - log_mass, log_mass


def _log_softmax(logits: Array) -> Array:
    return jax.nn.log_softmax(logits, axis=-1)


def _pick(values: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(values, tokens[:, None], axis=-1)[:, 0]
