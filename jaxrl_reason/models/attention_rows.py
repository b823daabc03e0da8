"""Attention of whole rows, without a cache: one function, and the backend that suits the device.

Every backend computes `attend` with `row_mask`; only outputs at padding differ, which nobody reads.
Each has a plan, made once from the ids of the rows and used by all layers, and a function from
queries, keys, values and plan. Leaves of a plan are [B, ...], so that on a mesh it is cut as the
rows are.

On several devices the loops and kernels run inside `jax.shard_map`: rows over `data`, `fsdp` and
`expert`, heads over `tensor`. The mesh is the one that the caller has set (`jax.set_mesh`); where
none is set and there are several devices, "auto" is the plain backend, which XLA partitions by
itself.

The axis `context` cuts rows where keys and values are kept, and tokens of a row where gradients are
wanted. There a device exchanges its tokens of all heads for all tokens of some heads and back, as
in DeepSpeed-Ulysses (arXiv 2309.14509): every backend sees whole rows, so results are those of one
device, and devices have equal work whatever the mask. Key heads are repeated where they are fewer.
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
from jaxrl_reason.models.mesh import (
    HEAD_AXES,
    LENGTH_AXIS,
    ROW_AXES,
    TOKEN_AXES,
    automatic_axes,
    platform_of,
    size_of,
)


class Axes(NamedTuple):
    """Mesh axes that cut queries, keys and values besides `HEAD_AXES`."""

    rows: tuple[str, ...]
    length: tuple[str, ...]


BY_ROW = Axes(TOKEN_AXES, ())
"""Tokens of a row are where the row is."""
ALONG_LENGTH = Axes(ROW_AXES, (LENGTH_AXIS,))
"""Tokens of a row are cut too."""


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
    *,
    axes: Axes = ALONG_LENGTH,
) -> Callable[[Bool[Array, ""] | bool], MixRows]:
    """Attention of these rows: of a layer, by whether it is sliding.

    The plans of the two kinds of layers are alike, so that a loop over layers can choose between
    them at run time. `positions` are needed where a layer is sliding.

    Raises:
        ValueError: the configuration names a backend that cannot run here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, length = segment_ids.shape
    name = choose_backend(config, (rows, length), mesh, axes)
    backend = BACKENDS[name]
    exchanges = size_of(mesh, axes.length) > 1 and not _uneven(config, rows, mesh, axes)
    mix = backend.attend
    if name != "plain" or exchanges:
        mix = _per_device(mix, mesh, axes)
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


def choose_backend(
    config: ModelConfig, shape: tuple[int, int], mesh: AbstractMesh, axes: Axes = ALONG_LENGTH
) -> str:
    """The name of the backend for rows of a shape [B, T] on a mesh (empty where none is set).

    Raises:
        ValueError: the configuration names a backend that cannot run here.
    """
    platform = platform_of(mesh)
    refused = functools.partial(
        _refusal, config=config, shape=shape, mesh=mesh, axes=axes, platform=platform
    )
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


def _refusal(
    name: str, *, config: ModelConfig, shape, mesh: AbstractMesh, axes: Axes, platform: str
) -> str:
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
    return _uneven(config, shape[0], mesh, axes)


def _uneven(config: ModelConfig, rows: int, mesh: AbstractMesh, axes: Axes) -> str:
    over_rows, over_heads = size_of(mesh, axes.rows), size_of(mesh, HEAD_AXES)
    over_both = over_heads * size_of(mesh, axes.length)
    if rows % over_rows:
        return f"{rows} rows do not divide over {over_rows} devices"
    if config.num_key_value_heads % over_heads:
        return f"{config.num_key_value_heads} key heads do not divide over {over_heads} devices"
    if config.num_attention_heads % over_both:
        heads, over = config.num_attention_heads, "tensor and context"
        return f"{heads} heads do not divide over {over_both} devices along {over}"
    return ""


def _per_device(attend_rows: Callable, mesh: AbstractMesh, axes: Axes) -> Callable:
    """Each device attends on its own rows and heads."""
    if mesh.empty or mesh.size == 1 or not automatic_axes(mesh, mesh.axis_names):
        return attend_rows
    over_rows, over_length, over_heads = (
        automatic_axes(mesh, some) for some in (axes.rows, axes.length, HEAD_AXES)
    )
    rows, heads = PartitionSpec(over_rows), PartitionSpec(over_rows, over_length, over_heads)
    exchange = _exchanged if size_of(mesh, axes.length) > 1 else lambda attend_rows, _: attend_rows
    # The loops start from constants and Pallas declares no varying axes: no check of replication.
    return jax.shard_map(
        exchange(attend_rows, size_of(mesh, axes.length)),
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )


def _exchanged(attend_rows: Callable, count: int) -> Callable:
    """Of a device: some tokens of all its heads for all tokens of some of them, and back."""
    move = functools.partial(jax.lax.all_to_all, axis_name=LENGTH_AXIS, tiled=True)

    def attend(queries, keys, values, plan):
        times = math.lcm(keys.shape[2], count) // keys.shape[2]
        keys, values = (jnp.repeat(x, times, axis=2) for x in (keys, values))
        whole = (move(x, split_axis=2, concat_axis=1) for x in (queries, keys, values))
        return move(attend_rows(*whole, plan), split_axis=1, concat_axis=2)

    return attend
