"""The mesh that the caller has set (`jax.set_mesh`), as the parts of a model see it."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array

ROW_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which rows are cut in training."""
LENGTH_AXIS = "context"
"""The mesh axis over which the tokens of a row are cut in training; in sampling it cuts rows."""
TOKEN_AXES = (*ROW_AXES, LENGTH_AXIS)
"""Mesh axes over which tokens are cut, whichever way."""
HEAD_AXES = ("tensor",)
"""Mesh axes over which heads are cut."""


def platform_of(mesh: AbstractMesh) -> str:
    """Of the mesh, which may belong to devices that are not here; of this process otherwise."""
    device = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    rocm = platform == "gpu" and "rocm" in jax.devices()[0].client.platform_version
    return "rocm" if rocm else platform


def automatic_axes(mesh: AbstractMesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the axes which the mesh has and no enclosing `shard_map` has taken."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in axes if types.get(axis, AxisType.Manual) != AxisType.Manual)


def row_axes(mesh: AbstractMesh, rows: int) -> tuple[str, ...]:
    """The axes that cut so many rows or tokens: all of `TOKEN_AXES` that divide them, in order."""
    chosen, size = [], 1
    for axis in automatic_axes(mesh, TOKEN_AXES):
        if rows % (size * mesh.shape[axis]) == 0:
            chosen.append(axis)
            size *= mesh.shape[axis]
    return tuple(chosen)


def along_length(x: Array, *, before: int = 0) -> Array:
    """[B, T, ...] with its tokens cut along `LENGTH_AXIS`, where that divides them.

    Args:
        x: the array.
        before: axes that it has before B.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = size_of(mesh, (LENGTH_AXIS,))
    if count == 1 or x.shape[before + 1] % count:
        return x
    place = PartitionSpec(*(None,) * before, automatic_axes(mesh, ROW_AXES), LENGTH_AXIS)
    return jax.lax.with_sharding_constraint(x, place)


def from_width(x: Array) -> Array:
    """`along_length` of what is cut over `LENGTH_AXIS` by the width, as an embedding is.

    The compiler would otherwise gather what moves from one axis of an array to two.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = size_of(mesh, (LENGTH_AXIS,))
    if count > 1 and x.shape[-1] % count == 0:
        rows = automatic_axes(mesh, ROW_AXES)
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(rows, None, LENGTH_AXIS))
    return along_length(x)


def on_every_device(x: Array) -> Array:
    """The array, whole on every device: for small parameters that are looked up in."""
    mesh = jax.sharding.get_abstract_mesh()
    if not automatic_axes(mesh, mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def size_of(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    """Devices along these axes, as far as no enclosing `shard_map` has taken them."""
    return math.prod(mesh.shape[axis] for axis in automatic_axes(mesh, axes))


def by_rows(function: Callable, rows: int) -> Callable:
    """Each device computes its own rows; for what the compiler does not cut by itself."""
    return cut(function, rows, lambda rows, heads: (PartitionSpec(rows), PartitionSpec(rows)))


def cut(function: Callable, rows: int, specs: Callable[..., tuple[Any, Any]]) -> Callable:
    """Each device computes its own part of `function`; without a mesh that is all of it.

    Args:
        function: of arrays, some of which have `rows` rows.
        rows: in all.
        specs: `(axes of rows, axis of heads)` to the partitions of arguments and results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = row_axes(mesh, rows)
    if mesh.empty or mesh.size == 1 or not axes:
        return function
    heads = automatic_axes(mesh, HEAD_AXES) or None
    in_specs, out_specs = specs(axes, heads)
    names = set(automatic_axes(mesh, mesh.axis_names))
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
    )
