import itertools

import numpy as np
import pytest

from jaxrl_reason.objectives import hypervolume, pareto_front


def inclusion_exclusion(points, reference):
    sides = np.maximum(points - reference, 0)
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(sides, size):
            total += (-1) ** (size + 1) * np.prod(np.min(chosen, axis=0))
    return total


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_hypervolume_matches_inclusion_exclusion(size):
    rng = np.random.default_rng(size)
    for count in (1, 2, 7):
        points = rng.normal(size=(count, size)) + 0.5  # some do not reach the reference
        reference = rng.normal(size=size) * 0.2
        expected = inclusion_exclusion(points, reference)
        np.testing.assert_allclose(hypervolume(points, reference), expected, atol=1e-12)


def test_hypervolume_with_ties_and_clones():
    points = np.asarray([[1, 2, 3], [1, 2, 3], [2, 2, 1], [2, 1, 3], [1, 1, 1]], float)
    expected = inclusion_exclusion(points, np.zeros(3))
    np.testing.assert_allclose(hypervolume(points, np.zeros(3)), expected)


def test_hypervolume_of_many_points_matches_monte_carlo():
    rng = np.random.default_rng(0)
    points = rng.random((40, 4))
    draws = rng.random((20_000, 4))
    share = np.mean([np.any(np.all(draw <= points, axis=1)) for draw in draws])
    # Four standard errors of a share of 20,000 draws.
    assert abs(hypervolume(points, np.zeros(4)) - share) < 4 * 0.5 / np.sqrt(20_000)


def test_hypervolume_of_nothing_is_zero():
    assert hypervolume(np.zeros((0, 3)), np.zeros(3)) == 0
    assert hypervolume(np.asarray([[1.0, -1.0]]), np.zeros(2)) == 0


def test_pareto_front_matches_brute_force():
    rng = np.random.default_rng(0)
    points = rng.integers(4, size=(40, 3)).astype(np.float32)  # many ties and clones
    expected = [
        not any(np.all(other >= own) and np.any(other > own) for other in points) for own in points
    ]
    np.testing.assert_array_equal(pareto_front(points), expected)
    points[0] = np.nan
    assert not pareto_front(points)[0]
    np.testing.assert_array_equal(pareto_front(points)[1:], pareto_front(points[1:]))


def test_only_the_front_has_volume():
    points = np.random.default_rng(1).random((30, 3))
    front = points[np.asarray(pareto_front(points))]
    assert len(front) < 30
    np.testing.assert_allclose(hypervolume(front, np.zeros(3)), hypervolume(points, np.zeros(3)))


def test_errors():
    with pytest.raises(ValueError, match=r"expected \[N, M\], \[M\]"):
        hypervolume(np.ones((2, 3)), np.ones(2))
    with pytest.raises(ValueError, match="must be finite"):
        hypervolume(np.asarray([[np.nan, 1.0]]), np.zeros(2))
    with pytest.raises(ValueError, match=r"points has shape \(3,\)"):
        pareto_front(np.ones(3))
