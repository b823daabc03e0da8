"""Per-token estimators of KL(policy || reference) from the log-probabilities of sampled tokens."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxrl_reason.arrays import bounded_exp, check_choice, check_shape, guard_nonfinite, to_floats

_ESTIMATORS = {
    "k1": lambda difference: difference,
    "k2": lambda difference: 0.5 * jnp.square(difference),
    "k3": lambda difference: bounded_exp(-difference) + difference - 1,
    "k1_abs": jnp.abs,
}


def kl_estimate(
    logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"], *, estimator: str
) -> Float[Array, "B T"]:
    """Schulman's estimators (http://joschu.net/blog/kl-approx.html) on tokens drawn from p.

    With d = log p - log p_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, k1_abs = |d|. k3 is
    never negative and is GRPO's (arXiv 2402.03300, eq. 4). The gradient flows through ``logprobs``
    only. As a loss on fresh samples, k2 has the gradient of the reverse KL, and that of k1 is 0 on
    average.
    """
    check_choice("estimator", estimator, tuple(_ESTIMATORS))
    logprobs, ref_logprobs = to_floats(logprobs, ref_logprobs)
    check_shape("ref_logprobs", ref_logprobs, logprobs.shape)
    difference = logprobs - jax.lax.stop_gradient(ref_logprobs)
    return guard_nonfinite(_ESTIMATORS[estimator], difference)
