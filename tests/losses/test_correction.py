import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.losses import effective_sample_share, importance_weights
from jaxrl_reason.sampling.filters import SamplingConfig, draw

LEVELS = ("token", "sequence", "geometric")
FREE = {"mode": "truncate", "cap": math.inf}
PREFIX = "sampling/importance_sampling_ratio/"


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def top_p(probabilities, p):
    """The smallest sets of most likely tokens whose probability reaches p."""
    descending = -np.sort(-probabilities, axis=-1)
    inside = np.cumsum(descending, -1) - descending < p
    return probabilities >= np.where(inside, descending, np.inf).min(-1, keepdims=True)


def weights_of(old, sampling, mask=None, **options):
    mask = np.ones(np.shape(old), bool) if mask is None else mask
    return np.asarray(importance_weights(old, sampling, mask, **{**FREE, **options})[0])


@pytest.fixture
def truncated():
    """Policy, sampler, the kept set S, the two masses of S, and the truncated sampler on S."""
    rng = np.random.default_rng(0)
    policy, sampler = softmax(rng.normal(size=(2, 9)))
    kept = top_p(sampler, 0.8)
    assert 1 < kept.sum() < 9
    q = sampler[kept] / sampler[kept].sum()
    return policy[kept], sampler[kept], policy[kept].sum(), sampler[kept].sum(), q


def test_truncated_sampling_by_exact_enumeration(truncated):
    policy, _, policy_mass, mass, q = truncated
    f = np.random.default_rng(1).normal(size=q.size)
    wanted = np.sum(policy / policy_mass * f)  # the mean of f under the policy truncated to S

    def mean(log_mass=None):
        kept = None if log_mass is None else np.full((1, q.size), log_mass)
        w = weights_of(np.log(policy)[None], np.log(q)[None], level="token", keep_mass=kept)[0]
        return np.sum(q * w * f), np.sum(q * w)

    # Without the kept mass the weights do not even average 1.
    np.testing.assert_allclose(mean(), (policy_mass * wanted, policy_mass), rtol=1e-5)
    # With the sampler's they do, up to the ratio of the two masses; with the policy's, exactly.
    share = policy_mass / mass
    np.testing.assert_allclose(mean(np.log(mass)), (share * wanted, share), rtol=1e-5)
    np.testing.assert_allclose(mean(np.log(policy_mass)), (wanted, 1), rtol=1e-5)


def test_without_mismatch_every_weight_is_1(truncated):
    _, sampler, _, mass, q = truncated
    old, sampling = np.log(sampler)[None], np.log(q)[None]
    kept = np.full(old.shape, np.log(mass))
    for level in LEVELS:
        weights = weights_of(old, sampling, level=level, keep_mass=kept)
        np.testing.assert_allclose(weights, 1, rtol=1e-5)
        assert (weights_of(old, sampling, level=level) < 0.95).all()


def test_sequences_by_exact_enumeration():
    # All sequences of two tokens; the kept set of the second depends on the first.
    rng = np.random.default_rng(2)
    sampler, policy = (softmax(x) for x in rng.normal(size=(2, 6, 5)))  # row 0: first token
    kept = top_p(sampler, 0.8)
    q = np.where(kept, sampler, 0) / np.where(kept, sampler, 0).sum(-1, keepdims=True)
    masses = np.where(kept, policy, 0).sum(-1)
    target = np.where(kept, policy, 0) / masses[:, None]
    pairs = np.asarray(
        [(a, b) for a in range(5) for b in range(5) if kept[0, a] and kept[a + 1, b]]
    )
    assert 4 < len(pairs) < 20
    rows = np.stack([np.zeros(len(pairs), int), pairs[:, 0] + 1], axis=1)
    f = rng.normal(size=len(pairs))
    given = [np.log(p[rows, pairs]) for p in (policy, q)]
    keep = np.log(masses[rows])

    weights = weights_of(*given, level="sequence", keep_mass=keep)[:, 0]
    probability = np.prod(q[rows, pairs], axis=1)
    wanted = np.sum(np.prod(target[rows, pairs], axis=1) * f)
    np.testing.assert_allclose(np.sum(probability * weights * f), wanted, rtol=1e-5)
    # The geometric mean is of low variance and not unbiased.
    geometric = weights_of(*given, level="geometric", keep_mass=keep)[:, 0]
    assert abs(np.sum(probability * geometric * f) - wanted) > 1e-2


def test_tokens_of_our_own_sampler_weigh_1():
    rng = np.random.default_rng(3)
    logits = jnp.asarray(2 * rng.normal(size=(64, 20)), jnp.float32)
    config = SamplingConfig(temperature=0.8, top_k=10, top_p=0.7, min_p=0.02)
    tokens, sampling, kept = draw(logits, jnp.asarray(rng.uniform(size=64), jnp.float32), config)
    old = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits / 0.8)), tokens[:, None], axis=1)
    weights = weights_of(old, sampling[:, None], level="token", keep_mass=kept[:, None])
    np.testing.assert_allclose(weights, 1, rtol=1e-5)


