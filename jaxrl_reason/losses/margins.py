"""From sequence log-probabilities to margins: what the preference losses share.

Arrays are ``[B]``, one number per completion. No gradient reaches the reference.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxrl_reason.arrays import (
    check_choice,
    check_number,
    check_shape,
    guard_nonfinite,
    to_floats,
)

Rows = Float[Array, " B"]
Level = Float[Array, ""] | Rows | float

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def to_rows(**arrays: Rows) -> tuple[Rows, ...]:
    """The arrays in one float dtype.

    Raises:
        ValueError: naming the first array whose shape differs from that of the very first.
    """
    converted = to_floats(*arrays.values())
    for name, array in zip(arrays, converted, strict=True):
        check_shape(name, array, converted[0].shape)
    return converted


def to_level(name: str, level: Level, rows: Rows) -> Rows:
    """A detached number for every row, from one for each or one for all."""
    if isinstance(level, (int, float)):
        return jnp.full_like(rows, level)
    level = jnp.asarray(level).astype(rows.dtype)
    if level.ndim:
        check_shape(name, level, rows.shape)
    return jax.lax.stop_gradient(jnp.broadcast_to(level, rows.shape))


def log_ratios(
    chosen: Rows, rejected: Rows, ref_chosen: Rows, ref_rejected: Rows, *, beta: float
) -> tuple[Rows, Rows]:
    """log(p / p_ref) of the chosen and of the rejected completions; checks ``beta`` too."""
    check_number("beta", beta, above=0)
    chosen, rejected, ref_chosen, ref_rejected = to_rows(
        chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    # Taken per completion: the two are close, so that float32 subtracts them nearly without error.
    chosen = chosen - jax.lax.stop_gradient(ref_chosen)
    return chosen, rejected - jax.lax.stop_gradient(ref_rejected)


def f_score(log_ratio: Rows, *, f_divergence: str, f_alpha: float | None) -> Rows:
    """f'(u) at u = p / p_ref, up to a constant: the reward in units of beta.

    A policy that maximises reward - beta D_f(p || p_ref) has the reward beta f'(p / p_ref) + a
    constant of the prompt (f-DPO, arXiv 2309.16240, theorem 1). Constants cancel in the difference
    of two completions, so these are TRL's, 0 at p = p_ref:

    - ``reverse_kl``: log u. DPO itself.
    - ``forward_kl``: 1 - 1 / u.
    - ``js``: log(2 u / (1 + u)).
    - ``alpha``: (u^(a - 1) - 1) / (a - 1) with a = ``f_alpha``. a = 0 is ``forward_kl`` and a = 1
      is ``reverse_kl``; this is TRL's a, 1 minus that of the paper.

    Powers of u are continued by their tangent above exp(20), so that gradients stay finite.
    """
    check_choice("f_divergence", f_divergence, F_DIVERGENCES)
    if (f_divergence == "alpha") != (f_alpha is not None):
        raise ValueError(
            f"f_alpha={f_alpha} with f_divergence={f_divergence!r}: f_divergence='alpha' needs "
            "f_alpha, and no other reads it"
        )
    if f_divergence == "reverse_kl":
        return log_ratio
    if f_divergence == "js":
        return guard_nonfinite(lambda x: jnp.log(2.0) + jax.nn.log_sigmoid(x), log_ratio)
    power = -1.0 if f_alpha is None else f_alpha - 1.0
    return guard_nonfinite(lambda x: _power_score(x, power), log_ratio)


def score_margin(
    arrays: tuple[Rows, Rows, Rows, Rows],
    *,
    beta: float,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
) -> Rows:
    """Score of the chosen completion minus that of the rejected one.

    Args:
        arrays: log-probabilities ``chosen, rejected, ref_chosen, ref_rejected``.
    """
    chosen, rejected = log_ratios(*arrays, beta=beta)
    scores = [f_score(x, f_divergence=f_divergence, f_alpha=f_alpha) for x in (chosen, rejected)]
    return scores[0] - scores[1]


def logistic(x: Rows, *, label_smoothing: float) -> Rows:
    """-(1 - s) log sigmoid(x) - s log sigmoid(-x), s = ``label_smoothing``."""
    agree, disagree = jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)
    return -(1 - label_smoothing) * agree - label_smoothing * disagree


def check_smoothing(label_smoothing: float) -> None:
    """Raises ValueError unless it is a share of flipped labels: at least 0, below 1/2."""
    check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)


def _power_score(log_ratio, power, limit=20.0):
    """(exp(power x) - 1) / power, and its limit x at power 0."""
    reverse_kl = power == 0
    power = jnp.where(reverse_kl, 1.0, power)
    x = power * log_ratio
    # expm1 keeps all digits for a power near 0, where the difference from 1 is small.
    grown = jnp.expm1(jnp.minimum(x, limit)) + jnp.exp(limit) * jnp.maximum(x - limit, 0)
    return jnp.where(reverse_kl, log_ratio, grown / power)
