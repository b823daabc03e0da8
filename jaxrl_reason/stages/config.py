"""The configuration of a run. A default lives here and nowhere else."""

import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jaxrl_reason.config import Config
from jaxrl_reason.errors import InputError
from jaxrl_reason.plugins import PATTERN
from jaxrl_reason.sampling import SamplingConfig
from jaxrl_reason.sharding import MeshConfig
from jaxrl_reason.stages.data_config import (
    Positive,
    Problems,
    PythonData,
    SampledPairs,
    StageData,
    TraceData,
)
from jaxrl_reason.stages.dataset_task import load_dataset_task
from jaxrl_reason.stages.model_choice import ModelChoice
from jaxrl_reason.stages.policy_config import GRPOConfig, MORLConfig, PolicyConfig
from jaxrl_reason.stages.reject_config import RejectConfig
from jaxrl_reason.stages.stage_config import DPOConfig, Names, Seed, SFTConfig
from jaxrl_reason.stages.task_set import TaskSet
from jaxrl_reason.tasks import Task, make_task

StageConfig = Annotated[
    SFTConfig | DPOConfig | GRPOConfig | MORLConfig | RejectConfig, Field(discriminator="kind")
]


class TaskChoice(Config):
    """What is to be learned: a procedural task, or the rows of a data set."""

    name: str = "arithmetic"
    """Name of a procedural task (`jaxrl_reason.tasks.TASKS`), `package.module:Class` for one of
    your own, or `dataset`."""
    options: Mapping[str, Any] = {}
    """Arguments of the task, such as its difficulty, or of the data set, such as `source`."""
    tokenizer: Literal["word", "character"] = "word"
    """Tokens are the words of the task's grammar, or its characters; a published model brings its
    own."""

    def make(self) -> Task:
        """The task itself; rows of a data set are read once."""
        return _make_task(self.name, json.dumps(dict(self.options), sort_keys=True))

    @pydantic.model_validator(mode="after")
    def _constructs(self):
        self.make()
        return self


@functools.lru_cache(maxsize=4)
def _make_task(name: str, options: str) -> Task:
    given = json.loads(options)
    return load_dataset_task(given) if name == "dataset" else make_task(name, given)


class ChatConfig(Config):
    """How prompts and completions become tokens."""

    system_prompt: str | None = None
    """A turn before every prompt that has none of its own, such as the layout of an answer."""
    template_kwargs: Mapping[str, Any] = {}
    """Variables of the chat template, for example `enable_thinking: false`."""
    chat_template_path: str | None = None
    """File with a Jinja template in place of the tokenizer's own."""
    plain: bool = False
    """No template: a prompt is text and stays as it is, for base models that have none."""

    @pydantic.model_validator(mode="after")
    def _acts(self):
        useless = [name for name in _OF_TEMPLATE if getattr(self, name)]
        if self.plain and useless:
            raise ValueError(f"{useless[0]} cannot act with plain=true; remove one of them")
        return self


_OF_TEMPLATE = ("system_prompt", "template_kwargs", "chat_template_path")


class EvaluationSet(Config):
    """Further held-out problems."""

    task: str | None = None
    """One of the run's `tasks`; its main task when null."""
    difficulties: tuple[int, ...] = ()
    """Only these difficulties, one after the other; mixed as the task does it when empty."""
    problems: Positive | None = None
    """Their number; that of the evaluation when null."""


