"""The command line: help, overrides, sampling, evaluation, and messages instead of tracebacks."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_reason import __version__, cli
from jaxrl_reason.cli import main
from jaxrl_reason.config import describe
from jaxrl_reason.data.records import read_jsonl
from jaxrl_reason.stages import pipeline
from jaxrl_reason.stages.config import EvaluationConfig, RunConfig
from jaxrl_reason.stages.sample import SampleConfig

TINY = (Path(__file__).parent / "tiny_run.yaml").read_text(encoding="utf-8")
CONFIG = (
    TINY
    + """
name: small
stages:
  cold:
    kind: sft
    steps: 20
    batch_size: 8
    max_length: 40
    data: {kind: traces, num_examples: 64, styles: {answer: 1.0}}
    optimizer: {learning_rate: 2.0e-2}
"""
)
PROMPTS = ["a = 1 ; b = a + 1 ; b ?", "c = 2 ; d = c * 2 ; d ?", "e = 0 ; f = e - 1 ; f ?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a configuration and its run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.yaml").write_text(CONFIG, encoding="utf-8")
    assert main(["run", str(folder / "small.yaml"), f"output_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def cold(folder) -> str:
    """A checkpoint."""
    return str(folder / "small" / "cold")


@pytest.fixture
def refused(capsys):
    """Run a command that must end with exit code 2 and one message; returns the message."""

    def run(*arguments) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert "Traceback" not in said.err
        return said.err.removeprefix("error: ").strip()

    return run


# Help


@pytest.mark.parametrize(
    ("command", "config"),
    [("run", RunConfig), ("evaluate", EvaluationConfig), ("sample", SampleConfig)],
)
def test_help_has_every_field_with_its_default_and_meaning(command, config, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    fields = describe(config)
    assert len(fields) > 5
    for field in fields:
        start, end = f"{field.path}  ({field.type};", f" {field.default})"
        found = [i for i, line in enumerate(lines) if line.startswith(start) and line.endswith(end)]
        assert found, field
        assert any(lines[i + 1] == field.help for i in found), field


def test_every_field_has_a_meaning():
    for config in (RunConfig, EvaluationConfig, SampleConfig):
        assert [f.path for f in describe(config) if not f.help] == []


def test_help_of_the_whole_and_of_lineage(capsys):
    for arguments in (["--help"], ["lineage", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
    said = capsys.readouterr().out
    for word in ("run", "evaluate", "sample", "lineage", "--json"):
        assert word in said


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"jaxrl-reason {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["train"], ["run"], ["run", "x.yaml", "--fast"]])
def test_a_command_that_is_none_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: jaxrl-reason" in capsys.readouterr().err


def test_the_module_is_a_command_and_help_needs_no_jax():
    probe = "import sys; from jaxrl_reason import cli; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    command = [sys.executable, "-m", "jaxrl_reason.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"jaxrl-reason {__version__}\n"


# Runs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.cold.step=3"], "unknown key stages.cold.step; did you mean 'steps'"),
        (["stages.could.steps=3"], "there is no stages.could; did you mean 'cold'"),
        (["stages.cold.steps=many"], r'stages.cold.steps: got "many"; needs int > 0'),
        (["stages.cold.steps"], "write it as dotted.key=value"),
        (["stages..steps=3"], "write it as dotted.key=value"),
        (["seed.deep=3"], "seed"),
        (["stages.cold.parent=warm"], "'warm' is no earlier stage; known are"),
        (
            ["stages.cold.batch_size=12", "name=twelve"],
            "cold.batch_size=12 must be a multiple of 8",
        ),
        (["mesh.data=3"], "does not fit 8 devices"),
        (["name=new", "stages.cold.data={kind: file, path: none.jsonl}"], "none.jsonl: no such"),
        (["stages.cold.steps=21"], "small/cold was made with another .* steps: 20 -> 21"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_message(folder, capsys, overrides, message):
    command = ["run", str(folder / "small.yaml"), f"output_dir={folder}", *overrides]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", r"broken.yaml: line \d+, column \d+: not valid YAML"),
        ("name: small\nname: other\n", "line 2: key 'name' was already given on line 1"),
        ("- a\n- b\n", "broken.yaml"),
        ("name: small\n", r"broken.yaml .*: 2 problems\n  - max_prompt_length: required"),
    ],
)
def test_a_broken_file_is_named(tmp_path, refused, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert re.search(message, refused("run", path, f"output_dir={tmp_path}"))
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there_has_its_neighbours_named(folder, refused):
    message = refused("run", folder / "smal.yaml")
    assert re.search(r"smal.yaml: no such config file; .*did you mean 'small.yaml'", message)


def test_a_folder_that_cannot_be_written_is_refused(folder, refused):
    message = refused("run", folder / "small.yaml", "output_dir=/dev/null/runs")
    assert message.startswith("cannot write to /dev/null/runs/small: Not a directory; choose")


def test_ctrl_c_says_how_to_go_on(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    assert main(["run", str(folder / "small.yaml")]) == 130
    said = capsys.readouterr()
    assert said.err == "interrupted; the same command goes on from the last checkpoint\n"


def test_a_closed_pipe_is_no_error(monkeypatch):
    def closed(_):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_lineage", closed)
    assert main(["lineage", "anything"]) == 1


# Evaluation


def evaluated(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_repeats_the_evaluation_of_the_run(cold, capsys, tmp_path):
    samples = tmp_path / "deep" / "samples.jsonl"
    result = evaluated(capsys, cold, "--samples", str(samples))
    saved = json.loads((Path(cold) / "eval.json").read_text())
    assert result.pop("checkpoint") == cold
    assert result == {name: saved[name] for name in result}
    assert samples.read_bytes() == (Path(cold) / "samples.jsonl").read_bytes()


def test_evaluate_takes_overrides_on_either_side_of_an_option(cold, capsys, tmp_path):
    option = ["--samples", str(tmp_path / "samples.jsonl")]
    first = evaluated(capsys, cold, "problems=16", *option)
    assert first["problems"] == 16
    assert first == evaluated(capsys, cold, *option, "problems=16")
    assert len(read_jsonl(tmp_path / "samples.jsonl", ("prompt",))) == 16


@pytest.mark.parametrize("where", ["cold", "cold/checkpoints", "cold/checkpoints/20"])
def test_a_checkpoint_may_be_named_by_its_stage_or_its_step(folder, capsys, where):
    result = evaluated(capsys, str(folder / "small" / where), "problems=16")
    assert result["problems"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{small}/cold", "problem=3"], "unknown key problem; did you mean 'problems'"),
        (["{small}/cold", "problems=0"], "problems: got 0; needs int > 0"),
        (["{small}/cold", "sampling.top_p=2"], r"top_p=2.0 must lie in \(0, 1\]"),
        (["{small}/cold", "max_completion_length=40"], "exceeds the model's max_position_emb"),
        (["{small}/cald"], "no checkpoint at .*cald; .* has no 'cald', did you mean 'cold'"),
        (["{small}/cold/checkpoints/7"], "no checkpoint at"),
        (["/dev/null/x"], "no checkpoint at /dev/null/x"),
    ],
)
def test_a_mistake_in_an_evaluation_is_one_message(folder, refused, arguments, message):
    small = str(folder / "small")
    got = refused("evaluate", *(argument.format(small=small) for argument in arguments))
    assert re.search(message, got), got


def test_samples_that_cannot_be_written_are_refused(cold, refused):
    message = refused("evaluate", cold, "problems=16", "--samples", "/dev/null/samples.jsonl")
    assert message.startswith("cannot write /dev/null/samples.jsonl")


def test_a_checkpoint_outside_a_run_is_refused(folder, tmp_path, refused):
    shutil.copytree(folder / "small" / "cold" / "checkpoints", tmp_path / "a" / "b" / "checkpoints")
    assert "config.json" in refused("evaluate", tmp_path / "a" / "b")


# Sampling


def sampled(capsys, *arguments) -> list[dict]:
    capsys.readouterr()
    assert main(["sample", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
    """The same prompts as lines of text and as JSONL."""
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\n".join(["", PROMPTS[0], "  ", f"  {PROMPTS[1]} ", PROMPTS[2], ""]))
    rows.write_text("".join(json.dumps({"prompt": p, "more": 1}) + "\n" for p in PROMPTS))
    return str(text), str(rows)


def test_sample_completes_the_prompts_of_a_file(cold, files, capsys):
    rows = sampled(capsys, cold, "--file", files[0])
    assert [row["prompt"] for row in rows] == PROMPTS
    assert rows == sampled(capsys, cold, "--file", files[1])
    for row in rows:
        assert list(row) == ["prompt", "completion", "length", "finished"]
        assert 1 <= row["length"] <= 12
        assert len(row["completion"].split()) == row["length"] - row["finished"]
    assert any("<answer>" in row["completion"] for row in rows)


def test_sample_draws_as_often_and_as_asked(cold, files, capsys):
    rows = sampled(capsys, cold, "--file", files[0], "num_generations=4", "seed=1")
    assert [row["prompt"] for row in rows] == [p for p in PROMPTS for _ in range(4)]
    assert rows == sampled(capsys, cold, "num_generations=4", "seed=1", "--file", files[0])
    assert rows != sampled(capsys, cold, "--file", files[0], "num_generations=4", "seed=2")


def test_sample_asks_at_the_terminal(cold, capsys, monkeypatch):
    typed = [PROMPTS[0], "what is this", PROMPTS[0], PROMPTS[0] + PROMPTS[1] * 3, ""]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\nnot read\n"))
    capsys.readouterr()
    assert main(["sample", cold]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Type a prompt, for example:  ")
    assert len(re.findall(r"\[\d+ tokens\]", said)) == 2
    assert "error: prompt: the word 'what' is not in the tokenizer's vocabulary" in said
    assert re.search(r"error: prompt: the prompt has \d+ tokens; .*max_prompt_length=20", said)


def test_the_end_of_input_ends_sampling(cold, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["sample", cold]) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a ?"}\n{"prompt"\n', r"p.jsonl:2: got .*no valid JSON"),
        ("p.jsonl", '{"prompt": "a ?"}\n{"promt": "a"}\n', r"p.jsonl:2: no column 'prompt'"),
        ("p.jsonl", '{"prompt": 3}\n', r"p.jsonl:1: column 'prompt' is 3; it must be str"),
        ("p.jsonl", "", r"p.jsonl: no rows"),
        ("p.txt", "a ?\n\nwhat\n", r"p.txt:3: the word 'what' is not in the tokenizer"),
        ("p.txt", f"a ?\n{'a + ' * 20} ?\n", r"p.txt:2: the prompt has \d+ tokens; .*length=20"),
        ("p.txt", " \n\n", r"p.txt has no prompt; write one a line"),
    ],
)
def test_a_mistake_in_a_file_of_prompts_is_named_by_line(
    cold, tmp_path, refused, name, text, message
):
    (tmp_path / name).write_text(text)
    got = refused("sample", cold, "--file", tmp_path / name)
    assert re.search(message, got), got


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "/no/such/file.txt"], "cannot read prompts from /no/such/file.txt"),
        (["--file", "/no/such/file.jsonl"], "/no/such/file.jsonl: no such file"),
        (["temperature=0.5"], "unknown key temperature; "),
        (["num_generations=0"], "num_generations: got 0; needs int > 0"),
        (["sampling.temperature=-1"], r"temperature=-1.0 must be 0 \(greedy\) or positive"),
        (["seed=-1"], "seed: got -1"),
    ],
)
def test_a_mistake_in_sampling_is_one_message(cold, refused, arguments, message):
    got = refused("sample", cold, *arguments)
    assert re.search(message, got), got


# Lineage


def test_lineage_has_a_line_for_every_ancestor(cold, capsys):
    capsys.readouterr()
    assert main(["lineage", cold]) == 0
    first, last = capsys.readouterr().out.splitlines()
    pattern = r"cold +sft +step 20 +hash \w{16}  data \w{16}  seed 0  version "
    assert re.match(pattern + re.escape(__version__), first)
    assert re.match(r"init +init +step 0 +hash \w{16}  seed 0  version ", last)


def test_lineage_as_json_is_the_meta_of_every_ancestor(cold, capsys):
    capsys.readouterr()
    assert main(["lineage", cold, "--json"]) == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["stage"] for entry in entries] == ["cold", "init"]
    assert entries[0]["parent"] == entries[1]["path"]
    assert entries[0]["config"]["optimizer"]["learning_rate"] == 0.02


def test_a_lost_ancestor_is_said(folder, tmp_path, capsys):
    copy = tmp_path / "small"
    shutil.copytree(folder / "small", copy)
    shutil.rmtree(copy / "init")
    capsys.readouterr()
    assert main(["lineage", str(copy / "cold")]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("cold")
    assert re.match(r".*init/checkpoints/0: no checkpoint at", last)


def test_lineage_of_nothing_is_refused(folder, refused):
    assert "no checkpoint at" in refused("lineage", folder)
    assert "no checkpoint at" in refused("lineage", folder / "nothing")


def test_lineage_takes_no_fields(cold, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["lineage", cold, "seed=3"])
    assert exit_.value.code == 2
    assert "unrecognized arguments: seed=3" in capsys.readouterr().err


# Reports


def test_a_run_ends_with_the_page_that_the_command_makes_again(folder, capsys, tmp_path):
    assert main(["run", str(folder / "small.yaml"), f"output_dir={folder}"]) == 0
    page = folder / "small" / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"report   {page}"
    again = tmp_path / "again.html"
    assert main(["report", str(folder / "small"), "--out", str(again)]) == 0
    assert capsys.readouterr().out == f"{again}\n"
    assert again.read_bytes() == page.read_bytes()
    assert main(["report", str(folder / "small"), "--out", str(again), "--examples", "0"]) == 0
    assert len(again.read_bytes()) < len(page.read_bytes())


def test_a_report_of_a_stage_lies_in_its_folder(cold, capsys):
    capsys.readouterr()
    assert main(["report", cold]) == 0
    assert capsys.readouterr().out == f"{cold}/report.html\n"
    assert "<title>small: cold</title>" in (Path(cold) / "report.html").read_text()


def test_a_report_of_no_run_is_refused(folder, refused):
    assert "runs in it: small" in refused("report", folder)
    assert "no such folder" in refused("report", folder / "none")
    assert "examples=-1" in refused("report", folder / "small", "--examples", "-1")
