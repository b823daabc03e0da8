"""The configuration of what stages read: problems, demonstrations, pairs."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jaxrl_reason.config import Config
from jaxrl_reason.plugins import PATTERN
from jaxrl_reason.sampling import SamplingConfig

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Problems(Config):
    """Which problems a stage reads."""

    task: str | None = None
    """One of the run's `tasks`; its main task when null."""
    difficulties: tuple[int, ...] = ()
    """Only these difficulties, equally often; mixed as the task does it when empty."""
    pool: Positive | None = None
    """Only so many different problems, again and again in new orders; all are new when null."""
    stream: str | None = None
    """Stages of the same stream see the same problems; null: a stream of the stage's own."""


class TraceData(Config):
    """Demonstrations written by the task's own solver."""

    kind: Literal["traces"] = "traces"
    """`traces`: from the task."""
    num_examples: Positive = 4096
    """Number of demonstrations."""
    problems: Problems = Problems()
    """What they are about."""
    styles: Mapping[Literal["long", "short", "answer"], Share] = {"long": 1.0}
    """Share of each style of trace; shares sum to 1."""

    @pydantic.model_validator(mode="after")
    def _sums_to_one(self):
        if abs(sum(self.styles.values()) - 1) > 1e-6:
            raise ValueError(f"styles sum to {sum(self.styles.values()):g}; they must sum to 1")
        return self


class PythonData(Config):
    """Rows that a function of the user's makes of problems of the task."""

    kind: Literal["python"]
    """`python`: `f(task, problems, rng, **options)` yields rows with `problem`, its number among
    `problems`, and `completion`, or `chosen` and `rejected`."""
    function: Annotated[str, Field(pattern=PATTERN)]
    """Where it is, as `package.module:function`."""
    options: Mapping[str, Any] = {}
    """Its further arguments."""
    num_examples: Positive = 4096
    """Number of problems it is given."""
    problems: Problems = Problems()
    """Which they are."""


class StageData(Config):
    """What an earlier stage of kind `reject` has kept."""

    kind: Literal["stage"]
    """`stage`: rows of an earlier stage."""
    stage: str
    """Its name."""
    num_examples: Positive | None = None
    """Only the first so many."""


class FileData(Config):
    """Rows of a JSONL or Parquet file, or of a data set on the hub, in TRL's columns."""

    kind: Literal["file"]
    """`file`: from a file or the hub."""
    path: str
    """File, or id of a data set."""
    split: str = "train"
    """Split of a data set that has some."""
    columns: Mapping[str, str] = {}
    """Our columns from those of the file, for example `{prompt: question, completion: answer}`."""


class SampledPairs(Config):
    """Preference pairs from the parent's own samples: a correct completion against a wrong one."""

    kind: Literal["sampled"] = "sampled"
    """`sampled`: from the parent."""
    num_prompts: Positive = 512
    """Problems to sample for; those solved always or never give no pair."""
    problems: Problems = Problems()
    """Which they are."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions per problem."""
    pairs_per_prompt: Positive = 1
    """At most this many pairs of one problem."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""

    @pydantic.model_validator(mode="after")
    def _differ(self):
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 gives equal completions, no pair; raise it")
        return self
