"""Evaluates cases: their oracle and its numeric gradients, and a function with its gradients.

Arrays are drawn in float64 and rounded to float32, so that one oracle and one numeric gradient
serve both precisions. Needs jax and NumPy only, no pytest.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason.conformance.case import ROWS, Case

Arrays = dict[str, np.ndarray]
Function = Callable[..., Any]

TOLERANCES = {"float32": 1e-5, "float64": 1e-9}
"""Largest error, relative to the largest entry of an array."""
STEP = 1e-3
"""Of central differences; cases keep ten times this distance from kinks."""


@functools.cache
def names(case: Case) -> tuple[str, ...]:
    """Names of the inputs, in the order of the arguments."""
    return tuple(case.draw())


def is_float(array: Any) -> bool:
    """Whether an array, or a Python number, is of floats."""
    return jnp.issubdtype(jnp.result_type(array), jnp.floating)


def cast(arrays: Mapping[str, np.ndarray], dtype: Any) -> Arrays:
    """The arrays, floats among them in a dtype."""
    return {name: x.astype(dtype) if is_float(x) else x for name, x in arrays.items()}


def draw(case: Case, seed: int = 0) -> Arrays:
    """The inputs, and the options that are arrays: float64 numbers that float32 can hold."""
    options = {name: x for name, x in case.options.items() if isinstance(x, np.ndarray)}
    return cast(cast({**case.draw(seed), **options}, np.float32), np.float64)


def call(function: Function, case: Case, arrays: Mapping[str, Any]) -> Any:
    """The function on arrays, by position and keyword as the case says, with its options."""
    positional = [arrays[name] for name in names(case) if name not in case.keywords]
    keywords = {name: arrays[name] for name in case.keywords}
    options = {name: arrays.get(name, option) for name, option in case.options.items()}
    return function(*positional, **keywords, **options)


def has_rows(array: Any) -> bool:
    """Whether the first axis of an array is that of the rows."""
    return np.shape(array)[:1] == (ROWS,)


def float_leaves(tree: Any) -> list[Any]:
    """The arrays of a result that a gradient can come from."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


@functools.lru_cache(maxsize=8)
def expected(case: Case) -> Any:
    """What the oracle says of the first draw."""
    return call(case.oracle, case, draw(case))


def random_weights(case: Case) -> list[np.ndarray]:
    """Weights of the sum that gradients are taken of, one array for every float result."""
    rng = np.random.default_rng(1)
    return [rng.normal(size=np.shape(leaf)) for leaf in float_leaves(expected(case))]


@functools.lru_cache(maxsize=8)
def numeric_gradients(case: Case) -> Arrays:
    """Gradients by five-point central differences of the oracle, or of the surrogate."""
    arrays, weights = draw(case), random_weights(case)
    formula = case.oracle
    if case.surrogate is not None:
        formula = functools.partial(case.surrogate, {name: arrays[name] for name in names(case)})

    def at(name: str, place: Any, shift: float) -> list[np.ndarray]:
        moved = arrays[name].copy()
        moved[place] += shift
        return float_leaves(call(formula, case, {**arrays, name: moved}))

    def slopes(name: str, place: Any) -> list[np.ndarray]:
        near, far = ([at(name, place, sign * k * STEP) for sign in (1, -1)] for k in (1, 2))
        # Subtracted before any sum, so that all that does not depend on the place drops out.
        return [
            w * (8 * (a - b) - (c - d)) / (12 * STEP)
            for w, a, b, c, d in zip(weights, *near, *far, strict=True)
        ]

    by_rows = case.rowwise and all(has_rows(w) for w in weights)
    gradients = {name: np.zeros_like(arrays[name]) for name in case.moving}
    for name, gradient in gradients.items():
        if by_rows and has_rows(gradient):
            for place in np.ndindex(gradient.shape[1:]):
                every = (slice(None), *place)
                gradient[every] = sum(x.reshape(ROWS, -1).sum(1) for x in slopes(name, every))
        else:
            for place in np.ndindex(gradient.shape):
                gradient[place] = sum(np.sum(x) for x in slopes(name, place))
        assert gradient.any(), f"{case.name} declares {name} as moving, but nothing depends on it"
    return gradients


@functools.cache
def _quick() -> dict[str, Any]:
    """Options that cut the time of compilation by four, those that this version of XLA has."""
    found = {}
    for name, value in (
        ("xla_backend_optimization_level", 0),
        ("xla_cpu_use_fusion_emitters", False),
        ("xla_cpu_parallel_codegen_split_count", 1),
    ):
        try:
            jax.jit(jnp.negative, compiler_options={name: value})(1.0)
        except jax.errors.JaxRuntimeError:
            continue
        found[name] = value
    return found


