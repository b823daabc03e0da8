"""One mesh over whatever devices are there, and where every array lies on it.

Parameters name their logical axes where they are declared (`Model.axes`); `AxisRules` maps those
names to mesh axes. Batches are cut over `data`, `fsdp` and `expert` together, and what a
model makes of their tokens also over `context`. The same code serves one CPU, eight virtual devices
and a pod; one configuration field changes the mesh.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrl_reason.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


_WINDOWED = "xla_jf_spmd_threshold_for_windowed_einsum_mib"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and then takes the devices that are left."""

    data: int = -1
    """Replicas of the parameters, each on its own part of the batch."""
    fsdp: int = 1
    """Devices over which parameters, optimiser state and the batch are cut."""
    expert: int = 1
    """Devices over which the experts of a mixture and the batch are cut."""
    context: int = 1
    """Devices over which the tokens of a row are cut in training, the rows in sampling, and
    parameters and optimiser state as over `fsdp`; for long rows."""
    tensor: int = 1
    """Devices over which heads, MLP and vocabulary are cut."""


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Mesh axis, or several, or None (replicated) for each logical axis name of a parameter."""

    rules: Mapping[str, str | tuple[str, ...] | None]

    def spec(self, names: Sequence[str]) -> PartitionSpec:
        """The partition of one parameter.

        Raises:
            ValueError: a name has no rule, or two names of this parameter share a mesh axis.
        """
        unknown = [name for name in names if name not in self.rules]
        if unknown:
            raise ValueError(f"no rule for logical axes {unknown}; rules: {sorted(self.rules)}")
        axes = [self.rules[name] for name in names]
        used = [axis for entry in axes for axis in axes_of(entry)]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {tuple(names)} use a mesh axis twice: {axes}")
        return PartitionSpec(*axes)


DEFAULT_RULES = AxisRules(
    {
        "vocab": "tensor",
        "embed": ("fsdp", "context"),
        "mlp": "tensor",
        "heads": "tensor",
        "kv_heads": "tensor",
        "experts": "expert",
        "head": None,
        "embed_vector": None,
        "router": None,
        "layers": None,
        "rank": None,
        "patch": None,
    }
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration over the given devices (all, by default).

    Raises:
        InputError: the sizes do not multiply to the number of devices, or a slice would hold a part
            of a replica.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    free = [i for i, size in enumerate(sizes) if size == -1]
    fixed = math.prod(size for size in sizes if size != -1)
    wrong = len(free) > 1 or any(size < 1 and size != -1 for size in sizes)
    if not wrong and free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if wrong or math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} does not fit {len(devices)} devices; "
            "sizes must be positive and multiply to that number, and one of them may be -1"
        )
    # Explicit axes, the default of jax.make_mesh from jax 0.10, reject ordinary FSDP einsums.
    return Mesh(_arranged(devices, sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(devices: Sequence[jax.Device], sizes: Sequence[int]) -> np.ndarray:
    """Devices in an order in which the axes that talk most have the shortest ways.

    On TPUs that is the order of the network's links, `tensor`, the last axis, within a host where
    it fits into one, and `data` alone across slices. Elsewhere the devices of a process are
    neighbours, so that `tensor` stays within one.
    """
    if devices[0].platform != "tpu":
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        return np.asarray(ordered).reshape(sizes)
    slices = sorted({getattr(device, "slice_index", None) or 0 for device in devices})
    axis = MESH_AXES.index("data")
    if sizes[axis] % len(slices):
        raise InputError(
            f"mesh.data={sizes[axis]} must be a multiple of the {len(slices)} slices, between "
            "which only replicas of the parameters talk"
        )
    within = [*sizes[:axis], sizes[axis] // len(slices), *sizes[axis + 1 :]]
    of = lambda number: [d for d in devices if (getattr(d, "slice_index", None) or 0) == number]
    return np.concatenate([_of_slice(of(number), within) for number in slices], axis=axis)


class _Box(NamedTuple):
    """Neighbouring chips, which `mesh_utils` arranges as if they were one."""

    chips: tuple[jax.Device, ...]
    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "box"
    core_on_chip: int = 0


def _of_slice(devices: Sequence[jax.Device], sizes: Sequence[int]) -> np.ndarray:
    """Devices of one slice by the links of its network."""
    plain = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    groups = plain.reshape(-1, sizes[-1])
    if all(len({device.process_index for device in group}) == 1 for group in groups):
        return plain
    boxes = _boxes(devices, sizes[-1])
    if boxes is None:
        return plain
    arranged = mesh_utils.create_device_mesh(sizes[:-1], boxes, allow_split_physical_axes=True)
    chips = np.empty(tuple(sizes), object)
    for place in np.ndindex(*arranged.shape):
        chips[place] = arranged[place].chips
    return chips


def _boxes(devices: Sequence[jax.Device], size: int) -> list[_Box] | None:
    """Boxes of so many chips, each within a host; None if hosts are no boxes, or are smaller."""
    coords: np.ndarray = np.asarray([device.coords for device in devices])
    coords -= coords.min(axis=0)
    processes = np.asarray([device.process_index for device in devices])
    of_one = coords[processes == processes[0]]
    host = of_one.max(axis=0) - of_one.min(axis=0) + 1
    hosts = {(p, *at) for p, at in zip(processes.tolist(), (coords // host).tolist(), strict=True)}
    box, left = [], size
    for length in host.tolist():
        box.append(math.gcd(length, left))
        left //= box[-1]
    if left > 1 or len(hosts) * math.prod(host) != len(devices):
        return None
    if len({process for process, *_ in hosts}) != len(hosts):
        return None
    found: dict[tuple[int, ...], dict[tuple[int, ...], jax.Device]] = {}
    for device, at, inside in zip(devices, coords // box, coords % box, strict=True):
        found.setdefault(tuple(at.tolist()), {})[tuple(inside.tolist())] = device
    order = _snake(box)
    return [_Box(tuple(chips[place] for place in order), at) for at, chips in found.items()]


def _snake(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """The places of a box, each a neighbour of the one before it."""
    if not sizes:
        return [()]
    inner = _snake(sizes[1:])
    turns = [inner[:: -1 if first % 2 else 1] for first in range(sizes[0])]
    return [(first, *rest) for first, places in enumerate(turns) for rest in places]


def tree_shardings(mesh: Mesh, axes, shapes, rules: AxisRules = DEFAULT_RULES):
    """Shardings of parameters.

    Args:
        mesh: from `make_mesh`.
        axes: tree of tuples of logical axis names.
        shapes: tree of the same structure with the parameters or their shapes.
        rules: logical to mesh axes.

    Raises:
        InputError: dimensions that their mesh axis does not divide, all listed.
    """
    problems = []

    def sharding(path, names, shape):
        spec = PartitionSpec(*(_present(mesh, entry) for entry in rules.spec(names)))
        for name, entry, size in zip(names, spec, shape.shape, strict=True):
            sizes = {axis: mesh.shape[axis] for axis in axes_of(entry)}
            if size % math.prod(sizes.values()):
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                over = " x ".join(f"{axis}={count}" for axis, count in sizes.items())
                problems.append(f"{where}: {name}={size} over {over}")
        return NamedSharding(mesh, spec)

    is_names = lambda x: isinstance(x, tuple)
    result = jax.tree_util.tree_map_with_path(sharding, axes, shapes, is_leaf=is_names)
    if problems:
        raise InputError(
            "these parameters cannot be cut evenly over the mesh: " + "; ".join(problems)
        )
    return result


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a partition names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _present(mesh: Mesh, entry: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """Of several axes those which the mesh has more than one device along; the first, if none."""
    if not isinstance(entry, tuple):
        return entry
    cut = tuple(axis for axis in entry if mesh.shape.get(axis, 1) > 1) or entry[:1]
    return cut if len(cut) > 1 else cut[0]


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of values that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, *, batch_axis: int = 0) -> NamedSharding:
    """The sharding of an array whose axis `batch_axis` is cut over `batch_axes`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * batch_axis, batch_axes(mesh)))


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh over which a batch is cut; a mesh of the caller's may lack some."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.shape)


