"""Losses that align whole samples of log-ratios by optimal transport; unreduced, ``[B]``.

In one dimension the optimal transport pairs the k-th smallest number of one sample with the k-th
smallest of the other, so these losses sort the batch. Unlike all other preference losses they
depend on how a batch is cut into microbatches, and on a mask where a batch holds padding. A pair
with a NaN or an infinity is left out of the sorting, so that it spoils only its own result.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool

from jaxrl_reason.arrays import check_number, check_shape, guard_nonfinite, to_mask
from jaxrl_reason.losses.margins import Rows, check_smoothing, log_ratios, logistic, to_rows


def aot_loss(
    chosen: Rows,
    rejected: Rows,
    ref_chosen: Rows,
    ref_rejected: Rows,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    mask: Bool[Array, " B"] | None = None,
) -> Rows:
    """-(1 - s) log sigmoid(beta d) - s log sigmoid(-beta d), d between margins of the same rank.

    Alignment via optimal transport on pairs (AOT, arXiv 2406.05882; ``label_smoothing`` s is
    TRL's). d is the policy's margin, log p(chosen) - log p(rejected), minus the reference's margin
    of the same rank in the batch. Row i holds the term of the policy's margin of pair i; TRL
    returns the same terms in sorted order.

    Args:
        mask: pairs that count, all when None. The results of others are 0.
    """
    check_number("beta", beta, above=0)
    chosen, rejected, ref_chosen, ref_rejected = to_rows(
        chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    reference = jax.lax.stop_gradient(ref_chosen - ref_rejected)
    return _sorted_logistic(chosen - rejected, reference, beta, label_smoothing, mask)


def aot_unpaired_loss(
    chosen: Rows,
    rejected: Rows,
    ref_chosen: Rows,
    ref_rejected: Rows,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    mask: Bool[Array, " B"] | None = None,
) -> Rows:
    """-(1 - s) log sigmoid(beta d) - s log sigmoid(-beta d), d between ratios of the same rank.

    AOT without pairs (arXiv 2406.05882; ``label_smoothing`` s is TRL's). d is log(p / p_ref) of a
    chosen completion minus that of the rejected completion of the same rank in the batch. Row i
    holds the term of chosen completion i; TRL returns the same terms in sorted order.

    Args:
        mask: rows that count, of chosen and rejected alike; all when None. The results of others
            are 0.
    """
    above, below = log_ratios(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    return _sorted_logistic(above, below, beta, label_smoothing, mask)


def _sorted_logistic(above, below, beta, label_smoothing, mask):
    """The logistic loss of ``above`` minus their partners among ``below``, one for each row."""
    check_smoothing(label_smoothing)
    if above.ndim != 1:
        raise ValueError(f"chosen has shape {above.shape}; expected [B], which is sorted")
    mask = jnp.ones(above.shape, jnp.bool_) if mask is None else to_mask(mask)
    check_shape("mask", mask, above.shape)

    paired = mask & jnp.isfinite(above) & jnp.isfinite(below)
    last = (~paired).astype(jnp.int32)
    # Rows that are not paired come last in both orders, so that they do not shift the others.
    partners = (
        jnp.zeros_like(below).at[jnp.lexsort((above, last))].set(below[jnp.lexsort((below, last))])
    )
    difference = above - jnp.where(paired, partners, below)
    losses = guard_nonfinite(
        lambda d: logistic(beta * d, label_smoothing=label_smoothing),
        jnp.where(mask, difference, 0),
    )
    return jnp.where(mask, losses, 0)