def compiled(function: Function) -> Function:
    """`jax.jit`, quick to compile rather than to run."""
    return jax.jit(function, compiler_options=_quick())


def jitted(function: Function) -> Function:
    """The function under `jit`; keyword arguments that are not arrays are constants."""

    def call_jitted(*arguments: Any, **options: Any) -> Any:
        arrays = {name: x for name, x in options.items() if isinstance(x, (np.ndarray, jax.Array))}
        constants = {name: x for name, x in options.items() if name not in arrays}
        bound = functools.partial(function, **constants)
        return compiled(lambda given, named: bound(*given, **named))(arguments, arrays)

    return call_jitted


def weighted_sum(function: Function, case: Case) -> Function:
    """`f(floats, others, weights)`: the scalar to differentiate in `floats`, and the result.

    Where a weight is 0 the result is left out, so that a NaN there must not matter.
    """

    def total(floats, others, weights):
        result = call(function, case, {**floats, **others})
        leaves = float_leaves(result)
        got, want = [jnp.shape(x) for x in leaves], [w.shape for w in weights]
        assert got == want, f"{case.name}: the floats have shapes {got}; expected {want}"
        parts = [
            jnp.sum(jnp.where(w != 0, x, 0) * w.astype(jnp.result_type(x)))
            for x, w in zip(leaves, weights, strict=True)
        ]
        return functools.reduce(jnp.add, parts) if parts else jnp.zeros(()), result

    return total


@functools.lru_cache(maxsize=4)
def program(function: Function, case: Case) -> Function:
    """`f(floats, others, weights)` to gradients and result, compiled once for each dtype."""
    return compiled(jax.grad(weighted_sum(function, case), has_aux=True))


def split(case: Case, arrays: Arrays) -> tuple[Arrays, Arrays]:
    """The inputs that a gradient is taken in, and all other arrays."""
    floats = {name: arrays[name] for name in names(case) if is_float(arrays[name])}
    return floats, {name: x for name, x in arrays.items() if name not in floats}


def run(
    function: Function, case: Case, arrays: Arrays, weights: list[np.ndarray], dtype: Any
) -> tuple[Arrays, Any]:
    """Gradients by name, and the result, in a dtype."""
    floats, others = split(case, cast(arrays, dtype))
    weights = [w.astype(dtype) for w in weights]
    with jax.enable_x64(dtype == np.float64):
        return jax.device_get(program(function, case)(floats, others, weights))


def assert_close(got: Any, want: Any, tolerance: float, what: str) -> None:
    """Compares two pytrees leaf by leaf: floats within the tolerance, anything else exactly.

    The tolerance is relative to the largest entry of the wanted leaf.
    """
    got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
    assert len(got) == len(want), f"{what}: {len(got)} arrays; expected {len(want)}"
    for (own_path, value), (path, wanted) in zip(got, want, strict=True):
        where = what + jax.tree_util.keystr(path)
        found, keys = _keys(own_path), _keys(path)
        assert found == keys, f"{where}: found under {found}; expected {keys}"
        _assert_close_arrays(np.asarray(value), np.asarray(wanted), tolerance, where)


def assert_same(got: Any, want: Any, what: str) -> None:
    """Two results of one function in float32, which may add in another order."""
    assert_close(jax.device_get(got), want, TOLERANCES["float32"], what)


def _keys(path) -> list[Any]:
    return [step.key for step in path if isinstance(step, jax.tree_util.DictKey)]


def _assert_close_arrays(got, want, tolerance, where):
    assert got.shape == want.shape, f"{where}: shape {got.shape}; expected {want.shape}"
    assert is_float(got) == is_float(want), f"{where}: dtype {got.dtype}; expected {want.dtype}"
    if is_float(want):
        finite = np.isfinite(want)
        scale = np.max(np.abs(want), where=finite, initial=0.0)
        with np.errstate(invalid="ignore"):
            near = np.abs(got - want) <= tolerance * scale
        agrees = np.where(finite, near, (got == want) | (np.isnan(got) & np.isnan(want)))
        allowed = f"allowed are {tolerance:g} of {scale:.3g}"
    else:
        agrees, allowed = got == want, "they must be equal"
    for place in map(tuple, np.argwhere(~agrees)[:1].tolist()):
        raise AssertionError(
            f"{where}: {np.count_nonzero(~agrees)} of {got.size} entries differ; at {place} "
            f"{got[place]} instead of {want[place]}; {allowed}"
        )
