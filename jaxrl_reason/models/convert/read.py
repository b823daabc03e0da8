"""From tensors on disk to parameters in place.

A tensor is read once, the rows that this process needs of it, and goes to the devices as it lies in
the file. Turning it, its dtype and its place among the stacked layers are the devices' work, so
host memory holds a few tensors at a time, whatever the size of the model.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_reason.errors import InputError
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.convert.files import DTYPES, Tensor
from jaxrl_reason.models.convert.names import Sizes, TreePath, Weight, parts_of
from jaxrl_reason.models.decoder import Params


def check_tensors(
    weights: Sequence[Weight],
    tensors: dict[str, Tensor],
    where: str,
    ignorable: Callable[[str], bool] = lambda name: False,
) -> None:
    """Raises InputError with every tensor that is missing, unexpected or not of its shape."""
    expected = {name: weight.shape for weight in weights for name in weight.tensors()}
    both = [(name, tensors[name], shape) for name, shape in expected.items() if name in tensors]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected and not ignorable(name)],
        "of another shape": [
            f"{name} {list(tensor.shape)} where the configuration has {list(shape)}"
            for name, tensor, shape in both
            if tensor.shape != shape
        ],
        "of a dtype that is not supported": [
            f"{name} {tensor.dtype} (supported: {', '.join(DTYPES)})"
            for name, tensor, _ in both
            if tensor.dtype not in DTYPES
        ],
    }
    if any(problems.values()):
        lines = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
        raise InputError(
            f"the tensors in {where} are not those of its configuration; {'; '.join(lines)}"
        )


def load_weights(
    config: ModelConfig, weights: Sequence[Weight], tensors: dict[str, Tensor], places: Params
) -> Params:
    """Parameters, each where `places` says, from tensors that were checked."""
    dtype = jnp.dtype(config.param_dtype)
    place_of = {weight.path: at_path(places, weight.path) for weight in weights}
    stacked = [weight for weight in weights if weight.stack]
    loaded = _zeros(
        {weight.path: jax.ShapeDtypeStruct(weight.parameter_shape, dtype) for weight in stacked},
        {weight.path: place_of[weight.path] for weight in stacked},
    )
    # In the order of the files, so that a disk is read from one end to the other.
    first = lambda part: tensors[part[0][0].tensors_of(part[1])[0]]
    parts = sorted(parts_of(weights), key=lambda part: (str(first(part).file), first(part).offset))
    moving = _Moving(limit=_largest_file(tensors) // 8)
    for group, layer in parts:
        arrived = []
        for weight in group:
            sources = [tensors[name] for name in weight.tensors_of(layer)]
            moving.make_room(sum(source.nbytes for source in sources))
            arrived.append(_to_devices(weight, sources, place_of[weight.path]))
            moving.add(arrived[-1])
        paths = [weight.path for weight in group]
        orders = tuple(weight.order for weight in group)
        to = tuple(place_of[path] for path in paths)
        if group[0].stack:
            put = _put_layer(orders, to)
            written = put([loaded[path] for path in paths], arrived, np.int32(layer))
            # Not ahead of the devices, or layers as they came would gather there.
            loaded.update(zip(paths, jax.block_until_ready(written), strict=True))
        else:
            loaded[paths[0]] = _turned(arrived[0], dtype.name, orders[0], to[0])
    return as_tree(loaded)


class _Moving:
    """Arrays on their way to the devices, whose host memory is not free yet."""

    def __init__(self, limit: int):
        self._limit = limit
        self._arrays: collections.deque[jax.Array] = collections.deque()

    def make_room(self, nbytes: int) -> None:
        """Wait until so much more stays below the limit, or nothing is on its way."""
        while self._arrays and sum(x.nbytes for x in self._arrays) + nbytes > self._limit:
            self._arrays.popleft().block_until_ready()

    def add(self, array: jax.Array) -> None:
        """Note one more."""
        self._arrays.append(array)


def _to_devices(weight: Weight, sources: Sequence[Tensor], place: NamedSharding) -> jax.Array:
    """One layer of a parameter (all of it, if it has no layers) on the devices, as in the file.

    Its shape is [*weight.split], behind an axis of experts where there are several sources; it is
    cut as the parameter will be, so that no device needs what another has.
    """
    leading, shape = len(weight.stack), (*weight.stack[1:], *weight.split)
    spec = (*place.spec, *(None,) * len(weight.parameter_shape))[: len(weight.parameter_shape)]
    of_split = dict(zip(weight.order, spec[leading:], strict=True))
    cut = PartitionSpec(*spec[1:leading], *(of_split[axis] for axis in range(len(weight.split))))
    rows = functools.cache(lambda which, start, stop: _rows(weight, sources[which], start, stop))

    def read(index: Any) -> np.ndarray:
        experts, (first, *rest) = index[: -len(weight.split)], index[-len(weight.split) :]
        start, stop, _ = first.indices(weight.split[0])
        get = lambda which: rows(which, start, stop)[(slice(None), *rest)]
        if not experts:
            return get(0)
        return np.stack([get(which) for which in range(len(sources))[experts[0]]])

    dtype = DTYPES[sources[0].dtype]
    return jax.make_array_from_callback(shape, NamedSharding(place.mesh, cut), read, dtype=dtype)


def _rows(weight: Weight, source: Tensor, start: int, stop: int) -> np.ndarray:
    """Entries start to stop of the first axis of `split`, which the file may hold with others."""
    each = source.shape[0] // (weight.parts * weight.split[0])
    above = weight.part * weight.split[0]
    rows = source.rows((above + start) * each, (above + stop) * each)
    return rows.reshape(stop - start, *weight.split[1:])


def _zeros(shapes: dict[Any, jax.ShapeDtypeStruct], places: dict[Any, NamedSharding]):
    make = lambda: {path: jnp.zeros(x.shape, x.dtype) for path, x in shapes.items()}
    return jax.jit(make, out_shardings=places)()


@functools.lru_cache(maxsize=16)
def _put_layer(orders: tuple[Sizes, ...], places: tuple[NamedSharding, ...]):
    """A program that writes a layer into stacked parameters, in their memory."""

    def put_one(stack, part, layer, order):
        experts = part.ndim - len(order)
        part = part if part.dtype == stack.dtype else part.astype(stack.dtype)
        turned = jnp.transpose(_bits(part), (*range(experts), *(axis + experts for axis in order)))
        written = jax.lax.dynamic_update_index_in_dim(_bits(stack), turned, layer, 0)
        return jax.lax.bitcast_convert_type(written, stack.dtype)

    def put(stacks, parts, layer):
        each = zip(stacks, parts, orders, strict=True)
        return [put_one(stack, part, layer, order) for stack, part, order in each]

    return jax.jit(put, donate_argnums=0, out_shardings=list(places))


def _bits(x: jax.Array) -> jax.Array:
    """Integers of the same width: XLA's CPU backend moves bfloat16 by way of float32."""
    wide = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
    return jax.lax.bitcast_convert_type(x, wide[x.dtype.itemsize])


def _turned(part: jax.Array, dtype: str, order: Sizes, place: NamedSharding) -> jax.Array:
    """A parameter without layers."""
    if order == tuple(range(part.ndim)) and part.dtype.name == dtype:
        return jax.device_put(part, place)
    turn = lambda x: jnp.transpose(x, order).astype(jnp.dtype(dtype))
    return jax.jit(turn, out_shardings=place)(part)


def _largest_file(tensors: dict[str, Tensor]) -> int:
    return max(file.stat().st_size for file in {tensor.file for tensor in tensors.values()})


def at_path(tree: Params, path: TreePath) -> Any:
    """The leaf at a path."""
    return functools.reduce(lambda node, name: node[name], path, tree)


def as_tree(leaves: dict[TreePath, Any]) -> Params:
    """Nested dicts from leaves by path."""
    tree: Params = {}
    for path, leaf in leaves.items():
        node = functools.reduce(lambda node, name: node.setdefault(name, {}), path[:-1], tree)
        node[path[-1]] = leaf
    return tree


def placed(x: Any) -> NamedSharding:
    """Where an array is, or the default device."""
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return sharding
    devices = jax.local_devices()[:1] if sharding is None else list(sharding.device_set)
    return NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec())
