"""Evaluation: the interval, the summary, and that all stages answer the same questions."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrl_reason import checkpoint
from jaxrl_reason.data.batching import fill_rows
from jaxrl_reason.data.records import read_jsonl
from jaxrl_reason.stages.config import EvaluationSet
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.evaluate import _held_out, evaluate, summarize, wilson_interval
from jaxrl_reason.steps import model_logprobs


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_that_of_the_literature(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("trials", [1, 7, 512])
def test_the_interval_is_that_of_scipy(trials):
    for successes in {0, 1, trials // 3, trials - 1, trials}:
        exact = stats.binomtest(successes, trials).proportion_ci(method="wilson")
        assert wilson_interval(successes, trials) == pytest.approx(tuple(exact), abs=1e-6)


def test_the_interval_stays_within_0_and_1_and_has_a_width():
    low, high = wilson_interval(0, 10)
    assert low == 0
    assert 0 < high < 0.5
    low, high = wilson_interval(10, 10)
    assert high == pytest.approx(1)
    assert 0.5 < low < 1


@pytest.mark.parametrize(("successes", "trials"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match=f"{successes} successes in {trials} trials"):
        wilson_interval(successes, trials)


def test_a_set_of_difficulties_takes_each_in_turn_and_no_problem_twice(make_context, tmp_path):
    context = make_context(tmp_path)
    config = context.config.evaluation
    chosen = EvaluationSet(difficulties=(1, 1, 2), problems=12)
    problems = _held_out(context, config, chosen)
    assert [p.columns["difficulty"] for p in problems] == [1, 1, 2] * 4
    assert len({p.prompt for p in problems}) == 12
    assert problems[0] == context.task.generate("test", 0, 1)
    assert problems[4] == context.task.generate("test", 3, 1)
    assert problems[5] == context.task.generate("test", 1, 2)
    assert len(_held_out(context, config, EvaluationSet())) == config.problems


def row(*, correct, formatted, length, finished, difficulty, measures=None):
    return locals() | {"measures": measures or {}}


def test_the_summary_counts_what_it_says():
    rows = [
        row(correct=True, formatted=True, length=4, finished=True, difficulty=1),
        row(correct=True, formatted=True, length=8, finished=True, difficulty=2),
        row(correct=False, formatted=True, length=12, finished=True, difficulty=2),
        row(correct=False, formatted=False, length=20, finished=False, difficulty=2),
    ]
    assert summarize(rows) == {
        "accuracy": 0.5,
        "accuracy_ci95": list(wilson_interval(2, 4)),
        "format_rate": 0.75,
        "mean_length": 11.0,
        "mean_length_correct": 6.0,
        "clipped_ratio": 0.25,
        "accuracy_by_difficulty": {"1": 1.0, "2": pytest.approx(1 / 3)},
        "problems": 4,
    }


def test_the_length_of_right_answers_is_null_without_one():
    wrong = row(correct=False, formatted=True, length=3, finished=True, difficulty=1)
    result = summarize([wrong])
    assert result["mean_length_correct"] is None
    json.dumps(result, allow_nan=False)


def test_all_stages_answer_the_same_held_out_problems(four):
    context = Context.create(four.config)
    expected = [context.task.generate("test", i) for i in range(24)]
    for stage in ("init", *four.config.stages):
        rows = read_jsonl(four.directory / stage / "samples.jsonl", ("prompt", "answer"))
        asked = [(row["prompt"], row["answer"]) for row in rows]
        assert asked == [(problem.prompt, problem.answer) for problem in expected]


def test_an_evaluation_is_repeatable_and_its_rows_agree_with_it(four):
    context = Context.create(four.config)
    params = checkpoint.restore_params(four.directory / "cold", context.params_like)
    result, rows = evaluate(context, params, four.config.evaluation)
    saved = json.loads((four.directory / "cold" / "eval.json").read_text())
    assert {name: saved[name] for name in result} == result
    assert rows == read_jsonl(four.directory / "cold" / "samples.jsonl", ("prompt",))
    for i, got in enumerate(rows):
        verdict = context.task.verify(context.task.generate("test", i), got["completion"])
        assert (got["correct"], got["formatted"]) == (verdict.correct, verdict.formatted)
    assert result["accuracy"] == sum(got["correct"] for got in rows) / len(rows)
    # Trained to answer at once: the format is right, and length and accuracy follow.
    assert result["format_rate"] > 0.9
    assert result["mean_length"] < 8


def test_accuracy_is_the_probability_of_the_right_answers(four):
    context = Context.create(four.config)
    params = checkpoint.restore_params(four.directory / "cold", context.params_like)
    config = four.config.evaluation.model_copy(update={"problems": 400})
    result, _ = evaluate(context, params, config)
    assert 0.1 < result["accuracy"] < 0.9
    problems = [context.task.generate("test", i) for i in range(400)]
    encode = context.encoder.demonstration
    answers = [encode(p, context.task.trace(p, "answer")) for p in problems]
    batch = fill_rows([[answer] for answer in answers], 40, pad_id=0)
    logprobs, _ = model_logprobs(
        context.model,
        params,
        jnp.asarray(batch["tokens"]),
        positions=jnp.asarray(batch["positions"]),
        segment_ids=jnp.asarray(batch["segment_ids"]),
        temperature=1.0,
        chunk_size=64,
    )
    right = np.exp(np.sum(np.asarray(logprobs) * batch["completion_mask"], axis=1))
    deviation = np.sqrt(np.sum(right * (1 - right))) / 400
    assert abs(result["accuracy"] - right.mean()) < 4 * deviation
