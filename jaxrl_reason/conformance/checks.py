"""What a function must do to agree with a case. Needs jax and NumPy only, no pytest.

Each check takes the function and the case and raises AssertionError; `masking` has one more.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason.conformance.case import ROWS, Case
from jaxrl_reason.conformance.evaluation import (
    TOLERANCES,
    Function,
    assert_close,
    assert_same,
    call,
    cast,
    compiled,
    draw,
    expected,
    float_leaves,
    has_rows,
    names,
    numeric_gradients,
    program,
    random_weights,
    run,
    split,
    weighted_sum,
)

CHANGE = 1e-4
"""What counts as an effect of a knob, relative to the largest entry of an array."""
DEVICES = 8


def check_value(function: Function, case: Case) -> None:
    """The value in float32 equals the oracle's; the quickest of the checks."""
    arrays, bound = cast(draw(case), np.float32), functools.partial(call, function, case)
    value = compiled(bound)(arrays) if "jit" in case.transforms else bound(arrays)
    what = f"{case.name} in float32: value"
    assert_close(jax.device_get(value), expected(case), TOLERANCES["float32"], what)


def check_oracle(function: Function, case: Case, dtype: str) -> None:
    """Value and gradients equal the oracle's; inputs that do not move get a gradient of exactly 0.

    A function of the host is called as it is, and has no gradient.
    """
    tolerance, what = TOLERANCES[dtype], f"{case.name} in {dtype}: "
    arrays, kind = draw(case), np.dtype(dtype).type
    if "jit" not in case.transforms:
        value = call(function, case, cast(arrays, kind))
        assert_close(value, expected(case), tolerance, f"{what}value")
        return
    gradients, value = run(function, case, arrays, random_weights(case), kind)
    assert_close(value, expected(case), tolerance, f"{what}value")
    for leaf in float_leaves(value):
        assert leaf.dtype == kind, f"{what}the result is {leaf.dtype}"
    numeric = numeric_gradients(case)
    for name, gradient in gradients.items():
        wanted = numeric.get(name, np.zeros_like(arrays[name]))
        assert_close(gradient, wanted, tolerance, f"{what}gradient in {name}")


def check_eager(function: Function, case: Case) -> None:
    """Without jit the value is the same."""
    arrays = cast(draw(case), np.float32)
    _, value = run(function, case, arrays, random_weights(case), np.float32)
    eager = call(function, case, {name: jnp.asarray(x) for name, x in arrays.items()})
    assert_close(jax.device_get(eager), value, 1e-5, f"{case.name} without jit: value")


def check_dtypes(function: Function, case: Case) -> None:
    """Half precision gives float32, and so does float32 where float64 is switched on."""
    for dtype, wide in ((jnp.bfloat16, False), (np.float32, True)):
        arrays = cast(draw(case), dtype)
        with jax.enable_x64(wide):
            shapes = _shapes(function, case, arrays)
        for leaf in float_leaves(shapes):
            given = jnp.dtype(dtype).name
            assert leaf.dtype == np.float32, f"{case.name}: {given} gives {leaf.dtype}"


def check_vmap(function: Function, case: Case) -> None:
    """Two draws, stacked and mapped over, give what each gives alone."""
    _check_mapped(function, case, ("vmap",))


def check_devices(function: Function, case: Case) -> None:
    """Rows spread over eight devices give what one device gives."""
    _check_mapped(function, case, ("devices",))


def check_vmap_on_devices(function: Function, case: Case) -> None:
    """Both at once, which is one compilation; where that fails, one after the other."""
    try:
        _check_mapped(function, case, ("vmap", "devices"))
    except Exception:
        check_vmap(function, case)
        check_devices(function, case)
        raise


def _check_mapped(function: Function, case: Case, transforms: tuple[str, ...]) -> None:
    draws = [cast(draw(case, seed), np.float32) for seed in (0, 1)]
    weights = [w.astype(np.float32) for w in random_weights(case)]
    wanted = [run(function, case, arrays, weights, np.float32) for arrays in draws]
    arrays, mapped = draws[0], program(function, case)
    stacked = dict.fromkeys(arrays, False)
    if "vmap" in transforms:
        stacked |= dict.fromkeys(names(case), True)
        arrays |= {name: np.stack([each[name] for each in draws]) for name in names(case)}
        axes = {name: 0 if stacked[name] else None for name in split(case, arrays)[1]}
        gradient = jax.grad(weighted_sum(function, case), has_aux=True)
        mapped = compiled(jax.vmap(gradient, in_axes=(0, axes, None)))
        wanted = jax.tree.map(lambda *leaves: np.stack(leaves), *wanted)
    else:
        wanted = wanted[0]
    if "devices" in transforms:
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:DEVICES]), ("rows",))
        place = lambda array, axis: jax.device_put(array, _by_rows(mesh, array, axis))
        arrays = {name: place(x, int(stacked[name])) for name, x in arrays.items()}
        weights = [place(w, 0) for w in weights]
    got = mapped(*split(case, arrays), weights)
    assert_same(got, wanted, f"{case.name} under {' and '.join(transforms)}: ")


