"""Attention among equal ids, in both directions: of the patches of images and videos.

Patches of an image may be anywhere in a row and ids in any order. On TPUs this is the flash kernel
of JAX (Pallas), elsewhere `attend` on some queries at a time. On a mesh every device computes its
own rows and heads, which also keeps the compiler from cutting patches by their width as parameters
are cut.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

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


def attend_flash(queries, keys, values, ids):
    """`attend_equal` by the kernel, which needs a TPU or `force_tpu_interpret_mode`."""
    length, width = queries.shape[1], queries.shape[-1]
    padding = -length % LANES
    size = next(size for size in BLOCKS if (length + padding) % size == 0)

    def heads_first(x):
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)

    # Ids are at least 0, so that nobody sees what is filled up.
    ids = jnp.pad(ids, ((0, 0), (0, padding)), constant_values=-1)
    names = (
        "block_q block_k_major block_k block_q_major_dkv block_k_major_dkv block_k_dkv block_q_dkv "
        "block_k_major_dq block_k_dq block_q_dq"
    )
    mixed = flash_attention.flash_attention(
        *map(heads_first, (queries, keys, values)),
        segment_ids=flash_attention.SegmentIds(ids, ids),
        sm_scale=width**-0.5,
        block_sizes=flash_attention.BlockSizes(block_b=1, **dict.fromkeys(names.split(), size)),
    )
    return mixed.swapaxes(1, 2)[:, :length]
