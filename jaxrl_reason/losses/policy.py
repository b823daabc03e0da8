"""Policy-gradient losses, minimised, per token and unreduced: ``[B, T]``.

Advantages are ``[B]`` (one per completion, spread over its tokens) or ``[B, T]``. The gradient
flows through ``logprobs`` only: old log-probabilities and advantages are detached, so
``old_logprobs=logprobs`` means a ratio of 1, not a gradient of 0.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from jaxrl_reason.arrays import (
    bounded_exp,
    check_number,
    check_shape,
    guard_nonfinite,
    masked_sum,
    sequence_sum,
    to_floats,
    to_mask,
)

Advantages = Float[Array, " B"] | Float[Array, "B T"]
ClipMetrics = dict[str, Bool[Array, "B T"]]


def reinforce_loss(logprobs: Float[Array, "B T"], advantages: Advantages) -> Float[Array, "B T"]:
    """-A log p (Williams 1992)."""
    logprobs, advantages = to_floats(logprobs, advantages)
    advantages = per_token(advantages, logprobs)
    return guard_nonfinite(lambda logprob, advantage: -advantage * logprob, logprobs, advantages)


def clipped_policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Float[Array, "B T"]:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), r = p / p_old.

    PPO, arXiv 1707.06347, eq. 7, as used by GRPO, arXiv 2402.03300, eq. 3.

    Args:
        epsilon_high: upper clip, ``epsilon`` when None (DAPO's clip-higher, arXiv 2503.14476).
        delta: bound on the ratio in the unclipped branch, which binds only where A < 0 (dual clip,
            arXiv 1912.09729, eq. 5; INTELLECT-2, arXiv 2505.07291). It must exceed
            1 + epsilon_high.
    """
    epsilon_high = check_clip(epsilon, epsilon_high)
    if delta is not None and all(isinstance(x, (int, float)) for x in (delta, epsilon_high)):
        check_number("delta", delta, above=1 + epsilon_high)
    log_ratio, advantages, _ = log_ratios(logprobs, old_logprobs, advantages)

    def loss(log_ratio, advantage):
        ratio = bounded_exp(log_ratio)
        clipped = jnp.clip(ratio, 1 - epsilon, 1 + epsilon_high)
        free = ratio if delta is None else jnp.minimum(ratio, delta)
        return -jnp.minimum(free * advantage, clipped * advantage)

    return guard_nonfinite(loss, log_ratio, advantages)


def clip_metrics(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
) -> ClipMetrics:
    """Where ``clipped_policy_loss`` stops the gradient, counted as TRL does.

    low: r < 1 - epsilon and A < 0; high: r > 1 + epsilon_high and A > 0; region: either.
    """
    epsilon_high = check_clip(epsilon, epsilon_high)
    log_ratio, advantages, _ = log_ratios(logprobs, old_logprobs, advantages)
    ratio = bounded_exp(log_ratio)
    low = (ratio < 1 - epsilon) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return {"low": low, "high": high, "region": low | high}


def cispo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    *,
    epsilon_high: float,
    epsilon: float | None = None,
) -> Float[Array, "B T"]:
    """-stop_gradient(clip(r, 1 - epsilon, epsilon_high)) A log p (CISPO, arXiv 2506.13585).

    The weight is bounded and detached, so that no token loses its gradient.

    Args:
        epsilon_high: the largest weight itself (TRL's meaning, and eps_max of ScaleRL, arXiv
            2510.13786, which uses 5), so 1 or more; the paper writes it as 1 + epsilon_high.
        epsilon: the smallest weight is 1 - epsilon; no lower bound when None.
    """
    _check_cispo(epsilon_high, epsilon)
    log_ratio, advantages, logprobs = log_ratios(logprobs, old_logprobs, advantages)

    def loss(log_ratio, advantage, logprob):
        floor = None if epsilon is None else 1 - epsilon
        weight = jax.lax.stop_gradient(jnp.clip(bounded_exp(log_ratio), floor, epsilon_high))
        return -weight * advantage * logprob

    return guard_nonfinite(loss, log_ratio, advantages, logprobs)


def cispo_clip_metrics(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    *,
    epsilon_high: float,
    epsilon: float | None = None,
) -> ClipMetrics:
    """Where ``cispo_loss`` bounds its weight, counted as TRL does.

    low: r < 1 - epsilon and A < 0; high: r > epsilon_high and A > 0; region: either.
    """
    _check_cispo(epsilon_high, epsilon)
    log_ratio, advantages, _ = log_ratios(logprobs, old_logprobs, advantages)
    ratio = bounded_exp(log_ratio)
    high = (ratio > epsilon_high) & (advantages > 0)
    low = jnp.zeros_like(high) if epsilon is None else (ratio < 1 - epsilon) & (advantages < 0)
    return {"low": low, "high": high, "region": low | high}


def triplet_clipped_policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    *,
    epsilon_neg_low: float,
    epsilon_neg_high: float,
    epsilon_pos_high: float,
) -> Float[Array, "B T"]:
    """PPO with its own bounds for each sign of A (LongCat-Flash-Thinking, arXiv 2509.18883).

    -A min(r, 1 + epsilon_pos_high) where A > 0, and -A clip(r, 1 - epsilon_neg_low,
    epsilon_neg_high) elsewhere. The report prints one expression for both signs, which taken
    literally removes every positive gradient; this is what its text says of the three bounds.

    Args:
        epsilon_neg_high: the largest ratio itself where A < 0, so more than 1.
    """
    _check_triplet(epsilon_neg_low, epsilon_neg_high, epsilon_pos_high)
    log_ratio, advantages, _ = log_ratios(logprobs, old_logprobs, advantages)

    def loss(log_ratio, advantage):
        ratio = bounded_exp(log_ratio)
        praised = jnp.minimum(ratio, 1 + epsilon_pos_high)
        blamed = jnp.clip(ratio, 1 - epsilon_neg_low, epsilon_neg_high)
        return -advantage * jnp.where(advantage > 0, praised, blamed)

    return guard_nonfinite(loss, log_ratio, advantages)


