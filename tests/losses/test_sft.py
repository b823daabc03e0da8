import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.losses import nll_loss, z_loss


def test_nll_is_minus_logprob(agrees, rng):
    agrees(nll_loss, lambda logprobs: -logprobs, -rng.exponential(size=(2, 5)))


def test_nll_with_label_smoothing(agrees, rng):
    logits = rng.normal(size=(2, 3, 7))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = rng.integers(7, size=(2, 3, 1))
    own = np.take_along_axis(logprobs, tokens, -1)[..., 0]

    def smooth(token, mean):
        return nll_loss(token, label_smoothing=0.1, mean_logprobs=mean)

    agrees(smooth, lambda token, mean: -0.9 * token - 0.1 * mean, own, logprobs.mean(-1), moving=2)
    # The same as cross-entropy against the smoothed target.
    target = np.full((2, 3, 7), 0.1 / 7)
    np.put_along_axis(target, tokens, 0.9 + 0.1 / 7, -1)
    np.testing.assert_allclose(
        smooth(own, logprobs.mean(-1)), -(target * logprobs).sum(-1), rtol=1e-5
    )


def test_z_loss(agrees, rng):
    agrees(lambda z: z_loss(z, coefficient=0.3), lambda z: 0.3 * z**2, rng.normal(size=(2, 5)))


def test_half_precision_gives_float32():
    assert nll_loss(jnp.ones((1, 2), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: nll_loss(x, label_smoothing=0.1), "needs mean_logprobs"),
        (lambda x: nll_loss(x, label_smoothing=1.0, mean_logprobs=x), "label_smoothing=1.0"),
        (
            lambda x: nll_loss(x, label_smoothing=0.1, mean_logprobs=x[:1]),
            "mean_logprobs has shape",
        ),
        (lambda x: z_loss(x, coefficient=-1), "coefficient=-1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 3)))
