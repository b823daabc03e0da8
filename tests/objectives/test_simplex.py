import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

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


def slsqp(value, size, allowed):
    """The best point on the simplex over several starts."""
    allowed = np.asarray(allowed, bool)
    bounds = [(0, 1) if live else (0, 0) for live in allowed]
    total = {"type": "eq", "fun": lambda w: np.sum(w) - 1}
    starts = [allowed / allowed.sum(), *np.eye(size)[allowed]]
    options = {"ftol": 1e-14, "maxiter": 500}
    runs = [
        minimize(value, w, bounds=bounds, constraints=total, method="SLSQP", options=options)
        for w in starts
    ]
    return min(run.fun for run in runs)


def gram_of(vectors):
    return (vectors @ vectors.T).astype(np.float32)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_faces_match_slsqp(size):
    rng = np.random.default_rng(size)
    for trial in range(4):
        gram = gram_of(rng.normal(size=(size, 4)) * rng.lognormal(size=(size, 1)))
        mask = np.ones(size, bool)
        mask[0] = trial % 2 == 0
        weights = np.asarray(faces(gram, mask), np.float64)
        assert np.all(weights >= 0)
        assert np.all(weights[~mask] == 0)
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
        best = slsqp(lambda w, gram=gram: w @ gram @ w, size, mask)
        np.testing.assert_allclose(weights @ gram @ weights, best, rtol=1e-4, atol=1e-5)


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


def test_capped_weights_are_the_projection():
    rng = np.random.default_rng(1)
    capped = jax.jit(functools.partial(capped_weights, max_weight=0.4))
    for _ in range(4):
        weights = rng.dirichlet(np.full(4, 0.3)).astype(np.float32)
        mask = np.asarray([True, True, True, rng.random() < 0.5])
        weights = np.where(mask, weights, 0) / weights[mask].sum()
        ours = np.asarray(capped(weights, mask))
        assert ours.max() <= 0.4 + 1e-6
        np.testing.assert_allclose(ours.sum(), 1, rtol=1e-5)
        bounds = [(0, 0.4) if live else (0, 0) for live in mask]
        best = minimize(
            lambda w, weights=weights: np.sum((w - weights) ** 2),
            mask / mask.sum(),
            bounds=bounds,
            constraints={"type": "eq", "fun": lambda w: np.sum(w) - 1},
            method="SLSQP",
        )
        np.testing.assert_allclose(ours, best.x, atol=1e-4)
    inside = np.asarray([0.4, 0.3, 0.3, 0.0], np.float32)
    np.testing.assert_array_equal(capped(inside, np.ones(4)), inside)
    # Two vectors cannot both be below 0.4: the cap gives way.
    one = np.asarray([1, 0, 0, 0], np.float32)
    np.testing.assert_allclose(capped(one, np.asarray([1, 1, 0, 0])), [0.5, 0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(capped(one, np.asarray([1, 0, 0, 0])), one)


def pcgrad_oracle(vectors, orders):
    total = np.zeros(vectors.shape[1])
    for i, order in enumerate(orders):
        vector = vectors[i].copy()
        for j in order:
            inner = vector @ vectors[j]
            if j != i and inner < 0:
                vector -= inner / (vectors[j] @ vectors[j]) * vectors[j]
        total += vector
    return total


def test_pcgrad_matches_the_loop():
    rng = np.random.default_rng(2)
    weigh = jax.jit(pcgrad_weights)
    for _ in range(3):
        vectors = rng.normal(size=(4, 5))
        orders = np.stack([rng.permutation(4) for _ in range(4)])
        weights = weigh(gram_of(vectors), np.ones(4), orders)
        expected = pcgrad_oracle(vectors, orders)
        np.testing.assert_allclose(weights @ vectors, expected, rtol=1e-4, atol=1e-5)


def test_mean_pcgrad_is_the_mean_over_orders():
    vectors = np.random.default_rng(3).normal(size=(3, 4))
    orders = list(itertools.permutations(range(3)))
    expected = np.mean([pcgrad_oracle(vectors, [order] * 3) for order in orders], axis=0)
    weights = mean_pcgrad_weights(gram_of(vectors), np.ones(3))
    np.testing.assert_allclose(weights @ vectors, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("c", [0.0, 0.5, 2.0])
def test_cagrad_matches_slsqp(c):
    rng = np.random.default_rng(4)
    for size in (3, 3, 5, 5):
        vectors = rng.normal(size=(5, 6)) * rng.lognormal(size=(5, 1))
        mask = np.arange(5) < size
        live = vectors[:size]
        mean = live.mean(0)
        ours = np.asarray(cagrad(gram_of(vectors), mask, c), np.float64)
        assert np.all(ours[~mask] == 0)
        direction = ours @ vectors
        # The direction stays in the ball around the mean, and the worst improvement is the best.
        radius = c * np.linalg.norm(mean)
        assert np.linalg.norm(direction - mean) <= radius * (1 + 1e-3) + 1e-5
        dual = lambda w, live=live, mean=mean, radius=radius: (
            w @ live @ mean + radius * np.linalg.norm(w @ live)
        )
        best = slsqp(dual, size, np.ones(size))
        np.testing.assert_allclose((live @ direction).min(), best, rtol=2e-3, atol=1e-3)


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
    with pytest.raises(ValueError, match="c=-1"):
        cagrad_weights(gram, jnp.ones(3), c=-1)
