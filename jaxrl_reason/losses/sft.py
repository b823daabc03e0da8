"""Supervised fine-tuning losses, per token and unreduced; reduce them with ``arrays.aggregate``."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxrl_reason.arrays import check_number, check_shape, guard_nonfinite, to_floats


def nll_loss(
    logprobs: Float[Array, "B T"],
    *,
    label_smoothing: float = 0.0,
    mean_logprobs: Float[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """Negative log-likelihood, optionally against a smoothed target (arXiv 1512.00567, section 7).

    loss = -(1 - s) log p(token) - s mean_v log p(v), with s the label smoothing.

    Args:
        mean_logprobs: mean over the vocabulary of the log-probabilities; required when
            ``label_smoothing`` is not 0.
    """
    check_number("label_smoothing", label_smoothing, at_least=0, below=1)
    if mean_logprobs is None:
        if not (isinstance(label_smoothing, (int, float)) and label_smoothing == 0):
            raise ValueError(
                f"label_smoothing={label_smoothing} needs mean_logprobs [B, T]; got None"
            )
        (logprobs,) = to_floats(logprobs)
        return guard_nonfinite(jnp.negative, logprobs)
    logprobs, mean_logprobs = to_floats(logprobs, mean_logprobs)
    check_shape("mean_logprobs", mean_logprobs, logprobs.shape)
    return guard_nonfinite(
        lambda token, mean: -(1 - label_smoothing) * token - label_smoothing * mean,
        logprobs,
        mean_logprobs,
    )


def z_loss(log_normalizers: Float[Array, "B T"], *, coefficient: float) -> Float[Array, "B T"]:
    """Keeps logits from drifting: coefficient (log Z)^2 (PaLM, arXiv 2204.02311, section 5)."""
    check_number("coefficient", coefficient, at_least=0)
    (log_normalizers,) = to_floats(log_normalizers)
    return guard_nonfinite(lambda log_z: coefficient * jnp.square(log_z), log_normalizers)
