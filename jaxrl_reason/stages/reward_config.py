"""The configuration of each kind of reward."""

from collections.abc import Iterable
from typing import Annotated, Literal

import pydantic
from pydantic import Field, PositiveInt

from jaxrl_reason.config import Config
from jaxrl_reason.rewards import OpenAIServer, Rubric, When

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


class PythonJudge(Config):
    """A function of the user's that replies to prompts."""

    kind: Literal["python"]
    """`python`: `f(prompts: list[str]) -> list[str]`, plain or async."""
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """Where it is, as `package.module:function`."""
    scope: Scope = "batch"
    """About which completions a call asks, as for `python` rewards."""


class CheckpointJudge(Config):
    """A model of ours that replies with its most likely tokens."""

    kind: Literal["checkpoint"]
    """`checkpoint`: a stage of another run, or a checkpoint of one."""
    path: str
    """Its folder, such as `runs/judge/tuned`."""
    max_completion_length: PositiveInt = 256
    """Longest reply in tokens."""
    batch_size: PositiveInt = 64
    """Replies sampled at once."""


class JudgeReward(Reward):
    """The number that a language model gives to a completion, brought to 0..1."""

    kind: Literal["judge"]
    """`judge`: (n - low) / (high - low) for the number n that the judge writes."""
    name: str
    """Name in the metrics."""
    scale: tuple[float, float] = Rubric.scale
    """The lowest and the highest number that the judge may write."""
    prompt: str = Rubric.prompt
    """What it is asked, with the fields {prompt}, {completion}, {thought}, {given}, {answer},
    {fence}, {low} and {high}."""
    pattern: str = Rubric.pattern
    """Regular expression with one group, the number; the last match in a reply counts."""
    when: When = Rubric.when
    """Which completions are judged; by the verifier's verdict."""
    otherwise: float | None = Rubric.otherwise
    """Reward of the others; null: it does not apply to them."""
    samples: PositiveInt = Rubric.samples
    """Replies about a completion, of which the mean counts."""
    backend: Annotated[OpenAIServer | PythonJudge | CheckpointJudge, Field(discriminator="kind")]
    """Who judges."""

    @property
    def rubric(self) -> Rubric:
        """What is asked and how the reply is read."""
        return Rubric(
            scale=self.scale,
            prompt=self.prompt,
            pattern=self.pattern,
            when=self.when,
            otherwise=self.otherwise,
            samples=self.samples,
        )

    @pydantic.model_validator(mode="after")
    def _acts(self):
        _ = self.rubric  # refuses what it cannot be
        if self.samples == 1:
            return self
        if isinstance(self.backend, CheckpointJudge):
            raise ValueError(
                f"samples={self.samples} cannot act with backend.kind=checkpoint, whose replies "
                "are all the same; remove it"
            )
        if isinstance(self.backend, OpenAIServer) and self.backend.temperature == 0:
            raise ValueError(
                f"samples={self.samples} cannot act with backend.temperature=0, at which replies "
                "are all the same; raise that or remove samples"
            )
        return self


AnyReward = Annotated[
    AccuracyReward
    | GradeReward
    | FormatReward
    | LengthReward
    | OverlongReward
    | PythonReward
    | JudgeReward,
    Field(discriminator="kind"),
]


def reward_name(reward: AnyReward) -> str:
    """The name of a reward in metrics."""
    return reward.name if isinstance(reward, PythonReward | JudgeReward) else reward.kind


def reward_scope(reward: AnyReward) -> Scope:
    """Which completions a reward is given in one call; for built-in ones it makes no difference."""
    if isinstance(reward, JudgeReward):
        backend = reward.backend
        if isinstance(backend, PythonJudge):
            return backend.scope
        return "batch" if isinstance(backend, CheckpointJudge) else "completion"
    return reward.scope if isinstance(reward, PythonReward) else "completion"


def uses_device(reward: AnyReward) -> bool:
    """Whether a reward computes on the devices of the run."""
    return bool(checkpoint_judges([reward]))


def checkpoint_judges(rewards: Iterable[AnyReward]) -> list[CheckpointJudge]:
    """The judges on the devices of the run, one for each reward that asks one."""
    judges = (reward.backend for reward in rewards if isinstance(reward, JudgeReward))
    return [judge for judge in judges if isinstance(judge, CheckpointJudge)]


def runs_elsewhere(reward: AnyReward) -> bool:
    """Whether a reward may be one that the main process only waits for."""
    return isinstance(reward, PythonReward | JudgeReward) and not uses_device(reward)
