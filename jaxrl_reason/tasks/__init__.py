"""Procedural problems with solver traces and verifiers, some of them about images and videos."""

from jaxrl_reason.tasks.arithmetic import ModularArithmetic
from jaxrl_reason.tasks.countdown import Countdown
from jaxrl_reason.tasks.facts import Fact, read_facts, write_facts
from jaxrl_reason.tasks.intervals import temporal_iou
from jaxrl_reason.tasks.knights_knaves import KnightsKnaves
from jaxrl_reason.tasks.moving_shapes import MovingShapes
from jaxrl_reason.tasks.problem import (
    Media,
    Problem,
    Task,
    Verdict,
    Video,
    VisualTask,
    chance_accuracy,
    constant_answer_accuracy,
    media_of,
    read_completion,
    write_completion,
)
from jaxrl_reason.tasks.registry import TASKS, make_task
from jaxrl_reason.tasks.shapes import Shapes

__all__ = [
    "TASKS",
    "Countdown",
    "Fact",
    "KnightsKnaves",
    "Media",
    "ModularArithmetic",
    "MovingShapes",
    "Problem",
    "Shapes",
    "Task",
    "Verdict",
    "Video",
    "VisualTask",
    "chance_accuracy",
    "constant_answer_accuracy",
    "make_task",
    "media_of",
    "read_completion",
    "read_facts",
    "temporal_iou",
    "write_completion",
    "write_facts",
]
