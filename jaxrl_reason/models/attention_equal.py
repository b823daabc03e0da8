"""Attention among equal ids, in both directions: of the patches of images and videos.

Patches of an image may be anywhere in a row and ids in any order. On TPUs this is the flash kernel
of JAX (Pallas), elsewhere `attend` on some queries at a time, both of them on parts of a long row
where that is enough. On a mesh every device computes its own rows and heads, which also keeps the
compiler from cutting patches by their width as parameters are cut.
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
Attend = Callable[..., Array]
"""`(queries, keys, values, ids, ids_of_keys)` to what queries get of values with their id."""
_QUERY_BLOCKS = ("block_q", "block_q_major_dkv", "block_q_dkv", "block_q_dq")
_KEY_BLOCKS = ("block_k_major", "block_k", "block_k_major_dkv", "block_k_dkv")
_KEY_BLOCKS += ("block_k_major_dq", "block_k_dq")


def attend_equal(
    queries: Float[Array, "R P N H"],
    keys: Float[Array, "R P N H"],
    values: Float[Array, "R P N H"],
    ids: Int[Array, "R P"],
) -> Float[Array, "R P N H"]:
    """`attend` among patches with equal ids; memory grows with P and not with its square.

    Both ways to do so multiply every pair that they are given. Frames of a video and windows of an
    image lie together, so where all patches with an id are in two neighbouring parts of `NEAR`
    patches, parts are given with their neighbours alone. What patches with id 0 get, which is
    nobody's, differs then.
    """
    mesh, count = jax.sharding.get_abstract_mesh(), queries.shape[0]
    # The compiler does not partition a kernel: it runs where a device has rows of its own.
    alone = jax.device_count() == 1 if mesh.empty else mesh.size == 1
    has_kernel = platform_of(mesh) == "tpu" and (alone or row_axes(mesh, count))
    even = queries.shape[2] % size_of(mesh, HEAD_AXES) == 0

    def specs(rows, heads):
        by_head = PartitionSpec(rows, None, heads if even else None)
        return (by_head, by_head, by_head, PartitionSpec(rows)), by_head

    attend_given = attend_flash if has_kernel else attend_some
    function = cut(functools.partial(attend_near, attend_given), count, specs)
    return function(queries, keys, values, ids)


# Ways to attend among all pairs


def attend_some(queries, keys, values, ids, ids_of_keys):
    """Attention of queries [R Q N H] to keys [R K N H], some scores of a head and row at a time.

    In long rows at most `SCORES` of them, which the backward pass computes again.
    """
    rows, length = ids.shape
    size = max(FEWEST_QUERIES, SCORES // ids_of_keys.shape[1])
    if length <= size:
        return attend(queries, keys, values, ids[:, :, None] == ids_of_keys[:, None, :])
    count = -(-length // size)

    def parts(x):
        x = _filled(x, size, 0)
        return jnp.moveaxis(x.reshape(rows, count, size, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def some(part):
        queries, of_queries = part
        return attend(queries, keys, values, of_queries[:, :, None] == ids_of_keys[:, None, :])

    mixed = jnp.moveaxis(jax.lax.map(some, (parts(queries), parts(ids))), 0, 1)
    return mixed.reshape(rows, count * size, *queries.shape[2:])[:, :length]


def attend_flash(queries, keys, values, ids, ids_of_keys):
    """The same by the kernel, which needs a TPU or `force_tpu_interpret_mode`."""
    length = ids.shape[1]
    # No patch has the id of what is filled up.
    given = [_filled(x, LANES, 0) for x in (queries, keys, values)]
    ids, ids_of_keys = _filled(ids, LANES, -1), _filled(ids_of_keys, LANES, -1)
    of_queries, of_keys = (
        next(size for size in BLOCKS if x.shape[1] % size == 0) for x in (ids, ids_of_keys)
    )
    mixed = flash_attention.flash_attention(
        *(x.swapaxes(1, 2) for x in given),
        segment_ids=flash_attention.SegmentIds(ids, ids_of_keys),
        sm_scale=queries.shape[-1] ** -0.5,
        block_sizes=flash_attention.BlockSizes(
            block_b=1,
            **dict.fromkeys(_QUERY_BLOCKS, of_queries),
            **dict.fromkeys(_KEY_BLOCKS, of_keys),
        ),
    )
    return mixed.swapaxes(1, 2)[:, :length]


# Parts with their neighbours


def attend_near(attend_given: Attend, queries, keys, values, ids):
    """`attend_equal` by one of the ways above."""
    if not _sizes(ids):
        return attend_given(queries, keys, values, ids, ids)
    return _attend_chosen(attend_given, queries, keys, values, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_chosen(attend_given, queries, keys, values, ids):
    which, ways = _ways(attend_given, ids)
    return jax.lax.switch(which, ways, queries, keys, values, ids)


def _forward(attend_given, *given):
    return _attend_chosen(attend_given, *given), given


def _backward(attend_given, given, gradient):
    # The way is chosen again, for else the residuals of all ways would be kept.
    *tensors, ids = given
    which, ways = _ways(attend_given, ids)

    def pull(way):
        return lambda *x: jax.vjp(lambda *tensors: way(*tensors, ids), *x)[1](gradient)

    found = jax.lax.switch(which, [pull(way) for way in ways], *tensors)
    return (*found, np.zeros(ids.shape, jax.dtypes.float0))


_attend_chosen.defvjp(_forward, _backward)


def _sizes(ids: Int[Array, "R P"]) -> list[int]:
    """Parts that are worth it."""
    return [size for size in NEAR if 4 * size <= ids.shape[1]]


def _ways(
    attend_given: Attend, ids: Int[Array, "R P"]
) -> tuple[Int[Array, ""], list[Callable[..., Array]]]:
    """Ways to attend, those with the fewest pairs first, and the first that is right for ids."""
    sizes = _sizes(ids)
    ways = [functools.partial(_attend_parts, attend_given, size) for size in sizes]
    fits = jnp.stack([*(_are_near(ids, size) for size in sizes), jnp.asarray(True)])
    return jnp.argmax(fits), [*ways, lambda q, k, v, ids: attend_given(q, k, v, ids, ids)]


def _are_near(ids: Int[Array, "R P"], size: int) -> Bool[Array, ""]:
    """Whether parts with equal ids are neighbours, by the least and the greatest id of each."""
    parts = _filled(ids, size, 0).reshape(ids.shape[0], -1, size)
    none = jnp.iinfo(ids.dtype).max
    low, high = jnp.where(parts > 0, parts, none).min(axis=2), parts.max(axis=2)
    overlap = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    places = jnp.arange(parts.shape[1])
    far = jnp.abs(places[:, None] - places[None, :]) > 1
    return ~jnp.any(overlap & far[None])


def _attend_parts(attend_given: Attend, size: int, queries, keys, values, ids):
    """Attention of each part of `size` patches to itself and its neighbours."""
    rows, length = ids.shape

    def part(x, fill=0):
        x = _filled(x, size, fill)
        return x.reshape(rows, -1, size, *x.shape[2:])

    def around(x, fill=0):
        parts = part(x, fill)
        ends = jnp.full_like(parts[:, :1], fill)
        before = jnp.concatenate([ends, parts[:, :-1]], axis=1)
        after = jnp.concatenate([parts[:, 1:], ends], axis=1)
        return jnp.concatenate([before, parts, after], axis=2)

    # What is filled up sees what is filled up, and nobody else does.
    given = (part(queries), around(keys), around(values), part(ids, -1), around(ids, -1))
    if attend_given is attend_flash:
        mixed = attend_flash(*(x.reshape(-1, *x.shape[2:]) for x in given))
    else:  # a part at a time, whose scores have room
        parts = [jnp.moveaxis(x, 1, 0) for x in given]
        mixed = jnp.moveaxis(jax.lax.map(lambda part: attend_given(*part), parts), 0, 1)
    return mixed.reshape(rows, -1, *queries.shape[2:])[:, :length]


def _filled(x: Array, multiple: int, fill: int) -> Array:
    """Patches up to a multiple, behind those of each row."""
    padding = ((0, 0), (0, -x.shape[1] % multiple), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, padding, constant_values=fill)
