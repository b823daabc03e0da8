"""A tiny experiment with two arms, and its results of two seeds, made once."""

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from jaxrl_reason.cli import main
from jaxrl_reason.reproduce import load_experiment
from jaxrl_reason.reproduce.records import rounded
from jaxrl_reason.stages import pipeline

TINY = (Path(__file__).parents[1] / "tiny_run.yaml").read_text(encoding="utf-8")
STAGES = """
  cold:
    kind: sft
    steps: 12
    batch_size: 8
    max_length: 40
    data: {kind: traces, num_examples: 64, styles: {answer: 1.0}}
    optimizer: {learning_rate: 2.0e-2}
  plain: &rl
    kind: grpo
    parent: cold
    steps: 3
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 12
    problems: {stream: shared}
    rewards: [{kind: accuracy}, {kind: format, weight: 0.5}]
    optimizer: {learning_rate: 1.0e-3}
  short:
    <<: *rl
    rewards: [{kind: accuracy}, {kind: length, low: 4, high: 12}]
"""
EXPERIMENT = """
paper: {title: "Short thoughts", arxiv: "2501.01234"}
question: Does a reward for short completions make them shorter?
run:
  name: shorter
  stages: {}
arms:
  short: {stage: short, label: "rewarded for brevity"}
  plain: {stage: plain}
budget:
  - {arms: [short, plain], equal: [updates, sft_rows, sft_tokens, rl_completions, rl_tokens]}
metrics:
  gain: {function: "metrics_of_tests:gain", options: {over: cold}, stages: [short, plain]}
claims:
  C1:
    claim: "A reward for brevity shortens completions."
    tests:
      - metric: mean_length
        arm: short
        against: plain
        ratio: true
        direction: lower
        margin: 1.0
      - {metric: sets.easy.accuracy, arm: short, against: plain, direction: within, margin: 0.9}
  C2:
    claim: "Reinforcement learning does not lower the format rate."
    tests:
      - {metric: derived.gain, arm: short, direction: higher, margin: -1.5}
      - {metric: train.rewards/accuracy/mean@last2, arm: short, direction: higher, margin: -0.5}
smoke: {stages.cold.steps: 1}
findings: |
  Nothing can be said of **two** seeds.
"""
METRICS = '''
"""Metrics of a user's."""


def gain(records, stage, *, over):
    return records[stage]["format_rate"] - records[over]["format_rate"]


def broken(records, stage):
    return 1 / 0


def not_a_number(records, stage):
    return "high"
'''


class Done(NamedTuple):
    """A finished reproduction and how it was made."""

    yaml: Path
    folder: Path
    code: int
    said: str
    trained: list[str]
    """Stages that were trained, in order."""

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "papers" / "shorter" / "small.json").read_text())

    @property
    def page(self) -> str:
        return (self.folder / "papers" / "shorter.md").read_text()

    def command(self, *more: str) -> list[str]:
        """The command line that made it, with more arguments."""
        folders = [
            f"--output-dir={self.folder / 'runs'}",
            f"--results-dir={self.folder / 'papers'}",
        ]
        return ["reproduce", str(self.yaml), *folders, "--seeds=2", *more]


def raw_experiment() -> dict[str, Any]:
    raw = yaml.safe_load(EXPERIMENT)
    raw["run"] |= {**yaml.safe_load(TINY), "stages": yaml.safe_load(STAGES)}
    raw["run"]["evaluation"]["sets"] = {"easy": {"difficulties": [1], "problems": 16}}
    return raw


@pytest.fixture(scope="session")
def make_raw():
    """Makes the experiment as plain values, to be changed."""
    return raw_experiment


@pytest.fixture
def raw() -> dict[str, Any]:
    """The experiment as plain values, to be changed."""
    return raw_experiment()


@pytest.fixture(scope="session")
def metrics_folder(tmp_path_factory) -> Path:
    """A folder with `metrics_of_tests.py`, importable while the tests run."""
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "metrics_of_tests.py").write_text(METRICS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture
def load(tmp_path, metrics_folder):
    """Write an experiment to a file and load it."""

    def of(raw: Mapping[str, Any], *overrides: str, scale: str | None = None, **options):
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(dict(raw), sort_keys=False), encoding="utf-8")
        return load_experiment(str(path), scale, overrides, **options)

    return of


@pytest.fixture
def fake_entry():
    """A seed's entry with the accuracies that a test wants, and nothing trained."""

    def of(accuracies: Mapping[str, float], **more: Any) -> dict[str, Any]:
        record = lambda accuracy: {
            "kind": "grpo",
            "accuracy": accuracy,
            "format_rate": 1.0,
            "mean_length": 10 * accuracy,
            "sets": {"easy": {"accuracy": accuracy}},
            "train": {"rewards/accuracy/mean": [0.1, 0.2, 0.3], "reward": [0.5, None, 0.7]},
            "used": {"steps": 3, "tokens": 30},
            **more,
        }
        return rounded(
            {
                "version": "0.1.0",
                "jax": "0.0",
                "device": "1 x cpu",
                "seconds": dict.fromkeys(accuracies, 60.0),
                "stages": {name: record(accuracy) for name, accuracy in accuracies.items()},
                "examples": {},
            }
        )

    return of


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The stages that are trained from now on."""
    trained = []
    for kind, train in list(pipeline.RUNNERS.items()):
        watched = lambda stage, train=train: trained.append(stage.name) or train(stage)
        monkeypatch.setitem(pipeline.RUNNERS, kind, watched)
    return trained


@pytest.fixture(scope="session")
def done(tmp_path_factory, metrics_folder) -> Done:
    """The experiment after its command."""
    folder = tmp_path_factory.mktemp("shorter")
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(raw_experiment(), sort_keys=False), encoding="utf-8")
    trained: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind, train in list(pipeline.RUNNERS.items()):
            watched = lambda stage, train=train: trained.append(stage.name) or train(stage)
            patch.setitem(pipeline.RUNNERS, kind, watched)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = main(Done(path, folder, 0, "", trained).command())
    return Done(path, folder, code, said.getvalue(), trained)
