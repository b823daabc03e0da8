"""A configuration without its data: programs depend on sizes, and data may not be here."""

import copy
from collections.abc import Sequence
from typing import Any

from jaxrl_reason.config import apply_overrides, load_yaml, validate
from jaxrl_reason.stages.config import RunConfig

_OF_PROBLEMS = ("problems", "curriculum")


def load_described(path: str, overrides: Sequence[str]) -> RunConfig:
    """The run of a file, with a task of the package in place of those that read data sets.

    Raises:
        InputError: a mistake in the configuration.
    """
    raw = apply_overrides(RunConfig, RunConfig.within(load_yaml(path)), overrides)
    return validate(RunConfig, _described(raw), str(path))


def _described(raw: dict[str, Any]) -> dict[str, Any]:
    named = [raw.get("task"), *_mapping(raw.get("tasks")).values()]
    if not any(_mapping(task).get("name") == "dataset" for task in named):
        return raw
    made = copy.deepcopy(raw)
    made["task"] = {"name": "arithmetic"}
    made.pop("tasks", None)
    _mapping(made.get("evaluation")).pop("sets", None)
    for stage in map(_mapping, _mapping(made.get("stages")).values()):
        for name in _OF_PROBLEMS:
            stage.pop(name, None)
        _mapping(stage.get("data")).pop("problems", None)
    return made


def _mapping(value: Any) -> dict[str, Any]:
    """The value, or an empty mapping in place of what validation will refuse."""
    return value if isinstance(value, dict) else {}
