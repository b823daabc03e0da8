"""What a function must do to agree with a case. Needs jax and NumPy only, no pytest.

Each check takes the function and the case and raises AssertionError.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason.conformance.case import ROWS, Case
from jaxrl_reason.conformance.evaluation import (
    Function,
    assert_close,
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

TOLERANCES = {"float32": 1e-5, "float64": 1e-9}
"""Largest error, relative to the largest entry of an array."""
CHANGE = 1e-4
"""What counts as an effect of a knob, likewise."""
BAD = (np.nan, np.inf, -np.inf, 1e30)
DEVICES = 8

Places = dict[str, np.ndarray]


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
    _assert_same(got, wanted, f"{case.name} under {' and '.join(transforms)}: ")


def _by_rows(mesh: jax.sharding.Mesh, array: Any, axis: int) -> jax.sharding.NamedSharding:
    """Splits the axis over the mesh if it is that of the rows; a copy on every device if not."""
    names = [None] * axis + ["rows"] if array.shape[axis : axis + 1] == (ROWS,) else []
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))


def check_masked(function: Function, case: Case) -> None:
    """NaN, infinities and 1e30 where nothing counts change neither value nor gradient elsewhere.

    The gradient at the bad entries is exactly 0.
    """
    arrays, tested = cast(draw(case), np.float32), 0
    for places in _bad_places(case):
        free = jax.tree.map(lambda x, at=places: _untouched(case, at, np.shape(x)), expected(case))
        tested += sum(np.count_nonzero(x) for x in jax.tree.leaves(free))
        weights = [w * _untouched(case, places, w.shape) for w in random_weights(case)]
        clean = run(function, case, arrays, weights, np.float32)
        for bad, flip in itertools.product(BAD, (1, -1)[: len(places)]):
            sign = dict(zip(places, np.resize([1, flip], len(places)), strict=True))
            dirty = {
                name: np.where(at, bad * sign[name], arrays[name]) for name, at in places.items()
            }
            gradients, value = run(function, case, {**arrays, **dirty}, weights, np.float32)
            what = f"{case.name} with {bad} in {' and '.join(places)}: "
            _assert_same(_where(free, value), _where(free, clean[1]), f"{what}value")
            _assert_same(gradients, clean[0], f"{what}gradient in ")
            for name, at in places.items():
                assert not gradients[name][at].any(), f"{what}gradient in {name} there is not 0"
    assert tested, f"{case.name}: no entry of the result was out of reach, so nothing was tested"


def _bad_places(case: Case) -> Iterator[Places]:
    """Which entries to make bad: in each input that may hold bad ones alone, then in all."""
    arrays, rng, places = draw(case), np.random.default_rng(7), {}
    for name in case.masked:
        array = arrays[name]
        if case.mask is None:
            bad = rng.random(array.shape[:2]) < 0.3
            bad.flat[0], bad.flat[-1] = True, False
        else:
            counts = arrays[case.mask] != 0
            bad = ~counts.any(axis=tuple(range(array.ndim, counts.ndim)))
            assert bad.any(), f"{case.name}: nothing is masked in {name}, so nothing is tested"
        places[name] = np.broadcast_to(_widened(bad, array.ndim), array.shape)
    yield from ({name: bad} for name, bad in places.items())
    if len(places) > 1:
        yield places


def _untouched(case: Case, places: Places, shape: tuple[int, ...]) -> np.ndarray:
    """The entries of a result of this shape that the bad entries must not reach.

    With a mask these are all, but for those that lie under the mask themselves; without one, those
    that share no leading index with a bad entry.
    """
    free = np.ones(shape, np.bool_)
    if case.mask is not None:
        counts = draw(case)[case.mask] != 0
        return free & _widened(counts, len(shape)) if shape[: counts.ndim] == counts.shape else free
    for bad in places.values():
        pairs = itertools.takewhile(
            lambda sizes: sizes[0] == sizes[1], zip(bad.shape, shape, strict=False)
        )
        shared = len(list(pairs))
        free &= ~_widened(bad.any(axis=tuple(range(shared, bad.ndim))), len(shape))
    return free


def _widened(mask: np.ndarray, ndim: int) -> np.ndarray:
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def _where(keep: Any, tree: Any) -> list[np.ndarray]:
    """The leaves of a result, 0 where they are not to be kept."""
    pairs = zip(jax.tree.leaves(keep), jax.tree.leaves(tree), strict=True)
    return [np.where(free, leaf, np.zeros_like(leaf)) for free, leaf in pairs]


def _assert_same(got: Any, want: Any, what: str) -> None:
    """Two results of one function in float32, which may add in another order."""
    assert_close(jax.device_get(got), want, TOLERANCES["float32"], what)


def check_knob(function: Function, case: Case, name: str) -> None:
    """The option at its other value changes the value or a gradient."""
    other = dataclasses.replace(case, options={**case.options, name: case.knobs[name]})
    points = [(each, cast(draw(each), np.float32)) for each in (case, other)]
    if "jit" not in case.transforms:
        results = [call(function, each, arrays) for each, arrays in points]
    elif len({str(_shapes(function, *point)) for point in points}) > 1:
        return
    else:
        weights = random_weights(case)
        results = [run(function, each, arrays, weights, np.float32) for each, arrays in points]
    assert _differ(*results), (
        f"{case.name}: {name}={case.knobs[name]!r} instead of {case.options.get(name)!r} changes "
        "neither value nor gradient"
    )


def _shapes(function: Function, case: Case, arrays: dict[str, np.ndarray]) -> Any:
    return jax.eval_shape(functools.partial(call, function, case), arrays)


def _differ(one: Any, other: Any) -> bool:
    pairs = [jax.tree.map(np.asarray, jax.tree.leaves(tree)) for tree in (one, other)]
    if [x.shape for x in pairs[0]] != [x.shape for x in pairs[1]]:
        return True
    wide = ((a.astype(np.float64), b.astype(np.float64)) for a, b in zip(*pairs, strict=True))
    return any(np.any(np.abs(a - b) > CHANGE * np.abs(a).max(initial=0)) for a, b in wide)


def check_rows(function: Function, case: Case) -> None:
    """Rows in another order give the same rows in that order, and so do rows in two parts."""
    arrays = cast(draw(case), np.float32)
    weights = random_weights(case)
    gradients, value = run(function, case, arrays, weights, np.float32)
    order = np.random.default_rng(3).permutation(ROWS)
    pick = lambda tree: jax.tree.map(lambda x: x[order] if has_rows(x) else x, tree)
    moved = run(function, case, pick(arrays), pick(weights), np.float32)
    _assert_same(moved, pick((gradients, value)), f"{case.name}, rows in another order: ")

    half = ROWS // 2
    parts = [
        jax.tree.map(lambda x, rows=rows: x[rows] if has_rows(x) else x, arrays)
        for rows in (slice(half), slice(half, None))
    ]
    forward = compiled(functools.partial(call, function, case))
    leaves = [jax.tree.leaves(jax.device_get(forward(part))) for part in parts]
    joined = [np.concatenate(pair) for pair in zip(*leaves, strict=True) if pair[0].ndim]
    wanted = [leaf for leaf in jax.tree.leaves(value) if has_rows(leaf)]
    _assert_same(joined, wanted, f"{case.name}, rows in two parts: value")


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
    arrays = cast(draw(case), np.float32)
    shape = arrays[case.mask or ""].shape

    def widen(array):
        extra = [(0, 0)] * array.ndim
        if array.shape[:2] == shape:
            extra[1] = (0, 1)
        return np.pad(array, extra)

    _, value = run(function, case, arrays, random_weights(case), np.float32)
    wide = compiled(functools.partial(call, function, case))(jax.tree.map(widen, arrays))
    trim = lambda x, like: x[:, : like.shape[1]] if like.ndim > 1 else x
    _assert_same(jax.tree.map(trim, wide, value), value, f"{case.name}, padded: value")
