import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.losses import kl_estimate


@pytest.fixture
def policies():
    """Logits of a policy and log-probs of a reference; means over tokens are enumerated exactly."""
    logits, reference = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    return jnp.asarray(logits), jax.nn.log_softmax(jnp.asarray(reference))


def kl(p, q):
    return jnp.sum(jnp.exp(p) * (p - q))


def test_means_of_k1_and_k3_are_the_kl(policies):
    p, q = jax.nn.log_softmax(policies[0]), policies[1]
    for estimator, unbiased in (("k1", True), ("k3", True), ("k2", False), ("k1_abs", False)):
        mean = jnp.sum(jnp.exp(p) * kl_estimate(p, q, estimator=estimator))
        assert np.isclose(mean, kl(p, q), rtol=1e-5) == unbiased


@pytest.mark.parametrize(
    ("estimator", "loss"),
    [("k1", lambda p, q: 0.0 * jnp.sum(p)), ("k2", kl), ("k3", lambda p, q: kl(q, p))],
)
def test_mean_gradient_on_fresh_samples(estimator, loss, policies):
    logits, q = policies

    def sampled(logits):
        p = jax.nn.log_softmax(logits)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(p)) * kl_estimate(p, q, estimator=estimator))

    exact = jax.grad(lambda x: loss(jax.nn.log_softmax(x), q))(logits)
    np.testing.assert_allclose(jax.grad(sampled)(logits), exact, atol=1e-6)


def test_zero_at_the_reference_and_never_overflows():
    same = jnp.full((1, 3), -2.0)
    for estimator in ("k1", "k2", "k3", "k1_abs"):
        np.testing.assert_array_equal(kl_estimate(same, same, estimator=estimator), 0)
    far = lambda p: jnp.sum(kl_estimate(p, jnp.zeros_like(p), estimator="k3"))
    value, gradient = jax.value_and_grad(far)(jnp.full((1, 1), -500.0))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert (gradient < 0).all()  # descent still raises the log-prob


@pytest.mark.parametrize("estimator", ["k2", "k3", "k1_abs"])
def test_no_gradient_at_the_reference(estimator):
    same = jnp.full((1, 3), -2.0)
    total = lambda p: jnp.sum(kl_estimate(p, same, estimator=estimator))
    np.testing.assert_array_equal(jax.grad(total)(same), 0)


def test_errors():
    with pytest.raises(ValueError, match="'k4' is unknown; use one of 'k1', 'k2', 'k3', 'k1_abs'"):
        kl_estimate(jnp.zeros((1, 2)), jnp.zeros((1, 2)), estimator="k4")
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(1, 3\); expected \(1, 2\)"):
        kl_estimate(jnp.zeros((1, 2)), jnp.zeros((1, 3)), estimator="k1")
