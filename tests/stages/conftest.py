"""One small run of four stages, made once and read by many tests."""

import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from jaxrl_reason import stages
from jaxrl_reason.cli import main
from jaxrl_reason.config import Config, validate
from jaxrl_reason.models import ModelConfig
from jaxrl_reason.sampling import SamplingConfig
from jaxrl_reason.sharding import MeshConfig
from jaxrl_reason.stages import dpo, pipeline
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.context import Context
from jaxrl_reason.steps import OptimizerConfig

TINY = (Path(__file__).parents[1] / "tiny_run.yaml").read_text(encoding="utf-8")
CONFIG = (
    TINY
    + """
name: four
stages:
  cold:
    kind: sft
    steps: 60
    batch_size: 8
    max_length: 40
    data: {kind: traces, num_examples: 64, styles: {answer: 1.0}}
    optimizer: {learning_rate: 2.0e-2}
    save_steps: 20
  prefer:
    kind: dpo
    parent: cold
    steps: 5
    batch_size: 8
    max_length: 32
    data: {kind: sampled, num_prompts: 16, num_generations: 8}
    optimizer: {learning_rate: 1.0e-3}
    save_steps: 2
  reason:
    kind: grpo
    parent: prefer
    steps: 5
    prompts_per_step: 16
    num_generations: 8
    max_completion_length: 12
    num_iterations: 2
    beta: 0.05
    rewards: [{kind: accuracy}, {kind: format, weight: 0.5}]
    optimizer: {learning_rate: 1.0e-2}
    save_steps: 2
  balance:
    kind: morl
    parent: reason
    steps: 5
    prompts_per_step: 16
    num_generations: 8
    max_completion_length: 12
    aggregator_options: {min_std: 0.01}
    hypervolume_weighting: true
    rewards:
      - {kind: accuracy}
      - {kind: format}
      - {kind: length, low: 4, high: 12}
      - {kind: python, name: ones, function: "rewards_of_tests:ones"}
    optimizer: {learning_rate: 1.0e-2}
    save_steps: 2
  ahead:
    kind: grpo
    parent: balance
    steps: 5
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 12
    max_staleness: 1
    reward_workers: 1
    mask_truncated_completions: true
    epsilon: 0.1
    mismatch: {threshold: 1.0e-9}
    rewards:
      - {kind: accuracy}
      - {kind: python, name: ones, function: "rewards_of_tests:ones", scope: group}
      - {kind: python, name: asked, function: "rewards_of_tests:asked", scope: completion}
    optimizer: {learning_rate: 1.0e-2}
    save_steps: 2
  refill:
    kind: grpo
    parent: ahead
    steps: 5
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 12
    dynamic_sampling: {max_batches: 3, metric: accuracy}
    rewards:
      - {kind: accuracy}
      - {kind: overlong, cache: 6, weight: 0.1}
    optimizer: {learning_rate: 1.0e-3}
    save_steps: 2
"""
)

REWARDS = '''
"""Reward functions of a user's."""

import math


def ones(prompts, completions, *, problem, **_):
    """Share of ones in the completion; says nothing about problems of one step."""
    return [
        text.split().count("1") / 8 if p.columns["difficulty"] > 1 else None
        for text, p in zip(completions, problem, strict=True)
    ]


async def asked(prompts, completions, **_):
    return [float(text.endswith("</answer>")) for text in completions]


def variety(prompts, completions, **_):
    """Differs between completions of any model."""
    return [float(len(set(text))) for text in completions]


def short_list(prompts, completions, **_):
    return [1.0] * (len(completions) - 1)


def not_a_number(prompts, completions, **_):
    return [math.nan] * len(completions)
'''


class Run(NamedTuple):
    """A finished run and how it was made."""

    yaml: Path
    config: RunConfig
    directory: Path
    reference_calls: int
    """How often the DPO stage computed its reference log-probs."""
    reads: dict[str, set[str]]
    """For each class of configuration, the fields that the pipeline read once it was valid."""


@contextlib.contextmanager
def watched_reads() -> Iterator[dict[str, set[str]]]:
    """Collects which fields of which configuration the package reads."""
    reads: dict[str, set[str]] = defaultdict(set)
    inside = str(Path(stages.__file__).parents[1])

    def watch(cls, patch):
        plain = cls.__getattribute__

        def read(self, name):
            caller = sys._getframe(1).f_code
            if caller.co_filename.startswith(inside) and caller.co_name != "__post_init__":
                reads[type(self).__name__].add(name)
            return plain(self, name)

        patch.setattr(cls, "__getattribute__", read)

    with pytest.MonkeyPatch.context() as patch:
        for cls in (Config, MeshConfig, ModelConfig, OptimizerConfig, SamplingConfig):
            watch(cls, patch)
        yield reads


@pytest.fixture(scope="session")
def rewards_folder(tmp_path_factory) -> Path:
    """A folder with `rewards_of_tests.py`, importable while the tests run."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "rewards_of_tests.py").write_text(REWARDS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="session")
def tiny() -> dict:
    """The configuration of the run as plain values, to be changed."""
    return yaml.safe_load(CONFIG)


@pytest.fixture(scope="session")
def make_context(tiny, rewards_folder):
    """A context of the configuration with other top-level keys, in a folder of one's own."""

    def make(folder: Path, **changes) -> Context:
        raw = json.loads(json.dumps(tiny)) | {"output_dir": str(folder)} | changes
        return Context.create(validate(RunConfig, raw, "test"))

    return make


@pytest.fixture(scope="session")
def four(tmp_path_factory, rewards_folder) -> Run:
    """The finished run."""
    folder = tmp_path_factory.mktemp("four")
    path = folder / "four.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    calls, reads = [], {}
    reference_logprobs, run = dpo.reference_logprobs, pipeline.run

    def watched_run(*given, **options):
        with watched_reads() as seen:
            rows = run(*given, **options)
        reads.update(seen)
        return rows

    with pytest.MonkeyPatch.context() as patch:
        counted = lambda *given: calls.append(1) or reference_logprobs(*given)
        patch.setattr(dpo, "reference_logprobs", counted)
        patch.setattr(pipeline, "run", watched_run)
        code = main(["run", str(path), f"output_dir={folder}"])
    assert code == 0
    config = RunConfig.load(path, [f"output_dir={folder}"])
    return Run(path, config, folder / "four", len(calls), reads)
