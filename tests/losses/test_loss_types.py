"""What the table of policy losses says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.losses import LOSS_TYPES, vespo_loss

ROWS, T = 3, 8
OPTIONS = {
    "epsilon": 0.2,
    "epsilon_high": 2.0,
    "temperature_pos": 1.0,
    "temperature_neg": 1.05,
    "k_pos": 2.0,
    "lambda_pos": 3.0,
    "k_neg": 3.0,
    "lambda_neg": 2.0,
    "epsilon_neg_low": 0.2,
    "epsilon_neg_high": 5.0,
    "epsilon_pos_high": 0.28,
    "clip_cov_ratio": 0.3,
    "clip_cov_lb": -9.0,
    "clip_cov_ub": 9.0,
    "kl_cov_ratio": 0.2,
    "ppo_kl_coef": 1.0,
    "alpha": 1.5,
}
# Two sequences in a row, of which the second of each has no advantage.
SEGMENTS = np.repeat(np.asarray([[1, 2]] * ROWS, np.int32), T // 2, axis=1)
LIVE = SEGMENTS == 1


def arrays():
    rng = np.random.default_rng(0)
    draw = lambda low, high: rng.uniform(low, high, (ROWS, T)).astype(np.float32)
    return {
        "logprobs": draw(-3, -0.1),
        "old_logprobs": draw(-3, -0.1),
        "advantages": np.where(LIVE, draw(-2, 2), 0).astype(np.float32),
        "key": jax.random.key(0),
    }


def losses_and_gradients(name, mask, **more):
    variant, given = LOSS_TYPES[name], arrays() | more
    options = {option: OPTIONS[option] for option in variant.required}
    options |= {"alpha": OPTIONS["alpha"]} if "alpha" in variant.options else {}

    def total(logprobs):
        values = variant(
            **given | {"logprobs": logprobs}, mask=mask, segment_ids=SEGMENTS, **options
        )
        return jnp.sum(jnp.where(mask, values, 0)), values

    gradient, values = jax.grad(total, has_aux=True)(jnp.asarray(given["logprobs"]))
    return np.asarray(values), np.asarray(gradient)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_losses_that_are_separable_can_do_without_sequences_of_no_advantage(name):
    everything = np.ones((ROWS, T), bool)
    values, gradient = losses_and_gradients(name, everything)
    alone, gradient_alone = losses_and_gradients(name, LIVE)
    inert = not values[~LIVE].any() and not gradient[~LIVE].any()
    same = np.array_equal(values[LIVE], alone[LIVE])
    same &= np.array_equal(gradient[LIVE], gradient_alone[LIVE])
    assert (inert and same) == LOSS_TYPES[name].separable
    assert gradient[LIVE].any()


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_importance_weights_are_factors_or_enter_the_loss(name):
    everything = np.ones((ROWS, T), bool)
    weights = np.random.default_rng(1).uniform(0.2, 3, (ROWS, T)).astype(np.float32)
    plain, gradient = losses_and_gradients(name, everything)
    ones = losses_and_gradients(name, everything, importance_weights=np.ones_like(weights))
    np.testing.assert_array_equal(ones[0], plain)
    np.testing.assert_array_equal(ones[1], gradient)
    got, _ = losses_and_gradients(name, everything, importance_weights=weights)
    if name != "vespo":
        np.testing.assert_allclose(got, weights * plain, rtol=1e-6)
        return
    given = arrays()
    del given["key"]
    options = {option: OPTIONS[option] for option in LOSS_TYPES[name].required}
    wanted = vespo_loss(
        **given, mask=everything, segment_ids=SEGMENTS, importance_weights=weights, **options
    )
    np.testing.assert_array_equal(got, wanted)
    assert not np.allclose(got, weights * plain)


def test_importance_weights_carry_no_gradient():
    weights = jnp.full((1, 2), 1.5)
    loss = lambda weights: jnp.sum(
        LOSS_TYPES["reinforce"](
            logprobs=-weights,
            old_logprobs=jnp.zeros((1, 2)),
            advantages=jnp.ones((1, 2)),
            mask=jnp.ones((1, 2), bool),
            importance_weights=weights,
        )
    )
    np.testing.assert_array_equal(jax.grad(loss)(weights), [[1.5, 1.5]])
