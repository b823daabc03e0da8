"""Losses that hold back the tokens which cost the most entropy (arXiv 2505.22617), ``[B, T]``.

Entropy falls with the covariance of log-probability and advantage, and a few tokens carry most of
it. Both losses compute (log p - mean log p) (A - mean A) of every token, the means over all counted
tokens of the batch, and treat the tokens where it is large apart. Which tokens those are carries no
gradient. Results are 0 (or false) where the mask is false. Advantages are as in ``losses.policy``.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray, Shaped, UInt32

from jaxrl_reason.arrays import (
    bounded_exp,
    check_number,
    check_shape,
    guard_nonfinite,
    masked_mean,
    to_floats,
    to_mask,
)
from jaxrl_reason.losses.divergence import kl_estimate
from jaxrl_reason.losses.policy import (
    Advantages,
    ClipMetrics,
    clip_metrics,
    clipped_policy_loss,
    log_ratios,
    per_token,
)

Key = PRNGKeyArray | UInt32[Array, "2"]


def clip_cov_loss(  # noqa: PLR0913 (a loss of five numbers)
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    mask: Shaped[Array, "B T"],
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    clip_cov_ratio: float,
    clip_cov_lb: float,
    clip_cov_ub: float,
    key: Key,
) -> Float[Array, "B T"]:
    """``clipped_policy_loss``, and 0 at random tokens of large covariance (Clip-Cov).

    ``key`` draws the tokens from those with clip_cov_lb < covariance < clip_cov_ub to which PPO's
    clip leaves a gradient: max(1, floor(clip_cov_ratio N)) of them, N the counted tokens, or all
    if there are fewer. Section 4 of arXiv 2505.22617; names as in verl.
    """
    numbers = {"clip_cov_ratio": clip_cov_ratio, "lb": clip_cov_lb, "ub": clip_cov_ub}
    clips = {"epsilon": epsilon, "epsilon_high": epsilon_high}
    loss = clipped_policy_loss(logprobs, old_logprobs, advantages, **clips)
    stopped = clip_metrics(logprobs, old_logprobs, advantages, **clips)["region"]
    drawn, mask = _draw(logprobs, advantages, mask, stopped, key, **numbers)
    return jnp.where(mask & ~drawn, loss, 0)


def clip_cov_metrics(  # noqa: PLR0913 (takes what the loss takes)
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    mask: Shaped[Array, "B T"],
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    clip_cov_ratio: float,
    clip_cov_lb: float,
    clip_cov_ub: float,
    key: Key,
) -> ClipMetrics:
    """Where ``clip_cov_loss`` stops the gradient, given the same ``key``.

    low and high: by the ratio, as in ``clip_metrics``; region: either, or by the covariance.
    """
    numbers = {"clip_cov_ratio": clip_cov_ratio, "lb": clip_cov_lb, "ub": clip_cov_ub}
    clips = {"epsilon": epsilon, "epsilon_high": epsilon_high}
    metrics = clip_metrics(logprobs, old_logprobs, advantages, **clips)
    drawn, mask = _draw(logprobs, advantages, mask, metrics["region"], key, **numbers)
    metrics["region"] |= drawn
    return {side: where & mask for side, where in metrics.items()}


def kl_cov_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Advantages,
    mask: Shaped[Array, "B T"],
    *,
    kl_cov_ratio: float,
    ppo_kl_coef: float,
) -> Float[Array, "B T"]:
    """-r A, plus ppo_kl_coef |log r| at the tokens of largest covariance (KL-Cov), r = p / p_old.

    Those are the first max(1, floor(kl_cov_ratio N)) of the N counted tokens. There is no clip.
    Section 4 of arXiv 2505.22617; |log r| for its KL and the names as in verl.
    """
    check_number("kl_cov_ratio", kl_cov_ratio, above=0, at_most=1)
    check_number("ppo_kl_coef", ppo_kl_coef, at_least=0)
    covariance, counted, mask = _covariance(logprobs, advantages, mask)
    log_ratio, advantages, _ = log_ratios(logprobs, old_logprobs, advantages)
    chosen = _first(counted, covariance, _share(kl_cov_ratio, mask, covariance.dtype))

    loss = guard_nonfinite(lambda x, a: -a * bounded_exp(x), log_ratio, advantages)
    penalty = ppo_kl_coef * kl_estimate(logprobs, old_logprobs, estimator="k1_abs")
    return jnp.where(mask, loss + jnp.where(chosen, penalty, 0), 0)


def _draw(logprobs, advantages, mask, stopped, key, *, clip_cov_ratio, lb, ub):
    """Clip-Cov's random tokens and the mask, both bool."""
    check_number("clip_cov_ratio", clip_cov_ratio, above=0, at_most=1)
    if all(isinstance(bound, (int, float)) for bound in (lb, ub)):
        check_number("clip_cov_ub", ub, above=lb)
    if key is None:
        raise TypeError("key is None; Clip-Cov draws tokens and needs a jax.random key")
    covariance, counted, mask = _covariance(logprobs, advantages, mask)
    candidates = counted & (covariance > lb) & (covariance < ub) & ~stopped
    noise = jax.random.uniform(key, mask.shape)
    return _first(candidates, noise, _share(clip_cov_ratio, mask, covariance.dtype)), mask


def _covariance(logprobs, advantages, mask):
    """Centred products, which tokens have one, and the mask; NaN and infinite tokens have none."""
    logprobs, advantages = to_floats(logprobs, advantages)
    logprobs, advantages = jax.lax.stop_gradient(logprobs), per_token(advantages, logprobs)
    mask = to_mask(mask)
    check_shape("mask", mask, logprobs.shape)
    counted = mask & jnp.isfinite(logprobs) & jnp.isfinite(advantages)
    centred = [
        jnp.where(counted, array - masked_mean(array, counted), 0)
        for array in (logprobs, advantages)
    ]
    return centred[0] * centred[1], counted, mask


def _share(ratio, mask, dtype):
    """max(1, floor(ratio N)), N the counted tokens."""
    # One rounding step up, so that 0.29 of 100 is 29 although the product of the floats is below.
    number = ratio * jnp.sum(mask, dtype=dtype) * (1 + jnp.finfo(dtype).eps)
    return jnp.maximum(jnp.floor(number).astype(jnp.int32), 1)


def _first(candidates, score, number):
    """The ``number`` candidates of highest score, or all; ``number`` may be traced."""
    order = jnp.argsort(jnp.where(candidates, -score, jnp.inf).ravel())
    places = jnp.arange(order.size, dtype=jnp.int32)
    rank = jnp.zeros_like(places).at[order].set(places).reshape(candidates.shape)
    return candidates & (rank < number)
