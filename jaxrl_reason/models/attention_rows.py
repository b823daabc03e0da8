"""Attention of whole rows, without a cache: one function, and the backend that suits the device.

Every backend computes `attend` with `row_mask`; only outputs at padding differ, which nobody reads.
Each has a plan, made once from the ids of the rows and used by all layers, and a function from
queries, keys, values and plan. Leaves of a plan are [B, ...], so that on a mesh it is cut as the
rows are.

On several devices the loops and kernels run inside `jax.shard_map`: rows over `data`, `fsdp` and
`expert`, heads over `tensor`. The mesh is the one that the caller has set (`jax.set_mesh`); where
none is set and there are several devices, "auto" is the plain backend, which XLA partitions by
itself.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Bool, Int

from jaxrl_reason.models.attention import MixRows, Window, attend, row_mask
from jaxrl_reason.models.attention_blockwise import BLOCK, attend_blocks, plan_blocks
from jaxrl_reason.models.attention_cudnn import attend_cudnn, plan_cudnn
from jaxrl_reason.models.attention_splash import attend_splash, plan_splash
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.mesh import ROW_AXES, automatic_axes, platform_of

HEAD_AXES = ("tensor",)


class Backend(NamedTuple):
    """One way to compute attention of whole rows."""

    plan: Callable[[Array, Array | None, Window | None], Any]
    attend: Callable[[Array, Array, Array, Any], Array]


BACKENDS: dict[str, Backend] = {
    "plain": Backend(row_mask, attend),
    "blockwise": Backend(plan_blocks, attend_blocks),
    "cudnn": Backend(plan_cudnn, attend_cudnn),
    "splash": Backend(plan_splash, attend_splash),
}


def row_attention(
    config: ModelConfig,
    segment_ids: Int[Array, "B T"],
    branch_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
) -> Callable[[Bool[Array, ""] | bool], MixRows]:
    """Attention of these rows: of a layer, by whether it is sliding.

    The plans of the two kinds of layers are alike, so that a loop over layers can choose between
    them at run time. `positions` are needed where a layer is sliding.

    Raises:
        ValueError: the configuration names a backend that cannot run here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, length = segment_ids.shape
    name = choose_backend(config, (rows, length), mesh)
    backend = BACKENDS[name]
    mix = backend.attend if name == "plain" else _per_device(backend.attend, mesh)
    plans = dict.fromkeys(set(config.sliding_layers))
    for sliding in plans:
        window = None
        if sliding:
            if positions is None or positions.ndim != 2:
                raise ValueError("sliding layers need one position of each token")
            window = Window(positions, config.sliding_window)
        elif len(plans) == 2:
            window = Window(positions, _EVERYTHING)
        plans[sliding] = backend.plan(segment_ids, branch_ids, window)

    def of_layer(sliding: Bool[Array, ""] | bool) -> MixRows:
        if len(plans) == 1:
            plan = next(iter(plans.values()))
        elif isinstance(sliding, bool):
            plan = plans[sliding]
        else:
            choose = lambda some, all: jnp.where(sliding, some, all)
            plan = jax.tree.map(choose, plans[True], plans[False])
        return lambda queries, keys, values: mix(queries, keys, values, plan)

    return of_layer


_EVERYTHING = 2**30


def choose_backend(config: ModelConfig, shape: tuple[int, int], mesh: AbstractMesh) -> str:
    """The name of the backend for rows of a shape [B, T] on a mesh (empty where none is set).

    Raises:
        ValueError: the configuration names a backend that cannot run here.
    """
    platform = platform_of(mesh)
    refused = functools.partial(_refusal, config=config, shape=shape, mesh=mesh, platform=platform)
    if config.attention == "auto":
        best = {"cpu": "blockwise", "gpu": "cudnn", "tpu": "splash"}.get(platform, "plain")
        short = best == "blockwise" and shape[1] <= BLOCK
        unknown = mesh.empty and jax.device_count() > 1
        return "plain" if short or unknown or refused(best) else best
    reason = refused(config.attention)
    if reason:
        raise ValueError(f"attention={config.attention!r} cannot run here: {reason}; {_REMEDY}")
    return config.attention


_REMEDY = 'change that, or set attention to "auto" or "plain"'


def _refusal(name: str, *, config: ModelConfig, shape, mesh: AbstractMesh, platform: str) -> str:
    """Why a backend cannot run, or an empty string."""
    if name == "plain":
        return ""
    if name == "cudnn" and platform != "gpu":
        return f"it needs an NVIDIA GPU and the platform is {platform!r}"
    if name == "splash" and platform != "tpu":
        return f"it needs a TPU and the platform is {platform!r}"
    if name == "cudnn" and config.dtype != "bfloat16":
        return f'it needs dtype="bfloat16" and dtype is {config.dtype!r}'
    if name == "cudnn" and (config.head_dim % 8 or config.head_dim > 128):
        return f"it needs a head_dim that is a multiple of 8 up to 128, and it is {config.head_dim}"
    return _uneven(config, shape[0], mesh)


def _uneven(config: ModelConfig, rows: int, mesh: AbstractMesh) -> str:
    over_rows, over_heads = (_size(mesh, axes) for axes in (ROW_AXES, HEAD_AXES))
    if rows % over_rows:
        return f"{rows} rows do not divide over {over_rows} devices"
    if config.num_key_value_heads % over_heads:
        return f"{config.num_key_value_heads} key heads do not divide over {over_heads} devices"
    return ""


def _size(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in automatic_axes(mesh, axes))


def _per_device(attend_rows: Callable, mesh: AbstractMesh) -> Callable:
    """Each device attends on its own rows and heads."""
    if mesh.empty or mesh.size == 1 or not automatic_axes(mesh, mesh.axis_names):
        return attend_rows
    rows = PartitionSpec(automatic_axes(mesh, ROW_AXES))
    heads = PartitionSpec(automatic_axes(mesh, ROW_AXES), None, automatic_axes(mesh, HEAD_AXES))
    # The loops start from constants and Pallas declares no varying axes: no check of replication.
    return jax.shard_map(
        attend_rows, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )
