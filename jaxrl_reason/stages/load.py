"""From the path of a checkpoint back to a model that can be sampled and evaluated."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_reason import checkpoint
from jaxrl_reason.config import load_yaml, validate
from jaxrl_reason.models import Params
from jaxrl_reason.models.config import DType
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.context import Context

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

    Raises:
        InputError: there is no checkpoint at that path, or it does not belong to a run.
    """
    step = checkpoint.find(path)
    context = load_context(step)
    params = checkpoint.restore_params(step, context.params_like)
    return Loaded(context, params, checkpoint.read_meta(step))


def load_context(path: str | Path) -> Context:
    """`load` without the parameters.

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
    return Context.create(validate(RunConfig, raw, str(run / "config.json")))


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
        InputError: no such checkpoint, no adapter, or something is in the place of the directory.
    """
    from jaxrl_reason.models.convert import save_adapter, save_pretrained

    loaded = load(path)
    context = loaded.context
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
