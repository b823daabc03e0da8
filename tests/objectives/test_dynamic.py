import numpy as np
import pytest

from jaxrl_reason.objectives import dynamic_weights_gradient, dynamic_weights_hypervolume


def test_hypervolume_factor_follows_progress():
    history = np.zeros((1, 2))  # the reference point
    factor, history = dynamic_weights_hypervolume(history, [0.5, 0.5])
    np.testing.assert_allclose(factor, 0.5 + 1.5 * np.tanh(0.25))
    np.testing.assert_array_equal(history, [[0, 0], [0.5, 0.5]])

    factor, history = dynamic_weights_hypervolume(history, [0.4, 0.5])  # dominated
    assert factor == 0.5
    assert len(history) == 2

    factor, longer = dynamic_weights_hypervolume(history, [0.25, 0.75], floor=0.1, gain=2.0)
    np.testing.assert_allclose(factor, 0.1 + 2.0 * np.tanh(0.25 * 0.25))
    assert len(longer) == 3


def test_a_weight_of_zero_stays_zero():
    gradients = {"a": np.ones((2, 3), np.float32), "b": np.ones((2,), np.float32)}
    weights = np.asarray([0, 1], np.float32)
    new = dynamic_weights_gradient(weights, gradients, learning_rate=1.0, mu=1.0)
    np.testing.assert_array_equal(new, [0, 1])


def test_errors():
    with pytest.raises(ValueError, match="history has shape"):
        dynamic_weights_hypervolume(np.zeros((0, 2)), [1.0, 1.0])
    with pytest.raises(ValueError, match=r"current has shape \(3,\); expected \(2,\)"):
        dynamic_weights_hypervolume(np.zeros((1, 2)), [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="mu=0"):
        dynamic_weights_gradient(np.ones(2), np.ones((2, 3)), learning_rate=1.0, mu=0)
