"""Trees of parameters in two: what an update changes, and the rest.

Both parts keep the structure of the whole, with None where a leaf belongs to the other, so either
may be mapped over, differentiated or given to Optax.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxrl_reason.models import Params

Trains = Callable[[tuple[str, ...]], bool]
"""Whether the leaf at a path is trained, such as ("layers", "attention", "q", "kernel")."""


def everything(path: tuple[str, ...]) -> bool:
    """Every leaf is trained."""
    return True


def partition(tree: Any, trains: Trains) -> tuple[Any, Any]:
    """The trained and the frozen part of a tree in the structure of the parameters."""
    at = lambda keys: tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
    keep = lambda wanted: jax.tree_util.tree_map_with_path(
        lambda keys, x: x if bool(trains(at(keys))) is wanted else None, tree
    )
    return keep(True), keep(False)


def combine(trained: Any, frozen: Any) -> Any:
    """The whole tree again."""
    is_none = lambda x: x is None
    return jax.tree.map(lambda x, y: y if x is None else x, trained, frozen, is_leaf=is_none)


def count_parameters(params: Params, trains: Trains = everything) -> int:
    """Number of parameters that are trained; `params` may be shapes."""
    trained, _ = partition(params, trains)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(trained))
