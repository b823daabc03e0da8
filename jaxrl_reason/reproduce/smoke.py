"""The same experiment with two steps a stage and a handful of problems: does it run at all?"""

import copy
import json
from collections.abc import Mapping
from typing import Any

from jaxrl_reason.config import to_json
from jaxrl_reason.reproduce.experiment_config import ExperimentConfig
from jaxrl_reason.stages.config import RunConfig

_STEPS = 2
_PROBLEMS = 16
_EXAMPLES = 32
_PROMPTS = 8
_LAYERS = 1


def shrink(given: Mapping[str, Any], run: RunConfig) -> dict[str, Any]:
    """`run` as its file has it, with fewer steps, data and layers.

    Most of the time of such a run is the compiler's, which a layer costs seconds.

    Args:
        given: plain values.
        run: what they are.
    """
    small = copy.deepcopy(dict(given))
    if run.model.path is None:
        model = small.setdefault("model", {})
        model["changes"] = {**model.get("changes", {}), "num_hidden_layers": _LAYERS}
    evaluation = small["evaluation"]
    evaluation["problems"] = min(run.evaluation.problems, _PROBLEMS)
    evaluation["batch_size"] = min(run.evaluation.batch_size, _PROBLEMS)
    for name, chosen in run.evaluation.sets.items():
        if chosen.problems is not None:
            evaluation["sets"][name]["problems"] = min(chosen.problems, _PROBLEMS)
    for name, stage in small.get("stages", {}).items():
        _shrink_stage(stage, to_json(run.stages[name]))
    return small


def smoke_overrides(config: ExperimentConfig) -> list[str]:
    """The overrides that the experiment itself has for such a run."""
    return [f"{key}={json.dumps(value)}" for key, value in config.smoke.items()]


def _shrink_stage(stage: dict[str, Any], whole: Mapping[str, Any]) -> None:
    """Change the values `stage` in place, whose defaults `whole` knows."""
    if "steps" in whole:
        stage["steps"] = min(whole["steps"], _STEPS)
    if "prompts_per_step" in whole:
        stage["prompts_per_step"] = min(whole["prompts_per_step"], _PROMPTS)
    if whole.get("curriculum"):
        first, *more = stage["curriculum"]
        stage["curriculum"] = [{**first, "steps": 1}, *more[-1:]]
    if whole.get("num_prompts") is not None:
        stage["num_prompts"] = min(whole["num_prompts"], _PROBLEMS)
    data = whole.get("data", {})
    for field, most in (("num_examples", _EXAMPLES), ("num_prompts", _PROBLEMS)):
        if data.get(field) is not None:
            stage.setdefault("data", {"kind": data["kind"]})
            stage["data"][field] = min(data[field], most)
