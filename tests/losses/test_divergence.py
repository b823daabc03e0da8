import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.losses import kl_estimate

ORACLES = {
    "k1": lambda p, q: p - q,
    "k2": lambda p, q: (p - q) ** 2 / 2,
    "k3": lambda p, q: np.exp(q - p) - (q - p) - 1,
    "k1_abs": lambda p, q: np.abs(p - q),
}


@pytest.mark.parametrize("estimator", ORACLES)
def test_matches_oracle(estimator, agrees, rng):
    def loss(p, q):
        return kl_estimate(p, q, estimator=estimator)

    agrees(loss, ORACLES[estimator], rng.normal(size=(2, 5)), rng.normal(size=(2, 5)))


def test_expectations_are_the_kl(rng):
    logits = rng.normal(size=(2, 9)).astype(np.float32)
    p, q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kl = np.sum(np.exp(p) * (p - q))
    for estimator in ("k1", "k3"):
        expected = np.sum(np.exp(p) * kl_estimate(p, q, estimator=estimator))
        np.testing.assert_allclose(expected, kl, rtol=1e-5)


def test_k2_gradient_is_the_gradient_of_the_kl(rng):
    # In expectation over the policy itself (arXiv 2510.01555 and Schulman's note).
    q = jax.nn.log_softmax(jnp.asarray(rng.normal(size=6), jnp.float32))

    def estimate(logits):
        p = jax.nn.log_softmax(logits)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(p)) * kl_estimate(p, q, estimator="k2"))

    def exact(logits):
        p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(p) * (p - q))

    logits = jnp.asarray(rng.normal(size=6), jnp.float32)
    np.testing.assert_allclose(jax.grad(estimate)(logits), jax.grad(exact)(logits), atol=1e-6)


def test_zero_at_the_reference_and_never_overflows():
    same = jnp.full((1, 3), -2.0)
    for estimator in ORACLES:
        np.testing.assert_array_equal(kl_estimate(same, same, estimator=estimator), 0)
    far = lambda p: jnp.sum(kl_estimate(p, jnp.zeros_like(p), estimator="k3"))
    value, gradient = jax.value_and_grad(far)(jnp.full((1, 1), -500.0))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert (gradient < 0).all()  # descent still raises the log-prob


def test_errors():
    with pytest.raises(ValueError, match="'k4' is unknown; use one of 'k1', 'k2', 'k3', 'k1_abs'"):
        kl_estimate(jnp.zeros((1, 2)), jnp.zeros((1, 2)), estimator="k4")
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(1, 3\); expected \(1, 2\)"):
        kl_estimate(jnp.zeros((1, 2)), jnp.zeros((1, 3)), estimator="k1")
