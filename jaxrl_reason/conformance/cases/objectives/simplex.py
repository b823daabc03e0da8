"""Cases of the solvers on the simplex of weights.

The oracles find an optimum from its optimality conditions, one face of the simplex after the other,
where the library compares the values at the candidates of all faces.
"""

import itertools
from collections.abc import Callable

import numpy as np

from jaxrl_reason.conformance.case import Case, Inputs

ON_ONE_DEVICE = ("jit", "vmap")
"""M objectives do not split over devices."""


def simplex_minimum(quadratic, linear, live) -> tuple[np.ndarray, float]:
    """argmin of w^T Q w / 2 + b^T w over the live corners, and how far it is from another face.

    The conditions are sufficient: Q w + b has one value on the face, and none below it elsewhere.
    """
    scale, corners = np.abs(quadratic).max(), np.flatnonzero(live)
    for size in range(1, len(corners) + 1):
        for face in map(list, itertools.combinations(corners, size)):
            ones = np.ones((size, 1))
            system = np.block([[quadratic[np.ix_(face, face)], -ones], [ones.T, np.zeros((1, 1))]])
            if np.linalg.matrix_rank(system) <= size:
                continue
            *inside, level = np.linalg.solve(system, np.append(-linear[face], 1.0))
            weights = np.zeros(len(linear))
            weights[face] = inside
            slack = np.delete(quadratic @ weights + linear - level, face)
            slack = slack[np.delete(np.asarray(live, bool), face)]
            if min(inside) > -1e-12 and np.all(slack >= -1e-12 * scale):
                return weights, min([*inside, *(slack / scale)])
    return np.zeros(len(linear)), np.inf


def min_norm(gram, mask, *, method="faces", steps=200) -> np.ndarray:
    """Weights of the shortest vector: exactly, or by so many steps of Frank-Wolfe."""
    if method == "faces":
        return simplex_minimum(gram, np.zeros(len(gram)), mask)[0]
    return frank_wolfe(gram, mask, steps)[0]


def frank_wolfe(gram, mask, steps) -> tuple[np.ndarray, float]:
    """The iterate after so many steps from uniform weights, and how close a choice was."""
    live, closest = np.flatnonzero(mask), np.inf
    weights = np.where(mask, 1.0, 0.0) / max(len(live), 1)
    for _ in range(steps if len(live) > 1 else 0):
        slope = gram @ weights
        best, second = live[np.argsort(slope[live])[:2]]
        closest = min(closest, slope[second] - slope[best])
        here = weights @ slope
        if here > slope[best]:
            step = (here - slope[best]) / (here - 2 * slope[best] + gram[best, best])
            weights = (1 - min(step, 1)) * weights
            weights[best] += min(step, 1)
    return weights, closest


def capped(weights, mask, *, max_weight) -> np.ndarray:
    """Projection on {0 <= w <= cap, sum w = 1}: bisects the shift that makes the sum 1."""
    cap = max(max_weight, 1 / max(np.sum(mask), 1))
    low, high = -1.0, 1.0
    for _ in range(100):
        shift = (low + high) / 2
        projected = np.where(mask, np.clip(np.where(mask, weights, 0) + shift, 0, cap), 0)
        low, high = (shift, high) if projected.sum() < 1 else (low, shift)
    return projected


def projected_sum(vectors, order_of) -> tuple[np.ndarray, float]:
    """PCGrad on the rows of a matrix, and the inner product that was closest to 0."""
    total, closest = np.zeros(vectors.shape[1]), np.inf
    for i, start in enumerate(vectors):
        vector = start.copy()
        for j in order_of[i]:
            inner = vector @ vectors[j]
            if j != i:
                closest = min(closest, abs(inner))
                vector -= min(inner, 0.0) / (vectors[j] @ vectors[j]) * vectors[j]
        total += vector
    return total, closest


def pcgrad_coefficients(gram, mask, orders) -> np.ndarray:
    """Coefficients of PCGrad's sum, read off vectors that have this Gram matrix."""
    live = list(np.flatnonzero(mask))
    vectors = np.linalg.cholesky(gram[np.ix_(live, live)])
    places = [[live.index(j) for j in orders[i] if j in live] for i in live]
    coefficients = np.zeros(len(gram))
    coefficients[live] = np.linalg.solve(vectors.T, projected_sum(vectors, places)[0])
    return coefficients


def cagrad_coefficients(gram, mask, *, c) -> np.ndarray:
    """v_0 + c |v_0| v_w / |v_w|, by |v_w| = min over s of (|v_w|^2 / s + s) / 2.

    What is minimised is jointly convex in w and s, and its slope in s has the sign of s - |v_w|.
    """
    gram = np.where(np.outer(mask, mask), gram, 0)
    mean = np.where(mask, 1.0, 0.0) / max(np.sum(mask), 1)
    radius = c * np.sqrt(mean @ gram @ mean)
    if radius == 0:
        return mean
    low, high = 0.0, np.sqrt(gram.diagonal().max())
    for _ in range(60):
        s = (low + high) / 2
        weights, _ = simplex_minimum(gram * radius / s, gram @ mean, mask)
        length = np.sqrt(max(weights @ gram @ weights, 0.0))
        low, high = (s, high) if s < length else (low, s)
    if length < 1e-6 * np.sqrt(gram.diagonal().max()):
        return mean
    return mean + radius / length * weights


