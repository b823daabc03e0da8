"""Experiments: where they are found, what is refused, budgets, hashes and smoke tests."""

import copy
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from jaxrl_reason.errors import InputError
from jaxrl_reason.reproduce import load_experiment
from jaxrl_reason.reproduce.budget import needed, path_of, planned, used
from jaxrl_reason.reproduce.experiment import at_scale, other_scales

PAPERS = sorted((Path(__file__).parents[2] / "configs" / "papers").glob("*/*.yaml"))


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_papers_load_as_they_are_and_as_smoke_tests(path):
    # Models and data of the other scales are not there.
    experiment = load_experiment(path.parent.name, path.stem, offline=path.stem != "small")
    assert (experiment.path, experiment.scale) == (path, path.stem)
    assert experiment.argument == path.parent.name
    assert all(sum(planned(experiment.config.run, a.stage).values()) for a in arms_of(experiment))
    if path.stem == "small":
        smoke = load_experiment(path.parent.name, path.stem, smoke=True)
        assert smoke.config.run.evaluation.problems <= 16


def arms_of(experiment):
    return experiment.config.arms.values()


def test_the_experiment_of_the_documents_loads(tmp_path):
    page = (PAPERS[0].parents[3] / "docs" / "reproduce.md").read_text()
    path = tmp_path / "small.yaml"
    path.write_text(re.search(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1])
    experiment = load_experiment(str(path))
    assert experiment.stages_for(()) == ["cold", "plain", "brief"]
    stages = experiment.config.run.stages
    assert stages["brief"].problems == stages["plain"].problems
    assert load_experiment(str(path), smoke=True).config.run.stages["brief"].steps == 2


# Finding


def test_a_name_is_searched_from_the_working_directory(raw, metrics_folder, tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "papers" / "shorter"
    folder.mkdir(parents=True)
    (folder / "full.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment("shorter", "full")
    assert (experiment.name, experiment.scale) == ("shorter", "full")
    assert other_scales(experiment) == []
    (folder / "small.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert other_scales(experiment) == ["small"]
    assert at_scale(experiment, "small", ()).scale == "small"
    (folder / "video.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert other_scales(experiment) == ["small", "video"]
    with pytest.raises(InputError, match="'longer' is unknown; "):
        load_experiment("longer")
    (folder / "full.yaml").unlink()
    with pytest.raises(InputError, match="shorter has no scale 'full'"):
        load_experiment("shorter", "full")
    folder.rename(folder.with_name("longer"))
    with pytest.raises(InputError, match=r"run.name is 'shorter'; it must be 'longer'"):
        load_experiment("longer")


def test_a_path_has_the_scale_of_its_name(load, raw, tmp_path):
    assert load(raw).scale == "small"
    path = (tmp_path / "small.yaml").rename(tmp_path / "full.yaml")
    assert load_experiment(str(path)).scale == "full"
    path = path.rename(tmp_path / "mine.yaml")
    assert load_experiment(str(path)).scale == "small"
    assert load_experiment(str(path), "full").scale == "full"
    assert load_experiment(str(path)).argument == str(path)


def test_a_wheel_has_the_papers_where_they_are_searched():
    root = PAPERS[0].parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    ((here, there),) = wheel["force-include"].items()
    assert (root / here).samefile(PAPERS[0].parents[1])
    assert there == f"jaxrl_reason/{here}"


# What is refused

TEST = {"metric": "accuracy", "arm": "short", "direction": "higher"}


def changed(raw, path, value):
    raw = copy.deepcopy(raw)
    *above, last = path.split(".")
    node = raw
    for key in above:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[int(last) if isinstance(node, list) else last] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("arms.short.stage", "shrt", "arms.short.stage='shrt' is unknown; did you mean 'short'"),
        ("arms.short.stage", "init", "arms.short.stage='init' is unknown"),
        ("budget.0.arms", ["short", "cold"], "budget.0.arms='cold' is unknown"),
        ("budget.0.arms", ["short"], "budget.0.arms"),
        ("budget.0.equal", ["rows"], 'budget.0.equal.0: got "rows"; needs "updates" | "sft_rows"'),
        ("metrics.gain.function", "metrics_of_tests:gian", "metrics.gain: metric function "),
        ("metrics.gain.function", "nowhere:gain", "ModuleNotFoundError on import"),
        ("metrics.gain.stages", ["hot"], "metrics.gain.stages='hot' is unknown"),
        ("claims.C1.tests.0.arm", "hot", "claims.C1.tests.0.arm='hot' is unknown"),
        ("claims.C1.tests.0.against", "plane", "against='plane' is unknown; did you mean 'plain'"),
        ("claims.C2.tests.0.metric", "derived.gian", "'gian' is unknown; did you mean 'gain'"),
        ("claims.C2.tests.0.arm", "cold", "claims.C2.tests.0.arm='cold' is unknown"),
        ("claims.C2.tests", [], "claims.C2.tests"),
        ("claims.C1.tests.0.margin", 0.0, "margin=0 of a ratio must be > 0"),
        ("claims.C1.tests.1.margin", 0.0, "margin=0 of `within` must be > 0"),
        ("claims.C1.tests.0", TEST | {"ratio": True, "margin": 1.0}, "ratio=true needs against"),
        ("claims.C1.tests.0.direction", "within", "margin=1 of `within` must be > 1"),
        ("claims.C1.tests.0.direction", "up", '"higher" | "lower" | "within"'),
        ("run.seed", 3, "run.seed cannot act: --seeds"),
        ("run.output_dir", "here", "run.output_dir cannot act"),
        ("run", "small", "run: got 'small'; needs the fields of a run"),
        ("run.stages.cold.stepps", 3, "run.stages.cold.stepps: unknown key; did you mean 'steps'"),
        ("paper.arxiv", "25.1", "paper.arxiv"),
        ("arms", {}, "arms"),
    ],
)
def test_mistakes_are_named(raw, load, path, value, message):
    with pytest.raises(InputError) as caught:
        load(changed(raw, path, value))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("run.stages.short.steps", 4, "updates of arm short is 16 and of arm plain 15"),
        ("run.stages.short.num_generations", 8, "rl_completions of arm short is 192 and .* 96"),
        (
            "run.stages.short.max_completion_length",
            10,
            "rl_tokens of arm short is 960 and .* 1,152",
        ),
    ],
)
def test_budgets_that_differ_are_named_with_both_numbers(raw, load, path, value, message):
    with pytest.raises(InputError, match=message):
        load(changed(raw, path, value))


