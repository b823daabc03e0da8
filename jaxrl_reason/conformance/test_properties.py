"""Laws of policy and preference losses and their parts, which no oracle states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.conformance.evaluation import compiled
from jaxrl_reason.conformance.masking import BAD

B, T = 8, 6
VESPO = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}
AGGREGATIONS = ("token_mean", "sequence_mean", "constant", "sequence_sum")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def named(value):
    """Part of a test's name: options as they are written in a call."""
    if isinstance(value, dict):
        return ",".join(f"{name}={option}" for name, option in value.items())
    return value if isinstance(value, str) else f"{value:.3g}"


@pytest.fixture
def batch():
    """Log-probs, advantages of sequences, and a mask that every row has a token under."""
    mask = np.random.default_rng(1).random((B, T)) < 0.6
    mask[:, 1] = True
    return -jnp.abs(normal(B, T)), normal(B, seed=2), jnp.asarray(mask)


@pytest.fixture
def pairs():
    """Log-probs of chosen and rejected completions under policy and reference."""
    return [2 * normal(B, seed=seed) for seed in range(4)]


@pytest.mark.parametrize(
    ("name", "takes", "options"),
    [
        ("reinforce_loss", "", {}),
        ("clipped_policy_loss", "old", {"epsilon": 0.2, "epsilon_high": 0.3}),
        ("clipped_policy_loss", "old", {"epsilon": 0.2, "delta": 1.5}),
        (
            "triplet_clipped_policy_loss",
            "old",
            {"epsilon_neg_low": 0.4, "epsilon_neg_high": 5.0, "epsilon_pos_high": 0.28},
        ),
        ("cispo_loss", "old", {"epsilon_high": 3.0}),
        ("cispo_loss", "old", {"epsilon_high": 1.5, "epsilon": 0.2}),
        ("sapo_loss", "old", {"temperature_pos": 1.0, "temperature_neg": 1.05}),
        ("gpg_loss", "mask", {"alpha": 1.0}),
        ("gspo_loss", "old mask", {"epsilon": 3e-4, "epsilon_high": 4e-4}),
        ("gspo_token_loss", "old mask", {"epsilon": 3e-4, "epsilon_high": 4e-4}),
        ("gmpo_loss", "old mask", {"epsilon": 0.4}),
        ("vespo_loss", "old mask", VESPO),
        ("kl_cov_loss", "old mask", {"kl_cov_ratio": 0.2, "ppo_kl_coef": 1.0}),
    ],
    ids=named,
)
def test_at_ratio_1_the_gradient_is_that_of_reinforce(name, takes, options, offered, batch):
    """On the first update of a batch every loss is policy gradient: -A for each token."""
    loss = offered(name)
    logprobs, advantages, mask = batch

    def total(logprobs):
        # The very array that is differentiated, so this also shows that the old one is detached.
        old = [logprobs] if "old" in takes else []
        masks = [mask] if "mask" in takes else []
        return jnp.sum(jnp.where(mask, loss(logprobs, *old, advantages, *masks, **options), 0))

    wanted = jnp.where(mask, -advantages[:, None], 0)
    np.testing.assert_allclose(compiled(jax.grad(total))(logprobs), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gspo_loss", {"epsilon": 0.1}),
        ("gspo_token_loss", {"epsilon": 0.1}),
        ("gmpo_loss", {"epsilon": 0.4}),
        ("vespo_loss", VESPO),
    ],
    ids=named,
)
def test_packed_sequences_stay_apart(name, options, offered_jitted, batch):
    """Two sequences in a row give what they give in a row each."""
    loss = offered_jitted(name)
    logprobs, advantages, mask = batch
    old, advantages = logprobs + 0.3 * normal(B, T, seed=3), jnp.repeat(advantages[:, None], T, 1)
    pack = lambda rows: jnp.pad(rows.reshape(B // 2, 2 * T), ((0, 0), (0, 2)))
    segments = jnp.asarray([[1] * T + [2] * T + [0, 0]] * (B // 2), jnp.int32)

    arrays = (logprobs, old, advantages, mask)
    apart = loss(*arrays, **options)
    packed = loss(*map(pack, arrays), **options, segment_ids=segments)
    np.testing.assert_allclose(
        jnp.where(pack(mask), packed, 0), pack(jnp.where(mask, apart, 0)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k1_abs"])
def test_kl_is_0_at_the_reference_and_never_overflows(estimator, offered, batch):
    kl_estimate = offered("kl_estimate")
    logprobs = batch[0]
    np.testing.assert_array_equal(kl_estimate(logprobs, logprobs, estimator=estimator), 0)
    far = lambda x: jnp.sum(kl_estimate(x, jnp.zeros_like(x), estimator=estimator))
    value, gradient = compiled(jax.value_and_grad(far))(jnp.full((1, 1), -500.0))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_expectation_of_kl_estimates_is_the_kl(offered_jitted):
    kl_estimate = offered_jitted("kl_estimate")
    logprobs, ref_logprobs = jax.nn.log_softmax(normal(2, 9))
    kl = jnp.sum(jnp.exp(logprobs) * (logprobs - ref_logprobs))
    for estimator in ("k1", "k3"):
        estimates = kl_estimate(logprobs[None], ref_logprobs[None], estimator=estimator)
        np.testing.assert_allclose(jnp.sum(jnp.exp(logprobs) * estimates[0]), kl, rtol=1e-5)


def test_gradient_of_k2_is_that_of_the_kl(offered):
    """In expectation over the policy (arXiv 2510.01555)."""
    kl_estimate = offered("kl_estimate")
    ref_logprobs = jax.nn.log_softmax(normal(1, 6))

    def estimate(logits):
        logprobs = jax.nn.log_softmax(logits)
        weights = jax.lax.stop_gradient(jnp.exp(logprobs))
        return jnp.sum(weights * kl_estimate(logprobs, ref_logprobs, estimator="k2"))

    def exact(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logprobs) * (logprobs - ref_logprobs))

    logits = normal(1, 6, seed=1)
    np.testing.assert_allclose(
        compiled(jax.grad(estimate))(logits), compiled(jax.grad(exact))(logits), atol=1e-6
    )


LOG_2 = np.log(2)


@pytest.mark.parametrize(
    ("name", "options", "value"),
    [
        ("dpo_loss", {}, LOG_2),
        ("dpo_loss", {"label_smoothing": 0.2}, LOG_2),
        ("dpo_norm_loss", {}, LOG_2),
        ("robust_dpo_loss", {"label_smoothing": 0.2}, LOG_2),
        ("hinge_dpo_loss", {}, 1.0),
        ("ipo_loss", {}, 1 / (4 * 0.3**2)),
        # The KL of (1/2, 1/2) from (0.9, 0.1).
        ("exo_loss", {"label_smoothing": 0.1}, -LOG_2 - np.log(0.9 * 0.1) / 2),
        ("nca_loss", {}, 2 * LOG_2),
        ("bco_pair_loss", {}, 2 * LOG_2),
        ("sppo_hard_loss", {}, 2 / (2 * 0.3) ** 2),
        ("apo_zero_loss", {}, 1.0),
        ("apo_down_loss", {}, 1.0),
        ("discopop_loss", {}, LOG_2 / 2 + 1 / 2),
        ("aot_loss", {}, LOG_2),
        ("aot_unpaired_loss", {}, LOG_2),
    ],
    ids=named,
)
def test_constant_at_the_reference(name, options, value, offered_jitted, pairs):
    """Before the first update the loss of a pair is a number that depends on the options only."""
    chosen, rejected, *_ = pairs
    loss = offered_jitted(name)(chosen, rejected, chosen, rejected, beta=0.3, **options)
    np.testing.assert_allclose(loss, np.full(B, value), rtol=1e-5)


@pytest.mark.parametrize("name", ["dpo_loss", "hinge_dpo_loss", "robust_dpo_loss", "exo_loss"])
@pytest.mark.parametrize("divergence", ["js", "alpha", "forward_kl"])
def test_f_divergences_agree_at_the_reference(name, divergence, offered_jitted, pairs):
    """There the scores of chosen and rejected are equal, whatever the divergence."""
    chosen, rejected, *_ = pairs
    options = {"label_smoothing": 0.1} if name in ("robust_dpo_loss", "exo_loss") else {}
    alpha = {"f_alpha": 0.5} if divergence == "alpha" else {}
    arrays, loss = (chosen, rejected, chosen, rejected), offered_jitted(name)
    np.testing.assert_allclose(
        loss(*arrays, beta=0.3, f_divergence=divergence, **alpha, **options),
        loss(*arrays, beta=0.3, **options),
        rtol=1e-5,
    )


def test_robust_dpo_undoes_flipped_labels(offered_jitted, pairs):
    """Its expectation over flips of probability s is the loss without flips."""
    robust, dpo = offered_jitted("robust_dpo_loss"), offered_jitted("dpo_loss")
    chosen, rejected, ref_chosen, ref_rejected = pairs
    options = {"beta": 0.5, "label_smoothing": 0.2}
    flipped = robust(rejected, chosen, ref_rejected, ref_chosen, **options)
    np.testing.assert_allclose(
        0.8 * robust(*pairs, **options) + 0.2 * flipped, dpo(*pairs, beta=0.5), rtol=1e-4, atol=1e-5
    )


def test_losses_that_are_dpo_in_special_cases(offered_jitted, pairs):
    """Against a uniform reference: CPO, SimPO of single tokens, and Bradley-Terry of log-probs."""
    dpo = offered_jitted("dpo_loss")
    chosen, rejected, *_ = pairs
    zeros, ones = jnp.zeros(B), jnp.ones(B, jnp.int32)
    wanted = dpo(chosen, rejected, zeros, zeros, beta=0.5)
    cpo = offered_jitted("cpo_loss")(chosen, rejected, beta=0.5)
    simpo = offered_jitted("simpo_loss")(chosen, rejected, ones, ones, beta=0.5, gamma=0.0)
    rewards = offered_jitted("bradley_terry_loss")(0.5 * chosen, 0.5 * rejected)
    for loss in (cpo, simpo, rewards):
        np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=1e-6)


def test_kto_and_bco_at_the_reference(offered_jitted, pairs):
    logprobs, desirable = pairs[0], jnp.arange(B) % 2 == 0
    level = jnp.zeros(())
    weights = {"desirable_weight": 1.0, "undesirable_weight": 3.0}
    kto = offered_jitted("kto_loss")(logprobs, logprobs, desirable, level, beta=0.1, **weights)
    np.testing.assert_allclose(kto, np.where(desirable, 0.5, 1.5), rtol=1e-6)
    bco = offered_jitted("bco_loss")(logprobs, logprobs, desirable, level, beta=0.1)
    np.testing.assert_allclose(bco, np.full(B, LOG_2), rtol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_weights_are_1_on_policy(level, mode, offered_jitted, batch):
    logprobs, _, mask = batch
    weights, _ = offered_jitted("importance_weights")(
        logprobs, logprobs, mask, level=level, mode=mode, cap=2.0, floor=0.5
    )
    np.testing.assert_array_equal(weights, mask.astype(np.float32))


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_aggregate_adds_up_over_parts_of_a_batch(how, offered_jitted, batch):
    """So do microbatches and devices: the mean is divided once, at the end."""
    aggregate = offered_jitted("aggregate")
    values, _, mask = batch
    reduce = lambda values, mask: aggregate(values, mask, how=how, max_length=T)
    reduced = reduce(values, mask)
    whole = reduced.mean()
    np.testing.assert_allclose(whole, reduced.total / reduced.weight, rtol=1e-6)
    first, *rest = [reduce(values[i : i + 2], mask[i : i + 2]) for i in range(0, B, 2)]
    np.testing.assert_allclose(sum(rest, start=first).mean(), whole, rtol=1e-5)
    # Means of means would not: the parts have unlike numbers of tokens.
    assert len({int(mask[i : i + 2].sum()) for i in range(0, B, 2)}) > 1


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("bad", BAD)
def test_aggregate_ignores_what_is_masked(how, bad, offered, batch):
    """A mean without any token is 0, and its gradient too."""
    aggregate = offered("aggregate")
    values, _, mask = batch
    dirty = jnp.where(mask, values, bad)
    mean = lambda values, mask: aggregate(values, mask, how=how, max_length=T).mean()
    differentiated = compiled(jax.value_and_grad(mean))
    for counted in (mask, jnp.zeros_like(mask)):
        clean = differentiated(values, counted)
        jax.tree.map(np.testing.assert_array_equal, differentiated(dirty, counted), clean)
    assert clean[0] == 0


def test_chunks_equal_the_plain_log_probs(offered_jitted):
    hidden, unembedding = normal(B, T, 5), normal(5, 7, seed=1)
    tokens = jnp.asarray(np.random.default_rng(2).integers(7, size=(B, T)), jnp.int32)
    logits = jnp.einsum("btd,dv->btv", hidden, unembedding)
    chunked = offered_jitted("chunked_token_logprobs")(
        hidden, unembedding, tokens, chunk_size=3 * B
    )
    plain = (
        offered_jitted("token_logprobs")(logits, tokens),
        offered_jitted("token_entropy")(logits),
    )
    for a, b in zip(chunked, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_forbidden_tokens_give_no_nan(offered_jitted):
    """A logit of -inf is a probability of 0, and adds nothing to the entropy."""
    logits = normal(B, T, 7).at[..., 3].set(-jnp.inf)
    kept = jnp.delete(logits, 3, axis=-1)
    entropy = offered_jitted("token_entropy")
    np.testing.assert_allclose(entropy(logits), entropy(kept), rtol=1e-5, atol=1e-6)
    tokens = jnp.full((B, T), 2)
    logprobs = offered_jitted("token_logprobs")
    np.testing.assert_allclose(logprobs(logits, tokens), logprobs(kept, tokens), rtol=1e-5)
