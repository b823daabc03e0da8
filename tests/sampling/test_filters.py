"""Truncation and inverse-CDF drawing, against brute force and frequencies."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.sampling import SamplingConfig
from jaxrl_reason.sampling.filters import draw, kept_tokens


def brute_force(p, config):
    order = np.argsort(-p, kind="stable")
    kept = set(order[: config.top_k] if config.top_k else order)
    total, nucleus = sum(p[i] for i in kept), []
    for i in [i for i in order if i in kept]:
        if sum(p[j] for j in nucleus) >= config.top_p * total:
            break
        nucleus.append(i)
    return [i in nucleus and p[i] >= config.min_p * p.max() for i in range(len(p))]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"top_k": 5, "top_p": 0.7, "min_p": 0.05},
        {"top_k": 100},
        {"top_p": 1e-6},
    ],
)
def test_kept_tokens_against_brute_force(options):
    config = SamplingConfig(**options)
    p = np.random.default_rng(0).dirichlet(np.ones(9) * 0.7, size=20).astype(np.float32)
    kept = np.asarray(kept_tokens(jnp.asarray(p), config))
    for row, mask in zip(p, kept, strict=True):
        assert mask.tolist() == brute_force(row, config)
        assert mask[row.argmax()]


drawn = jax.jit(draw, static_argnums=2)

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.02},
    {"top_k": 200, "top_p": 0.8},
    {"temperature": 1.4, "top_k": 300, "top_p": 0.95, "min_p": 0.001},
]


def kept_by_sorting(p, config):
    """The rule, in float64: the mask, and how far each token's cumulative mass is from top_p."""
    p = p.astype(np.float64)
    kept = p > 0
    if config.top_k is not None:
        kept &= p >= np.sort(p)[::-1][min(config.top_k, p.size) - 1]
    left = np.where(kept, p, 0) / np.where(kept, p, 0).sum()
    descending = np.sort(left)[::-1]
    before = (np.cumsum(descending) - descending)[np.searchsorted(-descending, -left)]
    kept &= before < config.top_p
    # In float32, as the rule multiplies.
    kept &= p >= np.float32(config.min_p) * np.float32(p.max())
    return kept, np.abs(before - config.top_p) if config.top_p < 1 else np.ones(p.size)


def distributions(size, rng):
    """Rows of probabilities: random, tied, nearly flat, Zipf, one-hot, with zeros."""
    spread = rng.normal(size=size) * np.asarray([0.01, 1, 8])[:, None]
    ties = rng.integers(0, 5, size=(2, size)) * 1.0
    zipf = -1.2 * np.log(1 + rng.permutation(size))
    hot = np.where(np.arange(size) == size // 3, 200.0, 0)
    holes = np.where(rng.random(size) < 0.7, -np.inf, rng.normal(size=size))
    holes[0] = 1.0
    logits = np.stack([*spread, *ties, zipf, hot, holes, np.zeros(size)])
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("size", [17, 3001])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 16},
        {"top_k": 3001},
        {"top_p": 1e-6},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"top_p": float(np.nextafter(np.float32(1), np.float32(0)))},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"top_k": 100, "top_p": 0.7},
        {"top_k": 900, "top_p": 0.9, "min_p": 0.01},
    ],
)
def test_kept_tokens_are_those_of_sorting(size, options):
    config = SamplingConfig(**options)
    p = distributions(size, np.random.default_rng(size))
    kept = np.asarray(jax.jit(kept_tokens, static_argnums=1)(p, config))
    for row, mask in zip(p, kept, strict=True):
        expected, distance = kept_by_sorting(row, config)
        clear = distance > 1e-6
        np.testing.assert_array_equal(mask[clear], expected[clear])
        assert mask[row.argmax()]
        assert not mask[row == 0].any()
        # Where rounding decides, it still decides for a set of most likely tokens.
        assert row[mask].min() > row[~mask].max(initial=0) or mask[row > 0].all()


