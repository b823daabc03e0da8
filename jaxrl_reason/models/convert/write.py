"""From parameters to tensors in safetensors files, a layer at a time."""

import collections
import functools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxrl_reason.errors import InputError
from jaxrl_reason.models.config import DType
from jaxrl_reason.models.convert.files import INDEX_FILE, WEIGHTS_FILE
from jaxrl_reason.models.convert.names import Sizes, Weight, parts_of
from jaxrl_reason.models.convert.read import at_path
from jaxrl_reason.models.decoder import Params
from jaxrl_reason.processes import is_first


def check_params(weights: Iterable[Weight], params: Params) -> None:
    """Raises InputError where the tree of parameters is not the model's."""
    expected = {"/".join(weight.path): weight.parameter_shape for weight in weights}
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    wrong = sorted(
        f"{name}: {found.get(name, 'missing')} (expected: {expected.get(name, 'none')})"
        for name in expected.keys() | found.keys()
        if expected.get(name) != found.get(name)
    )
    if wrong:
        raise InputError("these parameters are not those of the model: " + "; ".join(wrong))


def write_tensors(
    directory: Path,
    weights: list[Weight],
    params: Params,
    *,
    dtype: DType | None,
    limit: int,
    file: str = WEIGHTS_FILE,
) -> None:
    """Write parameters in files of at most `limit` bytes, with an index if they are several.

    Host memory holds one file at a time. Raises OSError where storage refuses one.
    """
    item = lambda weight: jnp.dtype(dtype or at_path(params, weight.path).dtype).itemsize
    sizes = {
        name: int(np.prod(weight.shape)) * item(weight)
        for weight in weights
        for name in weight.tensors()
    }
    groups = _groups([name for part in parts_of(weights) for name in _names(*part)], sizes, limit)
    stem, suffix = os.path.splitext(file)
    of = lambda i: f"{stem}-{i + 1:05d}-of-{len(groups):05d}{suffix}"
    files = [file] if len(groups) == 1 else [of(i) for i in range(len(groups))]
    held: dict[str, np.ndarray] = {}
    waiting = collections.deque(zip(files, groups, strict=True))
    for group, layer in parts_of(weights):
        held.update(zip(_names(group, layer), _fetch(group, layer, params, dtype), strict=True))
        while waiting and waiting[0][1][-1] in held:
            name, tensors = waiting.popleft()
            content = {tensor: held.pop(tensor) for tensor in tensors}
            if is_first():
                _save(content, directory / name)
    if len(files) > 1 and is_first():
        file_of = {tensor: f for f, group in zip(files, groups, strict=True) for tensor in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        write_json(directory / INDEX_FILE, index)


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Raises OSError where storage refuses; safetensors tells the reason in words alone."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _names(group: list[Weight], layer: int) -> list[str]:
    """Tensors of one layer; parameters that share one stand next to each other."""
    return [name for weight in group if not weight.part for name in weight.tensors_of(layer)]


def _groups(names: list[str], sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The tensors of each file, in this order."""
    groups: list[list[str]] = [[]]
    room = limit
    for name in names:
        if groups[-1] and sizes[name] > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= sizes[name]
    return groups


def _fetch(group: list[Weight], layer: int, params: Params, dtype: DType | None):
    """Arrays of `_names`, as in the file."""
    leaves = [at_path(params, weight.path) for weight in group]
    turned = _turned_layer(
        leaves,
        np.int32(layer),
        tuple(weight.order for weight in group),
        tuple(dtype or x.dtype.name for x in leaves),
        tuple(map(_everywhere, leaves)),
    )
    flat = [
        np.asarray(x).reshape(-1, weight.shape[0] // weight.parts, *weight.shape[1:])
        for weight, x in zip(group, turned, strict=True)
    ]
    for i, weight in enumerate(group):
        if not weight.part:
            together = flat[i : i + weight.parts]
            whole = flat[i] if weight.parts == 1 else np.concatenate(together, axis=1)
            yield from map(np.ascontiguousarray, whole)


def _everywhere(x: Any) -> NamedSharding | None:
    """Whole on every device, for arrays of which this process has a part only."""
    if getattr(x, "is_fully_addressable", True):
        return None
    return NamedSharding(x.sharding.mesh, PartitionSpec())


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _turned_layer(leaves, layer, orders: tuple[Sizes, ...], dtypes, places):
    """A layer of parameters in the order of the file."""

    def turn(x, order, dtype, place):
        if x.ndim > len(order):
            x = jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
        experts = x.ndim - len(order)
        back = tuple(experts + order.index(axis) for axis in range(len(order)))
        turned = jnp.transpose(x, (*range(experts), *back)).astype(jnp.dtype(dtype))
        return turned if place is None else jax.lax.with_sharding_constraint(turned, place)

    return [turn(*x) for x in zip(leaves, orders, dtypes, places, strict=True)]


def write_json(file: Path, value: Any) -> None:
    """Indented, keys in order."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