def _by_rows(mesh: jax.sharding.Mesh, array: Any, axis: int) -> jax.sharding.NamedSharding:
    """Splits the axis over the mesh if it is that of the rows; a copy on every device if not."""
    names = [None] * axis + ["rows"] if array.shape[axis : axis + 1] == (ROWS,) else []
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))


def check_knob(function: Function, case: Case, name: str) -> None:
    """The option at its other value changes the value or a gradient."""
    try:
        value, *others = _turned(function, case, tuple(case.knobs))
        other = others[list(case.knobs).index(name)]
    except Exception:
        # One knob that the function does not have must not stop the others.
        value, other = _turned(function, case, (name,))
    if _differ(value, other):
        return
    if "jit" in case.transforms:
        points = [_point(each) for each in (case, _turn(case, name))]
        weights = random_weights(case)
        gradients = [run(function, *point, weights, np.float32)[0] for point in points]
        if _differ(*gradients):
            return
    raise AssertionError(
        f"{case.name}: {name}={case.knobs[name]!r} instead of {case.options.get(name)!r} changes "
        "neither value nor gradient"
    )


def _turn(case: Case, name: str) -> Case:
    return dataclasses.replace(case, options={**case.options, name: case.knobs[name]})


def _point(case: Case) -> tuple[Case, dict[str, np.ndarray]]:
    return case, cast(draw(case), np.float32)


@functools.lru_cache(maxsize=2)
def _turned(function: Function, case: Case, knobs: tuple[str, ...]) -> list[Any]:
    """The value of the case, and with each of the knobs turned alone; compiled at once."""
    points = [_point(case), *(_point(_turn(case, name)) for name in knobs)]
    cases = [each for each, _ in points]
    values = lambda draws: [call(function, *pair) for pair in zip(cases, draws, strict=True)]
    values = compiled(values) if "jit" in case.transforms else values
    return jax.device_get(values([arrays for _, arrays in points]))


def _shapes(function: Function, case: Case, arrays: dict[str, np.ndarray]) -> Any:
    return jax.eval_shape(functools.partial(call, function, case), arrays)


def _differ(one: Any, other: Any) -> bool:
    pairs = [jax.tree.map(np.asarray, jax.tree.leaves(tree)) for tree in (one, other)]
    if [x.shape for x in pairs[0]] != [x.shape for x in pairs[1]]:
        return True
    for a, b in zip(*pairs, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(a)
        scale = np.max(np.abs(a), where=finite, initial=0.0)
        if (finite != np.isfinite(b)).any() or (np.abs(a - b)[finite] > CHANGE * scale).any():
            return True
    return False


def check_rows(function: Function, case: Case) -> None:
    """Rows in another order give the same rows in that order, and so do rows in two parts."""
    arrays = cast(draw(case), np.float32)
    weights = random_weights(case)
    gradients, value = run(function, case, arrays, weights, np.float32)
    order = np.random.default_rng(3).permutation(ROWS)
    pick = lambda tree: jax.tree.map(lambda x: x[order] if has_rows(x) else x, tree)
    moved = run(function, case, pick(arrays), pick(weights), np.float32)
    assert_same(moved, pick((gradients, value)), f"{case.name}, rows in another order: ")

    half = ROWS // 2
    parts = [
        jax.tree.map(lambda x, rows=rows: x[rows] if has_rows(x) else x, arrays)
        for rows in (slice(half), slice(half, None))
    ]
    forward = compiled(functools.partial(call, function, case))
    leaves = [jax.tree.leaves(jax.device_get(forward(part))) for part in parts]
    joined = [np.concatenate(pair) for pair in zip(*leaves, strict=True) if pair[0].ndim]
    wanted = [leaf for leaf in jax.tree.leaves(value) if has_rows(leaf)]
    assert_same(joined, wanted, f"{case.name}, rows in two parts: value")


def has_columns(case: Case) -> bool:
    """Whether columns under a false mask can be added to the inputs of a case."""
    if case.mask is None or "jit" not in case.transforms:
        return False
    arrays = draw(case)
    shape = arrays[case.mask].shape
    others = [x.shape for x in arrays.values() if x.shape[:2] != shape]
    return len(shape) == 2 and all(shape[1] not in other for other in others)


def check_padding(function: Function, case: Case) -> None:
    """A column under a false mask, added at the end, changes nothing in those before."""
    assert case.mask is not None
    arrays = cast(draw(case), np.float32)
    shape = arrays[case.mask].shape

    def widen(array):
        if array.shape[:2] != shape:
            return array
        return np.pad(array, [(0, 1 if axis == 1 else 0) for axis in range(array.ndim)])

    _, value = run(function, case, arrays, random_weights(case), np.float32)
    wide = compiled(functools.partial(call, function, case))(jax.tree.map(widen, arrays))
    trim = lambda x, like: x[:, : like.shape[1]] if like.ndim > 1 else x
    assert_same(jax.tree.map(trim, wide, value), value, f"{case.name}, padded: value")