def test_draws_have_the_frequencies_of_the_truncated_distribution():
    logits = jnp.asarray([[1.0, 0.0, 2.0, -1.0, 0.5]])
    config = SamplingConfig(temperature=0.7, top_k=3)
    n = 40_000
    uniforms = (jnp.arange(n, dtype=jnp.float32) + 0.5) / n
    tokens, logprobs, mass = jax.jit(draw, static_argnums=2)(
        jnp.broadcast_to(logits, (n, 5)), uniforms, config
    )
    p = np.exp(np.asarray(logits[0]) / 0.7)
    p /= p.sum()
    kept = np.asarray([True, False, True, False, True])
    q = np.where(kept, p, 0) / p[kept].sum()
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / n, q, atol=1e-4)
    np.testing.assert_allclose(logprobs, np.log(q[np.asarray(tokens)]), atol=1e-5)
    np.testing.assert_allclose(mass, np.log(p[kept].sum()), atol=1e-5)


def chi_square(tokens, q):
    """Standardised: about normal(0, 1); tokens expected fewer than 10 times are pooled."""
    n = len(tokens)
    counts = np.bincount(tokens, minlength=len(q))
    assert counts[q == 0].sum() == 0
    often = n * q >= 10
    observed = np.append(counts[often], counts[~often].sum())
    expected = n * np.append(q[often], q[~often].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [50, 5000])
def test_200_000_draws_pass_a_chi_square_test(size, options):
    rng = np.random.default_rng(1)
    normal = rng.normal(size=size)
    logits = (normal if size == 50 else -1.1 * np.log(1 + rng.permutation(size))).astype(np.float32)
    config = SamplingConfig(**options)

    def some(key):
        rows = jnp.broadcast_to(jnp.asarray(logits), (500, size))
        return draw(rows, jax.random.uniform(key, (500,)), config)

    keys = jax.random.split(jax.random.key(3), 400)
    tokens, logprobs, mass = (
        np.asarray(x).ravel() for x in jax.jit(lambda k: jax.lax.map(some, k))(keys)
    )
    p = np.exp(logits / np.float64(config.temperature))
    p /= p.sum()
    kept, _ = kept_by_sorting(p, config)
    q = np.where(kept, p, 0) / p[kept].sum()
    assert abs(chi_square(tokens, q)) < 4
    np.testing.assert_allclose(logprobs, np.log(q[tokens]), atol=2e-6)
    np.testing.assert_allclose(mass, np.log(p[kept].sum()), atol=2e-6)
    # The test would notice a distribution that is off by a twentieth.
    assert chi_square(tokens, q**1.05 / (q**1.05).sum()) > 8 or np.ptp(np.log(q[q > 0])) < 1


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 200, "top_p": 0.8}, {"temperature": 0}], ids=str
)
@pytest.mark.parametrize("size", [24, 1000, 3001, 32000])
def test_a_row_yields_the_same_bits_in_every_batch(size, options):
    rng = np.random.default_rng(size)
    logits = (3 * rng.normal(size=(64, size))).astype(np.float32)
    uniforms = rng.random(64, np.float32)
    whole = [np.asarray(x) for x in drawn(logits, uniforms, SamplingConfig(**options))]
    for rows in (1, 3, 8):
        for start in (0, 5):
            part = slice(start, start + rows)
            few = drawn(logits[part], uniforms[part], SamplingConfig(**options))
            for a, b in zip(whole, few, strict=True):
                np.testing.assert_array_equal(a[part], b)
    strangers = np.concatenate([logits[:4], -40 * logits[4:]])
    among = drawn(strangers, uniforms, SamplingConfig(**options))
    for a, b in zip(whole, among, strict=True):
        np.testing.assert_array_equal(a[:4], b[:4])