class EvaluationConfig(Config):
    """Accuracy on held-out problems of the task."""

    problems: Positive = 512
    """Number of held-out problems, the same for every stage."""
    sets: Mapping[str, EvaluationSet] = {}
    """Further sets of held-out problems by name, such as harder ones."""
    measures: Mapping[str, Annotated[str, Field(pattern=PATTERN)]] = {}
    """Averages over completions by name: functions `f(problem, completion, verdict, length)` that
    return a number, or None where it does not apply, as `package.module:function`."""
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
    profile: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None = None
    """First and last step of each stage to be profiled, such as `10:12`; the trace is then in
    `<stage>/profile`. `run --profile` sets it and has the compiler write its programs, too."""

    @pydantic.model_validator(mode="after")
    def _profile_is_a_span(self):
        if self.profile is not None and not 0 < self.profiled[0] <= self.profiled[1]:
            raise ValueError(f"profile={self.profile!r} must name a step from 1 and one behind it")
        return self

    @property
    def profiled(self) -> tuple[int, int]:
        """The first and the last step to be profiled; (0, 0) for none."""
        if self.profile is None:
            return (0, 0)
        first, _, last = self.profile.partition(":")
        return int(first), int(last)


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
    tasks: Mapping[str, TaskChoice] = {}
    """Further tasks by name, for stages and evaluation sets that name them."""
    words: Names = ()
    """Further words of a vocabulary that is made for the tasks, such as tags that only a stage's
    data has."""
    model: ModelChoice = ModelChoice()
    """The model."""
    chat: ChatConfig = ChatConfig()
    """Its chat template."""
    max_prompt_length: Positive
    """Longest prompt in tokens; shorter ones are padded to it for sampling."""
    max_visual_tokens: Positive | None = None
    """Most tokens that stand for the images and videos of a prompt, where the task shows some."""
    mesh: MeshConfig = MeshConfig()
    """How devices are arranged."""
    steps_per_dispatch: Positive = 32
    """Decode steps between two looks of the host at what is finished."""
    step_timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which a step that still runs ends the process, with the stacks of all threads
    and exit code 1, so that a launcher starts it again. Sampling for an evaluation, rejection or
    pairs has as long for each look of the host at what is finished, and the log-probs of DPO's
    reference for each batch. Ten times as long have the first step of a start, the first such look
    or batch, a program of sampling that is compiled, a checkpoint that is read or waited for, and
    the rewards of an evaluation. A function of your own that makes data has no limit. Null:
    never."""
    nonfinite_limit: Positive = 10
    """Updates in a row whose loss or gradient is not finite, and which are skipped, after which a
    stage ends. The last one's batch is then in its folder."""
    evaluation: EvaluationConfig
    """Evaluation of every stage."""
    tracking: TrackingConfig = TrackingConfig()
    """Sinks of metrics."""
    stages: Mapping[str, StageConfig] = {}
    """Stages by name, in order; without any, the model is evaluated as it is."""

    @classmethod
    def within(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """The run of an experiment; a file without `arms` is a run itself."""
        return raw["run"] if {"run", "arms"} <= raw.keys() else raw

    def make_tasks(self) -> TaskSet:
        """The tasks of the run."""
        others = {name: choice.make() for name, choice in self.tasks.items()}
        return TaskSet(main=self.task.make(), others=others)

    @pydantic.model_validator(mode="after")
    def _stages_exist(self):
        trained, kept = ["init"], []
        for name, stage in self.stages.items():
            if not name.isidentifier() or name == "init":
                raise ValueError(
                    f"stage name {name!r} must be a word of letters, digits and underscores, and "
                    "not `init`, which is the untrained model"
                )
            _check_earlier(f"stages.{name}.parent", stage.parent, trained, kept)
            if isinstance(stage, RejectConfig):
                if stage.rejected_from is not None:
                    where = f"stages.{name}.rejected_from"
                    _check_earlier(where, stage.rejected_from, trained, kept)
                kept.append(name)
                continue
            data = _data(stage)
            if isinstance(data, StageData) and data.stage not in kept:
                raise ValueError(
                    f"stages.{name}.data.stage={data.stage!r} is no earlier stage of kind reject; "
                    f"known are {kept}"
                )
            trained.append(name)
        return self

    @pydantic.model_validator(mode="after")
    def _problems_exist(self):
        tasks = self.make_tasks()
        wanted = {f"evaluation.sets.{name}": s for name, s in self.evaluation.sets.items()}
        more = {}
        for name, stage in self.stages.items():
            if (problems := problems_of(stage)) is not None:
                wanted[f"stages.{name}.problems"] = problems
            if isinstance(stage, PolicyConfig):
                more |= {
                    f"stages.{name}.curriculum.{i}": (problems.task, phase.difficulties)
                    for i, phase in enumerate(stage.curriculum)
                }
        for where, chosen in wanted.items():
            if chosen.task is not None and chosen.task not in self.tasks:
                raise ValueError(
                    f"{where}.task={chosen.task!r} is none of tasks={list(self.tasks)}; null is "
                    "the main task"
                )
        pairs = {where: (c.task, c.difficulties) for where, c in wanted.items()} | more
        for where, (task, difficulties) in pairs.items():
            try:
                tasks.check_difficulties(task, difficulties)
            except InputError as error:
                raise ValueError(f"{where}.difficulties: {error}") from error
        return self

    @pydantic.model_validator(mode="after")
    def _tokenizer_acts(self):
        if self.model.path is not None and self.words:
            raise ValueError(
                "words cannot act beside model.path, which brings its own tokenizer; remove them"
            )
        if self.model.path is not None and self.task.tokenizer != "word":
            raise ValueError(
                f"task.tokenizer={self.task.tokenizer} cannot act beside model.path, which brings "
                "its own tokenizer; remove it"
            )
        if self.model.path is None and self.chat.chat_template_path is not None:
            raise ValueError(
                "chat.chat_template_path cannot act without model.path: a tokenizer made for a "
                "task has its own template; remove it"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _completions_fit(self):
        lengths = {"evaluation": self.evaluation.max_completion_length}
        for name, stage in self.stages.items():
            if isinstance(stage, PolicyConfig | RejectConfig):
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


def problems_of(stage: Any) -> Problems | None:
    """Which problems a stage reads; None if its data are rows."""
    if isinstance(stage, PolicyConfig | RejectConfig):
        return stage.problems
    data = _data(stage)
    return data.problems if isinstance(data, TraceData | PythonData | SampledPairs) else None


def other_stage(stage: Any) -> str | None:
    """The stage besides its parent that a stage reads."""
    if isinstance(stage, RejectConfig):
        return stage.rejected_from
    data = _data(stage)
    return data.stage if isinstance(data, StageData) else None


def _data(stage: Any) -> Any:
    return stage.data if isinstance(stage, SFTConfig | DPOConfig) else None


def _check_earlier(where: str, name: str, trained: list[str], kept: list[str]) -> None:
    if name in kept:
        raise ValueError(
            f"{where}={name!r} is of kind reject and has no model; its rows are read with "
            f"data={{kind: stage, stage: {name}}}"
        )
    if name not in trained:
        raise ValueError(f"{where}={name!r} is no earlier stage; known are {trained}")
