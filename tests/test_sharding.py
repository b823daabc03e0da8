"""The mesh, axis rules, and errors that name what does not fit."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxrl_reason import sharding
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Model, preset
from jaxrl_reason.sharding import (
    DEFAULT_RULES,
    AxisRules,
    MeshConfig,
    batch_multiple,
    compiler_options,
    make_mesh,
    place_batch,
    tree_shardings,
)


def test_minus_one_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert batch_multiple(mesh) == 4
    mesh = make_mesh(MeshConfig(expert=4))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 4, "context": 1, "tensor": 1}
    assert batch_multiple(mesh) == 8
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape)["data"] == 1


@pytest.mark.parametrize(
    "sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": 8, "fsdp": 2}, {"fsdp": 0}]
)
def test_meshes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(InputError, match="does not fit 8 devices"):
        make_mesh(MeshConfig(**sizes))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is read of a device to arrange it."""

    id: int
    process_index: int = 0
    coords: tuple[int, ...] = ()
    slice_index: int | None = None
    platform: str = "tpu"
    device_kind: str = "TPU v5p"
    core_on_chip: int = 0


def slices(count: int, *sizes: int) -> list[Chip]:
    """Chips of slices, four of each host, in an order that says nothing about their places."""
    places = [place[::-1] for place in itertools.product(*(range(n) for n in sizes[::-1]))]
    chips = [
        Chip(s * len(places) + i, (s * len(places) + i) // 4, place, s)
        for s in range(count)
        for i, place in enumerate(places)
    ]
    return [chips[i] for i in np.random.default_rng(0).permutation(len(chips))]


def apart(one: Chip, other: Chip) -> int:
    """Links between two chips."""
    return sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True))


def test_neighbours_along_tensor_are_neighbours_in_the_network():
    grid = sharding._arranged(slices(1, 4, 4, 4), (1, 16, 1, 1, 4))
    for group in grid.reshape(16, 4):
        assert max(apart(*pair) for pair in itertools.pairwise(group)) == 1
    assert len({chip.id for chip in grid.flat}) == 64