@pytest.fixture
def batch():
    """Four sequences of up to five tokens, one per row."""
    rng = np.random.default_rng(4)
    mask = np.arange(5) < np.asarray([[5], [3], [4], [1]])
    sampling = -rng.exponential(size=mask.shape)
    return sampling + 0.6 * rng.normal(size=mask.shape), sampling, mask


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", LEVELS)
def test_packed_equals_unpacked(level, mode, batch):
    # Two sequences to a row, the second interleaved with padding.
    options = {"level": level, "mode": mode, "cap": 1.5, "floor": 0.8}
    weights, metrics = importance_weights(*batch, **options)
    pack = lambda x: np.reshape(x, (2, 10))
    segments = np.repeat(np.asarray([[1, 2], [4, 7]], np.int32), 5, axis=1)
    packed, packed_metrics = importance_weights(*map(pack, batch), segment_ids=segments, **options)
    np.testing.assert_allclose(packed, pack(weights), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), packed_metrics, metrics)


@pytest.mark.parametrize("level", LEVELS)
def test_metrics_of_microbatches_add(level, batch):
    options = {"level": level, "mode": "truncate", "cap": 1.5, "floor": 0.8}
    _, whole = importance_weights(*batch, **options)
    halves = [
        importance_weights(*[x[rows] for x in batch], **options)[1]
        for rows in (slice(0, 1), slice(1, 4))
    ]
    for name, mean in whole.items():
        added = (halves[0][name] + halves[1][name]).mean()
        np.testing.assert_allclose(added, mean.mean(), rtol=1e-6)
    assert whole[PREFIX + "mean"].weight == (13 if level == "token" else 4)


def test_a_bad_number_that_counts_is_seen_in_its_own_sequence_only(batch):
    old, sampling, mask = batch
    old, sampling, mask = (np.reshape(x, (2, 10)).copy() for x in (old, sampling, mask))
    segments = np.repeat(np.asarray([[1, 2], [1, 2]], np.int32), 5, axis=1)
    old[0, 1] = np.nan
    for level, mode in ((level, mode) for level in LEVELS for mode in ("truncate", "mask")):
        options = {"level": level, "mode": mode, "cap": 1.5, "segment_ids": segments}
        bad = np.isnan(weights_of(old, sampling, mask, **options))
        assert bad.sum() == (1 if level == "token" else 5)
        assert bad[0, 1]


def test_far_off_policies_neither_overflow_nor_lose_their_bound():
    old = np.asarray([[-1.0, -500.0], [-500.0, -500.0]])
    for level in LEVELS:
        options = {"level": level, "cap": 3.0, "floor": 0.1}
        low = weights_of(old, np.full((2, 2), -1.0), **options)
        assert low[1].tolist() == [np.float32(0.1)] * 2
        high = weights_of(np.full((2, 2), -1.0), old, **options)
        assert high[1].tolist() == [3.0, 3.0]
        masked = weights_of(np.full((2, 2), -1.0), old, **options, mode="mask")
        assert masked[1].tolist() == [0.0, 0.0]


def test_effective_sample_share(batch):
    def share(weights):
        weights = jnp.asarray(weights, jnp.float32)
        return effective_sample_share(jnp.mean(weights), jnp.mean(weights**2))

    np.testing.assert_allclose(share([0.3, 0.3, 0.3]), 1, rtol=1e-6)
    np.testing.assert_allclose(share([0.0, 2.0, 0.0, 0.0]), 0.25, rtol=1e-6)
    assert share([0.0, 0.0]) == 0
    weights, metrics = importance_weights(*batch, level="token", mode="truncate", cap=1.5)
    counted = np.asarray(weights)[batch[2]]
    ours = effective_sample_share(*(metrics[PREFIX + x].mean() for x in ("mean", "mean_square")))
    np.testing.assert_allclose(ours, counted.sum() ** 2 / (counted**2).sum() / 13, rtol=1e-5)


def test_an_empty_batch_has_metrics_of_0():
    x = np.zeros((2, 3), np.float32)
    for level in LEVELS:
        weights, metrics = importance_weights(x, x, x, level=level, mode="truncate", cap=2.0)
        np.testing.assert_array_equal(weights, 0)
        assert all(metric.mean() == 0 for metric in metrics.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"level": "row"}, "level='row' is unknown; use one of 'token', 'sequence', 'geometric'"),
        ({"mode": "clip"}, "mode='clip' is unknown; use one of 'truncate', 'mask'"),
        ({"cap": 0.0}, "cap=0.0 is out of range; it must be > 0"),
        ({"floor": -1}, "floor=-1 is out of range; it must be >= 0"),
        ({"floor": 3.0}, "floor=3.0 is out of range; it must be <= 2.0"),
        ({"keep_mass": np.zeros((2, 1))}, r"keep_mass has shape \(2, 1\); expected \(2, 3\)"),
        ({"segment_ids": np.zeros((2, 1), np.int32)}, r"segment_ids has shape \(2, 1\)"),
    ],
)
def test_errors(given, message):
    x = jnp.zeros((2, 3))
    options = {"level": "sequence", "mode": "truncate", "cap": 2.0, **given}
    with pytest.raises(ValueError, match=message):
        importance_weights(x, x, x, **options)


def test_errors_of_shapes():
    x = jnp.zeros((2, 3))
    options = {"level": "token", "mode": "truncate", "cap": 2.0}
    with pytest.raises(ValueError, match="sampling_logprobs has shape"):
        importance_weights(x, x[:1], x, **options)
    with pytest.raises(ValueError, match=r"mask has shape \(2,\); expected \(2, 3\)"):
        importance_weights(x, x, x[:, 0], **options)
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(3,\); expected \[B, T\]"):
        importance_weights(x[0], x[0], x[0], **options)
