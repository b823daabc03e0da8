"""Errors of the advantages; `jaxrl_reason.conformance` has their values and laws."""

import jax.numpy as jnp
import pytest

from jaxrl_reason.advantages import gae, group_advantages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 3}, "20 rows do not split into groups of num_generations=3"),
        ({"num_generations": 1}, "leaves nothing to compare"),
        (
            {"num_generations": 4, "baseline": "median"},
            "use one of 'mean', 'leave_one_out', 'none'",
        ),
        ({"num_generations": 4, "scale": True}, "scale=True is unknown"),
        ({"num_generations": 4, "ddof": 2}, "ddof=2 is unknown"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(jnp.arange(20.0), **options)


def test_shape_errors():
    with pytest.raises(ValueError, match=r"expected \[B\]"):
        group_advantages(jnp.zeros((4, 2)), num_generations=2)
    with pytest.raises(ValueError, match="values has shape"):
        gae(jnp.zeros((4, 2)), jnp.zeros((4, 3)), jnp.zeros((4, 2)), gamma=1.0, lam=1.0)
