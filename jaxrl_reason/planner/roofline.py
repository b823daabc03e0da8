"""How long a program takes at least: as long as its busiest resource.

The time of a program is the largest of what products, memory and links would need each on their
own. That assumes that they overlap and that each runs at its peak, so it is a bound that programs
come near to when one of the three rules; `docs/planner.md` says by how much it is off where that
could be measured.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

from jaxrl_reason.planner.chips import Chip
from jaxrl_reason.planner.hlo import Collective, Cost

Limit = Literal["products", "memory", "links"]


class Device(Protocol):
    """What is read of a device: its place in the network, and in which slice it is."""

    id: int


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that a program keeps each resource of a chip busy."""

    products: float
    memory: float
    links: float

    @property
    def total(self) -> float:
        """The largest."""
        return max(self.products, self.memory, self.links)

    @property
    def limit(self) -> Limit:
        """Which one that is."""
        by_name: dict[Limit, float] = {
            "products": self.products,
            "memory": self.memory,
            "links": self.links,
        }
        return max(by_name, key=lambda name: by_name[name])


def times(cost: Cost, chip: Chip, devices: Sequence[Device]) -> Times:
    """Seconds of one execution.

    Args:
        cost: of the program, per chip.
        chip: of the devices.
        devices: in the order in which the program numbers them.
    """
    shape = network_shape(devices)
    links = sum(
        turns * collective.bytes / bandwidth(collective, chip, devices, shape)
        for collective, turns in cost.collectives.items()
        if collective.bytes and len(collective.group) > 1
    )
    return Times(cost.flops / chip.flops, cost.memory_bytes / chip.memory_bandwidth, links)


def network_shape(devices: Sequence[Device]) -> tuple[int, ...]:
    """Sizes of the dimensions of a slice's network; empty if devices have no coordinates."""
    places = [place for device in devices if (place := _place(device))]
    return tuple(max(along) + 1 for along in zip(*places, strict=True)) if places else ()


def rings(chip: Chip, shape: Sequence[int]) -> list[bool]:
    """Which dimensions of a slice's network are rings; the others are lines."""
    wrap = [size % chip.wraps_at == 0 for size in shape]
    # Networks of three dimensions are built of cubes: a slice that is not made of whole ones, as
    # 2x4x4 is not, has no link around.
    return [all(wrap)] * len(wrap) if chip.torus_axes == 3 else wrap


def bandwidth(
    collective: Collective, chip: Chip, devices: Sequence[Device], shape: Sequence[int]
) -> float:
    """Bytes a second at which a chip sends in a collective.

    Between slices it is that of the data centre's network. Within one, a group uses the dimensions
    of the network along which its members differ, each of them in both directions where it is a
    ring and they are on all of it.
    """
    members = [devices[number] for number in collective.group]
    if len({getattr(device, "slice_index", None) for device in members}) > 1:
        return chip.network_bandwidth
    places = [_place(device) for device in members]
    reach = [len({place[axis] for place in places}) for axis in range(len(shape))]
    wraps = rings(chip, shape)
    directions = sum(
        2 if wrap and met == size else 1
        for wrap, met, size in zip(wraps, reach, shape, strict=True)
        if met > 1
    )
    if collective.kind == "collective-permute":
        directions = 1  # to one neighbour
    return chip.link_bandwidth * max(directions, 1)


def _place(device: Device) -> tuple[int, ...]:
    return tuple(getattr(device, "coords", ()) or ())
