"""Rewards ``[B, M]`` of M objectives, viewed as groups ``[N, G, M]`` and normalised.

N = B / num_generations prompts, G = num_generations completions each. The mask is false where an
objective does not apply; such a reward is left out of its group's statistics and never counts as 0.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Shaped

from jaxrl_reason.arrays import (
    check_choice,
    check_shape,
    masked_mean,
    masked_moments,
    split_groups,
    to_floats,
    to_mask,
)

SCALES = ("group", "batch", "none")
EPS = 1e-4
"""Added to a deviation before dividing by it, as in TRL and in GDPO."""


def grouped(
    rewards: Float[Array, "B M"], mask: Shaped[Array, "B M"], num_generations: int
) -> tuple[Float[Array, "N G M"], Bool[Array, "N G M"]]:
    """Rewards and mask in groups; raises ValueError on shapes that do not fit."""
    (rewards,) = to_floats(rewards)
    mask = to_mask(mask)
    if rewards.ndim != 2:
        raise ValueError(f"rewards has shape {rewards.shape}; expected [B, M]")
    check_shape("mask", mask, rewards.shape)
    if num_generations < 2:
        raise ValueError(f"num_generations={num_generations}; a group needs at least 2 completions")
    return split_groups(rewards, num_generations), split_groups(mask, num_generations)


def per_objective(
    name: str, values: float | Float[Array, " M"], like: Float[Array, "... M"]
) -> Float[Array, " M"]:
    """One number for each objective, in the dtype of ``like``; a scalar stands for all."""
    values = jnp.asarray(values).astype(like.dtype)
    if values.shape not in ((), like.shape[-1:]):
        raise ValueError(
            f"{name} has shape {values.shape}; expected {like.shape[-1:]}, one for each objective"
        )
    return jnp.broadcast_to(values, like.shape[-1:])


def standardized(
    rewards: Float[Array, "N G M"],
    mask: Bool[Array, "N G M"],
    *,
    ddof: int,
    eps: float,
    min_std: Float[Array, " M"] | None = None,
) -> tuple[Float[Array, "N G M"], Bool[Array, "N M"]]:
    """(r - mean) / (std + eps) in each group and objective, and which of them are live.

    An objective is dead in a group, and 0 there, when it does not apply, when its rewards are all
    equal, or when their deviation is below ``min_std``.
    """
    mean, std, differ = masked_moments(rewards, mask, axis=1, ddof=ddof)
    live = differ if min_std is None else differ & (std >= min_std[None, None, :])  # [N, 1, M]
    scores = (rewards - mean) / (jnp.where(live, std, 1) + eps)
    return jnp.where(mask & live, scores, 0), live[:, 0]


def imputed(
    rewards: Float[Array, "N G M"], mask: Bool[Array, "N G M"]
) -> tuple[Float[Array, "N G M"], Bool[Array, "N M"]]:
    """Rewards with gaps filled by the group's mean, and which objectives apply to which prompt.

    The mean makes a gap neutral in a sum; where an objective does not apply at all it is 0.
    """
    mean = masked_mean(rewards, mask, axis=1)[:, None]
    return jnp.where(mask, rewards, mean), jnp.any(mask, axis=1)


def centered(scores: Float[Array, "N G"], *, scale: str) -> Float[Array, " B"]:
    """Scores minus their group's mean, over the deviation of the group, of the batch, or 1.

    With ``scale="group"`` this is GRPO's advantage. Equal scores in a group give exactly 0.
    """
    check_choice("scale", scale, SCALES)
    everything = jnp.ones_like(scores, dtype=jnp.bool_)
    mean, std, differ = masked_moments(scores, everything, axis=1, ddof=1)
    if scale == "batch":
        _, std, _ = masked_moments(scores, everything, axis=(0, 1), ddof=1)
    divisor = 1 if scale == "none" else std + EPS
    return jnp.where(differ, (scores - mean) / divisor, 0).reshape(-1)


def renormalized(advantages: Float[Array, "N G"], *, over: str) -> Float[Array, " B"]:
    """Advantages standardised over the ``batch`` or each ``group``, or as they are (``none``)."""
    if over == "none":
        return advantages.reshape(-1)
    axis = (0, 1) if over == "batch" else 1
    everything = jnp.ones_like(advantages, dtype=jnp.bool_)
    mean, std, differ = masked_moments(advantages, everything, axis=axis, ddof=1)
    return jnp.where(differ, (advantages - mean) / (std + EPS), 0).reshape(-1)
