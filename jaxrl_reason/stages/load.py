"""From the path of a checkpoint back to a model that can be sampled and evaluated."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_reason import checkpoint
from jaxrl_reason.config import load_yaml, validate
from jaxrl_reason.models import Params
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.context import Context

lineage = checkpoint.lineage


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
    run = step.parents[2]
    raw = load_yaml(run / "config.json")
    # The run may have been moved or renamed since: its place is where it was found.
    raw |= {"output_dir": str(run.parent), "name": run.name}
    context = Context.create(validate(RunConfig, raw, str(run / "config.json")))
    params = checkpoint.restore_params(step, context.params_like)
    return Loaded(context, params, checkpoint.read_meta(step))
