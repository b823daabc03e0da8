"""Records of stages, and the file of results: merging, refusing, discarding."""

import json
import math

import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.reproduce import Results
from jaxrl_reason.reproduce.records import is_thinned, rounded, series_of, stage_record
from jaxrl_reason.tasks import chance_accuracy, constant_answer_accuracy

# Records


def folder_of(tmp_path, rows, **evaluation):
    directory = tmp_path / "stage"
    directory.mkdir()
    lines = [json.dumps(row) for row in rows]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = {"stage": "stage", "kind": "grpo", "hash": "abc", "seconds": 3.0, **evaluation}
    (directory / "eval.json").write_text(json.dumps(result))
    return directory


def test_a_record_is_the_evaluation_and_the_series_that_are_read(tmp_path):
    rows = [
        {"step": 1, "reward": 1 / 3, "rewards/a/mean": 0.5, "kl": 0.1, "num_tokens": 7},
        {"step": 2, "reward": "NaN", "rewards/a/std": 1.0, "kl": 0.2, "num_tokens": 9},
    ]
    record = stage_record(folder_of(tmp_path, rows, accuracy=0.123456789), {"kl", "never"})
    assert record == {
        "kind": "grpo",
        "accuracy": 0.123457,
        "used": {"steps": 2, "tokens": 16},
        "train": {"reward": [0.333333, None], "rewards/a/mean": [0.5, None], "kl": [0.1, 0.2]},
    }
    assert series_of(record, "reward") == ([1], [0.333333])
    assert series_of(record, "loss") == ([], [])


def test_long_series_are_thinned_unless_a_test_reads_them(tmp_path):
    rows = [{"step": i, "reward": float(i), "kl": float(i)} for i in range(1, 1001)]
    record = stage_record(folder_of(tmp_path, rows), {"kl"})
    assert len(record["train"]["kl"]) == 1000
    assert len(record["train"]["reward"]) == len(record["points"]) == 200
    steps, values = series_of(record, "reward")
    assert steps == values == record["points"]
    assert (steps[0], steps[-1]) == (1, 1000)
    assert (is_thinned(record, "reward"), is_thinned(record, "kl")) == (True, False)
    assert series_of(record, "kl")[0] == list(range(1, 1001))


def test_series_of_two_hundred_steps_are_whole(tmp_path):
    rows = [{"step": i, "reward": float(i)} for i in range(1, 201)]
    record = stage_record(folder_of(tmp_path, rows), ())
    assert len(record["train"]["reward"]) == 200
    assert "points" not in record
    assert not is_thinned(record, "reward")


def test_the_record_of_rejection_sampling_has_its_counts(tmp_path):
    meta = {"kind": "reject", "parent": "/somewhere", "counts": {"rows": 5, "accuracy": 0.5}}
    (tmp_path / "data.json").write_text(json.dumps(meta))
    record = stage_record(tmp_path, ())
    assert record["data"] == {"rows": 5, "accuracy": 0.5}
    assert record["kind"] == "reject"
    assert record["used"] == {"steps": 0, "tokens": 0}


def test_numbers_are_rounded_to_six_digits():
    value = {"a": [1234567.0, 1e-9 / 3, math.inf], "b": (True, 7, "x", None), "c": math.nan}
    expected = {"a": [1234570.0, 3.33333e-10, None], "b": [True, 7, "x", None], "c": None}
    assert rounded(value) == expected


# The file


@pytest.fixture
def results_of(raw, load, tmp_path):
    """Results of the experiment, with overrides."""

    def of(*overrides, **options):
        return Results(tmp_path / "papers" / "small.json", load(raw, *overrides), **options)

    return of


