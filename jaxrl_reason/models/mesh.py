"""The mesh that the caller has set (`jax.set_mesh`), as the parts of a model see it."""

import jax
from jax.sharding import AbstractMesh, AxisType

ROW_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which rows are cut."""


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
