"""What a chip can do at most, and where that number is from.

For TPUs the vendor's pages of each generation, read in November 2026. The vendor gives the
bandwidth between chips as that of all ports in both directions together; a link in one direction
has this divided by twice the number of ports.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

_GB, _GIB = 1e9, 2.0**30
_DOCS = "https://docs.cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peaks of one chip, as `jax` counts devices, in FLOP/s, bytes and bytes/s."""

    name: str
    flops: float
    """Of matrix products in bfloat16 with float32 sums."""
    memory: float
    """That the compiler lets a program have, which is a little less than the chip's."""
    memory_bandwidth: float
    link_bandwidth: float
    """To one neighbour, in one direction; 0: there are no links."""
    torus_axes: int
    """Dimensions of the network of a slice."""
    wraps_at: int
    """A dimension of the network is a ring if its size is a multiple of this, and else a line; of
    three dimensions all are rings or none is."""
    network_bandwidth: float
    """To other slices, through the data centre's network."""
    source: str
    configuration: str | None = None
    """Of the chip, as the compiler names it; of two cores as one device where it has that."""


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v4": Chip(
            name="TPU v4",
            flops=275e12,
            memory=30.75 * _GIB,
            memory_bandwidth=1200 * _GB,
            link_bandwidth=50 * _GB,
            torus_axes=3,
            wraps_at=4,
            network_bandwidth=6.25 * _GB,
            source=_DOCS + "v4",
            configuration="megacore",
        ),
        "v5e": Chip(
            name="TPU v5e",
            flops=197e12,
            memory=15.75 * _GIB,
            memory_bandwidth=819 * _GB,
            link_bandwidth=50 * _GB,
            torus_axes=2,
            wraps_at=16,
            network_bandwidth=3.125 * _GB,
            source=_DOCS + "v5e",
        ),
        "v5p": Chip(
            name="TPU v5p",
            flops=459e12,
            memory=95.74 * _GIB,
            memory_bandwidth=2765 * _GB,
            link_bandwidth=100 * _GB,
            torus_axes=3,
            wraps_at=4,
            network_bandwidth=6.25 * _GB,
            source=_DOCS + "v5p",
        ),
        "v6e": Chip(
            name="TPU v6e",
            flops=918e12,
            memory=31.25 * _GIB,
            memory_bandwidth=1638 * _GB,
            link_bandwidth=100 * _GB,
            torus_axes=2,
            wraps_at=16,
            network_bandwidth=12.5 * _GB,
            source=_DOCS + "v6e",
        ),
    }
)
"""By the name that a topology begins with."""
