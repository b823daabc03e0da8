"""Cases of the rules that combine M gradients."""

import itertools
from collections.abc import Callable

import numpy as np

from jaxrl_reason.conformance.case import Case, Inputs
from jaxrl_reason.conformance.cases.objectives.simplex import (
    ON_ONE_DEVICE,
    cagrad_coefficients,
    conflicts,
    min_norm,
    on_an_edge,
    projected_sum,
)


def gradients_draw(*, masked: bool = False) -> Callable[[np.random.Generator], Inputs]:
    """Four gradients whose shortest combination is an edge of their hull; a mask if wanted."""

    def inputs(rng):
        mask = np.arange(4) >= masked
        while True:
            gradients = rng.normal(size=(4, 6)) * rng.uniform(0.2, 0.6, size=(4, 1))
            gram = gradients @ gradients.T
            if np.linalg.cond(gram) < 30 and conflicts(gram, mask) and on_an_edge(gram, mask):
                return {"gradients": gradients, **({"mask": mask} if masked else {})}

    return inputs


def any_order(rng) -> Inputs:
    """Gradients with conflicts for which PCGrad gives the same sum in every order."""
    while True:
        gradients = rng.normal(size=(3, 5))
        orders = itertools.permutations(range(3))
        sums, margins = zip(*(projected_sum(gradients, [o] * 3) for o in orders), strict=True)
        agree = np.ptp(np.stack(sums), axis=0).max() < 1e-12
        if agree and min(margins) > 0.05 and not np.allclose(sums[0], gradients.sum(0), atol=0.1):
            return {"gradients": gradients, "key": rng.integers(2**31, size=2).astype(np.uint32)}


def around_zero(rng) -> Inputs:
    """Three gradients of the plane that have 0 between them."""
    angles = np.asarray([0.0, 2.0, 4.0]) + rng.uniform(0, 0.5, size=3)
    lengths = np.asarray([[1000.0], [500.0], [800.0]])
    return {"gradients": lengths * np.stack([np.cos(angles), np.sin(angles)], axis=1)}


def long_and_short(rng) -> Inputs:
    """Two gradients against each other, of which the short one decides."""
    x, y = np.linalg.qr(rng.normal(size=(4, 2)))[0].T
    return {"gradients": np.stack([1000 * x, 0.5 * y - 0.5 * x])}


def two_of_three(rng) -> Inputs:
    """Three gradients, a key and a mask; there is one order for the two that are left."""
    return {**any_order(rng), "mask": np.asarray([True, False, True])}


def mgda_weights(gradients, *, mask, normalize="none", **options) -> np.ndarray:
    """MGDA's weights of the rows of a matrix."""
    lengths = np.linalg.norm(gradients, axis=1) if normalize == "l2" else np.ones(len(gradients))
    units = gradients / lengths[:, None]
    return min_norm(units @ units.T, mask, **options)


def pcgrad_weights(gradients, key, *, mask) -> np.ndarray:
    """PCGrad's coefficients of independent rows, in their order, which any other equals here."""
    live = gradients[mask]
    total, _ = projected_sum(live, [range(len(live))] * len(live))
    return np.linalg.lstsq(gradients.T, total)[0]


def cagrad_weights(gradients, *, c, mask) -> np.ndarray:
    """CAGrad's coefficients of the rows of a matrix."""
    return cagrad_coefficients(gradients @ gradients.T, mask, c=c)


def rule(weigh, label="", *, masked=False, inputs=None, **options) -> Case:
    """A case of the rule with these weights, which are constants of its derivative."""

    def direction(gradients, *key, mask=None, **options):
        return surrogate({"gradients": gradients}, gradients, *key, mask=mask, **options)

    def surrogate(frozen, gradients, *key, mask=None, **options):
        mask = np.ones(len(gradients), bool) if mask is None else mask
        return weigh(frozen["gradients"], *key, mask=mask, **options) @ gradients

    return Case(
        function=weigh.__name__.removesuffix("_weights"),
        label="_".join(filter(None, [label, "masked" if masked else ""])),
        inputs=inputs or gradients_draw(masked=masked),
        keywords=("mask",) if masked else (),
        oracle=direction,
        surrogate=surrogate,
        moving=("gradients",),
        mask="mask" if masked else None,
        masked=("gradients",) if masked else (),
        rowwise=False,
        transforms=ON_ONE_DEVICE,
        **options,
    )


def ascent(weights, gradients, *, learning_rate, mu=1e-5):
    """w_k exp(learning_rate s_k / mu), divided by the sum; s_k = <g_k, sum_l g_l>."""
    gains = weights * np.exp(learning_rate * gradients @ gradients.sum(axis=0) / mu)
    return gains / gains.sum()


def weighted_gradients(rng) -> Inputs:
    """Weights, one of them 0, and gradients."""
    weights = np.r_[0.0, rng.dirichlet(np.ones(3))]
    return {"weights": weights, "gradients": rng.normal(size=(4, 6))}


def eight_gradients(rng) -> Inputs:
    """As many gradients as devices."""
    return {"gradients": rng.normal(size=(8, 5)), "weights": rng.normal(size=8)}


FIRST = np.asarray([True, False, False, False])
UNITS = {"normalize": "l2"}
FRANK_WOLFE = {"method": "frank_wolfe"}

CASES = (
    Case(
        function="gram_matrix",
        inputs=lambda rng: {"gradients": rng.normal(size=(8, 5))},
        oracle=lambda gradients: np.asarray(
            [[np.sum(a * b) for b in gradients] for a in gradients]
        ),
        moving=("gradients",),
        rowwise=False,
    ),
    Case(
        function="combine",
        inputs=eight_gradients,
        oracle=lambda gradients, weights: np.sum(weights[:, None] * gradients, axis=0),
        moving=("gradients", "weights"),
        rowwise=False,
    ),
    rule(mgda_weights, knobs={"mask": FIRST, **UNITS, **FRANK_WOLFE}),
    rule(mgda_weights, masked=True, knobs=UNITS),
    rule(mgda_weights, "l2", options=UNITS, knobs={"normalize": "none"}),
    rule(mgda_weights, "frank_wolfe", options=FRANK_WOLFE, knobs={"steps": 3}),
    rule(pcgrad_weights, inputs=any_order, knobs={"mask": np.asarray([True, False, True])}),
    rule(pcgrad_weights, inputs=two_of_three, masked=True),
    rule(cagrad_weights, options={"c": 0.5}, knobs={"c": 0.9, "mask": FIRST}),
    rule(cagrad_weights, masked=True, options={"c": 0.5}),
    rule(cagrad_weights, "around_zero", options={"c": 1.5}, inputs=around_zero),
    rule(cagrad_weights, "short", options={"c": 0.5}, inputs=long_and_short),
    Case(
        function="dynamic_weights_gradient",
        inputs=weighted_gradients,
        options={"learning_rate": 1e-6},
        oracle=ascent,
        knobs={"learning_rate": 2e-6, "mu": 3e-5},
        rowwise=False,
        transforms=ON_ONE_DEVICE,
    ),
)
