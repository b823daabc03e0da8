"""Times and bandwidths of a network, by hand."""

import dataclasses

import pytest

from jaxrl_reason.planner.chips import CHIPS
from jaxrl_reason.planner.hlo import Collective, Cost
from jaxrl_reason.planner.roofline import bandwidth, network_shape, rings, times


@dataclasses.dataclass(frozen=True)
class Place:
    """What is read of a device."""

    id: int
    coords: tuple[int, ...]
    slice_index: int = 0


def grid(wide: int, high: int, slices: int = 1) -> list[Place]:
    """Devices of slices of wide x high chips, along the first dimension first."""
    places = [(x, y, 0) for y in range(high) for x in range(wide)]
    return [
        Place(number + of_slice * len(places), place, of_slice)
        for of_slice in range(slices)
        for number, place in enumerate(places)
    ]


V5E = CHIPS["v5e"]
LINK = V5E.link_bandwidth


def test_a_dimension_is_a_ring_where_it_is_as_long_as_the_pod():
    devices = grid(16, 4)
    shape = network_shape(devices)
    assert shape == (16, 4, 1)
    reach = lambda *group: bandwidth(Collective("all-gather", 1.0, group), V5E, devices, shape)
    assert reach(*range(16)) == 2 * LINK
    assert reach(*range(8)) == LINK  # half of a ring is a line
    assert reach(0, 16, 32, 48) == LINK
    assert reach(*range(64)) == 3 * LINK


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("v5p", (2, 2, 4), [False, False, False]),
        ("v5p", (2, 4, 4), [False, False, False]),
        ("v5p", (4, 4, 4), [True, True, True]),
        ("v5p", (4, 8, 16), [True, True, True]),
        ("v4", (4, 4, 2), [False, False, False]),
        ("v5e", (8, 16, 1), [False, True, False]),
        ("v6e", (16, 16, 1), [True, True, False]),
    ],
)
def test_networks_of_three_dimensions_are_rings_from_a_whole_cube_on(kind, shape, expected):
    assert rings(CHIPS[kind], shape) == expected


def test_a_neighbour_is_reached_by_one_link():
    devices = grid(16, 16)
    shape = network_shape(devices)
    assert bandwidth(Collective("collective-permute", 1.0, (0, 1)), V5E, devices, shape) == LINK


def test_slices_talk_through_the_network_of_the_data_centre():
    devices = grid(4, 4, slices=2)
    shape = network_shape(devices)
    between = bandwidth(Collective("all-reduce", 1.0, (0, 16)), V5E, devices, shape)
    assert between == V5E.network_bandwidth


def test_a_program_takes_as_long_as_its_busiest_resource():
    devices = grid(16, 4)
    gather = Collective("all-gather", LINK / 4, tuple(range(16)))
    cost = Cost(2 * V5E.flops, 3 * V5E.memory_bandwidth, {gather: 8.0})
    found = times(cost, V5E, devices)
    assert (found.products, found.memory, found.links) == (2.0, 3.0, 1.0)
    assert (found.total, found.limit) == (3.0, "memory")
    alone = Collective("all-gather", 1.0, (0,))
    assert times(Cost(collectives={alone: 1.0}), V5E, devices).links == 0


@pytest.mark.parametrize("kind", CHIPS)
def test_chips_are_as_their_pages_say(kind):
    chip = CHIPS[kind]
    ports = 2 * chip.torus_axes
    both_ways = {"v4": 600, "v5e": 400, "v5p": 1200, "v6e": 800}[kind]
    assert 2 * ports * chip.link_bandwidth == both_ways * 1e9
    assert chip.source.endswith(kind)
