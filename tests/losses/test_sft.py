import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.losses import nll_loss, z_loss


def test_label_smoothing_is_cross_entropy_against_the_smoothed_target():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 3, 7)), jnp.float32)
    tokens = rng.integers(7, size=(2, 3))
    target = 0.9 * np.eye(7, dtype=np.float32)[tokens] + np.float32(0.1 / 7)

    def smoothed(logits):
        logprobs = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
        return jnp.sum(nll_loss(own, label_smoothing=0.1, mean_logprobs=logprobs.mean(-1)))

    def reference(logits):
        return -jnp.sum(target * jax.nn.log_softmax(logits))

    ours, wanted = (jax.value_and_grad(f)(logits) for f in (smoothed, reference))
    np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], wanted[1], atol=1e-6)


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