def batch_multiple(mesh: Mesh) -> int:
    """A batch must be a multiple of this many rows."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def place_batch(batch, mesh: Mesh, *, batch_axis: int = 0, rows: int | None = None):
    """A tree of host arrays on the mesh, cut along their batch axis.

    Args:
        batch: the arrays. With `rows`, of the batch axis only the `own_rows`.
        mesh: where to.
        batch_axis: that is cut.
        rows: of the whole batch.

    Raises:
        InputError: the batch does not divide over the mesh.
    """
    multiple = batch_multiple(mesh)
    for x in jax.tree.leaves(batch):
        size = x.shape[batch_axis] if rows is None else rows
        if size % multiple:
            raise InputError(
                f"a batch of {size} rows does not divide over {multiple} devices "
                f"(mesh {dict(mesh.shape)}); use a multiple of {multiple}"
            )
    sharding = batch_sharding(mesh, batch_axis=batch_axis)
    if rows is None:
        return put(batch, sharding)
    at = np.zeros(rows, np.int64)
    own = own_rows(mesh, rows)
    at[own] = np.arange(len(own))

    def place(x):
        shape = (*x.shape[:batch_axis], rows, *x.shape[batch_axis + 1 :])
        part = lambda index: np.take(x, at[index[batch_axis]], axis=batch_axis)
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch)


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What `jax.jit` is told for passes over a whole model on the devices of a mesh.

    On v6e products are not cut into those with each part of a gathered operand: every part would
    add to all of the output, and memory, not products, would bound a step. `LIBTPU_INIT_ARGS` has
    the last word.
    """
    kind = mesh.devices.flat[0].device_kind
    if kind not in ("TPU v6 lite", "TPU v6e") or _WINDOWED in os.environ.get(
        "LIBTPU_INIT_ARGS", ""
    ):
        return {}
    return {_WINDOWED: "1000000"}


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """The rows of a batch that devices of this process have, ascending."""
    places = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in places]))


