import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.losses import (
    PREFERENCE_LOSSES,
    SMOOTHED_LOSSES,
    dpo_loss,
    hinge_dpo_loss,
    ipo_loss,
    preference_metrics,
    robust_dpo_loss,
)


def softplus(x):
    return np.logaddexp(0, x)  # -log sigmoid(-x)


def margin(c, r, rc, rr):
    return (c - rc) - (r - rr)


CASES = {
    "dpo": (
        functools.partial(dpo_loss, beta=0.5),
        lambda *x: softplus(-0.5 * margin(*x)),
    ),
    "conservative": (
        functools.partial(dpo_loss, beta=0.5, label_smoothing=0.2),
        lambda *x: 0.8 * softplus(-0.5 * margin(*x)) + 0.2 * softplus(0.5 * margin(*x)),
    ),
    "ipo": (functools.partial(ipo_loss, beta=0.5), lambda *x: (margin(*x) - 1) ** 2),
    "hinge": (
        functools.partial(hinge_dpo_loss, beta=0.5),
        lambda *x: np.maximum(0, 1 - 0.5 * margin(*x)),
    ),
    "robust": (
        functools.partial(robust_dpo_loss, beta=0.5, label_smoothing=0.2),
        lambda *x: (0.8 * softplus(-0.5 * margin(*x)) - 0.2 * softplus(0.5 * margin(*x))) / 0.6,
    ),
}


def options(name):
    return {"label_smoothing": 0.1} if name in SMOOTHED_LOSSES else {}


@pytest.fixture
def pairs(rng):
    return [rng.normal(size=6) * 3 for _ in range(4)]


@pytest.mark.parametrize("name", CASES)
def test_matches_oracle(name, agrees, pairs):
    agrees(*CASES[name], *pairs, moving=2)


def test_dpo_is_log_2_at_the_reference(pairs):
    chosen, rejected, *_ = pairs
    loss = dpo_loss(chosen, rejected, chosen, rejected, beta=0.3)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


def test_robust_undoes_label_flips(pairs):
    # The expectation over flips of probability s is the clean loss.
    chosen, rejected, ref_chosen, ref_rejected = pairs
    robust = functools.partial(robust_dpo_loss, beta=0.5, label_smoothing=0.2)
    flipped = robust(rejected, chosen, ref_rejected, ref_chosen)
    clean = dpo_loss(*pairs, beta=0.5)
    np.testing.assert_allclose(0.8 * robust(*pairs) + 0.2 * flipped, clean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_every_name_runs_and_every_knob_counts(name, pairs):
    loss = PREFERENCE_LOSSES[name]
    near = [array / 10 for array in pairs]  # where the hinge is active
    base = loss(*near, beta=0.1, **options(name))
    assert base.shape == (6,)
    assert not np.allclose(base, loss(*near, beta=0.2, **options(name)))
    if name in SMOOTHED_LOSSES:
        assert not np.allclose(base, loss(*near, beta=0.1, label_smoothing=0.3))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_bad_pair_stays_alone(name, pairs):
    arrays = [jnp.asarray(array, jnp.float32) for array in pairs]
    arrays[3] = arrays[3].at[2].set(jnp.inf)
    counts = jnp.arange(6) != 2

    def total(chosen):
        losses = PREFERENCE_LOSSES[name](chosen, *arrays[1:], beta=0.1, **options(name))
        return jnp.sum(jnp.where(counts, losses, 0))

    value, gradient = jax.value_and_grad(total)(arrays[0])
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert gradient[2] == 0


def test_metrics(pairs):
    chosen, rejected, ref_chosen, ref_rejected = pairs
    metrics = preference_metrics(*pairs, beta=0.5)
    a, b = 0.5 * (chosen - ref_chosen), 0.5 * (rejected - ref_rejected)
    np.testing.assert_allclose(metrics["rewards/chosen"], a, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/rejected"], b, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], a - b, rtol=1e-4)
    np.testing.assert_array_equal(metrics["rewards/accuracies"], (a > b).astype(np.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dpo_loss(x, x, x, x[:1], beta=0.1), "ref_rejected has shape"),
        (lambda x: dpo_loss(x, x, x, x, beta=0.0), "beta=0.0 is out of range; it must be > 0"),
        (lambda x: dpo_loss(x, x, x, x, beta=1, label_smoothing=0.5), "label_smoothing=0.5"),
        (lambda x: robust_dpo_loss(x, x, x, x, beta=1, label_smoothing=0.5), "label_smoothing=0.5"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros(3))
