"""What the conformance suite cannot say of preference losses: limits, minima, extremes, errors."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.losses import (
    LENGTH_NORMALIZED,
    PREFERENCE_LOSSES,
    SMOOTHED_LOSSES,
    aot_loss,
    aot_unpaired_loss,
    apo_zero_loss,
    bco_loss,
    bco_pair_loss,
    bradley_terry_loss,
    cpo_loss,
    discopop_loss,
    dpo_loss,
    dpo_norm_loss,
    exo_loss,
    ipo_loss,
    kto_loss,
    nca_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
    sppo_hard_loss,
)

REQUIRED = {
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.1},
    "simpo": {"gamma": 0.5},
}
DIVERGENCES = (
    {"f_divergence": "reverse_kl"},
    {"f_divergence": "forward_kl"},
    {"f_divergence": "js"},
    {"f_divergence": "alpha", "f_alpha": 0.4},
    {"f_divergence": "alpha", "f_alpha": 1.5},
)


def modes():
    for name, loss in PREFERENCE_LOSSES.items():
        takes_divergence = "f_divergence" in inspect.signature(loss).parameters
        for mode in DIVERGENCES if takes_divergence else ({},):
            label = "-".join([name, *map(str, mode.values())])
            yield pytest.param(loss, {**REQUIRED.get(name, {}), **mode}, id=label)


MODES = tuple(modes())
"""Every named loss in each of its modes."""


def by_name(loss, arrays):
    """The arrays that a loss takes, found by the names of its parameters."""
    parameters = inspect.signature(loss).parameters.values()
    return [arrays[p.name] for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return [jnp.asarray(3 * rng.normal(size=6), jnp.float32) for _ in range(4)]


@pytest.mark.parametrize(("loss", "options"), MODES)
def test_every_name_runs_by_the_names_of_its_parameters(loss, options, pairs):
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    arrays = dict(zip(names, pairs, strict=True))
    for side in ("chosen", "rejected"):
        arrays[f"{side}_lengths"] = jnp.arange(6)
        arrays[f"{side}_mean"] = -jnp.abs(arrays[side])
    losses = loss(*by_name(loss, arrays), beta=0.1, **options)
    assert losses.shape == (6,)
    assert losses.dtype == jnp.float32
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(("loss", "options"), MODES)
def test_far_from_the_reference_nothing_overflows(loss, options):
    """Sequence log-probs thousands of nats apart, and token means at both of their ends."""
    far, near = jnp.array([-5e3, -1.0, -5e3, -1.0]), jnp.array([-1.0, -5e3, -5e3, -1.0])
    arrays = {"chosen": far, "rejected": near, "ref_chosen": near[::-1], "ref_rejected": near}
    arrays |= {"chosen_lengths": jnp.arange(4), "rejected_lengths": jnp.arange(4)}
    arrays |= {"chosen_mean": far + 1, "rejected_mean": near + 1}

    def total(first, second, *rest):
        losses = loss(first, second, *rest, beta=1.0, **options)
        return jnp.sum(losses), losses

    inputs = by_name(loss, arrays)
    gradients, losses = jax.grad(total, argnums=(0, 1), has_aux=True)(*inputs)
    assert np.isfinite(losses).all()
    assert np.isfinite(gradients).all()


def test_tables():
    smoothed = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "cpo"}
    assert smoothed == SMOOTHED_LOSSES
    assert set(PREFERENCE_LOSSES) > LENGTH_NORMALIZED


@pytest.mark.parametrize(
    "loss",
    [
        *(functools.partial(dpo_loss, **mode) for mode in DIVERGENCES),
        functools.partial(dpo_loss, label_smoothing=0.2),
        functools.partial(robust_dpo_loss, label_smoothing=0.2),
        dpo_norm_loss,
        aot_loss,
        aot_unpaired_loss,
    ],
)
def test_log_2_at_the_reference(loss, pairs):
    chosen, rejected, *_ = pairs
    losses = loss(chosen, rejected, chosen, rejected, beta=0.3)
    np.testing.assert_allclose(losses, np.log(2), rtol=1e-6)


def test_robust_undoes_label_flips(pairs):
    # The expectation over flips of probability s is the clean loss.
    chosen, rejected, ref_chosen, ref_rejected = pairs
    robust = functools.partial(robust_dpo_loss, beta=0.5, label_smoothing=0.2)
    flipped = robust(rejected, chosen, ref_rejected, ref_chosen)
    clean = dpo_loss(*pairs, beta=0.5)
    np.testing.assert_allclose(0.8 * robust(*pairs) + 0.2 * flipped, clean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("f_alpha", "limit"),
    [(1, "reverse_kl"), (1.0, "reverse_kl"), (1 + 1e-7, "reverse_kl"), (0.0, "forward_kl")],
)
def test_limits_of_alpha(f_alpha, limit, pairs):
    for loss in (dpo_loss, discopop_loss):
        alpha = loss(*pairs, beta=0.2, f_divergence="alpha", f_alpha=f_alpha)
        expected = loss(*pairs, beta=0.2, f_divergence=limit)
        np.testing.assert_allclose(alpha, expected, rtol=1e-5)


def test_alpha_may_be_traced(pairs):
    traced = jax.jit(lambda a: dpo_loss(*pairs, beta=0.2, f_divergence="alpha", f_alpha=a))
    for f_alpha in (0.4, 1.0):
        fixed = dpo_loss(*pairs, beta=0.2, f_divergence="alpha", f_alpha=f_alpha)
        np.testing.assert_allclose(traced(f_alpha), fixed, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "above", "below", "least"),
    [
        (ipo_loss, 2.0, -0.5, 0.0),  # a margin of 1 / (2 beta)
        (sppo_hard_loss, 2.5, -2.5, 0.0),  # 1 / (2 beta) above and below
        # beta h = log((1 - s) / s)
        (functools.partial(exo_loss, label_smoothing=0.2), 5 * np.log(4), 0.0, 0.0),
        # sigmoid(beta c) = 2/3; the other completion is lowered without end.
        (nca_loss, 5 * np.log(2), -500.0, -np.log(2 / 3) - 0.5 * np.log(1 / 3)),
        (apo_zero_loss, 70.0, -70.0, 0.0),
    ],
)
def test_minima(loss, above, below, least):
    reference = jnp.array([-3.0])

    def of(above, below):
        return loss(reference + above, reference + below, reference, reference, beta=0.2)[0]

    value, gradients = jax.value_and_grad(of, argnums=(0, 1))(above, below)
    np.testing.assert_allclose(value, least, atol=1e-5)
    np.testing.assert_allclose(gradients, 0, atol=1e-5)
    assert of(above - 1, below) > value


def test_transport_pairs_equal_ranks_in_any_order(pairs):
    chosen, rejected, ref_chosen, ref_rejected = pairs
    difference = np.sort(chosen - rejected) - np.sort(ref_chosen - ref_rejected)
    paired = aot_loss(*pairs, beta=0.5)
    np.testing.assert_allclose(np.sort(paired), np.sort(np.logaddexp(0, -0.5 * difference)), 1e-5)
    difference = np.sort(chosen - ref_chosen) - np.sort(rejected - ref_rejected)
    unpaired = aot_unpaired_loss(*pairs, beta=0.5)
    np.testing.assert_allclose(np.sort(unpaired), np.sort(np.logaddexp(0, -0.5 * difference)), 1e-5)

    order = jnp.array([3, 0, 5, 1, 4, 2])
    shuffled = [array[order] for array in pairs]
    np.testing.assert_allclose(aot_loss(*shuffled, beta=0.5), paired[order], rtol=1e-6)
    # Which rejected completion stands beside which chosen one does not matter.
    moved = [chosen, rejected[order], ref_chosen, ref_rejected[order]]
    np.testing.assert_allclose(aot_unpaired_loss(*moved, beta=0.5), unpaired, rtol=1e-6)


@pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
def test_transport_without_a_pair(loss, pairs):
    kept = jnp.array([0, 1, 3, 4, 5])
    alone = loss(*[array[kept] for array in pairs], beta=0.5)
    masked = loss(*pairs, beta=0.5, mask=jnp.arange(6) != 2)
    np.testing.assert_allclose(masked[kept], alone, rtol=1e-6)
    assert masked[2] == 0

    bad = [*pairs[:3], pairs[3].at[2].set(jnp.nan)]
    total = lambda chosen: jnp.sum(loss(chosen, *bad[1:], beta=0.5)[kept])
    losses, gradient = loss(*bad, beta=0.5), jax.grad(total)(bad[0])
    np.testing.assert_allclose(losses[kept], alone, rtol=1e-6)
    assert np.isnan(losses[2])
    assert np.isfinite(gradient).all()
    assert gradient[2] == 0


def test_cpo_is_dpo_with_a_uniform_reference(pairs):
    chosen, rejected, *_ = pairs
    uniform = jnp.full(6, -20.0)
    expected = dpo_loss(chosen, rejected, uniform, uniform, beta=0.5)
    np.testing.assert_allclose(cpo_loss(chosen, rejected, beta=0.5), expected, rtol=1e-5)


def test_simpo_counts_an_empty_completion_as_one_token(pairs):
    chosen, rejected, *_ = pairs
    lengths = jnp.array([0, 1, 2, 3, 4, 5])
    losses = simpo_loss(chosen, rejected, lengths, lengths, beta=2.0, gamma=0.0)
    per_token = (np.asarray(chosen) - np.asarray(rejected)) / [1, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(losses, np.logaddexp(0, -2 * per_token), rtol=1e-5)


def test_orpo_where_completions_are_certain():
    """1 - exp(x) keeps no digit of x = -1e-5 in float32; the odds must."""
    chosen = np.float32([-1e-5, -1e-3, -1e-5, -10.0])
    rejected = np.float32([-1e-3, -1e-5, -10.0, -1e-5])
    exact = [np.log(np.expm1(-np.float64(x))) for x in (rejected, chosen)]
    expected = -chosen + np.logaddexp(0, exact[1] - exact[0])
    np.testing.assert_allclose(orpo_loss(chosen, rejected, beta=1.0), expected, rtol=1e-5)


def test_kto_takes_one_kl_and_none_below_0(pairs):
    logprobs, ref_logprobs, *_ = pairs
    desirable = jnp.arange(6) % 2 == 0
    kto = functools.partial(
        kto_loss,
        logprobs,
        ref_logprobs,
        desirable,
        beta=0.5,
        desirable_weight=1,
        undesirable_weight=1,
    )
    np.testing.assert_array_equal(kto(0.3), kto(jnp.full(6, 0.3)))
    np.testing.assert_array_equal(kto(-0.3), kto(0.0))
    assert not np.allclose(kto(0.3), kto(0.0))


def test_unpaired_losses_without_an_offset_are_halves_of_the_paired(pairs):
    chosen, rejected, ref_chosen, ref_rejected = pairs
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    for unpaired, paired in (
        (functools.partial(kto_loss, **weights), apo_zero_loss),
        (bco_loss, bco_pair_loss),
    ):
        wanted = unpaired(chosen, ref_chosen, jnp.ones(6), 0.0, beta=0.5)
        unwanted = unpaired(rejected, ref_rejected, jnp.zeros(6), 0.0, beta=0.5)
        np.testing.assert_allclose(wanted + unwanted, paired(*pairs, beta=0.5), rtol=1e-5)


def test_bradley_terry_takes_one_margin(pairs):
    loss = functools.partial(bradley_terry_loss, *pairs[:2])
    np.testing.assert_array_equal(loss(), loss(margin=0.0))
    np.testing.assert_array_equal(loss(margin=0.5), loss(margin=jnp.full(6, 0.5)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dpo_loss(x, x, x, x[:1], beta=0.1), "ref_rejected has shape"),
        (lambda x: dpo_loss(x, x, x, x, beta=0.0), "beta=0.0 is out of range; it must be > 0"),
        (lambda x: dpo_loss(x, x, x, x, beta=1, label_smoothing=0.5), "label_smoothing=0.5"),
        (lambda x: robust_dpo_loss(x, x, x, x, beta=1, label_smoothing=0.5), "label_smoothing=0.5"),
        (lambda x: exo_loss(x, x, x, x, beta=1, label_smoothing=0.0), "must be > 0 and < 0.5"),
        (lambda x: discopop_loss(x, x, x, x, beta=1, discopop_tau=0.0), "discopop_tau=0.0"),
        (lambda x: dpo_loss(x, x, x, x, beta=1, f_divergence="kl"), "use one of 'reverse_kl'"),
        (lambda x: dpo_loss(x, x, x, x, beta=1, f_divergence="alpha"), "needs f_alpha"),
        (lambda x: dpo_loss(x, x, x, x, beta=1, f_alpha=0.5), "no other reads it"),
        (lambda x: aot_loss(x, x, x, x, beta=1, mask=x[:1] > 0), "mask has shape"),
        (lambda x: aot_loss(x, x, x, x, beta=1, label_smoothing=-0.1), "label_smoothing=-0.1"),
        (lambda x: aot_loss(*[x[:, None]] * 4, beta=1), r"expected \[B\]"),
        (lambda x: simpo_loss(x, x, x, x[:1], beta=1, gamma=1), "rejected_lengths has shape"),
        (lambda x: simpo_loss(x, x, x, x, beta=1, gamma=-1), "gamma=-1"),
        (lambda x: orpo_loss(x, x[:1], beta=1), "rejected_mean has shape"),
        (lambda x: cpo_loss(x, x, beta=1, label_smoothing=1.0), "label_smoothing=1.0"),
        (lambda x: bco_loss(x, x, x > 0, x[:1], beta=1), "shift has shape"),
        (lambda x: bco_loss(x, x, x[:1] > 0, 0.0, beta=1), "desirable has shape"),
        (lambda x: bradley_terry_loss(x, x, margin=x[:1]), "margin has shape"),
        (lambda x: bradley_terry_loss(x, x, center=-1.0), "center=-1.0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros(3))


def test_negative_kto_weights_are_refused():
    x = jnp.zeros(3)
    kto = functools.partial(kto_loss, x, x, x > 0, 0.0, beta=1)
    with pytest.raises(ValueError, match="undesirable_weight=-1"):
        kto(desirable_weight=1, undesirable_weight=-1)
    with pytest.raises(ValueError, match="desirable_weight=-1"):
        kto(desirable_weight=-1, undesirable_weight=1)
