"""Laws of the policy losses that hold across functions; oracles are in the conformance suite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.arrays import aggregate, sequence_sum
from jaxrl_reason.losses import (
    LOSS_TYPES,
    cispo_loss,
    clip_cov_loss,
    clip_cov_metrics,
    clipped_policy_loss,
    gmpo_loss,
    gpg_loss,
    gspo_loss,
    gspo_token_loss,
    kl_cov_loss,
    sapo_loss,
    triplet_clipped_policy_loss,
    vespo_loss,
)

B, T = 6, 8
DETERMINISTIC = [name for name in LOSS_TYPES if name != "clip_cov"]
ARRAYS = ("logprobs", "old_logprobs", "advantages", "mask")
NUMBERS = {
    "epsilon": 0.2,
    "temperature_pos": 1.0,
    "temperature_neg": 1.5,
    "k_pos": 2.0,
    "lambda_pos": 3.0,
    "k_neg": 3.0,
    "lambda_neg": 2.0,
    "epsilon_neg_low": 0.2,
    "epsilon_neg_high": 2.0,
    "epsilon_pos_high": 0.3,
    "clip_cov_ratio": 0.1,
    "clip_cov_lb": 0.1,
    "clip_cov_ub": 2.0,
    "kl_cov_ratio": 0.2,
    "ppo_kl_coef": 1.0,
}


def numbers(name):
    """What a loss of this name must be told."""
    given = {option: NUMBERS.get(option, 3.0) for option in LOSS_TYPES[name].required}
    return {**given, "key": jax.random.key(0)} if name == "clip_cov" else given


@pytest.fixture
def batch():
    """Ratios far beyond every clip on both sides, both signs of A, lengths from 0 to T."""
    rng = np.random.default_rng(0)
    old = -rng.exponential(size=(B, T)).astype(np.float32)
    return {
        "logprobs": jnp.asarray(old + 0.8 * rng.normal(size=(B, T)), jnp.float32),
        "old_logprobs": jnp.asarray(old),
        "advantages": jnp.asarray([1.0, -1.0, 0.5, 2.0, -0.7, 1.5], jnp.float32),
        "mask": jnp.arange(T)[None] < jnp.asarray([[3], [8], [5], [0], [1], [6]]),
    }


def per_token(batch):
    return {**batch, "advantages": jnp.repeat(batch["advantages"][:, None], T, axis=1)}


def pack(batch):
    """Three rows of two sequences, the second one with ids that another row uses too."""
    joined = {name: jnp.reshape(array, (B // 2, 2 * T)) for name, array in batch.items()}
    ids = jnp.broadcast_to(jnp.repeat(jnp.asarray([1, 2]), T), (B // 2, 2 * T))
    return {**joined, "segment_ids": ids.at[1].add(3)}


def mean(name, batch, **options):
    """The scalar that a step minimises."""
    variant = LOSS_TYPES[name]
    values = variant(**batch, **options)
    how = {"how": variant.aggregation, "max_length": T, "segment_ids": batch.get("segment_ids")}
    return aggregate(values, batch["mask"], **how).mean()


def gradient(function, batch, **options):
    """Of the sum of the result, or of a scalar."""
    return jax.grad(lambda x: jnp.sum(function(**{**batch, "logprobs": x}, **options)))(
        batch["logprobs"]
    )


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_every_name_is_usable_with_what_it_requires(name, batch):
    variant, given = LOSS_TYPES[name], numbers(name)
    assert set(variant.required) <= set(variant.options)
    assert not {"segment_ids", "key", *ARRAYS} & set(variant.options)
    packed = pack(per_token(batch))
    assert np.isfinite(jax.jit(functools.partial(mean, name))(packed, **given))
    clipped = jax.jit(variant.clipped)(**packed, **given)
    assert set(clipped) == ({"low", "high", "region"} if variant.clip_metrics else set())
    for where in clipped.values():
        assert where.shape == packed["mask"].shape
        assert where.dtype == np.bool_


def test_clipped_leaves_out_options_that_only_the_loss_takes(batch):
    clipped = LOSS_TYPES["grpo"].clipped
    jax.tree.map(
        np.testing.assert_array_equal,
        clipped(**batch, epsilon=0.2, delta=2.0),
        clipped(**batch, epsilon=0.2),
    )


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_packed_equals_unpacked(name, batch):
    given, spread = numbers(name), per_token(batch)
    if name in ("dr_grpo", "triplet"):  # their divisor counts rows, or sequences that have a token
        spread["mask"] = spread["mask"].at[3].set(spread["mask"][2])
    both = jax.value_and_grad(lambda x, batch: mean(name, {**batch, "logprobs": x}, **given))
    value, slope = both(spread["logprobs"], spread)
    packed = pack(spread)
    packed_value, packed_slope = both(packed["logprobs"], packed)
    np.testing.assert_allclose(packed_value, value, rtol=1e-5)
    np.testing.assert_allclose(packed_slope.reshape(B, T), slope, rtol=1e-4, atol=1e-7)
    clipped, mask = LOSS_TYPES[name].clipped, spread["mask"]
    for side, where in clipped(**packed, **given).items():
        expected = clipped(**spread, **given)[side]
        np.testing.assert_array_equal(where.reshape(B, T) & mask, expected & mask)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_at_ratio_1_the_gradient_is_reinforce(name, batch):
    # old_logprobs is the very array that is differentiated, so this also shows it is detached.
    variant, given = LOSS_TYPES[name], numbers(name)
    given |= {"alpha": 1.0} if name == "gpg" else {}

    def slope(loss):
        def total(x):
            values = loss(**{**batch, "logprobs": x, "old_logprobs": x})
            return aggregate(values, batch["mask"], how=variant.aggregation, max_length=T).mean()

        return jax.grad(total)(batch["logprobs"])

    ours = slope(functools.partial(variant, **given))
    np.testing.assert_allclose(ours, slope(LOSS_TYPES["reinforce"]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_masked_garbage_reaches_neither_value_nor_gradient(name, batch):
    given, mask = numbers(name), batch["mask"]
    both = jax.value_and_grad(lambda x, batch: mean(name, {**batch, "logprobs": x}, **given))
    clean = both(batch["logprobs"], batch)
    for bad in (jnp.nan, jnp.inf, -jnp.inf, 1e30):
        dirty = {
            **batch,
            "logprobs": jnp.where(mask, batch["logprobs"], bad),
            "old_logprobs": jnp.where(mask, batch["old_logprobs"], -bad).at[0, 4].set(bad),
            "advantages": batch["advantages"].at[3].set(bad),
        }
        jax.tree.map(np.testing.assert_array_equal, both(dirty["logprobs"], dirty), clean)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_a_bad_number_that_counts_stays_in_its_sequence(name, batch):
    given, packed = numbers(name), pack(per_token(batch))
    variant = LOSS_TYPES[name]
    dirty = {**packed, "logprobs": packed["logprobs"].at[0, 1].set(jnp.nan)}
    values, slope = variant(**dirty, **given), gradient(variant, dirty, **given)
    assert np.isnan(values[0, 1])
    assert np.isfinite(values[:, T:]).all()
    assert np.isfinite(values[1:]).all()
    assert np.isfinite(slope).all()
    assert np.any(slope[0, T:] != 0)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_an_overflowing_ratio_has_a_finite_gradient(name):
    batch = {
        "logprobs": jnp.full((2, 3), -1.0),
        "old_logprobs": jnp.full((2, 3), -300.0),
        "advantages": jnp.asarray([1.0, -1.0]),
        "mask": jnp.ones((2, 3), jnp.bool_),
    }
    given = numbers(name)
    assert np.isfinite(LOSS_TYPES[name](**batch, **given)).all()
    slope = gradient(LOSS_TYPES[name], batch, **given)
    assert np.isfinite(slope).all()
    turned = {**batch, "logprobs": batch["old_logprobs"], "old_logprobs": batch["logprobs"]}
    assert np.isfinite(gradient(LOSS_TYPES[name], turned, **given)).all()
    if name == "grpo":
        assert (slope[0] == 0).all()  # clipped
        assert (slope[1] > 0).all()  # still pushed down


@pytest.mark.parametrize("name", ["grpo", "gspo", "gspo_token", "gmpo", "triplet", "clip_cov"])
def test_clip_metrics_tell_where_the_gradient_is_0(name, batch):
    batch["mask"] = batch["mask"].at[3].set(True)
    given = {**numbers(name), "clip_cov_lb": -9.0} if name == "clip_cov" else numbers(name)
    clipped = LOSS_TYPES[name].clipped(**batch, **given)
    stopped = gradient(LOSS_TYPES[name], batch, **given) == 0
    mask = batch["mask"]
    np.testing.assert_array_equal(clipped["region"] & mask, stopped & mask)
    assert (clipped["low"] & mask).any()
    assert (clipped["high"] & mask).any()
    assert (mask & ~clipped["region"]).any()


def test_a_cispo_token_keeps_its_gradient_where_the_metrics_say_bounded(batch):
    given = {"epsilon_high": 1.5, "epsilon": 0.3}
    clipped = LOSS_TYPES["cispo"].clipped(**batch, **given)
    assert clipped["low"].any()
    assert clipped["high"].any()
    assert (gradient(LOSS_TYPES["cispo"], batch, **given) != 0).all()


def test_gspo_is_constant_along_a_sequence_and_its_token_form_has_the_same_gradient(batch):
    values = gspo_loss(**batch, epsilon=0.2)
    same = gspo_token_loss(**batch, epsilon=0.2)
    np.testing.assert_allclose(values, same, rtol=1e-6)
    first = values[:, :1]
    np.testing.assert_array_equal(values, jnp.where(batch["mask"], first, 0))
    slopes = [
        gradient(lambda name=name, **batch: mean(name, batch, epsilon=0.2), batch)
        for name in ("gspo", "gspo_token")
    ]
    assert np.any(slopes[0] != 0)
    np.testing.assert_allclose(*slopes, rtol=1e-5)


def test_vespo_weights_move_the_reference_of_its_kernel(batch):
    kernel = {name: NUMBERS[name] for name in LOSS_TYPES["vespo"].required}
    sampling = batch["old_logprobs"] - 0.1
    weights = jnp.exp(batch["old_logprobs"] - sampling)
    np.testing.assert_allclose(
        vespo_loss(**batch, **kernel, importance_weights=weights),
        vespo_loss(**{**batch, "old_logprobs": sampling}, **kernel),
        rtol=1e-4,
    )
    rejected = vespo_loss(**batch, **kernel, importance_weights=weights.at[0, 0].set(0))
    assert np.abs(rejected[0]).max() < 1e-12
    assert np.abs(rejected[1]).max() > 0


def test_gpg_counts_live_sequences(batch):
    arrays = {name: batch[name] for name in ("logprobs", "mask")}
    dead = jnp.asarray([1.0, 0.0, 0.0, 2.0, 0.0, 1.0])  # of five sequences with tokens two live
    plain = gpg_loss(**arrays, advantages=dead, alpha=1.0)
    np.testing.assert_allclose(gpg_loss(**arrays, advantages=dead), 2.5 * plain, rtol=1e-6)
    nothing = gpg_loss(**arrays, advantages=jnp.zeros(B))
    np.testing.assert_array_equal(nothing, np.zeros((B, T)))
    assert np.isfinite(nothing).all()


def test_clip_cov_draws_the_number_it_should_at_random(batch):
    batch["mask"] = jnp.ones((B, T), jnp.bool_)
    options = {"epsilon": 0.2, "clip_cov_lb": 0.0, "clip_cov_ub": 9.0}

    @jax.jit
    def drawn(mask, share, key):
        metrics = clip_cov_metrics(
            **{**batch, "mask": mask}, **options, clip_cov_ratio=share, key=key
        )
        return metrics["region"] & ~metrics["low"] & ~metrics["high"]

    keys = jax.random.split(jax.random.key(1), 50)
    full = jax.vmap(lambda key: drawn(batch["mask"], 0.1, key))(keys)
    candidates = drawn(batch["mask"], 1.0, keys[0])
    assert candidates.sum() > 8
    np.testing.assert_array_equal(full.sum(axis=(1, 2)), 4)  # floor(0.1 * 48)
    np.testing.assert_array_equal(full.any(axis=0), candidates)
    short = drawn(jnp.ones((B, T), jnp.bool_).at[:, 5:].set(False), 0.1, keys[0])
    assert short.sum() == 3  # floor(0.1 * 30), exact although 0.1 is none of the floats
    assert drawn(batch["mask"], 1e-6, keys[0]).sum() == 1
    assert drawn(jnp.zeros((B, T), jnp.bool_), 0.1, keys[0]).sum() == 0
    key = {"key": keys[0], "clip_cov_ratio": 0.1}
    loss = clip_cov_loss(**batch, **options, **key)
    np.testing.assert_array_equal((loss == 0), full[0])


def test_kl_cov_chooses_exactly_as_many_when_covariances_tie(batch):
    batch |= {"advantages": jnp.zeros(B), "mask": jnp.ones((B, T), jnp.bool_)}
    loss = jax.jit(functools.partial(kl_cov_loss, ppo_kl_coef=1.0, kl_cov_ratio=0.25))(**batch)
    assert np.count_nonzero(loss) == 12


def test_sequence_sum():
    values = jnp.asarray([[1.0, 2.0, 4.0, 8.0], [1.0, jnp.nan, 4.0, jnp.nan]])
    mask = jnp.asarray([[1, 1, 1, 0], [1, 0, 1, 1]])
    ids = jnp.asarray([[1, 1, 2, 2], [4, 4, 4, 0]])
    np.testing.assert_array_equal(
        sequence_sum(values, mask, ids), [[3.0, 3.0, 4.0, 4.0], [5.0, 5.0, 5.0, np.nan]]
    )
    np.testing.assert_array_equal(sequence_sum(values, mask)[0], [7.0] * 4)

    def total(values):
        sums = jnp.square(sequence_sum(values, mask, ids))
        return jnp.sum(jnp.where(jnp.isfinite(sums), sums, 0))

    expected = [[12.0, 12.0, 16.0, 0.0], [30.0, 0.0, 30.0, 0.0]]
    np.testing.assert_array_equal(jax.grad(total)(values.at[1, 3].set(0.0)), expected)


_X = jnp.zeros((2, 3))
_M = jnp.ones((2, 3), jnp.bool_)
_COV = {"clip_cov_ratio": 0.1, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0}
_KERNEL = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clipped_policy_loss(_X, _X[:1], _X, epsilon=0.2), "old_logprobs has shape"),
        (lambda: clipped_policy_loss(_X, _X, _X[0], epsilon=0.2), r"expected \(2,\)"),
        (lambda: clipped_policy_loss(_X, _X, _X, epsilon=-0.1), "epsilon=-0.1"),
        (lambda: clipped_policy_loss(_X, _X, _X, epsilon=0.2, delta=1.1), "delta=1.1"),
        (lambda: cispo_loss(_X, _X, _X, epsilon_high=0.28), "the largest weight itself"),
        (
            lambda: triplet_clipped_policy_loss(
                _X, _X, _X, epsilon_neg_low=0.2, epsilon_neg_high=0.3, epsilon_pos_high=0.3
            ),
            "the largest ratio itself",
        ),
        (
            lambda: sapo_loss(_X, _X, _X, temperature_pos=0.0, temperature_neg=1.0),
            "temperature_pos=0.0 is out of range; it must be > 0",
        ),
        (lambda: gpg_loss(_X, _X, _M[:1]), "mask has shape"),
        (lambda: gpg_loss(_X, _X, _M, alpha=-1.0), "alpha=-1.0"),
        (lambda: gspo_loss(_X, _X, _X, _M[:, :2], epsilon=0.2), "mask has shape"),
        (lambda: gspo_loss(_X, _X, _X[0], _M, epsilon=0.2), r"expected \(2,\)"),
        (lambda: gspo_loss(_X, _X, _X, _M, epsilon=2.0), "epsilon=2.0"),
        (
            lambda: gspo_loss(_X, _X, _X, _M, epsilon=0.2, segment_ids=jnp.zeros(3, jnp.int32)),
            "segment_ids has shape",
        ),
        (lambda: gmpo_loss(_X, _X, _X, _M, epsilon=0.4, epsilon_high=-1.0), "epsilon_high=-1.0"),
        (lambda: vespo_loss(_X, _X, _X, _M, **{**_KERNEL, "lambda_neg": 0.0}), "lambda_neg=0.0"),
        (
            lambda: vespo_loss(_X, _X, _X, _M, **_KERNEL, importance_weights=_X[0]),
            "importance_weights has shape",
        ),
        (
            lambda: clip_cov_loss(
                _X, _X, _X, _M, epsilon=0.2, **{**_COV, "clip_cov_ub": 0.5}, key=jax.random.key(0)
            ),
            "clip_cov_ub=0.5 is out of range; it must be > 1.0",
        ),
        (
            lambda: kl_cov_loss(_X, _X, _X, _M, kl_cov_ratio=2.0, ppo_kl_coef=1.0),
            "kl_cov_ratio=2.0",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_clip_cov_asks_for_a_key(batch):
    with pytest.raises(TypeError, match=r"needs a jax\.random key"):
        LOSS_TYPES["clip_cov"](**batch, epsilon=0.2, **_COV)
