"""Checks a loss against a float64 NumPy oracle: values, and gradients by central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def central_difference(function, arrays, index, step=1e-6):
    """Gradient of the scalar ``function(*arrays)`` in ``arrays[index]``."""
    gradient = np.zeros_like(arrays[index])
    for place in np.ndindex(gradient.shape):
        moved = []
        for sign in (1, -1):
            shifted = [array.copy() for array in arrays]
            shifted[index][place] += sign * step
            moved.append(function(*shifted))
        gradient[place] = (moved[0] - moved[1]) / (2 * step)
    return gradient


@pytest.fixture
def agrees():
    """Asserts that a loss equals its oracle, in value and gradient.

    Arrays after the first ``moving`` must have gradient 0. ``frozen`` is an oracle for
    the gradient where part of the loss is detached.
    """

    def check(loss, oracle, *arrays, moving=1, frozen=None):
        arrays = [np.asarray(array, np.float64) for array in arrays]
        expected = oracle(*arrays)
        single = jax.jit(loss)(*[jnp.asarray(array, jnp.float32) for array in arrays])
        assert single.dtype == jnp.float32
        # float32 rounding of inputs and of exp, relative to values of order one.
        np.testing.assert_allclose(single, expected, rtol=2e-5, atol=2e-5)

        weights = np.random.default_rng(5).normal(size=expected.shape)
        with jax.enable_x64(True):
            inputs = [jnp.asarray(array) for array in arrays]
            total = lambda *xs: jnp.sum(loss(*xs) * weights)
            value = loss(*inputs)
            gradients = jax.jit(jax.grad(total, argnums=tuple(range(len(arrays)))))(*inputs)
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
        surrogate = oracle if frozen is None else frozen
        for index, gradient in enumerate(gradients):
            if index < moving:
                numeric = central_difference(
                    lambda *xs: float(np.sum(surrogate(*xs) * weights)), arrays, index
                )
                np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-7)
            else:
                np.testing.assert_array_equal(gradient, np.zeros_like(gradient))

    return check


@pytest.fixture
def rng():
    return np.random.default_rng(0)