def test_an_override_that_breaks_a_budget_is_refused(raw, load):
    with pytest.raises(InputError, match="updates of arm short is 17 and of arm plain 15"):
        load(raw, "stages.short.steps=5")


# Budgets


@pytest.fixture
def wide(raw, load):
    """A run with all kinds of stages."""
    stages = raw["run"]["stages"]
    stages["keep"] = {
        "kind": "reject",
        "parent": "plain",
        "rejected_from": "cold",
        "num_prompts": 5,
        "num_generations": 3,
        "max_completion_length": 12,
    }
    stages["prefer"] = {
        "kind": "dpo",
        "parent": "cold",
        "steps": 7,
        "batch_size": 8,
        "max_length": 32,
        "data": {"kind": "stage", "stage": "keep"},
        "optimizer": {"learning_rate": 1e-3},
    }
    stages["again"] = {
        **stages["short"],
        "parent": "prefer",
        "num_iterations": 2,
        "dynamic_sampling": {"max_batches": 2},
    }
    stages["sampled"] = {
        **stages["prefer"],
        "parent": "short",
        "data": {"kind": "sampled", "num_prompts": 16, "num_generations": 8},
    }
    return load(raw).config.run


def test_paths_and_what_they_need(wide):
    assert path_of(wide, "again") == ["cold", "prefer", "again"]
    assert path_of(wide, "init") == []
    # The data of `prefer` come from `keep`, which samples `plain` and `cold`.
    assert needed(wide, ["again"]) == ["cold", "plain", "keep", "prefer", "again"]
    assert needed(wide, ["short", "init"]) == ["cold", "short"]


def test_planned_budgets_by_hand(wide):
    assert planned(wide, "again") == {
        "updates": 12 + 7 + 3 * 2,
        "sft_rows": 12 * 8,
        "sft_tokens": 12 * 8 * 40,
        "dpo_pairs": 7 * 8,
        "sampled_completions": 2 * 5 * 3,
        "rl_prompts": 3 * 8 * 2,
        "rl_completions": 3 * 8 * 2 * 4,
        "rl_tokens": 3 * 8 * 2 * 4 * 12,
    }
    of_sampled = planned(wide, "sampled")
    assert (of_sampled["sampled_completions"], of_sampled["dpo_pairs"]) == (128, 56)
    assert set(planned(wide, "init").values()) == {0}


def test_used_budgets_by_hand(wide):
    spent = {"cold": (12, 500), "prefer": (7, 0), "again": (3, 900)}
    records = {n: {"used": {"steps": s, "tokens": t}} for n, (s, t) in spent.items()}
    expected = {"updates": 12 + 7 + 6, "sft_tokens": 500, "rl_tokens": 900}
    assert used(wide, "again", records) == expected