def test_seeds_are_merged_and_sorted(results_of, fake_entry):
    results = results_of()
    results.add(10, fake_entry({"init": 0.0, "cold": 0.1, "short": 0.2}))
    results.add(2, fake_entry({"init": 0.0, "cold": 0.3, "plain": 0.4}))
    results.add(10, fake_entry({"init": 0.0, "cold": 0.1, "plain": 0.5}))
    again = results_of()
    assert list(again.seeds) == ["2", "10"]
    accuracies = {name: record["accuracy"] for name, record in again.seeds["10"].items()}
    assert accuracies == {"init": 0.0, "cold": 0.1, "short": 0.2, "plain": 0.5}
    assert again.has(10, ["cold", "short", "plain"])
    assert not again.has(2, ["cold", "short"])
    assert not again.has(3, [])
    # Only seed 10 has both stages of `short`: 12 + 3 updates.
    assert again.budget["short"]["used"]["updates"] == 3 + 3
    assert again.budget["short"]["planned"]["updates"] == 12 + 3
    assert again.budget["plain"]["used"]["seconds"] == 120
    assert set(again.baselines) == {"", "easy"}
    task = again.experiment.config.run.task.make()
    assert again.baselines["easy"] == rounded(
        {
            "constant_answer": constant_answer_accuracy(task, 2000, [1]),
            "chance": chance_accuracy(task, 2000, [1]),
        }
    )
    assert again.baselines[""]["chance"] == rounded(chance_accuracy(task, 2000))


def test_the_file_is_written_whole(results_of, fake_entry, tmp_path):
    results = results_of()
    results.add(0, fake_entry({"init": 0.0, "cold": 0.1}))
    assert sorted(path.name for path in (tmp_path / "papers").iterdir()) == ["small.json"]
    text = results.path.read_text()
    assert json.loads(text)["seeds"]["0"]["stages"]["cold"]["accuracy"] == 0.1
    assert '"rewards/accuracy/mean": [0.1, 0.2, 0.3]' in text  # a series is one line


def test_results_of_another_configuration_are_refused(results_of, fake_entry):
    first = results_of("evaluation.problems=8")
    first.add(0, fake_entry({"init": 0.0, "cold": 0.1}))
    before = first.path.read_bytes()
    with pytest.raises(InputError) as caught:
        results_of()
    message = str(caught.value)
    assert "has results of another configuration with evaluation.problems=8 (hash " in message
    assert first.experiment.hash in message
    assert "--results-dir" in message
    assert "move them to small.old.json with --discard" in message
    assert first.path.read_bytes() == before
    assert list(results_of("evaluation.problems=8").seeds) == ["0"]


def test_discarded_results_are_kept_beside(results_of, fake_entry):
    first = results_of("evaluation.problems=8")
    first.add(0, fake_entry({"init": 0.0, "cold": 0.1}))
    before = first.path.read_bytes()
    second = results_of(discard=True)
    assert second.seeds == {}
    assert second.path.with_name("small.old.json").read_bytes() == before
    assert not second.path.exists()


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "no file of results"), ("{}", "no file of")]
)
def test_a_file_that_is_something_else_is_refused(results_of, tmp_path, text, message):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "small.json").write_text(text)
    with pytest.raises(InputError, match=message):
        results_of()


def test_a_folder_that_cannot_be_written_is_refused(raw, load, tmp_path, fake_entry):
    (tmp_path / "file").write_text("")
    results = Results(tmp_path / "file" / "small.json", load(raw))
    with pytest.raises(InputError, match=r"cannot write .*; choose another --results-dir"):
        results.add(0, fake_entry({"init": 0.0}))


def test_verdicts_are_written(results_of, fake_entry):
    results = results_of()
    for seed, length in enumerate((0.3, 0.31, 0.29)):
        results.add(seed, fake_entry({"init": 0.0, "cold": 0.1, "plain": 0.6, "short": length}))
    assert [verdict.verdict for verdict in results.judge()] == ["supported", "supported"]
    written = json.loads(results.path.read_text())["claims"]["C1"]
    assert written["verdict"] == "supported"
    assert written["tests"][0]["values"] == {"0": 0.5, "1": 0.516667, "2": 0.483333}


def test_no_results_are_written_of_no_seed(results_of):
    results = results_of()
    assert [verdict.verdict for verdict in results.judge()] == ["not run", "not run"]
    assert not results.path.exists()
