"""The configuration of a run. A default lives here and nowhere else."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jaxrl_reason.config import Config, validate
from jaxrl_reason.models import PRESETS, ModelConfig, preset
from jaxrl_reason.sampling import SamplingConfig
from jaxrl_reason.sharding import MeshConfig
from jaxrl_reason.stages.policy_config import GRPOConfig, MORLConfig, PolicyConfig
from jaxrl_reason.stages.stage_config import DPOConfig, Positive, SampledPairs, Seed, SFTConfig
from jaxrl_reason.tasks import make_task

StageConfig = Annotated[
    SFTConfig | DPOConfig | GRPOConfig | MORLConfig, Field(discriminator="kind")
]


class ModelChoice(Config):
    """A model to train from scratch: a preset with some fields changed."""

    preset: Literal[PRESETS] = "0.7m"
    """Size by the parameters of its blocks."""
    changes: Mapping[str, Any] = {}
    """Fields of `ModelConfig` that differ from the preset, for example `num_hidden_layers: 6`."""

    def resolve(self, vocab_size: int) -> ModelConfig:
        """The model's configuration for a vocabulary."""
        whole = dataclasses.asdict(preset(self.preset, vocab_size=vocab_size)) | self.changes
        return validate(_Changed, {"changes": whole}, f"preset {self.preset}").changes

    @pydantic.model_validator(mode="after")
    def _resolves(self):
        if "vocab_size" in self.changes:
            raise ValueError("changes.vocab_size follows from the task's tokenizer; remove it")
        self.resolve(vocab_size=8)
        return self


class _Changed(Config):
    """Checks the fields of a model that are read from a configuration."""

    changes: ModelConfig


class TaskChoice(Config):
    """A procedural task with solver traces and a verifier."""

    name: str = "arithmetic"
    """Name of the task; see `jaxrl_reason.tasks.TASKS`."""
    options: Mapping[str, Any] = {}
    """Arguments of the task, such as its difficulty."""
    tokenizer: Literal["word", "character"] = "word"
    """Tokens are the words of the task's grammar, or its characters."""

    @pydantic.model_validator(mode="after")
    def _constructs(self):
        make_task(self.name, self.options)
        return self


class EvaluationConfig(Config):
    """Accuracy on held-out problems of the task."""

    problems: Positive = 512
    """Number of held-out problems, the same for every stage."""
    batch_size: Positive = 256
    """Problems sampled at once."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    max_completion_length: Positive
    """Longest completion in tokens."""


class TrackingConfig(Config):
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""
    verl_names: bool = False
    """Also log each metric under verl's name for it."""


class RunConfig(Config):
    """A chain of stages on one task and one model."""

    name: str
    """Name of the run; its folder is `<output_dir>/<name>`."""
    output_dir: str = "runs"
    """Folder of runs."""
    seed: Seed = 0
    """Seed of everything random."""
    task: TaskChoice = TaskChoice()
    """The task."""
    model: ModelChoice = ModelChoice()
    """The model."""
    max_prompt_length: Positive
    """Longest prompt in tokens; shorter ones are padded to it for sampling."""
    mesh: MeshConfig = MeshConfig()
    """How devices are arranged."""
    steps_per_dispatch: Positive = 32
    """Decode steps between two looks of the host at what is finished."""
    evaluation: EvaluationConfig
    """Evaluation of every stage."""
    tracking: TrackingConfig = TrackingConfig()
    """Sinks of metrics."""
    stages: Annotated[Mapping[str, StageConfig], Field(min_length=1)]
    """Stages by name, in order."""

    @pydantic.model_validator(mode="after")
    def _parents_exist(self):
        known = ["init"]
        for name, stage in self.stages.items():
            if not name.isidentifier() or name == "init":
                raise ValueError(
                    f"stage name {name!r} must be a word of letters, digits and underscores, and "
                    "not `init`, which is the untrained model"
                )
            if stage.parent not in known:
                raise ValueError(
                    f"stages.{name}.parent={stage.parent!r} is no earlier stage; known are {known}"
                )
            known.append(name)
        return self

    @pydantic.model_validator(mode="after")
    def _completions_fit(self):
        lengths = {"evaluation": self.evaluation.max_completion_length}
        for name, stage in self.stages.items():
            if isinstance(stage, PolicyConfig):
                lengths[f"stages.{name}"] = stage.max_completion_length
            elif isinstance(stage, DPOConfig) and isinstance(stage.data, SampledPairs):
                lengths[f"stages.{name}"] = stage.max_length - self.max_prompt_length
                if stage.max_length <= self.max_prompt_length:
                    raise ValueError(
                        f"stages.{name}.max_length={stage.max_length} leaves no token for a "
                        f"completion after max_prompt_length={self.max_prompt_length}"
                    )
        room = self.model.resolve(vocab_size=8).max_position_embeddings
        for where, length in lengths.items():
            if self.max_prompt_length + length > room:
                raise ValueError(
                    f"max_prompt_length={self.max_prompt_length} and the {length} tokens of a "
                    f"completion in {where} exceed the model's max_position_embeddings={room}; "
                    "set that in model.changes or shorten them"
                )
        return self
