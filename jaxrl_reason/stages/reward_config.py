"""The configuration of each kind of reward."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field, PositiveInt

from jaxrl_reason.config import Config

Scope = Literal["batch", "group", "completion"]
"""Which completions a reward function is given in one call."""


class Reward(Config):
    """What all rewards have in common."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share in a weighted sum, 1 when null; a reward that should not count is left out."""


class AccuracyReward(Reward):
    """1 if the task's verifier accepts the answer."""

    kind: Literal["accuracy"]
    """`accuracy`: 0 or 1 by the verifier."""


class GradeReward(Reward):
    """The verifier's score from 0 to 1, where an answer can be partly right."""

    kind: Literal["grade"]
    """`grade`: the overlap of intervals in `moving_shapes`; as `accuracy` where there is none."""


class FormatReward(Reward):
    """1 if the completion is one think block followed by one answer block."""

    kind: Literal["format"]
    """`format`: 0 or 1 by the layout."""


class LengthReward(Reward):
    """1 up to `low` tokens, falling linearly to 0 at `high`; 0 unless the answer is right."""

    kind: Literal["length"]
    """`length`: shorter is better, among right answers."""
    low: PositiveInt
    """Completion length in tokens up to which the reward is 1."""
    high: PositiveInt
    """Completion length in tokens from which the reward is 0."""

    @pydantic.model_validator(mode="after")
    def _ordered(self):
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be smaller than high={self.high}")
        return self


class OverlongReward(Reward):
    """DAPO's soft punishment: 0, falling to -1 over the last `cache` tokens. arXiv 2503.14476."""

    kind: Literal["overlong"]
    """`overlong`: from 0 to -1 near the longest length."""
    cache: PositiveInt
    """Tokens before `max_completion_length` over which the reward falls from 0 to -1."""


class PythonReward(Reward):
    """A function of the user's with TRL's signature."""

    kind: Literal["python"]
    """`python`: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`."""
    name: str
    """Name in the metrics."""
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """Where it is, as `package.module:function`."""
    scope: Scope = "batch"
    """What a call is given: the whole batch, a problem's group, or one completion once it ends."""


AnyReward = Annotated[
    AccuracyReward | GradeReward | FormatReward | LengthReward | OverlongReward | PythonReward,
    Field(discriminator="kind"),
]


def reward_name(reward: Reward) -> str:
    """The name of a reward in metrics."""
    return reward.name if isinstance(reward, PythonReward) else reward.kind


def reward_scope(reward: Reward) -> Scope:
    """Which completions a reward is given in one call; for built-in ones it makes no difference."""
    return reward.scope if isinstance(reward, PythonReward) else "completion"
