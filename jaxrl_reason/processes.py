"""Several processes that work as one: how they find each other, and what they tell each other.

Every process of a run executes the same program on its own devices and takes the same decisions.
What only one may do (writing a file) the first does; what differs from process to process (a
reward, a clock) is exchanged before anything depends on it. In a run of one process all of this is
nothing.
"""

import os
import pickle
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxrl_reason.errors import InputError, StorageError

S = TypeVar("S")
T = TypeVar("T")

_TOLD = (InputError, StorageError)
"""What all processes end with, if one does."""

_UNIT = 2**20
_GATHERED_BYTES = 2**28
"""Of all processes at once, on every device."""

ADDRESS, COUNT, NUMBER = "JAXRL_COORDINATOR", "JAXRL_PROCESSES", "JAXRL_PROCESS"
"""Variables of the environment: where the first process listens, how many there are, which this is.

`jaxrl-reason run --local-processes` sets them; a launcher that JAX does not know can do so too."""

_NUMBERS = (NUMBER, "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
"""Where launchers say the number of a process; Google's do not."""


class Launch(NamedTuple):
    """What started the processes."""

    name: str
    address: str | None = None
    """Where the first one listens; None if JAX finds that out."""
    count: int | None = None
    number: int | None = None


def recognise(environ: Mapping[str, str], *, tpu: bool | None = None) -> Launch | None:
    """What started this process as one of several; None for a process on its own.

    Args:
        environ: variables of the environment.
        tpu: whether this machine has TPUs; looked up by default.

    Raises:
        InputError: some of the three variables are set and not all, or one is no number.
    """
    if NUMBER in environ or COUNT in environ:
        return _given(environ)
    if _number(environ, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environ:
        return Launch("slurm")
    if (size := _number(environ, "OMPI_COMM_WORLD_SIZE")) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ and ADDRESS not in environ:
            return Launch("openmpi")
        if ADDRESS not in environ:
            raise InputError(
                f"{size} processes were started by an Open MPI that does not say where the first "
                f"one is; set {ADDRESS}=<its host>:<a free port> for all of them"
            )
        rank = _number(environ, "OMPI_COMM_WORLD_RANK")
        return Launch("openmpi", environ[ADDRESS], size, rank)
    hosts = environ.get("TPU_WORKER_HOSTNAMES", environ.get("TPU_PROCESS_ADDRESSES", ""))
    if "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environ:
        return Launch("gke" if "KUBERNETES_SERVICE_HOST" in environ else "cloud tpu")
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Launch("kubernetes")
    skips = "TPU_SKIP_MDS_QUERY" in environ or environ.get("JAX_PLATFORMS") in ("cpu", "cuda")
    if not skips and (_has_tpu() if tpu is None else tpu):
        return Launch("cloud tpu")  # whose metadata say how many hosts there are, perhaps one
    return None


def _given(environ: Mapping[str, str]) -> Launch:
    missing = [name for name in (ADDRESS, COUNT, NUMBER) if name not in environ]
    if missing:
        raise InputError(f"{ADDRESS}, {COUNT} and {NUMBER} go together; {missing[0]} is not set")
    count, number = _number(environ, COUNT), _number(environ, NUMBER)
    if not 0 <= number < count:
        raise InputError(f"{NUMBER}={number} must be at least 0 and less than {COUNT}={count}")
    return Launch("environment", environ[ADDRESS], count, number)


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "0")
    if not value.isdecimal():
        raise InputError(f"{name}={value!r} in the environment must be a number")
    return int(value)


def _has_tpu() -> bool:
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def start() -> None:
    """Join the other processes of the run, if there are any; before JAX looks for devices.

    Raises:
        InputError: the other processes cannot be found.
    """
    launch = recognise(os.environ)
    if launch is None:
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=launch.address,
            num_processes=launch.count,
            process_id=launch.number,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"this process is one of several (started by: {launch.name}) and cannot join the "
            f"others: {error}; set {ADDRESS}, {COUNT} and {NUMBER} to say where they are"
        ) from error


def count() -> int:
    """Processes of the run."""
    import jax

    return jax.process_count()


def number() -> int:
    """Number of this process, counted from 0."""
    import jax

    return jax.process_index()


def place() -> str:
    """Name of this process's own folder in one that all write to; "" for a process on its own.

    Known once the processes have found each other, and before JAX has looked for devices, when
    `number` is not: the number where the launcher told it, and else the name of the host.
    """
    import jax

    if not jax.distributed.is_initialized():
        return ""
    told = [os.environ[name] for name in _NUMBERS if name in os.environ]
    return f"process_{told[0]}" if told else socket.gethostname()


def devices() -> int:
    """Devices of all processes."""
    import jax

    return jax.device_count()


def is_first() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return number() == 0


def wait(name: str) -> None:
    """Go on when all processes are here; what the first has written is there then."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def gather(value: T) -> list[T]:
    """What each process gives, in their order. All processes must call it."""
    if count() == 1:
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    own = np.frombuffer(pickle.dumps(value), np.uint8)
    # In two numbers: a single one of 32 bits ends at 2 GiB.
    parts = multihost_utils.process_allgather(np.asarray(divmod(own.size, _UNIT), np.int32))
    sizes = [high * _UNIT + low for high, low in parts.tolist()]
    # Few sizes of pieces, each of which compiles a program, and none too large for the devices.
    piece = min(2 ** (max(sizes) - 1).bit_length(), max(_GATHERED_BYTES // count(), 1))
    every = np.zeros((count(), -(-max(sizes) // piece) * piece), np.uint8)
    for start in range(0, max(sizes), piece):
        part = own[start : start + piece]
        padded = np.zeros(piece, np.uint8)
        padded[: part.size] = part
        every[:, start : start + piece] = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size]) for row, size in zip(every, sizes, strict=True)]


def together(make: Callable[[], T]) -> list[T]:
    """What `make` returns in each process, in their order, in all of them.

    Raises:
        InputError: that of the first process in which `make` raised one, in all processes.
        StorageError: as well.
        RuntimeError: `make` raised something else in another process.
    """
    if count() == 1:
        return [make()]
    made, error = None, None
    try:
        made = make()
    except Exception as raised:  # the others are waiting, and have to be told of anything
        error = raised
    kind = next((kind for kind in _TOLD if isinstance(error, kind)), None)
    found = gather((made, None if error is None else (kind, f"{error}")))
    if error is not None and kind is None:
        raise error
    for process, (_, told) in enumerate(found):
        if told is not None:
            kind, message = told
            raise RuntimeError(f"process {process}: {message}") if kind is None else kind(message)
    return [value for value, _ in found]


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in all; it is called in that one alone.

    Raises:
        InputError: `make` raised it, in all processes.
        StorageError: as well.
    """
    first: list[Any] = together(lambda: make() if is_first() else None)
    return first[0]


def divided(items: Sequence[S], make: Callable[[S], T]) -> list[T]:
    """`make` of every item, in their order, in all processes; each calls it for its share.

    Raises:
        InputError: as `together`.
    """
    own: list[T] = []
    together(lambda: own.extend(make(item) for item in items[number() :: count()]))
    # One of each process at a time, as they may be large.
    rounds = range(-(-len(items) // count()))
    found = [value for at in rounds for value in gather(own[at] if at < len(own) else None)]
    return found[: len(items)]