def test_stages_for_arms(raw, load):
    raw["run"]["stages"]["other"] = raw["run"]["stages"]["cold"]
    raw["run"]["stages"]["idle"] = raw["run"]["stages"]["cold"]
    raw["claims"]["C3"] = {"claim": "c", "tests": [TEST | {"arm": "other"}]}
    experiment = load(raw)
    assert experiment.stages_for(()) == ["cold", "plain", "short", "other"]
    assert experiment.stages_for(["short"]) == ["cold", "short"]
    with pytest.raises(InputError, match="arm 'shorter' is unknown; did you mean 'short'"):
        experiment.stages_for(["shorter"])
    run = experiment.run_of(3, ["cold", "short"], Path("out"))
    assert (run.seed, run.name, list(run.stages)) == (3, "seed_3", ["cold", "short"])
    assert run.output_dir == str(Path("out/shorter/small"))


def test_a_seed_has_problems_of_its_own_unless_the_file_says_which(raw, load):
    raw["run"]["tasks"] = {"far": {"options": {"seed": 7}}, "near": {"name": "countdown"}}
    experiment = load(raw)
    runs = [experiment.run_of(seed, ["cold"], Path("out")) for seed in (0, 3)]
    assert [run.task.options["seed"] for run in runs] == [0, 3]
    assert [run.tasks["near"].options["seed"] for run in runs] == [0, 3]
    assert [run.tasks["far"].options["seed"] for run in runs] == [7, 7]
    tasks = [run.task.make() for run in runs]
    assert tasks[0].generate("test", 0).prompt != tasks[1].generate("test", 0).prompt


# Hashes


def test_the_hash_is_of_what_is_computed(raw, load):
    before = load(raw).hash
    for path, value in (
        ("findings", "other"),
        ("claims", {}),
        ("smoke", {}),
        ("question", "another?"),
        ("budget", []),
        ("arms.short.label", "another"),
        ("paper.title", "another"),
    ):
        assert load(changed(raw, path, value)).hash == before, path
    for path, value in (
        ("run.stages.cold.steps", 13),
        ("run.name", "longer"),
        ("arms", {"short": {"stage": "short"}}),
    ):
        new = changed(raw, path, value)
        new["budget"] = []
        assert load(new).hash != before, path
    assert load(raw, "evaluation.problems=8").hash != before


def test_series_are_those_of_tests_and_metrics(raw, load):
    raw["metrics"]["gain"]["train"] = ["kl"]
    assert load(raw).series() == {"rewards/accuracy/mean", "kl"}


# Smoke tests


def test_a_smoke_test_is_small(raw, load):
    stages = raw["run"]["stages"]
    stages["plain"] |= {
        "steps": 30,
        "problems": {},
        "curriculum": [
            {"steps": 10, "difficulties": [1]},
            {"steps": 10, "difficulties": [1, 2]},
            {"steps": 10, "difficulties": [2]},
        ],
    }
    stages["plain"]["prompts_per_step"] = 64
    stages["short"] |= {"steps": 30, "prompts_per_step": 64}
    stages["keep"] = {
        "kind": "reject",
        "parent": "plain",
        "num_prompts": 500,
        "max_completion_length": 12,
    }
    stages["prefer"] = {
        **{name: stages["cold"][name] for name in ("batch_size", "max_length", "optimizer")},
        "kind": "dpo",
        "parent": "cold",
        "steps": 1,
    }
    smoke = load(raw, smoke=True)
    run = smoke.config.run
    assert {name: stage.steps for name, stage in run.stages.items() if name != "keep"} == {
        "cold": 1,  # an override of the experiment's own
        "plain": 2,
        "short": 2,
        "prefer": 1,
    }
    assert [phase.steps for phase in run.stages["plain"].curriculum] == [1, 10]
    assert run.stages["plain"].difficulties(1) == (2,)
    assert run.stages["keep"].num_prompts == 16
    assert run.stages["cold"].data.num_examples == 32
    assert run.stages["prefer"].data.num_prompts == 16
    assert (run.evaluation.problems, run.evaluation.sets["easy"].problems) == (16, 16)
    assert run.evaluation.batch_size == 16
    assert (run.stages["cold"].batch_size, run.stages["plain"].prompts_per_step) == (8, 8)
    assert run.stages["short"].prompts_per_step == 8
    assert run.model.resolve(64).num_hidden_layers == 1
    assert smoke.hash != load(raw).hash
    assert json.loads(json.dumps(smoke.raw_run)) == smoke.raw_run
