"""Truncation and inverse-CDF drawing, against brute force and frequencies."""

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
