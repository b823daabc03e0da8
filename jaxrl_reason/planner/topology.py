"""Devices by the name of a topology, none of which has to be here."""

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_reason.errors import InputError
from jaxrl_reason.planner.chips import CHIPS, Chip

_NAME = re.compile(r"(?:(?P<slices>\d+)\*)?(?P<kind>\w+):(?P<sizes>\d+(?:x\d+)*)")
_EXAMPLES = "v5e:8x8, v6e:4x8, v5p:2x4x4, 2*v5e:16x16 (two slices) or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind, and what one of them can do."""

    name: str
    chip: Chip
    devices: Sequence[jax.Device]


def open_topology(name: str) -> Topology:
    """The devices of a topology, to compile for.

    Call it before anything else of JAX: it sees to it that JAX looks for no accelerator here.

    Args:
        name: kind and sizes, for example `v5e:8x8`.

    Raises:
        InputError: an unknown name, or the compiler for TPUs is not installed.
    """
    found = _NAME.fullmatch(name)
    kinds = (*CHIPS, "cpu")
    if found is None or found["kind"] not in kinds or _is_odd(found):
        raise InputError(
            f"topology {name!r} is unknown; kinds are {', '.join(CHIPS)} and cpu, for example "
            f"{_EXAMPLES}"
        )
    jax.config.update("jax_platforms", "cpu")
    if found["kind"] == "cpu":
        return _cpus(name, int(found["sizes"]))
    return _tpus(name, found["kind"], found["sizes"], int(found["slices"] or 1))


def _is_odd(found: re.Match[str]) -> bool:
    """Whether it speaks of slices of a CPU, or of none at all."""
    of_cpu = found["kind"] == "cpu" and (found["slices"] or "x" in found["sizes"])
    return bool(of_cpu) or found["slices"] == "0"


def _tpus(name: str, kind: str, sizes: str, slices: int) -> Topology:
    _find_compiler()
    from jax.experimental import topologies

    chip = CHIPS[kind]
    if len(sizes.split("x")) != chip.torus_axes:
        raise InputError(
            f"topology {name!r}: the network of {chip.name} has {chip.torus_axes} dimensions, for "
            f"example {_EXAMPLES}"
        )
    more: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    if chip.configuration is not None:
        more["chip_config_name"] = chip.configuration
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{sizes}", **more
        )
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"topology {name!r}: the compiler knows none of it: {error}") from error
    return Topology(name, chip, description.devices)


def _find_compiler() -> None:
    # There is no cloud to ask what this machine is, and no TPU that two plans could contend for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if "TPU_LIBRARY_PATH" not in os.environ:
        os.environ["TPU_LIBRARY_PATH"] = _library()


def _library() -> str:
    spec = importlib.util.find_spec("libtpu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "planning for TPUs needs their compiler: pip install 'jaxrl-reason[plan]', or set "
            "TPU_LIBRARY_PATH to a libtpu.so; no TPU is needed"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "libtpu.so")


def _cpus(name: str, count: int) -> Topology:
    """Devices that share this machine, each with its part of what all can do, as measured."""
    if count < 1:
        raise InputError(f"topology {name!r} has no device; use cpu:1 or more")
    jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) != count:
        raise InputError(
            f"topology {name!r}: JAX has made {len(devices)} devices already; plan in a process of "
            "its own"
        )
    size = 1024
    square = jnp.ones((size, size), jnp.float32)
    flops = 2 * size**3 / _seconds(jax.jit(lambda x: x @ x / size), square)
    # In place: a new array would be mapped page by page, which takes ten times as long.
    large = jnp.ones(2**26, jnp.float32)
    bandwidth = 2 * large.nbytes / _seconds(jax.jit(lambda x: x + 1, donate_argnums=0), large)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chip = Chip(
        name="a part of this machine",
        flops=flops / count,
        memory=memory / count,
        memory_bandwidth=bandwidth / count,
        link_bandwidth=bandwidth / count,  # through memory
        torus_axes=0,
        wraps_at=1,
        network_bandwidth=bandwidth / count,
        source="measured: a product of float32 matrices, and passes over an array in place",
    )
    return Topology(name, chip, devices)


def _seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Of the fastest of many runs, each on what the one before it has returned."""
    x = function(x).block_until_ready()
    took: list[float] = []
    # Where a process is new, all its threads may be on one core for a second.
    while sum(took) < 3:
        began = time.perf_counter()
        x = function(x).block_until_ready()
        took.append(time.perf_counter() - began)
    return min(took)
