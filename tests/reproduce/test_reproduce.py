"""The command from its first seed to its page: sharing, resuming, failing, several processes."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

from jaxrl_reason.cli import main
from jaxrl_reason.reproduce import runner
from jaxrl_reason.reproduce.runner import compilation_cache

ROOT = Path(__file__).parents[2]


def without_times(results):
    """Results as they must be whenever and wherever they were made."""
    results = copy.deepcopy(results)
    for entry in results["seeds"].values():
        for name in ("seconds", "version", "jax", "device"):
            del entry[name]
    for arm in results["budget"].values():
        arm["used"].pop("seconds", None)
    return results


# A reproduction


def test_stages_that_arms_share_are_trained_once_a_seed(done):
    assert done.code == 0
    assert done.trained == ["cold", "plain", "short"] * 2


def test_the_results_have_every_seed_and_stage(done):
    results = done.results
    assert list(results["seeds"]) == ["0", "1"]
    for entry in results["seeds"].values():
        assert list(entry["stages"]) == ["init", "cold", "plain", "short"]
        assert entry["seconds"].keys() == entry["stages"].keys()
        short, cold = entry["stages"]["short"], entry["stages"]["cold"]
        assert short["problems"] == 24
        assert short["sets"]["easy"]["problems"] == 16
        assert len(short["train"]["rewards/length/mean"]) == 3
        assert len(cold["train"]["loss"]) == cold["used"]["steps"] == 12
        # Of three steps of 32 completions, each up to 12 tokens long.
        assert 3 * 32 <= short["used"]["tokens"] <= 3 * 32 * 12
        assert "hash" not in short
    first, second = (entry["stages"] for entry in results["seeds"].values())
    assert first["cold"]["train"]["loss"] != second["cold"]["train"]["loss"]
    assert results["budget"]["plain"]["used"]["updates"] == 15
    assert results["claims"].keys() == {"C1", "C2"}


def test_examples_are_the_first_problems_before_and_after(done):
    (examples,) = done.results["seeds"]["0"]["examples"].values()
    folder = done.folder / "runs" / "shorter" / "small" / "seed_0"
    assert len(examples) == 3
    for stage, side in (("cold", "before"), ("short", "after")):
        lines = (folder / stage / "samples.jsonl").read_text().splitlines()
        for line, example in zip(lines, examples, strict=False):
            row = json.loads(line)
            assert (row["prompt"], row["completion"]) == (
                example["prompt"],
                example[side]["completion"],
            )


def test_the_command_says_what_it_does_and_ends_with_verdicts_and_paths(done):
    said = done.said
    assert "shorter (small)" in said
    assert "arms short, plain; stages cold, plain, short" in said
    assert said.index("seed 0") < said.index("seed 1") < said.index("claim")
    assert re.search(r"C1 +(supported|refuted|undecided)", said)
    for name in ("shorter.md", "small.json", "small_arms.png", "small_claims.png"):
        assert name in said
    assert "| C2 | Reinforcement learning does not lower the format rate. |" in done.page


def test_a_second_time_nothing_runs(done, counted, capsys):
    before, page = done.results, done.page
    assert main(done.command()) == 0
    assert counted == []
    assert "seeds 0, 1 are in" in capsys.readouterr().out
    assert (done.results, done.page) == (before, page)


def test_seeds_in_the_results_need_no_folder(done, counted, tmp_path):
    shutil.copytree(done.folder / "papers", tmp_path / "papers")
    folders = [f"--output-dir={tmp_path / 'runs'}", f"--results-dir={tmp_path / 'papers'}"]
    assert main(["reproduce", str(done.yaml), *folders, "--seeds=2"]) == 0
    assert main(["reproduce", str(done.yaml), *folders, "--seeds=0"]) == 0
    assert counted == []
    assert not (tmp_path / "runs").exists()


def test_a_new_claim_needs_no_run_and_findings_reach_the_page(done, counted, tmp_path):
    shutil.copytree(done.folder / "papers", tmp_path / "papers")
    raw = yaml.safe_load(done.yaml.read_text())
    test = {"metric": "accuracy", "arm": "short", "direction": "higher", "margin": 2.0}
    raw |= {"findings": "Now we know.", "claims": {"C9": {"claim": "new", "tests": [test]}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(raw))
    folders = [f"--output-dir={tmp_path / 'runs'}", f"--results-dir={tmp_path / 'papers'}"]
    assert main(["reproduce", str(tmp_path / "small.yaml"), *folders, "--seeds=2"]) == 0
    page = (tmp_path / "papers" / "shorter.md").read_text()
    assert "Now we know." in page
    assert "| C9 | new | **refuted** |" in page
    assert counted == []


def test_a_claim_about_nothing_is_refused_after_the_results_are_safe(done, tmp_path, capsys):
    shutil.copytree(done.folder / "papers", tmp_path / "papers")
    raw = yaml.safe_load(done.yaml.read_text())
    raw["claims"]["C1"]["tests"][0]["metric"] = "mean_lenght"
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(raw))
    folders = [f"--output-dir={tmp_path / 'runs'}", f"--results-dir={tmp_path / 'papers'}"]
    assert main(["reproduce", str(tmp_path / "small.yaml"), *folders, "--seeds=2"]) == 2
    message = capsys.readouterr().err
    assert "claims.C1.tests.0: seed 0, stage short, metric 'mean_lenght'" in message
    assert "did you mean 'mean_length'" in message


def test_another_configuration_is_refused(done, counted, capsys):
    assert main(done.command("stages.cold.steps=13")) == 2
    assert "has results of another configuration" in capsys.readouterr().err
    assert counted == []


# Arms, one after the other


def test_arms_are_added_to_seeds_and_shared_stages_are_not_trained_again(done, counted, tmp_path):
    folders = [f"--output-dir={tmp_path / 'runs'}", f"--results-dir={tmp_path / 'papers'}"]
    command = ["reproduce", str(done.yaml), *folders, "--seeds=1"]
    path = tmp_path / "papers" / "shorter" / "small.json"
    assert main([*command, "--arms", "plain"]) == 0
    assert counted == ["cold", "plain"]
    results = json.loads(path.read_text())
    assert list(results["seeds"]["0"]["stages"]) == ["init", "cold", "plain"]
    assert results["claims"]["C1"]["verdict"] == "not run"
    page = (tmp_path / "papers" / "shorter.md").read_text()
    assert "| rewarded for brevity | not run | not run |" in page

    assert main(command) == 0
    assert counted == ["cold", "plain", "short"]
    whole = json.loads(path.read_text())
    expected = done.results["seeds"]["0"]["stages"]
    assert whole["seeds"]["0"]["stages"] == expected


# Failing


def test_a_seed_that_fails_is_reported_and_the_others_go_on(done, tmp_path, monkeypatch, capsys):
    trains = runner.pipeline.run
    entry = done.results["seeds"]["1"]

    def fails(config, *, say):
        if config.seed == 0:
            raise RuntimeError("out of luck")
        return trains(config, say=say)

    monkeypatch.setattr(runner.pipeline, "run", fails)
    shutil.copytree(done.folder / "runs" / "shorter", tmp_path / "runs" / "shorter")
    folders = [f"--output-dir={tmp_path / 'runs'}", f"--results-dir={tmp_path / 'papers'}"]
    assert main(["reproduce", str(done.yaml), *folders, "--seeds=2"]) == 1
    said = capsys.readouterr()
    assert "RuntimeError: out of luck" in said.err
    assert said.out.count("seed 0 failed") == 1
    results = json.loads((tmp_path / "papers" / "shorter" / "small.json").read_text())
    # Its folder is finished: nothing is trained, and the entry is the same.
    assert list(results["seeds"]) == ["1"]
    assert results["seeds"]["1"]["stages"] == entry["stages"]


def test_input_that_every_seed_refuses_is_exit_code_two(done, tmp_path, capsys):
    folders = [f"--output-dir={tmp_path / 'runs'}", f"--results-dir={tmp_path / 'papers'}"]
    command = ["reproduce", str(done.yaml), *folders, "--seeds=2", "stages.cold.batch_size=12"]
    assert main(command) == 2
    assert "cold.batch_size=12 must be a multiple of 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds=-1"], "--seeds=-1 must be at least 0"),
        (["--jobs=0"], "--jobs=0 must be at least 1"),
        (["--arms", "shrt"], "arm 'shrt' is unknown; did you mean 'short'"),
        (["--arms", "plain", "evaluation.problem=3"], "unknown key evaluation.problem"),
        (["seed=3"], "run.seed cannot act"),
    ],
)
def test_mistakes_on_the_command_line(done, capsys, arguments, message):
    assert main(done.command(*arguments)) == 2
    assert message in capsys.readouterr().err


def test_an_experiment_that_is_not_there(capsys):
    assert main(["reproduce", "no_such_paper"]) == 2
    assert "experiment 'no_such_paper' is unknown" in capsys.readouterr().err


# Smoke tests


def test_a_smoke_test_ends_with_verdicts_and_leaves_the_results_alone(done, tmp_path, capsys):
    raw = yaml.safe_load(done.yaml.read_text())
    # What two steps leave without a number is no error here.
    raw["claims"]["C2"]["tests"][0]["metric"] = "mean_length_correct"
    raw["smoke"]["evaluation.problems"] = 8
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(raw))
    folders = [f"--output-dir={tmp_path / 'runs'}", f"--results-dir={tmp_path / 'papers'}"]
    command = ["reproduce", str(tmp_path / "small.yaml"), *folders, "--smoke"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert re.search(r"C1 +undecided|C1 +supported|C1 +refuted", said)
    assert not (tmp_path / "papers").exists()
    results = tmp_path / "runs" / ".smoke" / "results"
    found = json.loads((results / "shorter" / "small.json").read_text())
    assert list(found["seeds"]) == ["0"]
    stages = found["seeds"]["0"]["stages"]
    assert [stages[name]["used"]["steps"] for name in ("cold", "plain", "short")] == [1, 2, 2]
    assert stages["short"]["problems"] == 8
    assert (results / "shorter.md").exists()
    folder = tmp_path / "runs" / ".smoke" / "shorter" / "small"
    marker = folder / "seed_0" / "old"
    marker.write_text("")
    assert main([*command, "--seeds=0"]) == 0
    assert not marker.exists()


# Processes


@pytest.fixture
def in_processes(monkeypatch, metrics_folder):
    """Lets commands that a test starts find its metrics, and not compile what is compiled."""
    monkeypatch.setenv("PYTHONPATH", str(metrics_folder), prepend=os.pathsep)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))


@pytest.mark.slow
def test_two_jobs_give_the_results_of_one(done, in_processes, tmp_path, capfd):
    results = []
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        folders = [f"--output-dir={folder / 'runs'}", f"--results-dir={folder / 'papers'}"]
        command = ["reproduce", str(done.yaml), *folders, "--seeds=2", f"--jobs={jobs}"]
        command += ["--arms", "plain"]
        if jobs == 1:
            # Not here, where a program is one for eight devices.
            command = [sys.executable, "-m", "jaxrl_reason.cli", *command]
            subprocess.run(command, check=True, timeout=600)
        else:
            assert main(command) == 0
        results.append(json.loads((folder / "papers" / "shorter" / "small.json").read_text()))
    assert without_times(results[0]) == without_times(results[1])
    said = capfd.readouterr()
    assert said.err == ""
    for seed in (0, 1):
        assert f"seed {seed}: started, output in" in said.out
        assert f"seed {seed}: finished after" in said.out
    log = (tmp_path / "2" / "runs" / "shorter" / "small" / "seed_1.log").read_text()
    assert "evaluating on 24 held-out problems" in log
    assert "Warning" not in log


def test_a_process_that_fails_has_the_end_of_its_log_told(done, tmp_path, monkeypatch, capsys):
    # The metrics of this experiment are nowhere to be found for a process of its own.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folders = [f"--output-dir={tmp_path / 'runs'}", f"--results-dir={tmp_path / 'papers'}"]
    assert main(["reproduce", str(done.yaml), *folders, "--seeds=2", "--jobs=2"]) == 2
    said = capsys.readouterr()
    for seed in (0, 1):
        assert f"seed {seed} failed with exit code 2; the end of " in said.out
        assert f"seed {seed} failed: error: " in said.err
    assert "metrics_of_tests:gain" in said.err
    assert not (tmp_path / "papers" / "shorter" / "small.json").exists()


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4}, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert runner._shares(2) == [{0, 2, 4}, {1, 3}]
    assert runner._shares(7) == [{0}, {1}, {2}, {3}, {4}, {0}, {1}]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert runner._shares(2) == [set(), set()]


def test_the_cache_of_programs_is_that_of_the_user_or_ours_for_a_while(tmp_path, monkeypatch):
    chosen = jax.config.values["jax_compilation_cache_dir"]
    with compilation_cache(tmp_path):
        assert jax.config.values["jax_compilation_cache_dir"] == chosen
    seconds = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[seconds]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        with compilation_cache(tmp_path):
            assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)
            assert jax.config.values[seconds] < before
        assert jax.config.values["jax_compilation_cache_dir"] is None
        assert jax.config.values[seconds] == before
    finally:
        jax.config.update("jax_compilation_cache_dir", chosen)
