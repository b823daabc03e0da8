"""Safetensors files as they lie on disk: what is in them, and rows of one tensor.

Tensors are read and not mapped: the pages of a mapped file count as memory of the process for as
long as the file is open, so that a model would be in host memory once it has been read.
"""

import dataclasses
import json
import math
import os
from io import FileIO
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxrl_reason.errors import InputError

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}

_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str
    """As the file names it, such as BF16."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of the first axis, freshly read."""
        dtype, row = DTYPES[self.dtype], math.prod(self.shape[1:])
        # JAX takes memory that is aligned so as it is where the device is the host.
        count = (stop - start) * row * dtype.itemsize
        memory = np.empty(count + _ALIGNMENT, np.uint8)
        first = -memory.ctypes.data % _ALIGNMENT
        data = memory[first : first + count]
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + start * row * dtype.itemsize)
            _fill(file, data)
        return data.view(dtype).reshape(stop - start, *self.shape[1:])


def _fill(file: FileIO, data: np.ndarray) -> None:
    """Read until the memory is full; the system reads 2 GiB at once at most."""
    view = data.data
    while view:
        count = file.readinto(view)
        if not count:
            raise InputError(f"{file.name} ended while it was read; fetch it again")
        view = view[count:]


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        InputError: the file is no safetensors file, or is shorter than its header says.
    """
    size = os.path.getsize(file)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {
            name: Tensor(
                file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"]
            )
            for name, entry in header.items()
        }
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no safetensors file: {error}; fetch it again") from error
    if 8 + length + end != size:
        raise InputError(
            f"{file} has {size} bytes and should have {8 + length + end}; fetch it again"
        )
    return tensors


def read_headers(directory: Path) -> dict[str, Tensor]:
    """The tensors of all files of a model by name.

    Raises:
        InputError: there are no safetensors files, or some that the index names are not there.
    """
    index = directory / INDEX_FILE
    if not index.is_file():
        if not (directory / WEIGHTS_FILE).is_file():
            raise InputError(
                f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; give a directory of a "
                "model in safetensors format (transformers writes it with save_pretrained)"
            )
        return read_header(directory / WEIGHTS_FILE)
    files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [name for name in files if not (directory / name).is_file()]
    if absent:
        raise InputError(f"{directory} lacks files that its index names: {', '.join(absent)}")
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors.update(read_header(directory / name))
    return tensors
