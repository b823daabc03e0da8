"""Every token through its few experts: one function, and the way that suits the device.

    dense    every expert on every token, most of them with weight 0
    blocks   tokens sorted by expert, in blocks of rows of one expert; a loop over the blocks
    ragged   the same, with `jax.lax.ragged_dot` in place of the loop

No way drops a token, and all compute the same. `ragged_dot` is native on TPUs only: elsewhere XLA
expands it to a product over all experts with a copy of the rows for each. It does so on TPUs too
with its gradient in the kernel, which is therefore a loop in both.

On a mesh (`jax.set_mesh`) this runs inside `jax.shard_map`. Every device along `expert` holds some
of the experts: it gathers the tokens of the axis, computes what its experts add to them, and the
sums are scattered back. Experts never travel along `expert`. The width F is cut over `tensor`.

Einsum alphabet: S token, E expert, D model width, F expert width, R row of a sorted layout, C block
of rows, B row of a block.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxrl_reason.models.attention import wide_dtype
from jaxrl_reason.models.layers import PRODUCT
from jaxrl_reason.models.mesh import automatic_axes, platform_of, row_axes

EXPERT_AXIS, WIDTH_AXIS = "expert", "tensor"

Projection = Mapping[str, Array]
"""`kernel` [E, inputs, outputs]; with an adapter also `lora_a` [E, inputs, r], `lora_b` [E, r,
outputs]."""
Projections = Mapping[str, Projection]
"""`gate` and `up` from D to F, `down` from F to D."""

# Sizes of blocks: half of what an expert gets on average, so that few rows are filling.
CPU_BLOCK = 64
"""Rows of a block on a CPU at most; it multiplies one block at a time."""
GPU_BLOCK, GPU_CHUNK = 128, 32
"""Rows of a block on a GPU at most, and blocks multiplied at once, with a copy of their experts."""
TPU_BLOCK = 512
"""Rows of a block on a TPU at most, for the gradient of the kernels."""
GPU_FEW_TOKENS = 256
"""So many tokens and fewer are a matter of reading weights, on a GPU: every expert once."""


class Way(NamedTuple):
    """How to compute, and its sizes."""

    name: Literal["dense", "blocks", "ragged"]
    block: int = 1
    """Rows of a block."""
    chunk: int = 1
    """Blocks that are multiplied at once."""
    share: float = 1.0
    """Of the assignments, those to experts of this device if all experts get as many."""


def choose_way(shape: tuple[int, int], num_experts: int, here: int, mesh: AbstractMesh) -> Way:
    """What suits a device.

    Args:
        shape: number of tokens on it, and of experts for each.
        num_experts: experts among which they choose.
        here: experts on the device.
        mesh: that is set, empty where none is.
    """
    tokens, assignments = shape[0], shape[0] * shape[1]
    platform = platform_of(mesh)
    if mesh.empty and jax.device_count() > 1:
        return Way("dense")  # arrays may be cut; the others are not partitioned by the compiler
    half = 1 << (max(1, assignments // (2 * num_experts)).bit_length() - 1)
    if platform == "cpu":
        return Way("blocks", block=min(half, CPU_BLOCK))
    if platform == "tpu":
        return Way("ragged", block=min(half, TPU_BLOCK))
    if 3 * assignments <= here:  # to copy an expert's weights is to move them three times
        return Way("blocks", block=1, chunk=assignments)
    if tokens <= GPU_FEW_TOKENS:
        return Way("dense")
    return Way("blocks", block=min(max(half, 16), GPU_BLOCK), chunk=GPU_CHUNK)


def mix_experts(
    x: Float[Array, "S D"],
    experts: Int[Array, "S k"],
    weights: Float[Array, "S k"],
    projections: Projections,
    *,
    activation: Callable[[Array], Array],
    adapter_scale: float = 1.0,
    way: Way | None = None,
) -> Float[Array, "S D"]:
    """The weighted sum of down(act(gate(x)) * up(x)) over the experts of each token.

    Args:
        x: tokens, in the dtype to compute in.
        experts: the experts of each token; E stands for none.
        weights: the factor of each.
        projections: of all E experts.
        activation: of the gate.
        adapter_scale: factor of adapters.
        way: one way to compute; by default what suits the device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    projections = {name: _cast(p, x.dtype) for name, p in projections.items()}
    num_experts = projections["gate"]["kernel"].shape[0]

    def mix(x, experts, weights, projections):
        here = projections["gate"]["kernel"].shape[0]
        chosen = way or choose_way(experts.shape, num_experts, here, mesh)
        settings = {"activation": activation, "adapter_scale": adapter_scale}
        if chosen.name == "dense":
            return _mix_dense(x, experts, weights, projections, **settings)
        chosen = chosen._replace(share=here / num_experts)
        return _mix_sorted(x, experts, weights, projections, way=chosen, **settings)

    return _per_device(mix, mesh, x, experts, weights, projections)


