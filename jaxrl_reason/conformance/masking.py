"""The check that bad numbers stay where they are: under a false mask, or in their own rows."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxrl_reason.conformance.case import Case
from jaxrl_reason.conformance.evaluation import (
    Function,
    assert_same,
    cast,
    draw,
    expected,
    random_weights,
    run,
)

BAD = (np.nan, np.inf, -np.inf, 1e30)

Places = dict[str, np.ndarray]


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
            assert_same(_where(free, value), _where(free, clean[1]), f"{what}value")
            assert_same(gradients, clean[0], f"{what}gradient in ")
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
        touched = np.any(bad, axis=tuple(range(shared, bad.ndim)))
        free &= ~_widened(np.asarray(touched), len(shape))
    return free


def _widened(mask: np.ndarray, ndim: int) -> np.ndarray:
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def _where(keep: Any, tree: Any) -> list[np.ndarray]:
    """The leaves of a result, 0 where they are not to be kept."""
    pairs = zip(jax.tree.leaves(keep), jax.tree.leaves(tree), strict=True)
    return [np.where(free, leaf, np.zeros_like(leaf)) for free, leaf in pairs]
