import numpy as np
import pytest

from jaxrl_reason.objectives import hypervolume, pareto_front


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
