"""From the path of a checkpoint back to a model that can be sampled and evaluated."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrl_reason import checkpoint, files
from jaxrl_reason.config import load_yaml, validate
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Params
from jaxrl_reason.models.config import DType
from jaxrl_reason.sharding import MeshConfig, make_mesh
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.context import Context

_logger = logging.getLogger(__name__)
lineage = checkpoint.lineage
TOKENIZER = "tokenizer"
"""Folder of a run with its tokenizer, and of a published model with its description."""


class Loaded(NamedTuple):
    """A model of a run."""

    context: Context
    params: Params
    meta: dict[str, Any]


def load(path: str | Path) -> Loaded:
    """The model at a stage's folder, its `checkpoints` folder, or one step in it.

    It lies on the run's mesh, or, where that does not fit the devices that are here, on one that
    does.

    Raises:
        InputError: there is no checkpoint at that path, or it does not belong to a run.
    """
    step = checkpoint.find(path)
    context = load_context(step)
    params = context.restore_params(step)
    return Loaded(context, params, checkpoint.read_meta(step))


def load_context(path: str | Path) -> Context:
    """`load` without the parameters.

    Raises:
        InputError: as `load` does.
    """
    return Context.create(load_config(path))


def load_config(path: str | Path, devices: Sequence[jax.Device] | None = None) -> RunConfig:
    """The configuration of a checkpoint's run, with a mesh that fits.

    Args:
        path: as in `load`.
        devices: of the mesh; those that are here by default.

    Raises:
        InputError: as `load` does.
    """
    run = checkpoint.find(path).parents[2]
    raw = load_yaml(run / "config.json")
    # The run may have been moved or renamed since: its place is where it was found.
    raw |= {"output_dir": str(run.parent), "name": run.name}
    if raw["model"].get("path") is not None:
        # So may the published model; the run has its description, and its weights as `init`.
        raw["model"] |= {"path": str(run / TOKENIZER), "revision": None}
        raw["chat"] |= {"chat_template_path": None}
    config = validate(RunConfig, raw, str(run / "config.json"))
    devices = jax.devices() if devices is None else devices
    return config.model_copy(update={"mesh": _fitting(config.mesh, devices)})


def _fitting(config: MeshConfig, devices: Sequence[jax.Device]) -> MeshConfig:
    """The mesh of a run, or one of as many devices as these that cuts parameters no finer."""
    try:
        make_mesh(config, devices)
    except InputError:
        count = len(devices)
        tensor = math.gcd(max(config.tensor, 1), count)
        wanted = config.fsdp * config.context
        fsdp = math.gcd(wanted if min(config.fsdp, config.context) > 0 else 2**20, count // tensor)
        made = MeshConfig(data=-1, fsdp=fsdp, tensor=tensor)
        _logger.warning(
            "the mesh of the run, %s, does not fit the %d devices here: the model lies on data %d, "
            "fsdp %d, tensor %d",
            ", ".join(f"{axis} {n}" for axis, n in dataclasses.asdict(config).items() if n != 1),
            count,
            count // (fsdp * tensor),
            fsdp,
            tensor,
        )
        return made
    return config


def export(
    path: str | Path,
    directory: str | Path,
    *,
    adapter: bool = False,
    dtype: DType | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write the model at a checkpoint as a directory in Hugging Face's format.

    Args:
        path: as in `load`.
        directory: to be made.
        adapter: write the adapter alone, in PEFT's format, and not merged into the model.
        dtype: of the tensors; that of the parameters if None.
        max_shard_size: of a file.

    Raises:
        InputError: no such checkpoint, no adapter, something is in the place of the directory, or
            it cannot be made there.
        StorageError: the disk is full, or broken; nothing is left.
    """
    from jaxrl_reason.models.convert import save_adapter, save_pretrained

    loaded = load(path)
    context = loaded.context
    with files.chosen(f"to {directory}", "choose another directory"):
        if adapter:
            return save_adapter(context.model, loaded.params, directory)
        like = context.directory / TOKENIZER if context.config.model.path is not None else None
        return save_pretrained(
            context.model,
            loaded.params,
            directory,
            tokenizer=context.tokenizer,
            like=like,
            dtype=dtype,
            max_shard_size=max_shard_size,
        )
