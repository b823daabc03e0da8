"""From rewards to advantages: group-relative, over the batch, and from a value function.

Results are detached. B is prompts x num_generations, the completions of one prompt consecutive.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Shaped

from jaxrl_reason.arrays import (
    check_choice,
    check_number,
    check_shape,
    masked_moments,
    split_groups,
    to_floats,
    to_mask,
)

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: Float[Array, " B"],
    *,
    num_generations: int,
    baseline: str = "mean",
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-4,
) -> Float[Array, " B"]:
    """A_i = (r_i - b_i) / (s + eps) (GRPO, arXiv 2402.03300).

    A group of equal rewards gives exactly 0.

    Args:
        baseline: ``mean`` of the group; ``leave_one_out``, the mean of the others (RLOO, arXiv
            2402.14740); or ``none``, where equal rewards keep their value unless ``scale``
            is ``group``.
        scale: s is the deviation of the rewards in the ``group``, in the whole ``batch`` (arXiv
            2508.08221), or there is no division (``none``, Dr. GRPO, arXiv 2503.20783).
        ddof: 1 divides the squares by n - 1, as TRL does; 0 by n.
    """
    check_choice("baseline", baseline, BASELINES)
    check_choice("scale", scale, SCALES)
    check_choice("ddof", ddof, (0, 1))
    check_number("eps", eps, at_least=0)
    (rewards,) = to_floats(rewards)
    groups = split_groups(_vector(rewards), num_generations)  # [N, G]
    if num_generations < 2 and (baseline != "none" or scale == "group"):
        raise ValueError(
            f"num_generations={num_generations} leaves nothing to compare; use at least 2, or "
            "baseline='none' with scale='batch' or 'none'"
        )
    everything = jnp.ones_like(groups, dtype=jnp.bool_)
    mean, std, differ = masked_moments(groups, everything, axis=1, ddof=ddof)

    advantages = groups if baseline == "none" else groups - mean
    if baseline == "leave_one_out":
        advantages = advantages * (num_generations / (num_generations - 1))
    if scale == "batch":
        _, std, _ = masked_moments(groups, everything, axis=(0, 1), ddof=ddof)
    if scale != "none":
        advantages = _divide(advantages, std + eps)
    if baseline != "none" or scale == "group":
        advantages = jnp.where(differ, advantages, 0)
    return jax.lax.stop_gradient(advantages.reshape(-1))


def global_advantages(rewards: Float[Array, " B"], *, eps: float) -> Float[Array, " B"]:
    """(r - mean) / (std + eps) over the batch (REINFORCE++, arXiv 2501.03262).

    The deviation divides by n - 1. A batch of equal rewards gives exactly 0.
    """
    check_number("eps", eps, at_least=0)
    (rewards,) = to_floats(rewards)
    rewards = _vector(rewards)
    mean, std, differ = masked_moments(
        rewards, jnp.ones_like(rewards, dtype=jnp.bool_), axis=0, ddof=1
    )
    return jax.lax.stop_gradient(jnp.where(differ, _divide(rewards - mean, std + eps), 0))


def dead_groups(rewards: Float[Array, " B"], num_generations: int) -> Bool[Array, " N"]:
    """True for each of the B / num_generations groups whose rewards are all equal."""
    (rewards,) = to_floats(rewards)
    groups = split_groups(_vector(rewards), num_generations)
    _, _, differ = masked_moments(groups, jnp.ones_like(groups, dtype=jnp.bool_), axis=1, ddof=0)
    return ~differ[:, 0]


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16).

    d_t = r_t + gamma V_{t+1} - V_t and A_t = d_t + gamma lam A_{t+1}, where t+1 is the next true
    token: false tokens in between (padding, the output of a tool) are skipped. An episode ends
    after its last true token.

    Returns:
        Advantages and returns (advantages + values), ``[B, T]``, both 0 under a false mask.
    """
    check_number("gamma", gamma, at_least=0, at_most=1)
    check_number("lam", lam, at_least=0, at_most=1)
    rewards, values = to_floats(rewards, values)
    mask = to_mask(mask)
    if rewards.ndim != 2:
        raise ValueError(f"rewards has shape {rewards.shape}; expected [B, T]")
    check_shape("values", values, rewards.shape)
    check_shape("mask", mask, rewards.shape)
    rewards, values = jnp.where(mask, rewards, 0), jnp.where(mask, values, 0)

    def backward(later, now):
        next_value, next_advantage = later
        reward, value, counts = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        kept = jnp.where(counts, value, next_value), jnp.where(counts, advantage, next_advantage)
        return kept, jnp.where(counts, advantage, 0)

    end = jnp.zeros_like(rewards[:, 0])
    _, advantages = jax.lax.scan(backward, (end, end), (rewards.T, values.T, mask.T), reverse=True)
    advantages = advantages.T
    return jax.lax.stop_gradient((advantages, advantages + values))


def _vector(rewards):
    if rewards.ndim != 1:
        raise ValueError(f"rewards has shape {rewards.shape}; expected [B]")
    return rewards


def _divide(values, scale):
    # eps may be 0, and then a dead group has scale 0; its value is replaced by 0 afterwards.
    return values / jnp.where(scale == 0, 1, scale)