def triplet_clip_metrics(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    *,
    epsilon_neg_low: float,
    epsilon_neg_high: float,
    epsilon_pos_high: float,
) -> ClipMetrics:
    """Where ``triplet_clipped_policy_loss`` stops the gradient.

    low: r < 1 - epsilon_neg_low and A < 0; high: r above the upper bound of the sign of A; region:
    either.
    """
    _check_triplet(epsilon_neg_low, epsilon_neg_high, epsilon_pos_high)
    log_ratio, advantages, _ = log_ratios(logprobs, old_logprobs, advantages)
    ratio = bounded_exp(log_ratio)
    low = (ratio < 1 - epsilon_neg_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_pos_high) & (advantages > 0)
    high |= (ratio > epsilon_neg_high) & (advantages < 0)
    return {"low": low, "high": high, "region": low | high}


def sapo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    *,
    temperature_pos: float,
    temperature_neg: float,
) -> Float[Array, "B T"]:
    """-A (4 / tau) sigmoid(tau (r - 1)) (SAPO, arXiv 2511.20347).

    tau is ``temperature_pos`` where A > 0 and ``temperature_neg`` elsewhere. At ratio 1 the
    gradient is that of REINFORCE; it fades smoothly on both sides instead of being cut.
    """
    check_number("temperature_pos", temperature_pos, above=0)
    check_number("temperature_neg", temperature_neg, above=0)
    log_ratio, advantages, _ = log_ratios(logprobs, old_logprobs, advantages)

    def loss(log_ratio, advantage):
        tau = jnp.where(advantage > 0, temperature_pos, temperature_neg)
        return -advantage * jax.nn.sigmoid(tau * (bounded_exp(log_ratio) - 1)) * (4 / tau)

    return guard_nonfinite(loss, log_ratio, advantages)


def gpg_loss(
    logprobs: Float[Array, "B T"],
    advantages: Advantages,
    mask: Shaped[Array, "B T"],
    *,
    alpha: float | Float[Array, ""] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """-alpha A log p, alpha = sequences / live sequences (GPG, arXiv 2504.02546).

    A live sequence has an advantage other than 0. The groups whose rewards are all equal add
    nothing to the gradient but count in its mean; alpha undoes that. verl counts rewards instead of
    advantages. 0 where the mask is false.

    Args:
        alpha: that factor for the whole batch, where this is a microbatch of it, or a constant;
            counted in the arrays given when None.
        segment_ids: which sequence of its row a token belongs to; a row is one without it.
    """
    logprobs, advantages = to_floats(logprobs, advantages)
    advantages, mask = per_token(advantages, logprobs), to_mask(mask)
    check_shape("mask", mask, logprobs.shape)
    if alpha is None:
        ones = jnp.ones_like(advantages)
        share = 1 / jnp.maximum(sequence_sum(ones, mask, segment_ids), 1)
        live = sequence_sum(jnp.where(advantages != 0, ones, 0), mask, segment_ids) > 0
        alpha = masked_sum(share, mask) / jnp.maximum(masked_sum(share, mask & live), 1)
    else:
        check_number("alpha", alpha, above=0)
    alpha = jax.lax.stop_gradient(jnp.asarray(alpha, logprobs.dtype))
    return jnp.where(mask, alpha * reinforce_loss(logprobs, advantages), 0)


def check_clip(epsilon, epsilon_high):
    """The upper clip, after a check of both; it is ``epsilon`` when None."""
    check_number("epsilon", epsilon, at_least=0, at_most=1)
    if epsilon_high is None:
        return epsilon
    check_number("epsilon_high", epsilon_high, at_least=0)
    return epsilon_high


def _check_cispo(epsilon_high, epsilon):
    check_number("epsilon_high (the largest weight itself)", epsilon_high, at_least=1)
    if epsilon is not None:
        check_number("epsilon", epsilon, at_least=0, at_most=1)


def _check_triplet(epsilon_neg_low, epsilon_neg_high, epsilon_pos_high):
    check_number("epsilon_neg_low", epsilon_neg_low, at_least=0, at_most=1)
    check_number("epsilon_neg_high (the largest ratio itself)", epsilon_neg_high, above=1)
    check_number("epsilon_pos_high", epsilon_pos_high, at_least=0)


def per_token(advantages, logprobs):
    """Advantages ``[B]`` or ``[B, T]`` as a detached ``[B, T]``."""
    if advantages.shape not in (logprobs.shape, logprobs.shape[:-1]):
        raise ValueError(
            f"advantages has shape {advantages.shape}; expected {logprobs.shape[:-1]} "
            f"(one per sequence) or {logprobs.shape} (one per token)"
        )
    if advantages.ndim < logprobs.ndim:
        advantages = jnp.broadcast_to(advantages[..., None], logprobs.shape)
    return jax.lax.stop_gradient(advantages)


def log_ratios(logprobs, old_logprobs, advantages):
    """Log ratio to the detached old policy, advantages and ``logprobs``, each ``[B, T]``."""
    logprobs, old_logprobs, advantages = to_floats(logprobs, old_logprobs, advantages)
    check_shape("old_logprobs", old_logprobs, logprobs.shape)
    log_ratio = logprobs - jax.lax.stop_gradient(old_logprobs)
    return log_ratio, per_token(advantages, logprobs), logprobs