@pytest.mark.parametrize("size", [5, 128, 129, 2049, 40_000])
def test_tokens_invert_a_cumulative_distribution_of_exact_probabilities(size):
    """Even steps of the uniform number give every token its share, whatever the vocabulary."""
    rng = np.random.default_rng(size)
    logits = (2 * rng.normal(size=size)).astype(np.float32)
    logits[rng.random(size) < 0.2] = -np.inf
    n = 20_000
    uniforms = ((np.arange(n) + 0.5) / n).astype(np.float32)
    some = lambda u: draw(jnp.broadcast_to(jnp.asarray(logits), (100, size)), u, SamplingConfig())
    tokens, logprobs, _ = jax.jit(lambda u: jax.lax.map(some, u))(uniforms.reshape(-1, 100))
    tokens = np.asarray(tokens).ravel()
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    counts = np.bincount(tokens, minlength=size)
    assert np.abs(counts - n * p).max() < 1.1  # an interval holds its length in steps, or one more
    np.testing.assert_allclose(np.ravel(logprobs), np.log(p[tokens]), atol=3e-6)
    # Each token has one interval.
    assert (np.diff(tokens) != 0).sum() == len(np.unique(tokens)) - 1


@pytest.mark.parametrize("size", [3, 200, 5000])
@pytest.mark.parametrize("options", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}])
def test_forbidden_tokens_are_never_drawn(size, options):
    """-inf, as a bias sets it, and extreme uniform numbers."""
    logits = np.full((4, size), -np.inf, np.float32)
    logits[:, size // 2] = [0.0, -50.0, 3.0, 1e4]
    logits[2:, size - 1] = [3.0, 1e4]
    uniforms = jnp.asarray([0, 1 - 2**-24, 0.0, 1 - 2**-24], jnp.float32)
    tokens, logprobs, mass = drawn(jnp.asarray(logits), uniforms, SamplingConfig(**options))
    assert tokens[:2].tolist() == [size // 2] * 2
    assert set(tokens[2:].tolist()) == {size // 2, size - 1}
    np.testing.assert_allclose(logprobs, np.log([1, 1, 0.5, 0.5]), atol=1e-6)
    np.testing.assert_array_equal(mass, 0)


def test_logits_that_are_not_numbers_show_in_the_logprobs():
    logits = jnp.asarray([[0.0, jnp.nan, 1.0], [-jnp.inf] * 3, [0.0, 1.0, 2.0]])
    for options in ({}, {"top_p": 0.5}):
        tokens, logprobs, _ = drawn(logits, jnp.full(3, 0.5), SamplingConfig(**options))
        assert np.isnan(logprobs).tolist() == [True, True, False]
        assert ((tokens >= 0) & (tokens < 3)).all()


@pytest.mark.parametrize("options", [{}, {"top_k": 50, "top_p": 0.9}, {"temperature": 0}])
def test_sharded_rows_stay_where_they_are(mesh8, options):
    rows, size = 16, 3001
    spec = jax.sharding.PartitionSpec(("data", "fsdp", "tensor"))
    sharding = jax.sharding.NamedSharding(mesh8, spec)
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(rows, size))).astype(np.float32)
    uniforms = rng.random(rows, np.float32)
    config = SamplingConfig(**options)
    expected = drawn(logits, uniforms, config)
    arguments = jax.device_put((logits, uniforms), sharding)
    program = drawn.lower(*arguments, config).compile()
    for a, b in zip(expected, program(*arguments), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not re.search(r"all-(gather|reduce|to-all)|collective", program.as_text())


def test_extreme_uniforms_never_pick_a_forbidden_token():
    logits = jnp.asarray([[-1e9, 3.0, -1e9, 1.0, -1e9]] * 3)
    uniforms = jnp.asarray([0.0, np.nextafter(np.float32(1), np.float32(0)), 0.5])
    tokens, logprobs, _ = draw(logits, uniforms, SamplingConfig(top_p=0.99))
    assert set(np.asarray(tokens).tolist()) <= {1, 3}
    assert bool(jnp.all(jnp.isfinite(logprobs)))


def test_greedy_is_a_point_mass_that_tells_its_probability():
    logits = jnp.asarray([[0.0, 2.0, 1.0]])
    tokens, logprobs, mass = draw(logits, jnp.asarray([0.3]), SamplingConfig(temperature=0))
    assert tokens.tolist() == [1]
    assert logprobs.tolist() == [0.0]
    np.testing.assert_allclose(mass, jax.nn.log_softmax(logits)[:, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 2}, "min_p=2"),
        ({"temperature": 0, "top_p": 0.9}, "cannot act"),
    ],
)
def test_options_that_cannot_be_right_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)
