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
    # JAX gives the absolute value slope 1 at 0, where the policy equals the reference.
    "k1_abs": lambda difference: difference * jnp.sign(difference),
}


def kl_estimate(
    logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"], *, estimator: str
) -> Float[Array, "B T"]:
    """Schulman's estimators (http://joschu.net/blog/kl-approx.html) on tokens drawn from p.

    With d = log p - log p_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, k1_abs = |d|. As values,
    k1 and k3 have mean KL(p || p_ref); k3 is never negative and is GRPO's (arXiv 2402.03300, eq.
    4). k2 and k1_abs are biased.

    The gradient flows through ``logprobs`` only. Used as a loss on fresh samples its mean is that
    of KL(p || p_ref) for k2, of KL(p_ref || p) for k3, and 0 for k1 (arXiv 2510.01555).
    """
    check_choice("estimator", estimator, tuple(_ESTIMATORS))
    logprobs, ref_logprobs = to_floats(logprobs, ref_logprobs)
    check_shape("ref_logprobs", ref_logprobs, logprobs.shape)
    difference = logprobs - jax.lax.stop_gradient(ref_logprobs)
    return guard_nonfinite(_ESTIMATORS[estimator], difference)
