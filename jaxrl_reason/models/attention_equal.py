"""Attention among equal ids, in both directions: of the patches of images and videos.

Patches of an image may be anywhere in a row and ids in any order. On TPUs this is the flash kernel
of JAX (Pallas), elsewhere `attend` on some queries at a time. On a mesh every device computes its
own rows and heads, which also keeps the compiler from cutting patches by their width as parameters
are cut.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models.attention import attend
from jaxrl_reason.models.mesh import HEAD_AXES, cut, platform_of, row_axes, size_of

SCORES = 1 << 20
"""Attention scores computed at a time, of one head of one row."""
FEWEST_QUERIES = 64
"""Queries attended at a time in the longest rows."""
LANES = 128
"""Rows are padded to a multiple of it for the kernel."""
BLOCKS = (512, 256, LANES)
"""Slots of a block of the kernel, the first that divides the row."""
NEAR = (1024, 4096)
"""Patches of a part; the first size that ids are near in is taken."""
_QUERY_BLOCKS = ("block_q", "block_q_major_dkv", "block_q_dkv", "block_q_dq")
_KEY_BLOCKS = ("block_k_major", "block_k", "block_k_major_dkv", "block_k_dkv")
_KEY_BLOCKS += ("block_k_major_dq", "block_k_dq")


def attend_equal(
    queries: Float[Array, "R P N H"],
    keys: Float[Array, "R P N H"],
    values: Float[Array, "R P N H"],
    ids: Int[Array, "R P"],
) -> Float[Array, "R P N H"]:
    """`attend` among patches with equal ids; memory grows with P and not with its square."""
    mesh, count = jax.sharding.get_abstract_mesh(), queries.shape[0]
    # The compiler does not partition a kernel: it runs where a device has rows of its own.
    alone = jax.device_count() == 1 if mesh.empty else mesh.size == 1
    has_kernel = platform_of(mesh) == "tpu" and (alone or row_axes(mesh, count))
    even = queries.shape[2] % size_of(mesh, HEAD_AXES) == 0

    def specs(rows, heads):
        by_head = PartitionSpec(rows, None, heads if even else None)
        return (by_head, by_head, by_head, PartitionSpec(rows)), by_head

    function = cut(attend_flash if has_kernel else attend_some, count, specs)
    return function(queries, keys, values, ids)


def attend_some(queries, keys, values, ids):
    """`attend_equal` with at most `SCORES` scores of a head and row at a time.

    In long rows some queries at a time, whose scores the backward pass computes again.
    """
    rows, length = ids.shape
    size = max(FEWEST_QUERIES, SCORES // length)
    if length <= size:
        return attend(queries, keys, values, ids[:, :, None] == ids[:, None, :])
    count = -(-length // size)

    def parts(x):
        x = jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(rows, count, size, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def some(part):
        queries, of_queries = part
        return attend(queries, keys, values, of_queries[:, :, None] == ids[:, None, :])

    mixed = jnp.moveaxis(jax.lax.map(some, (parts(queries), parts(ids))), 0, 1)
    return mixed.reshape(rows, count * size, *queries.shape[2:])[:, :length]


@jax.custom_vjp
def attend_flash(
    queries: Float[Array, "R P N H"],
    keys: Float[Array, "R P N H"],
    values: Float[Array, "R P N H"],
    ids: Int[Array, "R P"],
) -> Float[Array, "R P N H"]:
    """`attend_equal` by the kernel, which needs a TPU or `force_tpu_interpret_mode`.

    The kernel multiplies every pair that it is given. Frames of a video and windows of an image lie
    together, so where all patches with an id are in two neighbouring parts of `NEAR` patches, it is
    given parts with their neighbours; what patches with id 0 get, which is nobody's, differs then.
    """
    which, ways = _ways(ids)
    return jax.lax.switch(which, ways, queries, keys, values, ids)


def _forward(queries, keys, values, ids):
    return attend_flash(queries, keys, values, ids), (queries, keys, values, ids)


def _backward(given, gradient):
    # The way is chosen again, for else the residuals of all ways would be kept.
    *tensors, ids = given
    which, ways = _ways(ids)

    def pull(way):
        return lambda *x: jax.vjp(lambda *tensors: way(*tensors, ids), *x)[1](gradient)

    found = jax.lax.switch(which, [pull(way) for way in ways], *tensors)
    return (*found, np.zeros(ids.shape, jax.dtypes.float0))


attend_flash.defvjp(_forward, _backward)


def _ways(ids: Int[Array, "R P"]) -> tuple[Int[Array, ""], list[Callable[..., Array]]]:
    """Ways to attend, the one with the fewest pairs first, and which of them is right for ids."""
    sizes = [size for size in NEAR if 4 * size <= ids.shape[1]]
    ways = [functools.partial(_attend_near, size=size) for size in sizes]
    fits = jnp.stack([*(_are_near(ids, size) for size in sizes), jnp.asarray(True)])
    return jnp.argmax(fits), [*ways, _attend_all]


def _are_near(ids: Int[Array, "R P"], size: int) -> Bool[Array, ""]:
    """Whether parts with equal ids are neighbours, by the least and the greatest id of each."""
    parts = _filled(ids, size, 0).reshape(ids.shape[0], -1, size)
    none = jnp.iinfo(ids.dtype).max
    low, high = jnp.where(parts > 0, parts, none).min(axis=2), parts.max(axis=2)
    overlap = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    places = jnp.arange(parts.shape[1])
    far = jnp.abs(places[:, None] - places[None, :]) > 1
    return ~jnp.any(overlap & far[None])


def _attend_near(queries, keys, values, ids, *, size: int):
    """Attention of each part of `size` patches to itself and its neighbours."""
    rows, length = ids.shape

    def part(x, fill=0):
        x = _filled(x, size, fill)
        return x.reshape(rows, -1, size, *x.shape[2:])

    def joined(x):
        return x.reshape(-1, *x.shape[2:])

    def around(x, fill=0):
        parts = part(x, fill)
        ends = jnp.full_like(parts[:, :1], fill)
        before = jnp.concatenate([ends, parts[:, :-1]], axis=1)
        after = jnp.concatenate([parts[:, 1:], ends], axis=1)
        return joined(jnp.concatenate([before, parts, after], axis=2))

    # No patch has the id of what is filled up, but for what is filled up itself.
    mixed = _kernel(
        joined(part(queries)), around(keys), around(values), joined(part(ids, -1)), around(ids, -1)
    )
    return mixed.reshape(rows, -1, *mixed.shape[2:])[:, :length]


def _attend_all(queries, keys, values, ids):
    """Attention of all patches to all."""
    length = ids.shape[1]
    queries, keys, values = (_filled(x, LANES, 0) for x in (queries, keys, values))
    filled = _filled(ids, LANES, -1)
    return _kernel(queries, keys, values, filled, filled)[:, :length]


def _kernel(queries, keys, values, ids, ids_of_keys):
    """The kernel for lengths that `LANES` divides."""
    of_queries, of_keys = (
        next(size for size in BLOCKS if x.shape[1] % size == 0) for x in (queries, keys)
    )
    mixed = flash_attention.flash_attention(
        *(x.swapaxes(1, 2) for x in (queries, keys, values)),
        segment_ids=flash_attention.SegmentIds(ids, ids_of_keys),
        sm_scale=queries.shape[-1] ** -0.5,
        block_sizes=flash_attention.BlockSizes(
            block_b=1,
            **dict.fromkeys(_QUERY_BLOCKS, of_queries),
            **dict.fromkeys(_KEY_BLOCKS, of_keys),
        ),
    )
    return mixed.swapaxes(1, 2)


def _filled(x: Array, multiple: int, fill: int) -> Array:
    """Patches up to a multiple, behind those of each row."""
    padding = ((0, 0), (0, -x.shape[1] % multiple), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, padding, constant_values=fill)
