"""Cases of Pareto fronts and hypervolumes, and of weights that follow them."""

import itertools

import numpy as np

from jaxrl_reason.conformance.case import ROWS, Case


def inclusion_exclusion(points, reference):
    """Sum over all subsets of boxes of the volume they share, with alternating signs."""
    sides, total = np.maximum(points - reference, 0), 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(sides, size):
            total -= (-1) ** size * np.prod(np.min(chosen, axis=0))
    return float(total)


def cloud(objectives):
    """Points around a reference: dominated ones, equal ones, and some that do not reach it."""

    def inputs(rng):
        points = rng.integers(-1, 5, size=(9, objectives)) + 0.25
        points[:4] += rng.random((4, objectives))
        points[-2:] = 2.25
        return {"points": points, "reference": 0.5 * rng.random(objectives)}

    return inputs


def volume_factor(history, current, *, floor=0.5, gain=1.5):
    """floor + gain tanh of the volume added, and the longer history if it was."""
    longer = np.append(history, current[None], axis=0)
    before, after = (inclusion_exclusion(rows, history[0]) for rows in (history, longer))
    more = after > before + 1e-9
    return floor + gain * np.tanh(max(after - before, 0)), longer if more else history


def evaluations(low, high):
    """Earlier rewards above the reference of 0, and the present ones between two bounds."""

    def inputs(rng):
        history = np.append(np.zeros((1, 3)), rng.uniform(0.4, 0.8, size=(4, 3)), axis=0)
        return {"history": history, "current": rng.uniform(low, high, size=3)}

    return inputs


def front(points):
    """Each point against each other one."""
    dominated = [
        any(np.all(other >= own) and np.any(other > own) for other in points) for own in points
    ]
    return ~np.asarray(dominated) & ~np.isnan(points).any(axis=1)


def integer_points(bad):
    """Points with many ties; those from ``bad`` on have a NaN."""

    def inputs(rng):
        points = rng.integers(4, size=(2 * ROWS, 3)).astype(float)
        points[bad:, 1] = np.nan
        return {"points": points}

    return inputs


CASES = (
    *(
        Case(
            function="hypervolume",
            label=f"{objectives}_objectives",
            inputs=cloud(objectives),
            oracle=inclusion_exclusion,
            rowwise=False,
            transforms=(),
        )
        for objectives in (1, 2, 3, 4)
    ),
    Case(
        function="hypervolume",
        label="nothing",
        inputs=lambda rng: {"points": rng.normal(size=(3, 2)), "reference": np.asarray([9.0, 0.0])},
        oracle=inclusion_exclusion,
        rowwise=False,
        transforms=(),
    ),
    *(
        Case(
            function="dynamic_weights_hypervolume",
            label=label,
            inputs=evaluations(*bounds),
            oracle=volume_factor,
            knobs=knobs,
            rowwise=False,
            transforms=(),
        )
        for label, bounds, knobs in (
            ("outward", (0.9, 1.2), {"floor": 0.1, "gain": 2.0}),
            ("dominated", (0.1, 0.3), {"floor": 0.1}),
        )
    ),
    *(
        Case(
            function="pareto_front",
            label=label,
            inputs=integer_points(bad),
            oracle=front,
            rowwise=False,
        )
        for label, bad in (("ties", 2 * ROWS), ("nan", ROWS))
    ),
)