def _cast(projection: Projection, dtype) -> Projection:
    return {name: leaf.astype(dtype) for name, leaf in projection.items()}


# On a mesh


def _per_device(mix, mesh, x, experts, weights, projections):
    automatic = automatic_axes(mesh, mesh.axis_names)
    if mesh.empty or mesh.size == 1 or not automatic:
        return mix(x, experts, weights, projections)
    rows = row_axes(mesh, x.shape[0])
    has_experts, has_width = (axis in automatic for axis in (EXPERT_AXIS, WIDTH_AXIS))
    gathered = EXPERT_AXIS in rows
    # Sums over axes that cut no rows are left to the compiler: a part for every device.
    parts = tuple(a for a in (EXPERT_AXIS, WIDTH_AXIS) if a in automatic and a not in rows)

    def on_device(x, experts, weights, projections):
        if gathered:
            gather = functools.partial(jax.lax.all_gather, axis_name=EXPERT_AXIS, tiled=True)
            x, experts, weights = map(gather, (x, experts, weights))
        if has_experts:
            here = projections["gate"]["kernel"].shape[0]
            experts = experts - jax.lax.axis_index(EXPERT_AXIS) * here
            experts = jnp.where((experts >= 0) & (experts < here), experts, here)
        mixed = mix(x, experts, weights, projections)
        if gathered:
            mixed = jax.lax.psum_scatter(mixed, EXPERT_AXIS, scatter_dimension=0, tiled=True)
        return mixed[None]

    expert = EXPERT_AXIS if has_experts else None
    width = WIDTH_AXIS if has_width else None

    def spec(path, leaf):
        name, kind = (key.key for key in path)
        inputs, outputs = (width, None) if name == "down" else (None, width)
        if kind == "lora_a":
            outputs = None
        if kind == "lora_b":
            inputs = None
        return PartitionSpec(expert, inputs, outputs)

    by_row = PartitionSpec(rows)
    cut = jax.shard_map(
        on_device,
        in_specs=(by_row,) * 3 + (jax.tree_util.tree_map_with_path(spec, projections),),
        out_specs=PartitionSpec(parts, rows),
        axis_names=set(automatic),
        check_vma=False,  # loops start from constants
    )
    return jnp.sum(cut(x, experts, weights, projections), axis=0)


# Every expert on every token


def _mix_dense(x, experts, weights, projections, *, activation, adapter_scale):
    num_experts = projections["gate"]["kernel"].shape[0]
    chosen = jax.nn.one_hot(experts, num_experts, dtype=weights.dtype)
    factor = jnp.sum(chosen * weights[..., None], axis=1).T[..., None]
    of_rows = {2: "sd,edf->esf", 3: "esd,edf->esf"}  # of all experts, or of each its own
    multiply = lambda rows, kernel: jnp.einsum(of_rows[rows.ndim], rows, kernel)
    project = functools.partial(_project, multiply, projections, adapter_scale)
    inner = _inner(project, x, factor, activation)
    return jnp.sum(project("down", inner), axis=0, dtype=factor.dtype).astype(x.dtype)


def _inner(project, rows, factor, activation):
    """act(gate) * up times the factor of each row: weighted here, `down` is not kept for it."""
    gate, up = (checkpoint_name(project(name, rows), PRODUCT) for name in ("gate", "up"))
    return ((activation(gate) * up).astype(factor.dtype) * factor).astype(up.dtype)