def put(tree, sharding):
    """Host arrays where they belong; of several processes each has them whole and keeps its parts.

    Args:
        tree: of arrays.
        sharding: of all of them, or a tree of shardings that begins like `tree`.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(sharding, x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(sharding, jax.random.key_data(x)))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    each = lambda sharding, part: jax.tree.map(lambda x: place(sharding, x), part)
    return jax.tree.map(each, sharding, tree)


@dataclasses.dataclass(frozen=True)
class OnMesh(Generic[P, R]):
    """A jitted function that is traced with a mesh set, so that its contents can be cut over it.

    Kernels and loops are not partitioned by the compiler; where they know the mesh, they are cut by
    `jax.shard_map`.
    """

    function: Callable[P, R]
    mesh: Mesh

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call it; it is compiled for new shapes."""
        with jax.set_mesh(self.mesh):
            return self.function(*args, **kwargs)

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Lowered:
        """Its program for arguments of these shapes, which need no device."""
        with jax.set_mesh(self.mesh):
            return self.function.lower(*args, **kwargs)


def jit_on_mesh(function: Callable[P, R], mesh: Mesh, **options: Any) -> OnMesh[P, R]:
    """Jit a pass over a model as it is compiled best for the devices of a mesh.

    Args:
        function: pure.
        mesh: with which it is traced.
        options: of `jax.jit`, such as `out_shardings`.
    """
    return OnMesh(jax.jit(function, compiler_options=compiler_options(mesh), **options), mesh)
