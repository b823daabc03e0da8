"""Importance weights between the policy that drew the tokens and the policy that is trained.

An inference engine, a stale copy of the weights or truncated sampling makes the sampler differ from
the policy whose log-probabilities the loss takes as old. A weight multiplies the loss of its token.

Truncated sampling: top-p, top-k and min-p draw from q = mu / m on a kept set S, where mu is the
sampler's untruncated distribution and m = mu(S). Then p_old / q has mean p_old(S) and not 1, so
that even for p_old = mu every loss shrinks by the kept mass (huggingface/trl issue 6789). With
``keep_mass`` = log m the ratio is w = p_old / mu, and for every function f of the token, before
bounds, E_q[w f] = p_old(S) / m x E[f], the last mean under p_old renormalised on S. The factor is
1 when both policies put the same mass on S, as with equal parameters. It is exactly 1 if
``keep_mass`` is log p_old(S) instead, for callers who know S. Tokens outside S are never drawn, so
no weight can give means under all of p_old.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from jaxrl_reason.arrays import (
    WeightedMean,
    aggregate,
    check_choice,
    check_number,
    check_shape,
    sequence_sum,
    to_floats,
    to_mask,
)

_LEVELS = ("token", "sequence", "geometric")
_MODES = ("truncate", "mask")
_PREFIX = "sampling/importance_sampling_ratio/"


def importance_weights(  # noqa: PLR0913 (arrays and options of one formula)
    old_logprobs: Float[Array, "B T"],
    sampling_logprobs: Float[Array, "B T"],
    mask: Shaped[Array, "B T"],
    *,
    level: str,
    mode: str,
    cap: float,
    floor: float | None = None,
    keep_mass: Float[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], dict[str, WeightedMean]]:
    """Bounded ratios p_old / q of the old policy p_old to the sampler q, detached.

    The log ratio of a token is log p_old - log q - log m, with log m = 0 unless ``keep_mass`` is
    given. ``level`` makes ratios of it: ``"token"``, exp of it; ``"sequence"``, exp of its sum over
    the sequence (the exact ratio of sequences, of high variance); ``"geometric"``, exp of its mean
    over the sequence. ``mode`` bounds them: ``"truncate"``, max(min(ratio, cap), floor) (truncated
    importance sampling, Ionides 2008; Yao et al. 2025, https://fengyao.notion.site/off-policy-rl);
    ``"mask"``, the ratio inside [floor, cap] and 0 outside (IcePop for tokens, arXiv 2510.18855;
    masked sequences and geometric rejection, Liu, Li et al. 2025,
    https://richardli.xyz/rl-collapse). To reject by one level and weigh by another, multiply the
    weights of one call by ``weights > 0`` of the other. A token of weight 0 still counts in the
    divisor of the loss; to leave it out there too, aggregate under ``mask & (weights > 0)``.

    Args:
        mask: tokens that count. The weight of the others is 0.
        cap: upper bound, > 0; math.inf for none.
        floor: lower bound, at most ``cap``; none when None.
        keep_mass: log of the mass that truncation kept at each token, when ``sampling_logprobs``
            are those of the truncated, renormalised distribution (see the module).
        segment_ids: which sequence of its row a token belongs to, where several are packed into a
            row; a row is one sequence without it.

    Returns:
        The weights, constant along a sequence unless ``level="token"``, and metrics, means over
        tokens, for the other levels over sequences, all under the prefix
        ``sampling/importance_sampling_ratio/``: ``mean`` and ``mean_square`` of the weights
        (``effective_sample_share`` takes both), and of the ratios before bounds the shares
        ``below_floor``, ``above_cap`` and ``outside_half_to_double``. Least and largest weight do
        not add over microbatches: take them of the weights of the whole batch.
    """
    check_choice("level", level, _LEVELS)
    check_choice("mode", mode, _MODES)
    _check_bounds(cap, floor)
    log_ratio = _log_ratio(old_logprobs, sampling_logprobs, keep_mass)
    mask = to_mask(mask)
    check_shape("mask", mask, log_ratio.shape)
    if level != "token":
        log_ratio = _over_sequence(log_ratio, mask, segment_ids, mean=level == "geometric")
    ratio = jnp.where(mask, jnp.exp(log_ratio), 0)
    # A NaN is on neither side and stays in the weight, where it is seen.
    low = jnp.zeros_like(mask) if floor is None else mask & (ratio < floor)
    high = ratio > cap
    weights = jnp.where(low | high, 0, ratio) if mode == "mask" else jnp.clip(ratio, floor, cap)
    weights = jnp.where(mask, weights, 0)

    values = {
        "mean": weights,
        "mean_square": jnp.square(weights),
        "below_floor": low,
        "above_cap": high,
        "outside_half_to_double": (ratio < 0.5) | (ratio > 2),
    }
    how = "token_mean" if level == "token" else "sequence_mean"
    reduce = lambda x: aggregate(x.astype(ratio.dtype), mask, how=how, segment_ids=segment_ids)
    return weights, {_PREFIX + name: reduce(value) for name, value in values.items()}


def effective_sample_share(
    mean: Float[Array, "..."], mean_square: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Kish's effective sample size of weights over their number, mean^2 / mean_square; detached.

    It is 1 for equal weights, 1/n when one of n carries everything, and 0 when none does. Not a
    mean, so take it of means that are summed over microbatches already.
    """
    mean, mean_square = map(jax.lax.stop_gradient, to_floats(mean, mean_square))
    check_shape("mean_square", mean_square, mean.shape)
    empty = mean_square == 0
    return jnp.where(empty, 0, jnp.square(mean) / jnp.where(empty, 1, mean_square))


def _check_bounds(cap, floor):
    check_number("cap", cap, above=0)
    if floor is None:
        return
    check_number("floor", floor, at_least=0)
    if isinstance(floor, (int, float)) and isinstance(cap, (int, float)):
        check_number("floor", floor, at_most=cap)


def _log_ratio(old_logprobs, sampling_logprobs, keep_mass) -> Float[Array, "B T"]:
    given = (old_logprobs, sampling_logprobs, *([] if keep_mass is None else [keep_mass]))
    old, *sampler = map(jax.lax.stop_gradient, to_floats(*given))
    if old.ndim != 2:
        raise ValueError(f"old_logprobs has shape {old.shape}; expected [B, T]")
    for name, array in zip(("sampling_logprobs", "keep_mass"), sampler, strict=False):
        check_shape(name, array, old.shape)
    return old - sum(sampler[1:], start=sampler[0])


def _over_sequence(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], segment_ids, *, mean: bool
) -> Float[Array, "B T"]:
    """For every token the sum, or the mean, over counted tokens of its own sequence."""
    total = sequence_sum(values, mask, segment_ids)
    if not mean:
        return total
    return total / jnp.maximum(sequence_sum(jnp.ones_like(values), mask, segment_ids), 1)
