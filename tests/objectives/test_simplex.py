import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.objectives import (
    cagrad_weights,
    capped_weights,
    min_norm_weights,
    pcgrad_weights,
)
from jaxrl_reason.objectives.simplex import mean_pcgrad_weights

faces = jax.jit(functools.partial(min_norm_weights, method="faces"))
frank_wolfe = jax.jit(functools.partial(min_norm_weights, method="frank_wolfe"))
cagrad = jax.jit(lambda gram, mask, c: cagrad_weights(gram, mask, c=c))


def gram_of(vectors):
    return (vectors @ vectors.T).astype(np.float32)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_no_vector_is_worked_against(size):
    vectors = np.random.default_rng(size).normal(size=(size, 9)).astype(np.float32)
    mask = np.arange(size) != 1
    weights = np.asarray(faces(gram_of(vectors), mask))
    assert np.all(weights >= 0)
    assert weights[1] == 0
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    shortest = weights @ vectors
    assert np.all((vectors @ shortest)[mask] >= shortest @ shortest - 1e-4)


def test_two_vectors_have_the_closed_form():
    g1, g2 = np.random.default_rng(0).normal(size=(2, 6))
    first = np.clip((g2 @ g2 - g1 @ g2) / np.sum((g1 - g2) ** 2), 0, 1)
    weights = faces(gram_of(np.stack([g1, g2])), np.ones(2, bool))
    np.testing.assert_allclose(weights, [first, 1 - first], rtol=1e-5)


@pytest.mark.parametrize(
    ("vectors", "mask", "norm"),
    [
        ([[1, 0], [1, 0], [0, 1]], [1, 1, 1], 0.5),  # clones
        ([[0, 0], [1, 0], [0, 1]], [1, 1, 1], 0.0),  # a zero vector
        ([[0, 0], [1, 0], [0, 1]], [0, 1, 1], 0.5),  # unless it is masked
        ([[0, 0], [0, 0], [0, 0]], [1, 1, 1], 0.0),
        ([[1, 0], [-1, 0], [0, 0.1]], [1, 1, 1], 0.0),  # opposite
        ([[1, 0], [2, 0], [3, 0]], [1, 1, 1], 1.0),  # on a line
        ([[1e10, 0], [1e10, 1], [0, 1e10]], [1, 1, 1], 0.5e20),  # far from 1
    ],
)
def test_singular_matrices(vectors, mask, norm):
    gram = gram_of(np.asarray(vectors, np.float64))
    for method in ("faces", "frank_wolfe"):
        solve = {"faces": faces, "frank_wolfe": frank_wolfe}[method]
        weights = solve(gram, np.asarray(mask, bool))
        assert np.isfinite(weights).all()
        np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
        # Frank-Wolfe is slow at zero: 6e-4 above it after its 200 steps on opposite vectors.
        atol = 1e-6 if method == "faces" else 1e-3
        np.testing.assert_allclose(weights @ gram @ weights, norm, rtol=1e-3, atol=atol)


def test_a_zero_vector_takes_all_weight():
    np.testing.assert_array_equal(faces(np.diag([0.0, 1.0, 1.0]), np.ones(3, bool)), [1, 0, 0])


def test_nothing_left_gives_zero_weights():
    gram, nothing = np.full((3, 3), np.nan, np.float32), np.zeros(3, bool)
    np.testing.assert_array_equal(faces(gram, nothing), 0)
    np.testing.assert_array_equal(frank_wolfe(gram, nothing), 0)
    gram, nothing = np.full((5, 5), np.nan, np.float32), np.zeros(5, bool)
    np.testing.assert_array_equal(cagrad(gram, nothing, 0.5), 0)


def test_frank_wolfe_approaches_the_exact_solution():
    # The gaps of plain Frank-Wolfe at M = 4 on standardised rewards of 8 completions.
    rng = np.random.default_rng(0)
    z = rng.normal(size=(100, 8, 4))
    z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    grams = np.einsum("ngi,ngj->nij", z, z) / 8

    def value(**options):
        with jax.enable_x64(True):
            solve = functools.partial(min_norm_weights, mask=np.ones(4), **options)
            weights = np.asarray(jax.jit(jax.vmap(solve))(grams))
        return np.einsum("ni,nij,nj->n", weights, grams, weights)

    exact = value(method="faces")
    gaps = {k: value(method="frank_wolfe", steps=k) - exact for k in (50, 200)}
    assert all((gap > -1e-12).all() for gap in gaps.values())
    assert 1e-5 < np.median(gaps[50]) < 3e-3
    assert np.median(gaps[200]) < min(5e-4, np.median(gaps[50]) / 2)


def test_cagrad_is_the_best_of_its_ball():
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(5, 6)) * rng.lognormal(size=(5, 1))
    mean = vectors.mean(0)
    direction = np.asarray(cagrad(gram_of(vectors), np.ones(5), 0.5), np.float64) @ vectors
    radius = 0.5 * np.linalg.norm(mean)
    assert np.linalg.norm(direction - mean) <= radius * (1 + 1e-4)
    for reach in (1.0, 0.1):
        others = direction + reach * rng.normal(size=(20_000, 6))
        shifts = others - mean
        shifts *= radius / np.maximum(np.linalg.norm(shifts, axis=1, keepdims=True), radius)
        worst = ((mean + shifts) @ vectors.T).min(axis=1)
        assert worst.max() <= (vectors @ direction).min() + 1e-4


def test_errors():
    gram = jnp.eye(3)
    with pytest.raises(ValueError, match="'newton' is unknown; use one of 'faces', 'frank_wolfe'"):
        min_norm_weights(gram, jnp.ones(3), method="newton")
    with pytest.raises(ValueError, match="at most 8 objectives; use method='frank_wolfe'"):
        min_norm_weights(jnp.eye(9), jnp.ones(9))
    with pytest.raises(ValueError, match=r"mask has shape \(2,\); expected \(3,\)"):
        min_norm_weights(gram, jnp.ones(2))
    with pytest.raises(ValueError, match=r"gram has shape \(2, 3\)"):
        min_norm_weights(gram[:2], jnp.ones(2))
    with pytest.raises(ValueError, match="steps=0"):
        min_norm_weights(gram, jnp.ones(3), method="frank_wolfe", steps=0)
    with pytest.raises(ValueError, match="max_weight=0"):
        capped_weights(jnp.ones(3) / 3, jnp.ones(3), max_weight=0)
    with pytest.raises(ValueError, match=r"orders has shape \(3,\); expected \(3, 3\)"):
        pcgrad_weights(gram, jnp.ones(3), jnp.arange(3))
    with pytest.raises(ValueError, match="use at most 6"):
        mean_pcgrad_weights(jnp.eye(7), jnp.ones(7))
    with pytest.raises(ValueError, match="c=-1"):
        cagrad_weights(gram, jnp.ones(3), c=-1)
