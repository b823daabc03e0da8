"""Collects what a reference computed, and writes it as one npz.

``meta`` is a JSON string with the versions and a list of records. A record says how our function is
called and how its result is reduced to what the reference returned:

name, function: of the record, and of our function.
arguments: names of the arrays in positional order.
keywords: names of the arrays that are passed by keyword, under that name.
options: keyword arguments that are no arrays.
output: path into the result where it is a tuple or a dict, such as [0] or ["rewards/chosen"].
reduction: null, "mean", or {"how", "max_length"} of ``arrays.aggregate``.
mask: name of the array that is the mask of the reduction. Without a reduction, the value of the
    reference counts where it is true, and is stored as 0 elsewhere.
gradients: names of the arrays whose gradient of the reduced value is stored.
dtype: in which the reference computed.
tolerance: relative, of value and gradients (the absolute one is the same times the largest number),
    wide where the reference adds something like 1e-8 to a divisor.

The arrays of a record are ``<name>/<array>``, ``<name>/value`` and ``<name>/grad/<array>``.
"""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOLERANCES = {"float64": 1e-10, "float32": 2e-5}
DIVISOR_TOLERANCE = 1e-7
"""Where 1e-8 is added to a number of tokens."""


def leaf(array: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A tensor that gradients are taken for."""
    return torch.tensor(np.asarray(array), dtype=dtype, requires_grad=True)


def tensor(array: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A constant; masks become numbers, as the references have them."""
    return torch.tensor(np.asarray(array), dtype=dtype)


class Recorder:
    """The records of one reference."""

    def __init__(self, reference: str, left_out: Mapping[str, str]):
        self.meta: dict[str, Any] = {
            "reference": f"{reference} {importlib.metadata.version(reference)}",
            "records": [],
            "left_out": dict(left_out),
        }
        for package in ("torch", "transformers", "numpy"):
            self.meta[package] = importlib.metadata.version(package)
        self.arrays: dict[str, np.ndarray] = {}

    def add(  # noqa: PLR0913 (the fields of a record)
        self,
        name: str,
        function: str,
        arrays: Mapping[str, np.ndarray],
        value: torch.Tensor | np.ndarray | float,
        *,
        arguments: Sequence[str],
        leaves: Mapping[str, torch.Tensor] | None = None,
        options: Mapping[str, Any] | None = None,
        keywords: Sequence[str] = (),
        output: Sequence[str | int] = (),
        reduction: str | Mapping[str, Any] | None = None,
        mask: str | None = None,
        dtype: str = "float64",
        tolerance: float | None = None,
    ) -> None:
        """Stores one call; gradients of ``value`` are taken here, for each of ``leaves``."""
        if any(record["name"] == name for record in self.meta["records"]):
            raise ValueError(f"two records are called {name}")
        leaves = dict(leaves or {})
        if isinstance(value, torch.Tensor):
            gradients = torch.autograd.grad(value, list(leaves.values())) if leaves else ()
            value = value.detach().numpy()
        else:
            gradients = ()
        stored = [*arguments, *keywords, *([mask] if mask else [])]
        for array in dict.fromkeys(stored):
            self._store(f"{name}/{array}", arrays[array], dtype)
        self._store(f"{name}/value", value, dtype)
        for array, gradient in zip(leaves, gradients, strict=True):
            self._store(f"{name}/grad/{array}", gradient.numpy(), dtype)
        self.meta["records"].append(
            {
                "name": name,
                "function": function,
                "options": dict(options or {}),
                "arguments": list(arguments),
                "keywords": list(keywords),
                "output": list(output),
                "reduction": _reduction(reduction),
                "mask": mask,
                "gradients": list(leaves),
                "dtype": dtype,
                "tolerance": tolerance or TOLERANCES[dtype],
            }
        )

    def save(self, path: Path) -> None:
        """Writes the npz; the same records give the same bytes."""
        np.savez_compressed(path, meta=np.array(json.dumps(self.meta)), **self.arrays)
        print(f"{path}: {len(self.meta['records'])} records, {path.stat().st_size} bytes")

    def _store(self, name: str, array: Any, dtype: str) -> None:
        array = np.asarray(array)
        if array.dtype.kind == "f":
            if not np.all(np.isfinite(array)):
                raise ValueError(f"{name} is not finite")
            array = array.astype(dtype)
        self.arrays[name] = array


def _reduction(reduction):
    if reduction is None or reduction == "mean":
        return reduction
    if isinstance(reduction, str):
        reduction = {"how": reduction}
    return {"max_length": None, **reduction}
