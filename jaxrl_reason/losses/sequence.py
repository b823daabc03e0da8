"""Policy-gradient losses whose ratio belongs to a sequence, minimised, unreduced: ``[B, T]``.

A row is one sequence, or several that ``segment_ids`` tell apart. The mask says which tokens
belong to a completion; results are 0 (or false) where it is false. A loss has one value per token,
so that ``arrays.aggregate`` reduces it as any other: ``sequence_mean`` gives the mean over
sequences that the papers write. Advantages and gradients are as in ``losses.policy``.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from jaxrl_reason.arrays import (
    bounded_exp,
    check_number,
    check_shape,
    guard_nonfinite,
    sequence_sum,
    to_floats,
    to_mask,
)
from jaxrl_reason.losses.policy import (
    Advantages,
    ClipMetrics,
    clip_metrics,
    clipped_policy_loss,
    per_token,
)

_LOG_WEIGHT_RANGE = (-18.420680743952367, 20.0)  # log 1e-8, beyond which VESPO's kernel is 0 anyway


def gspo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    mask: Shaped[Array, "B T"],
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """-min(s A, clip(s, 1 - epsilon, 1 + epsilon_high) A), s = exp(mean_t log(p_t / p_old_t)).

    GSPO, arXiv 2507.18071, eq. 5 and 7. The value is constant along a sequence, as its advantage
    is. With ``sequence_sum`` as aggregation it is LUSPO, arXiv 2602.05261.

    Args:
        epsilon_high: upper clip, ``epsilon`` when None. Both are far smaller than for token ratios:
            3e-4 and 4e-4 in the paper.
        segment_ids: which sequence of its row a token belongs to; a row is one without it.
    """
    log_ratio, mask = _log_ratio(logprobs, old_logprobs, mask)
    mean = _sequence_mean(log_ratio, mask, segment_ids)
    clips = {"epsilon": epsilon, "epsilon_high": epsilon_high}
    loss = clipped_policy_loss(mean, jnp.zeros_like(mean), advantages, **clips)
    return jnp.where(mask, loss, 0)


def gspo_token_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    mask: Shaped[Array, "B T"],
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """``gspo_loss`` with s_t = stop_gradient(s) p_t / stop_gradient(p_t) in the place of s.

    GSPO-token, arXiv 2507.18071, eq. 13 and 14: the same value, and the same gradient of the mean
    over a sequence with one advantage; it lets advantages differ along the sequence.
    """
    log_ratio, mask = _log_ratio(logprobs, old_logprobs, mask)
    mean = _sequence_mean(jax.lax.stop_gradient(log_ratio), mask, segment_ids)
    moving = mean + (log_ratio - jax.lax.stop_gradient(log_ratio))
    clips = {"epsilon": epsilon, "epsilon_high": epsilon_high}
    loss = clipped_policy_loss(moving, jnp.zeros_like(mean), advantages, **clips)
    return jnp.where(mask, loss, 0)


def gspo_clip_metrics(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    mask: Shaped[Array, "B T"],
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> ClipMetrics:
    """Where ``gspo_loss`` and ``gspo_token_loss`` stop the gradient: ``clip_metrics`` of s."""
    log_ratio, mask = _log_ratio(logprobs, old_logprobs, mask)
    mean = _sequence_mean(log_ratio, mask, segment_ids)
    clips = {"epsilon": epsilon, "epsilon_high": epsilon_high}
    metrics = clip_metrics(mean, jnp.zeros_like(mean), advantages, **clips)
    return {side: where & mask for side, where in metrics.items()}


def gmpo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    mask: Shaped[Array, "B T"],
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """-A exp(mean_t c_t), the geometric mean of clipped ratios (GMPO, arXiv 2507.20673).

    With d = log(p / p_old), c = min(d, epsilon_high) where A > 0 and max(d, -epsilon) elsewhere:
    each token is clipped by itself, on the side that its advantage pushes to.

    Args:
        epsilon: lower clip of the log ratio; 0.4 in the paper.
        epsilon_high: upper clip of the log ratio, ``epsilon`` when None.
        segment_ids: which sequence of its row a token belongs to; a row is one without it.
    """
    epsilon_high = _check_log_clip(epsilon, epsilon_high)
    log_ratio, mask = _log_ratio(logprobs, old_logprobs, mask)
    log_ratio, advantages = to_floats(log_ratio, advantages)
    advantages = per_token(advantages, log_ratio)
    praised, blamed = jnp.minimum(log_ratio, epsilon_high), jnp.maximum(log_ratio, -epsilon)
    clipped = jnp.where(advantages > 0, praised, blamed)
    mean = _sequence_mean(clipped, mask, segment_ids)
    loss = guard_nonfinite(lambda mean, a: -a * bounded_exp(mean), mean, advantages)
    return jnp.where(mask, loss, 0)


def gmpo_clip_metrics(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    mask: Shaped[Array, "B T"],
    *,
    epsilon: float,
    epsilon_high: float | None = None,
) -> ClipMetrics:
    """Which tokens ``gmpo_loss`` leaves without a gradient.

    With d = log(p / p_old), low: d < -epsilon and A < 0; high: d > epsilon_high and A > 0; region:
    either.
    """
    epsilon_high = _check_log_clip(epsilon, epsilon_high)
    log_ratio, mask = _log_ratio(logprobs, old_logprobs, mask)
    log_ratio, advantages = to_floats(log_ratio, advantages)
    advantages = per_token(advantages, log_ratio)
    low = (log_ratio < -epsilon) & (advantages < 0) & mask
    high = (log_ratio > epsilon_high) & (advantages > 0) & mask
    return {"low": low, "high": high, "region": low | high}


def vespo_loss(  # noqa: PLR0913 (four numbers shape the kernel)
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    mask: Shaped[Array, "B T"],
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
    importance_weights: Float[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """-stop_gradient(W^k exp(lambda (1 - W))) A log p, W = prod_t p_t / p_old_t.

    VESPO, arXiv 2602.10693, scaled to 1 at W = 1 as TRL has it. k and lambda are those of ``_pos``
    where A >= 0 and those of ``_neg`` elsewhere: k damps sequences that the policy has left behind
    (W < 1), lambda those it favours (W > 1). W is not normalised by length and is clipped to
    [1e-8, e^20].

    Args:
        importance_weights: p_old / p_sampling of each token, truncated or masked, which W is
            multiplied with. They act here instead of as a factor of the loss.
        segment_ids: which sequence of its row a token belongs to; a row is one without it.
    """
    for name, k in (("k_pos", k_pos), ("k_neg", k_neg)):
        check_number(name, k, at_least=0)
    for name, rate in (("lambda_pos", lambda_pos), ("lambda_neg", lambda_neg)):
        check_number(name, rate, above=0)
    log_weight, mask = _log_ratio(logprobs, old_logprobs, mask)
    log_weight, logprobs, advantages = to_floats(log_weight, logprobs, advantages)
    advantages = per_token(advantages, logprobs)
    log_weight = jax.lax.stop_gradient(log_weight)
    if importance_weights is not None:
        log_weight, importance_weights = to_floats(log_weight, importance_weights)
        check_shape("importance_weights", importance_weights, log_weight.shape)
        log_weight += jnp.log(jax.lax.stop_gradient(importance_weights))
    log_weight = jnp.clip(sequence_sum(log_weight, mask, segment_ids), *_LOG_WEIGHT_RANGE)
    k = jnp.where(advantages >= 0, k_pos, k_neg)
    rate = jnp.where(advantages >= 0, lambda_pos, lambda_neg)
    kernel = jnp.exp(k * log_weight + rate * (1 - jnp.exp(log_weight)))
    loss = guard_nonfinite(lambda w, a, logprob: -w * a * logprob, kernel, advantages, logprobs)
    return jnp.where(mask, loss, 0)


def _log_ratio(logprobs, old_logprobs, mask):
    """log(p / p_old) and the mask as bool; 0 where the mask is false."""
    logprobs, old_logprobs = to_floats(logprobs, old_logprobs)
    mask = to_mask(mask)
    check_shape("old_logprobs", old_logprobs, logprobs.shape)
    check_shape("mask", mask, logprobs.shape)
    return jnp.where(mask, logprobs - jax.lax.stop_gradient(old_logprobs), 0), mask


def _sequence_mean(values, mask, segment_ids):
    lengths = sequence_sum(jnp.ones_like(values), mask, segment_ids)
    return sequence_sum(values, mask, segment_ids) / jnp.maximum(lengths, 1)


def _check_log_clip(epsilon, epsilon_high):
    check_number("epsilon", epsilon, at_least=0)
    if epsilon_high is None:
        return epsilon
    check_number("epsilon_high", epsilon_high, at_least=0)
    return epsilon_high
