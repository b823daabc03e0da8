"""Policy-gradient losses, minimised, per token and unreduced: ``[B, T]``.

Advantages are ``[B]`` (one per completion, spread over its tokens) or ``[B, T]``. The gradient
flows through ``logprobs`` only: old log-probabilities and advantages are detached, so
``old_logprobs=logprobs`` means a ratio of 1, not a gradient of 0.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxrl_reason.arrays import bounded_exp, check_number, check_shape, guard_nonfinite, to_floats

Advantages = Float[Array, " B"] | Float[Array, "B T"]
ClipMetrics = dict[str, Bool[Array, "B T"]]


@dataclasses.dataclass(frozen=True)
class LossType:
    """What one of TRL's ``loss_type`` names stands for."""

    loss: Callable[..., Float[Array, "B T"]]
    """Called as ``loss(logprobs, old_logprobs, advantages, **options)``."""
    aggregation: str
    """``how`` of ``arrays.aggregate``."""
    scale: str
    """``scale`` of ``advantages.group_advantages`` in the paper that the name stands for."""
    options: tuple[str, ...]
    """The hyperparameters that ``loss`` takes, by keyword."""
    clip_metrics: Callable[..., ClipMetrics]
    """Called like ``loss``, with ``epsilon`` and ``epsilon_high``."""


def reinforce_loss(logprobs: Float[Array, "B T"], advantages: Advantages) -> Float[Array, "B T"]:
    """-A log p (Williams 1992)."""
    logprobs, advantages = to_floats(logprobs, advantages)
    advantages = _per_token(advantages, logprobs)
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
    epsilon_high = _check_clip(epsilon, epsilon_high)
    if delta is not None and all(isinstance(x, (int, float)) for x in (delta, epsilon_high)):
        check_number("delta", delta, above=1 + epsilon_high)
    log_ratio, advantages, _ = _prepare(logprobs, old_logprobs, advantages)

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
    epsilon_high = _check_clip(epsilon, epsilon_high)
    log_ratio, advantages, _ = _prepare(logprobs, old_logprobs, advantages)
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
    log_ratio, advantages, logprobs = _prepare(logprobs, old_logprobs, advantages)

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
    log_ratio, advantages, _ = _prepare(logprobs, old_logprobs, advantages)
    ratio = bounded_exp(log_ratio)
    high = (ratio > epsilon_high) & (advantages > 0)
    low = jnp.zeros_like(high) if epsilon is None else (ratio < 1 - epsilon) & (advantages < 0)
    return {"low": low, "high": high, "region": low | high}


def _check_clip(epsilon, epsilon_high):
    check_number("epsilon", epsilon, at_least=0, at_most=1)
    if epsilon_high is None:
        return epsilon
    check_number("epsilon_high", epsilon_high, at_least=0)
    return epsilon_high


def _check_cispo(epsilon_high, epsilon):
    check_number("epsilon_high (the largest weight itself)", epsilon_high, at_least=1)
    if epsilon is not None:
        check_number("epsilon", epsilon, at_least=0, at_most=1)


def _per_token(advantages, logprobs):
    """Advantages ``[B]`` or ``[B, T]`` as a detached ``[B, T]``."""
    if advantages.shape not in (logprobs.shape, logprobs.shape[:-1]):
        raise ValueError(
            f"advantages has shape {advantages.shape}; expected {logprobs.shape[:-1]} "
            f"(one per sequence) or {logprobs.shape} (one per token)"
        )
    if advantages.ndim < logprobs.ndim:
        advantages = jnp.broadcast_to(advantages[..., None], logprobs.shape)
    return jax.lax.stop_gradient(advantages)


def _prepare(logprobs, old_logprobs, advantages):
    logprobs, old_logprobs, advantages = to_floats(logprobs, old_logprobs, advantages)
    check_shape("old_logprobs", old_logprobs, logprobs.shape)
    log_ratio = logprobs - jax.lax.stop_gradient(old_logprobs)
    return log_ratio, _per_token(advantages, logprobs), logprobs


_CLIPPED = {
    "loss": clipped_policy_loss,
    "options": ("epsilon", "epsilon_high", "delta"),
    "clip_metrics": clip_metrics,
}

LOSS_TYPES: Mapping[str, LossType] = MappingProxyType(
    {
        "grpo": LossType(aggregation="sequence_mean", scale="group", **_CLIPPED),
        "bnpo": LossType(aggregation="token_mean", scale="group", **_CLIPPED),
        "dr_grpo": LossType(aggregation="constant", scale="none", **_CLIPPED),
        "dapo": LossType(aggregation="token_mean", scale="group", **_CLIPPED),
        "cispo": LossType(
            loss=cispo_loss,
            aggregation="token_mean",
            scale="group",
            options=("epsilon", "epsilon_high"),
            clip_metrics=cispo_clip_metrics,
        ),
    }
)
"""TRL's ``loss_type`` names.

``bnpo`` and ``dapo`` are one thing here: TRL's ``bnpo`` divides by the tokens of a microbatch and
``dapo`` by those of the whole batch, and a ``WeightedMean`` always does the latter. ``grpo`` leaves
sequences without a token out of the mean; TRL counts them as zeros.
"""
