"""Procedural problems with solver traces and verifiers."""

from jaxrl_reason.tasks.arithmetic import ModularArithmetic
from jaxrl_reason.tasks.countdown import Countdown
from jaxrl_reason.tasks.knights_knaves import KnightsKnaves
from jaxrl_reason.tasks.problem import (
    Problem,
    Task,
    Verdict,
    constant_answer_accuracy,
    read_completion,
    write_completion,
)
from jaxrl_reason.tasks.registry import TASKS, make_task

__all__ = [
    "TASKS",
    "Countdown",
    "KnightsKnaves",
    "ModularArithmetic",
    "Problem",
    "Task",
    "Verdict",
    "constant_answer_accuracy",
    "make_task",
    "read_completion",
    "write_completion",
]