def hosted(chips: list[Chip], *host: int) -> list[Chip]:
    """The same with hosts of boxes of so many chips."""
    where = lambda chip: (
        chip.slice_index,
        *(c // n for c, n in zip(chip.coords, host, strict=True)),
    )
    hosts = sorted({where(chip) for chip in chips})
    return [dataclasses.replace(chip, process_index=hosts.index(where(chip))) for chip in chips]


@pytest.mark.parametrize(
    ("chips", "host", "sizes"),
    [
        ((1, 4, 4, 4), (2, 2, 1), (1, 16, 1, 1, 4)),
        ((1, 8, 8, 1), (2, 4, 1), (2, 8, 1, 1, 4)),
        ((1, 8, 8, 1), (2, 4, 1), (1, 8, 1, 1, 8)),
        ((1, 4, 8, 1), (2, 2, 1), (2, 2, 1, 2, 4)),
        ((2, 4, 4, 1), (2, 2, 1), (4, 2, 1, 1, 4)),
    ],
)
def test_tensor_stays_within_a_host_whose_chips_are_neighbours(chips, host, sizes):
    grid = sharding._arranged(hosted(slices(*chips), *host), sizes)
    assert grid.shape == sizes
    assert len({chip.id for chip in grid.flat}) == grid.size
    for group in grid.reshape(-1, sizes[-1]):
        assert len({chip.process_index for chip in group}) == 1
        assert max(apart(*pair) for pair in itertools.pairwise(group)) == 1
    for slice_index, part in enumerate(np.split(grid, chips[0])):
        assert {chip.slice_index for chip in part.flat} == {slice_index}


@pytest.mark.parametrize(("host", "tensor"), [((2, 2, 1), 8), ((1, 2, 1), 4), ((2, 2, 1), 16)])
def test_a_tensor_axis_larger_than_a_host_goes_along_the_links(host, tensor):
    grid = sharding._arranged(hosted(slices(1, 8, 8, 1), *host), (1, 64 // tensor, 1, 1, tensor))
    assert len({chip.id for chip in grid.flat}) == 64
    for group in grid.reshape(-1, tensor):
        wide, high, _ = (max(a) - min(a) + 1 for a in zip(*(c.coords for c in group), strict=True))
        assert wide * high == tensor


def test_slices_hold_whole_replicas():
    grid = sharding._arranged(slices(2, 2, 2, 4), (4, 4, 1, 1, 2))
    for replica in grid:
        assert len({chip.slice_index for chip in replica.flat}) == 1
    with pytest.raises(InputError, match=r"mesh\.data=1 must be a multiple of the 2 slices"):
        sharding._arranged(slices(2, 2, 2, 4), (1, 16, 1, 1, 2))


def test_tensor_stays_within_a_process_where_there_is_no_network_to_see():
    mixed = [Chip(i, process_index=i % 2, platform="gpu") for i in range(8)]
    grid = sharding._arranged(mixed, (1, 2, 1, 1, 4))
    for group in grid.reshape(2, 4):
        assert len({chip.process_index for chip in group}) == 1


def test_every_logical_axis_of_the_model_has_a_rule_and_is_used_once():
    model = Model(preset("0.3m", vocab_size=64))
    is_names = lambda x: isinstance(x, tuple)
    for names in jax.tree.leaves(model.axes(), is_leaf=is_names):
        assert isinstance(DEFAULT_RULES.spec(names), PartitionSpec)


def test_unknown_and_doubled_axes_raise():
    rules = AxisRules({"embed": "fsdp", "mlp": "fsdp"})
    with pytest.raises(ValueError, match="no rule for logical axes"):
        rules.spec(("embed", "vocab"))
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        rules.spec(("embed", "mlp"))


def test_dimensions_that_do_not_divide_are_listed_together():
    model = Model(preset("0.3m", vocab_size=63))
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(InputError) as caught:
        tree_shardings(mesh, model.axes(), shapes)
    assert "embedding: vocab=63 over tensor=8" in str(caught.value)
    assert "layers/attention/q/kernel: heads=4 over tensor=8" in str(caught.value)


@pytest.mark.parametrize(
    "sizes", [{"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "expert": 2}, {"expert": 8}]
)
def test_batches_are_cut_over_data_fsdp_and_expert(sizes):
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    placed = place_batch({"x": np.arange(32).reshape(2, 16)}, mesh, batch_axis=1)
    assert placed["x"].addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(placed["x"], np.arange(32).reshape(2, 16))
    with pytest.raises(InputError, match="batch of 12 rows does not divide over 8 devices"):
        place_batch({"x": jnp.zeros((12, 3))}, mesh)


def test_a_mesh_without_an_axis_for_experts_cuts_batches_over_the_others(mesh8):
    assert batch_multiple(mesh8) == 4
    placed = place_batch(np.arange(8), mesh8)
    assert placed.addressable_shards[0].data.shape == (2,)


def test_experts_are_cut_over_their_axis():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    axes = {"gate": ("layers", "experts", "embed", "mlp"), "router": ("layers", "embed", "router")}
    shapes = {"gate": jnp.zeros((3, 4, 8, 6)), "router": jnp.zeros((3, 8, 4))}
    shardings = tree_shardings(mesh, axes, shapes)
    assert shardings["gate"].spec == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert shardings["router"].spec == PartitionSpec(None, "fsdp", None)
    with pytest.raises(InputError, match="gate: experts=3 over expert=2"):
        tree_shardings(mesh, axes, shapes | {"gate": jnp.zeros((3, 3, 8, 6))})


@pytest.mark.parametrize(
    ("kind", "arguments", "is_told"),
    [
        ("TPU v6 lite", "", True),
        ("TPU v6 lite", "--xla_tpu_some=1", True),
        ("TPU v6 lite", "--xla_jf_spmd_threshold_for_windowed_einsum_mib=0", False),
        ("TPU v5", "", False),
        ("cpu", "", False),
    ],
)
def test_only_v6e_is_told_not_to_cut_products(monkeypatch, kind, arguments, is_told):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", arguments)
    mesh = SimpleNamespace(devices=np.array([[SimpleNamespace(device_kind=kind)]], object))
    assert bool(compiler_options(mesh)) == is_told
