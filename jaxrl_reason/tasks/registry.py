"""Tasks by name, for configurations."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxrl_reason.errors import InputError, nearest
from jaxrl_reason.plugins import load_object
from jaxrl_reason.tasks.arithmetic import ModularArithmetic
from jaxrl_reason.tasks.countdown import Countdown
from jaxrl_reason.tasks.knights_knaves import KnightsKnaves
from jaxrl_reason.tasks.moving_shapes import MovingShapes
from jaxrl_reason.tasks.problem import Task
from jaxrl_reason.tasks.shapes import Shapes

TASKS: dict[str, type] = {
    task.name: task for task in (ModularArithmetic, Countdown, KnightsKnaves, Shapes, MovingShapes)
}


def make_task(name: str, options: Mapping[str, Any]) -> Task:
    """Build a task from its name and its options (lists become tuples).

    Args:
        name: of a task of ours, or `package.module:Class` of a dataclass that is a `Task`.
        options: its fields.

    Raises:
        InputError: for an unknown task, an unknown option or a value out of range.
    """
    task = TASKS.get(name)
    if task is None:
        if ":" not in name:
            raise InputError(
                f"task {name!r} is unknown; {nearest(name, TASKS)} (a task of your own is named "
                "package.module:Class)"
            )
        task = load_object(name, "task")
    if not (isinstance(task, type) and dataclasses.is_dataclass(task)):
        raise InputError(f"task {name!r} is no dataclass; its fields would be the task's options")
    allowed = {field.name for field in dataclasses.fields(task)}
    for option in options:
        if option not in allowed:
            hint = nearest(str(option), allowed)
            raise InputError(f"option {option!r} of task {name!r} is unknown; {hint}")
    values = {
        option: tuple(value) if isinstance(value, list) else value
        for option, value in options.items()
    }
    return task(**values)