def gram_draw(
    accept: Callable[[np.ndarray, np.ndarray], bool], *, size: int = 4, rotate: bool = False
) -> Callable[[np.random.Generator], Inputs]:
    """Well-conditioned Gram matrices and a mask without its second entry, until accepted."""

    def inputs(rng):
        mask = np.arange(size) != 1
        while True:
            vectors = rng.normal(size=(size, 6)) * rng.uniform(0.5, 2, size=(size, 1))
            gram = vectors @ vectors.T
            if np.linalg.cond(gram) < 30 and accept(gram, mask):
                break
        drawn = {"gram": gram, "mask": mask}
        if rotate:
            drawn["orders"] = np.stack([rng.permutation(size) for _ in range(size)]).astype("int32")
        return drawn

    return inputs


def on_an_edge(gram, mask) -> bool:
    """Two vectors share the weight, so that Frank-Wolfe goes to and fro between them."""
    weights, margin = simplex_minimum(gram, np.zeros(len(gram)), mask)
    return np.sum(weights > 0) == 2 and margin > 0.02 and frank_wolfe(gram, mask, 200)[1] > 1e-4


def conflicts(gram, mask) -> bool:
    """At least one inner product is negative."""
    return bool(np.any(gram[np.ix_(mask, mask)] < -0.1))


def stationary(rng) -> Inputs:
    """The vectors 3x and -x: their hull holds 0 and their mean is not 0."""
    x = rng.integers(1, 9)  # whose products are exact, so that the hull does hold 0
    vectors = np.asarray([3.0 * x, -x])
    return {"gram": np.outer(vectors, vectors), "mask": np.ones(2, bool)}


def alone(rng) -> Inputs:
    """Two vectors, of which the second is masked."""
    vectors = rng.normal(size=(2, 3))
    return {"gram": vectors @ vectors.T, "mask": np.asarray([True, False])}


def on_a_line(rng) -> Inputs:
    """The vectors x and 3x, whose line search ends at x, and one that is masked."""
    x = rng.normal(size=4)
    vectors = np.stack([x, 3 * x, rng.normal(size=4)])
    return {"gram": vectors @ vectors.T, "mask": np.asarray([True, True, False])}


def equal_vectors(rng) -> Inputs:
    """Two vectors that are equal, so that no step is better than another."""
    return {"gram": np.full((2, 2), rng.uniform(1, 2)), "mask": np.ones(2, bool)}


def weights_draw(low: int) -> Callable[[np.random.Generator], Inputs]:
    """Weights of which the first is 0.6 and those from ``low`` on are masked."""

    def inputs(rng):
        mask = np.arange(5) < low
        shares = mask[1:] * rng.uniform(0.5, 1, size=4)
        # Thousandths of 2^10 add up to 1 in any precision.
        rest = rng.multinomial(410, shares / shares.sum()) if low > 1 else [0] * 4
        first = 1024 - np.sum(rest)
        return {"weights": np.where(mask, np.r_[first, rest] / 1024, 3.0), "mask": mask}

    return inputs


SOLVER = {"mask": "mask", "masked": ("gram",), "rowwise": False, "transforms": ON_ONE_DEVICE}

CASES = (
    Case(
        function="min_norm_weights",
        inputs=gram_draw(on_an_edge),
        oracle=min_norm,
        knobs={"method": "frank_wolfe"},
        **SOLVER,
    ),
    Case(
        function="min_norm_weights",
        label="frank_wolfe",
        inputs=gram_draw(lambda gram, mask: frank_wolfe(gram, mask, 5)[1] > 0.01),
        options={"method": "frank_wolfe", "steps": 5},
        oracle=min_norm,
        knobs={"method": "faces", "steps": 4},
        **SOLVER,
    ),
    Case(
        function="min_norm_weights",
        label="frank_wolfe_of_200_steps",
        inputs=gram_draw(on_an_edge),
        options={"method": "frank_wolfe"},
        oracle=min_norm,
        **SOLVER,
    ),
    *(
        Case(
            function="capped_weights",
            label=label,
            inputs=weights_draw(live),
            options={"max_weight": max_weight},
            oracle=capped,
            knobs=knobs,
            mask="mask",
            masked=("weights",) if live < 5 else (),
            rowwise=False,
            transforms=ON_ONE_DEVICE,
        )
        for label, live, max_weight, knobs in (
            ("", 4, 0.4, {"max_weight": 0.5}),
            ("relaxed", 2, 0.3, {}),
            ("alone", 1, 0.3, {}),
            ("inside", 4, 0.7, {}),
            ("unmasked", 5, 0.4, {}),
        )
    ),
    *(
        Case(
            function="min_norm_weights",
            label=f"frank_wolfe_{inputs.__name__}",
            inputs=inputs,
            options={"method": "frank_wolfe", "steps": 3},
            oracle=min_norm,
            rowwise=False,
            transforms=ON_ONE_DEVICE,
        )
        for inputs in (alone, on_a_line, equal_vectors)
    ),
    Case(
        function="pcgrad_weights",
        inputs=gram_draw(conflicts, rotate=True),
        oracle=pcgrad_coefficients,
        **SOLVER,
    ),
    Case(
        function="cagrad_weights",
        inputs=gram_draw(conflicts),
        options={"c": 0.5},
        oracle=cagrad_coefficients,
        knobs={"c": 0.9},
        **SOLVER,
    ),
    Case(
        function="cagrad_weights",
        label="alone",
        inputs=alone,
        options={"c": 0.5},
        oracle=cagrad_coefficients,
        **SOLVER,
    ),
    Case(
        function="cagrad_weights",
        label="stationary",
        inputs=stationary,
        options={"c": 1.5},
        oracle=cagrad_coefficients,
        rowwise=False,
        transforms=ON_ONE_DEVICE,
    ),
)
