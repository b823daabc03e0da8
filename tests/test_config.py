"""YAML, overrides, validation messages, help and hashes of `jaxrl_reason.config`."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest

from jaxrl_reason.config import (
    Config,
    apply_overrides,
    config_hash,
    describe,
    load_yaml,
    to_json,
    validate,
)
from jaxrl_reason.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """A standard-library dataclass, as models/ and steps/ declare theirs."""

    max_tokens: int
    """Longest completion."""
    temperature: float = 1
    """Softmax temperature."""
    stop: tuple[str, ...] = dataclasses.field(default_factory=lambda: ("</s>",))
    """Strings that end a completion."""
    mode: Literal["greedy", "random"] = "random"
    """How a token is chosen."""

    def __post_init__(self):
        if self.max_tokens % 2:
            raise ValueError(f"max_tokens={self.max_tokens} is odd; use an even number")


class Teach(Config):
    kind: Literal["teach"] = "teach"
    """Supervised stage."""
    steps: Annotated[int, pydantic.Field(gt=0)]
    """Number of updates."""
    learning_rate: float = 1e-3
    """Peak learning rate,
    reached after warm-up."""


class Reason(Config):
    kind: Literal["reason"] = "reason"
    """Reinforcement stage."""
    steps: int = 5
    """Number of updates."""
    packed: bool = False
    """Whether rows share a batch."""
    sampling: Sampling = Sampling(max_tokens=64, temperature=0.5)
    """How completions are drawn."""
    limit: int | str | None = None
    """A number of problems or `all`."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Momenta."""
    rewards: list[Sampling] = pydantic.Field(default_factory=list)
    """Reward settings."""


Stage = Annotated[Teach | Reason, pydantic.Field(discriminator="kind")]


class Run(Config):
    name: str
    """Folder of the run."""
    stages: dict[str, Stage]
    """The stages in order."""
    judge: Stage = Reason(steps=7)
    """The stage that judges."""
    sampling: Sampling | None = None
    """Shared sampling."""
    weights: dict[str, float] = {"accuracy": 1}  # noqa: RUF012 (pydantic copies it)
    """Weight of each reward."""

    @pydantic.model_validator(mode="after")
    def _has_stages(self):
        if not self.stages:
            raise ValueError("stages is empty; name at least one stage")
        return self