def _project(multiply, projections, adapter_scale, name, rows):
    projection = projections[name]
    out = multiply(rows, projection["kernel"])
    if "lora_a" in projection:
        inner = multiply(rows, projection["lora_a"])
        scale = jnp.asarray(adapter_scale, out.dtype)
        out = out + multiply(inner, projection["lora_b"]) * scale
    return out


# Tokens sorted by expert


class Layout(NamedTuple):
    """Assignments, each a token with one of its k experts, in R rows sorted by expert.

    The rows of every expert fill whole blocks, the last of them up with rows of nobody.
    """

    row: Int[Array, "S k"]
    """Of each assignment; R if it has none."""
    assignment: Int[Array, " R"]
    """In each row; S k if none."""
    sizes: Int[Array, " E"]
    """Rows of each expert."""
    expert: Int[Array, " C"]
    """Of each block; E beyond the last."""
    count: Int[Array, ""]
    """Blocks of some expert."""


def make_layout(
    experts: Int[Array, "S k"], num_experts: int, block: int = 1, chunk: int = 1
) -> Layout:
    """Rows for all assignments; R is enough for any distribution and C a multiple of `chunk`."""
    number = experts.size
    flat = experts.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    each = jnp.arange(num_experts, dtype=jnp.int32)
    ends = jnp.searchsorted(flat[order], each, side="right").astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    sizes = (ends - starts + block - 1) // block * block
    last_rows = jnp.cumsum(sizes)
    first_rows = last_rows - sizes

    blocks = min(number, (number + num_experts * (block - 1)) // block)
    blocks = -(-blocks // chunk) * chunk
    rows = jnp.arange(blocks * block, dtype=jnp.int32)
    expert = jnp.searchsorted(last_rows, rows[::block], side="right").astype(jnp.int32)
    of_row = jnp.minimum(jnp.repeat(expert, block), num_experts - 1)
    place = starts[of_row] + rows - first_rows[of_row]
    used = (rows < last_rows[-1]) & (place < ends[of_row])
    assignment = jnp.where(used, order[jnp.minimum(place, number - 1)], number)
    row = jnp.full(number, rows.size, jnp.int32).at[assignment].set(rows, mode="drop")
    return Layout(row.reshape(experts.shape), assignment, sizes, expert, last_rows[-1] // block)


def _mix_sorted(x, experts, weights, projections, *, activation, adapter_scale, way):
    (tokens, per_token), num_experts = experts.shape, projections["gate"]["kernel"].shape[0]
    layout = make_layout(experts, num_experts, way.block, way.chunk)
    layout = jax.tree.map(lambda leaf: checkpoint_name(leaf, PRODUCT), layout)
    multiply = functools.partial(_multiply, way, layout)
    project = functools.partial(_project, multiply, projections, adapter_scale)
    by_row, flat = layout.row.reshape(-1, 1), layout.assignment[:, None]
    rows = _move(x, layout.assignment // per_token, layout.row)
    factor = _move(weights.reshape(-1, 1), layout.assignment, by_row)
    out = project("down", _inner(project, rows, factor, activation))
    out = _move(out, by_row[:, 0], flat).reshape(tokens, per_token, -1)
    return jnp.sum(out, axis=1, dtype=factor.dtype).astype(x.dtype)


@jax.custom_vjp
def _move(
    x: Float[Array, "n D"], take: Int[Array, " m"], back: Int[Array, "n c"]
) -> Float[Array, "m D"]:
    """x[take], zeros where `take` is n or more; x[i] is taken by `back[i]`, m for nobody.

    The gradient gathers too, where that of an indexing would scatter.
    """
    return jnp.take(x, take, axis=0, mode="fill", fill_value=0)


def _move_back(back, gradient):
    taken = jnp.take(gradient, back, axis=0, mode="fill", fill_value=0)
    return jnp.sum(taken, axis=1, dtype=wide_dtype(gradient)).astype(gradient.dtype), None, None


_move.defvjp(lambda x, take, back: (_move(x, take, back), back), _move_back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(
    way: Way, layout: Layout, rows: Float[Array, "R D"], kernel: Float[Array, "E D F"]
) -> Float[Array, "R F"]:
    """Every row times the kernel of its expert; what stands beyond the last expert is anything."""
    return _product(way, layout, rows, kernel, contracted=1)


def _multiply_saving(way, layout, rows, kernel):
    return _multiply(way, layout, rows, kernel), (layout, rows, kernel)


def _multiply_gradients(way, saved, gradient):
    # Apart from each other: where kernels are frozen, the second falls away.
    layout, rows, kernel = saved
    of_rows = _product(way, layout, gradient, kernel, contracted=2)
    return None, of_rows, _outer_products(way, layout, rows, gradient)


_multiply.defvjp(_multiply_saving, _multiply_gradients)


def _product(way, layout, rows, kernel, contracted: int):
    """Rows times kernels, whose axis `contracted` is summed over."""
    if way.name == "ragged":
        axes = jax.lax.RaggedDotDimensionNumbers((([1], [contracted]), ([], [])), [0], [0])
        return jax.lax.ragged_dot_general(rows, kernel, layout.sizes, axes)
    blocks, width = _cut(rows, layout), kernel.shape[3 - contracted]
    einsum = "cbd,cdf->cbf" if contracted == 1 else "cbf,cdf->cbd"

    def visit(at, out):
        some, experts = (_slice(x, at, way.chunk) for x in (blocks, layout.expert))
        new = jnp.einsum(einsum, some, _read(kernel, experts))
        return jax.lax.dynamic_update_slice_in_dim(out, new, at, axis=0)

    out = jnp.zeros((*blocks.shape[:2], width), rows.dtype)
    return _loop(way, layout, visit, out).reshape(rows.shape[0], width)


def _outer_products(way, layout, rows, gradient):
    """For every expert the sum of row times gradient [E, D, F], added up in `wide_dtype`."""
    wide = wide_dtype(rows)
    left, right = _cut(rows, layout), _cut(gradient, layout)

    def visit(at, total):
        some, others, experts = (_slice(x, at, way.chunk) for x in (left, right, layout.expert))
        # XLA's CPU backend transposes the left side entry by entry, unless it lies transposed.
        turned = jax.lax.optimization_barrier(some.swapaxes(1, 2))
        new = jnp.einsum("cdb,cbf->cdf", turned, others, preferred_element_type=wide)
        if way.chunk > 1:
            return total.at[experts].add(new, mode="drop")
        new = _read(total, experts) + new
        return jax.lax.dynamic_update_slice_in_dim(total, new, experts[0], axis=0)

    total = jnp.zeros((layout.sizes.shape[0], rows.shape[1], gradient.shape[1]), wide)
    return _loop(way, layout, visit, total).astype(rows.dtype)


def _loop(way: Way, layout: Layout, visit, start):
    """`visit(first block, state)` for every chunk of blocks that has one in use."""
    if layout.expert.shape[0] == way.chunk:
        return visit(jnp.int32(0), start)
    trips = (layout.count + way.chunk - 1) // way.chunk
    evenly = min(_even_blocks(way, layout), layout.expert.shape[0])
    with jax.named_scope(f"evenly_{-(-evenly // way.chunk)}"):  # read by the planner
        return jax.lax.fori_loop(0, trips, lambda i, state: visit(i * way.chunk, state), start)


def _even_blocks(way: Way, layout: Layout) -> int:
    """Blocks in use if all experts get as many tokens, the last block of each half filled."""
    rows = layout.row.size * way.share + layout.sizes.size * (way.block - 1) / 2
    return math.ceil(rows / way.block)


def _cut(rows: Float[Array, "R D"], layout: Layout) -> Float[Array, "C B D"]:
    return rows.reshape(layout.expert.shape[0], -1, rows.shape[1])


def _slice(x, start, size):
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _read(kernel: Float[Array, "E D F"], expert: Int[Array, " c"]) -> Float[Array, "c D F"]:
    """Kernels of some experts; a single one is read where it lies."""
    if expert.shape[0] == 1:
        return jax.lax.dynamic_slice_in_dim(kernel, expert[0], 1)
    return jnp.take(kernel, expert, axis=0, mode="clip")
