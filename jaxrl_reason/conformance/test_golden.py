"""Golden vectors: what the code of other projects computed, in `golden/*.npz`.

`meta` is a JSON string with the versions that made a file and its records. A record names the
function, the arrays it takes (`arguments` in order, `keywords` by name), its `options`, the path of
the `output` in the result, the `reduction` with its `mask`, and the arrays whose `gradients` are
stored. `scripts/golden/` makes them.
"""

import functools
import json
import operator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.arrays import aggregate
from jaxrl_reason.conformance.evaluation import assert_close, cast, compiled

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@functools.cache
def contents(file):
    with np.load(file) as arrays:
        return dict(arrays)


def records():
    for file in FILES:
        for record in json.loads(str(contents(file)["meta"]))["records"]:
            name = f"{file.stem}-{record['name']}-{record['function']}"
            yield pytest.param(file, record, id=name)


def reduced(result, record, mask):
    """The array that the reference returned, from the result of our function."""
    value: Any = functools.reduce(operator.getitem, record["output"], result)
    how = record["reduction"]
    if how is not None and value.dtype == jnp.bool_:
        value = value.astype(record["dtype"])
    if how == "mean":
        return jnp.mean(value)
    if how is not None:
        return aggregate(value, mask, **how).mean()
    # The reference's numbers under a false mask are stored as 0.
    return value if mask is None else jnp.where(mask, value, jnp.zeros_like(value))


@pytest.mark.parametrize(("file", "record"), list(records()))
def test_golden(file, record, offered):
    function, name = offered(record["function"]), record["name"]
    stored = {
        key.removeprefix(f"{name}/"): array
        for key, array in contents(file).items()
        if key.startswith(f"{name}/")
    }
    needed = {*record["arguments"], *record["keywords"], *filter(None, [record["mask"]])}
    arrays = cast({key: stored[key] for key in needed}, np.dtype(record["dtype"]))
    moving = {key: arrays.pop(key) for key in record["gradients"]}

    def value(moving, others):
        given = {**others, **moving}
        keywords = {key: given[key] for key in record["keywords"]} | record["options"]
        result = function(*[given[key] for key in record["arguments"]], **keywords)
        return reduced(result, record, given.get(record["mask"]))

    program = jax.value_and_grad(value) if moving else lambda *given: (value(*given), {})
    with jax.enable_x64(record["dtype"] == "float64"):
        got = jax.device_get(compiled(program)(moving, arrays))
    wanted = stored["value"], {key: stored[f"grad/{key}"] for key in moving}
    what = f"{record['function']}, {name} of {file.stem}: "
    for part, own, reference in zip(("value", "gradient in "), got, wanted, strict=True):
        assert_close(own, reference, record["tolerance"], what + part)