GOOD = """
name: demo
stages:
  cold_start: {kind: teach, steps: 3, learning_rate: 1e-4}
  reason:
    kind: reason
    sampling: {max_tokens: 8}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> Run:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return Run.load(path, overrides)


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(str(tmp_path), "DIR")


def test_load_builds_typed_frozen_values(tmp_path):
    run = load(tmp_path, GOOD)
    assert run.stages["cold_start"] == Teach(steps=3, learning_rate=1e-4)
    assert isinstance(run.stages["reason"], Reason)
    assert isinstance(run.stages["reason"].sampling, Sampling)
    assert run.stages["reason"].sampling.stop == ("</s>",)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        run.name = "other"


def test_numbers_are_read_as_yaml_1_2(tmp_path):
    path = tmp_path / "numbers.yaml"
    path.write_text(
        "a: 1e-4\nb: 010\nc: 1_000\nd: .5\ne: -1E+3\nf: 0x1F\ng: yes\nh: 1:30\n"
        "i: 2024-01-01\nj: ~\nk:\nl: 'true'\nm: true\nn: -.inf\no: +3\np: '1e-4'\n"
    )
    assert load_yaml(path) == {
        "a": 1e-4,
        "b": 10,
        "c": 1000,
        "d": 0.5,
        "e": -1000.0,
        "f": 31,
        "g": "yes",
        "h": "1:30",
        "i": "2024-01-01",
        "j": None,
        "k": None,
        "l": "true",
        "m": True,
        "n": -math.inf,
        "o": 3,
        "p": "1e-4",
    }


def test_yaml_merge_keys_still_work(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\n")
    assert load_yaml(path)["other"] == {"a": 1, "b": 3}


def test_yaml_merges_what_itself_merges_and_overrides(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(
        "deep: {base: &base {a: 1, b: 2}}\n"
        "below: {deeper: {middle: &middle {<<: *base, a: 3}}}\n"
        "top: {<<: *middle, b: 4}\n"
        "both: [*middle, {<<: [*base, *middle], c: 5}]\n"
    )
    raw = load_yaml(path)
    assert raw["below"]["deeper"]["middle"] == {"a": 3, "b": 2}
    assert raw["top"] == {"a": 3, "b": 4}
    assert raw["both"] == [{"a": 3, "b": 2}, {"a": 1, "b": 2, "c": 5}]


def test_an_override_of_what_an_anchor_shares_changes_one_place(tmp_path):
    path = tmp_path / "anchor.yaml"
    path.write_text("a: &a {deep: {x: 1}}\nb: *a\nc: {<<: *a}\n")
    raw = load_yaml(path)
    raw["a"]["deep"]["x"] = 2
    assert (raw["b"], raw["c"]) == ({"deep": {"x": 1}}, {"deep": {"x": 1}})


def test_an_anchor_that_contains_itself_is_refused(tmp_path):
    path = tmp_path / "circle.yaml"
    path.write_text("a: &a {b: [*a]}\n")
    with pytest.raises(InputError, match="anchor contains itself"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "DIR/bad.yaml: line 3: key 'a' was already given on line 1"),
        ("a: {b: 1,\n  b: 2}\n", "DIR/bad.yaml: line 2: key 'b' was already given on line 1"),
        ("a: 1\n2: b\n", "DIR/bad.yaml: line 2: a key must be a string, quote '2'"),
        ("a: 1\nb: [1\n", "DIR/bad.yaml: line 3, column 1: not valid YAML: expected ',' or ']'"),
        ("a: !!python/name:os.system\n", "line 1, column 4: not valid YAML: could not determine"),
        ("- 1\n- 2\n", "DIR/bad.yaml: got [1, 2]; a config is a mapping of `key: value` lines"),
        ("", "DIR/bad.yaml: got nothing; a config is a mapping"),
        ("a: 1\n---\nb: 2\n", "DIR/bad.yaml: line 2, column 1: not valid YAML: but found another"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_yaml(path)
    assert expected in str(caught.value).replace(str(tmp_path), "DIR")


def test_unreadable_files_are_input_errors(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("a: 1")
    with pytest.raises(InputError, match=r"no such config file; .* did you mean 'quickstart.yaml'"):
        load_yaml(tmp_path / "quickstrat.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(InputError, match=r"latin.yaml: not UTF-8 text \(byte 9\)"):
        load_yaml(tmp_path / "latin.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_yaml(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("steps: 3", "steps: true"), "stages.cold_start.steps: got true; needs int > 0"),
        (("steps: 3", "steps: '12'"), 'stages.cold_start.steps: got "12"; needs int > 0'),
        (("steps: 3", "steps: 3.0"), "stages.cold_start.steps: got 3.0; needs int > 0"),
        (("steps: 3", "steps: 0"), "stages.cold_start.steps: got 0; needs int > 0"),
        (
            ("steps: 3, ", ""),
            "stages.cold_start.steps: required but missing; needs int > 0",
        ),
        (
            ("rate: 1e-4", "rate: '1e-4'"),
            'stages.cold_start.learning_rate: got "1e-4"; needs float',
        ),
        (
            ("rate: 1e-4", "rate: false"),
            "stages.cold_start.learning_rate: got false; needs float",
        ),
        (
            ("learning_rate", "lerning_rate"),
            "stages.cold_start.lerning_rate: unknown key; did you mean 'learning_rate'?",
        ),
        (
            ("kind: reason", "kind: reson"),
            "stages.reason.kind: got \"reson\"; did you mean 'reason'? allowed: teach, reason",
        ),
        (
            ("kind: reason", "kind: zzz"),
            'stages.reason.kind: got "zzz"; allowed: reason, teach',
        ),
        (
            ("kind: reason", "steps: 3"),
            "stages.reason.kind: required but missing; allowed: teach, reason",
        ),
        (
            ("max_tokens: 8", "max_token: 8"),
            "stages.reason.sampling.max_token: unknown key; did you mean 'max_tokens'?",
        ),
        (
            ("max_tokens: 8", "max_tokens: yes"),
            'stages.reason.sampling.max_tokens: got "yes"; needs int',
        ),
        (
            ("max_tokens: 8", "max_tokens: 8, mode: best"),
            'stages.reason.sampling.mode: got "best"; needs "greedy" | "random"',
        ),
        (
            ("max_tokens: 8", "max_tokens: 9"),
            "stages.reason.sampling: max_tokens=9 is odd; use an even number",
        ),
        (("{max_tokens: 8}", "hot"), 'stages.reason.sampling: got "hot"; needs a mapping'),
        (("{max_tokens: 8}", "null"), "stages.reason.sampling: got null; needs a mapping"),
        (
            ("kind: reason", "kind: reason\n    limit: [1]"),
            "stages.reason.limit: got [1]; needs int | str | null",
        ),
        (
            ("kind: reason", "kind: reason\n    betas: [1]"),
            "stages.reason.betas.1: required but missing; needs float",
        ),
        (
            ("kind: reason", "kind: reason\n    rewards: [{max_tokens: a}]"),
            'stages.reason.rewards.0.max_tokens: got "a"; needs int',
        ),
        (("name: demo", "name: demo\nweights: {a: x}"), 'weights.a: got "x"; needs float'),
        (("name: demo", "name: demo\nstage: {}"), "stage: unknown key; did you mean 'stages'?"),
        (("name: demo", "name: demo\nsampling: 3"), "sampling: got 3; needs a mapping | null"),
        (("name: demo", ""), "name: required but missing; needs str"),
    ],
)
def test_a_wrong_value_is_one_readable_line(tmp_path, change, expected):
    assert change[0] in GOOD
    assert message(tmp_path, GOOD.replace(*change)) == f"DIR/run.yaml: {expected}"


def test_every_problem_is_listed_once_and_validators_keep_their_words(tmp_path):
    text = GOOD.replace("steps: 3", "steps: x").replace("max_tokens: 8", "max_tokens: x")
    assert message(tmp_path, text).splitlines() == [
        "DIR/run.yaml: 2 problems",
        '  - stages.cold_start.steps: got "x"; needs int > 0',
        '  - stages.reason.sampling.max_tokens: got "x"; needs int',
    ]
    assert message(tmp_path, "name: a\nstages: {}") == (
        "DIR/run.yaml: stages is empty; name at least one stage"
    )


def test_an_integer_is_a_float_where_a_float_is_wanted(tmp_path):
    rate = load(tmp_path, GOOD.replace("1e-4", "1")).stages["cold_start"].learning_rate
    assert (rate, type(rate)) == (1.0, float)
    # An integer default means the same, or equal settings would have different hashes.
    assert type(Reason(sampling=Sampling(max_tokens=2)).betas[0]) is float
    assert type(load(tmp_path, GOOD).weights["accuracy"]) is float


def test_overrides_are_typed_by_the_field(tmp_path):
    run = load(
        tmp_path,
        GOOD,
        "stages.cold_start.steps=20",
        "stages.cold_start.learning_rate=1e-6",
        "stages.reason.packed=true",
        "stages.reason.sampling.stop=[a, 'b c']",
        "stages.reason.betas.1=0.5",
        "stages.reason.limit=all",
        "stages.extra={kind: teach, steps: 1}",
        "sampling.max_tokens=2",
        "weights.length=0.25",
        "name=x=y",
    )
    assert run.stages["cold_start"] == Teach(steps=20, learning_rate=1e-6)
    reason = run.stages["reason"]
    assert (reason.packed, reason.limit, reason.betas) == (True, "all", (0.9, 0.5))
    assert reason.sampling.stop == ("a", "b c")
    assert run.stages["extra"] == Teach(steps=1)
    assert run.sampling == Sampling(max_tokens=2)
    assert run.weights == {"accuracy": 1.0, "length": 0.25}
    assert run.name == "x=y"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "stages.reason.stesp=1",
            "override 'stages.reason.stesp=1': unknown key stages.reason.stesp; "
            "did you mean 'steps'?",
        ),
        (
            "stages.raeson.steps=1",
            "override 'stages.raeson.steps=1': there is no stages.raeson; did you mean 'reason'?",
        ),
        (
            "stages.reason.sampling.temprature=1",
            "unknown key stages.reason.sampling.temprature; did you mean 'temperature'?",
        ),
        ("nmae=1", "override 'nmae=1': unknown key nmae; did you mean 'name'?"),
        ("name", "override 'name': write it as dotted.key=value"),
        ("a..b=1", "override 'a..b=1': write it as dotted.key=value"),
        ("name.x=1", "override 'name.x=1': name is \"demo\", which has no keys"),
        ("stages.reason.betas.2=1", "stages.reason.betas has 2 entries; got index '2'"),
        ("name=[", "override 'name=[': line 1, column 2: not valid YAML"),
        ("stages.reason.steps=2.5", "stages.reason.steps: got 2.5; needs int"),
        ("stages.reason.packed=1", "stages.reason.packed: got 1; needs bool"),
    ],
)
def test_a_wrong_override_names_itself(tmp_path, override, expected):
    assert expected in message(tmp_path, GOOD, override)


def test_a_type_error_names_the_file_and_the_overrides(tmp_path):
    assert message(tmp_path, GOOD, "stages.reason.steps=x").startswith(
        "DIR/run.yaml with stages.reason.steps=x: stages.reason.steps: got"
    )


def test_overrides_leave_the_input_unchanged():
    raw = {"name": "a", "stages": {"s": {"kind": "reason", "betas": [0.1, 0.2]}}}
    before = json.dumps(raw)
    changed = apply_overrides(Run, raw, ["stages.s.betas.0=0.5", "stages.s.steps=2"])
    assert changed["stages"]["s"] == {"kind": "reason", "betas": [0.5, 0.2], "steps": 2}
    assert json.dumps(raw) == before


def test_setting_one_key_of_a_nested_default_keeps_the_others(tmp_path):
    # The field's default has temperature 0.5; the dataclass alone would say 1.
    reason = load(tmp_path, GOOD).stages["reason"]
    assert reason.sampling == Sampling(max_tokens=8, temperature=0.5)
    judge = load(tmp_path, GOOD, "judge.sampling.mode=greedy").judge
    assert judge == Reason(
        steps=7, sampling=Sampling(max_tokens=64, temperature=0.5, mode="greedy")
    )
    other = load(tmp_path, GOOD, "judge.kind=teach", "judge.steps=2").judge
    assert other == Teach(steps=2)


def test_help_lists_every_field_with_type_default_and_sentence():
    lines = {(line.path, line.kind): line for line in describe(Run)}
    assert list(dict.fromkeys(path for path, _ in lines))[:6] == [
        "name",
        "stages",
        "stages.<name>.kind",
        "stages.<name>.steps",
        "stages.<name>.learning_rate",
        "stages.<name>.packed",
    ]

    def line(path, kind=""):
        found = lines[path, kind]
        return found.type, found.default, found.help

    assert line("name") == ("str", "required", "Folder of the run.")
    assert line("stages.<name>.steps", "teach") == ("int > 0", "required", "Number of updates.")
    assert line("stages.<name>.steps", "reason") == ("int", "5", "Number of updates.")
    assert line("stages.<name>.learning_rate", "teach") == (
        "float",
        "0.001",
        "Peak learning rate, reached after warm-up.",
    )
    sampling = "stages.<name>.sampling"
    assert line(sampling, "reason") == ("a mapping", "(below)", "How completions are drawn.")
    assert line(f"{sampling}.temperature", "reason") == ("float", "0.5", "Softmax temperature.")
    assert line(f"{sampling}.stop", "reason")[:2] == ("list of str", '["</s>"]')
    assert line(f"{sampling}.mode", "reason")[0] == '"greedy" | "random"'
    assert line("stages.<name>.limit", "reason")[:2] == ("int | str | null", "null")
    assert line("stages.<name>.betas", "reason")[:2] == ("[float, float]", "[0.9, 0.99]")
    assert line("stages.<name>.rewards.<index>.max_tokens", "reason")[1] == "required"
    assert line("judge.steps", "reason")[1] == "7"
    assert line("sampling") == ("a mapping | null", "null", "Shared sampling.")
    assert line("sampling.temperature")[1] == "1"
    assert line("weights")[0] == "a mapping of names to float"


def test_help_names_the_kinds_above_a_nested_union():
    class File(Config):
        kind: Literal["file"] = "file"
        path: str

    class Made(Config):
        kind: Literal["made"] = "made"
        number: int = 4

    class Sft(Config):
        kind: Literal["sft"]
        data: Annotated[Made | File, pydantic.Field(discriminator="kind")] = Made(number=9)

    class Dpo(Config):
        kind: Literal["dpo"]

    class Top(Config):
        stage: Annotated[Sft | Dpo, pydantic.Field(discriminator="kind")]

    found = {(line.path, line.kind): line.default for line in describe(Top)}
    assert found["stage.data.number", "sft/made"] == "9"
    assert found["stage.data.path", "sft/file"] == "required"
    assert found["stage.kind", "dpo"] == "required"


def test_the_saved_config_reads_back_equal_and_hashes_alike(tmp_path):
    run = load(tmp_path, GOOD, "sampling.max_tokens=2", "weights.x=.inf")
    saved = json.loads(json.dumps(to_json(run)))
    again = validate(Run, saved, "config.json")
    assert again == run
    assert config_hash(again) == config_hash(run)
    assert len(config_hash(run)) == 16


def test_the_hash_ignores_order_and_spelling_but_no_value(tmp_path):
    reordered = """
stages:
  cold_start: {learning_rate: 0.0001, steps: 3, kind: teach}
  reason: {sampling: {temperature: 0.5, max_tokens: 8}, kind: reason, steps: 5}
name: demo
weights: {accuracy: 1.0}
"""
    run = load(tmp_path, GOOD)
    assert config_hash(load(tmp_path, reordered)) == config_hash(run)
    changed = load(tmp_path, GOOD, "stages.reason.sampling.temperature=0.51")
    assert config_hash(changed) != config_hash(run)


def test_the_hash_is_the_same_in_another_process():
    # Python's own hash is salted for each process; a checkpoint's must not be.
    code = (
        "from jaxrl_reason.config import *\n"
        "class A(Config):\n"
        "    x: int = 3\n"
        "    y: str = 'b'\n"
        "print(config_hash(A()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    class A(Config):
        x: int = 3
        y: str = "b"

    assert run.stdout.strip() == config_hash(A()) == "6ee182ae29182c45"
