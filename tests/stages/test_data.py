"""Data of the stages that read some: demonstrations and preference pairs, made and from files."""

import functools
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason import checkpoint
from jaxrl_reason.cli import main
from jaxrl_reason.config import to_json
from jaxrl_reason.data.records import read_jsonl
from jaxrl_reason.errors import InputError
from jaxrl_reason.metrics import read_metrics
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.dpo import pair_rows, preference_pairs, reference_logprobs, row_length
from jaxrl_reason.stages.pipeline import plan
from jaxrl_reason.stages.sft import demonstrations
from jaxrl_reason.steps import model_logprobs

ANSWER = "<think> </think> <answer> {} </answer>"


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def stage_of(make_context, tiny, tmp_path):
    """The stage of that name alone, with changes, as the first of a run."""

    def of(name, **changes):
        raw = tiny["stages"][name] | {"parent": "init"} | changes
        return plan(make_context(tmp_path, stages={name: raw}))[0]

    return of


def texts(stage, examples):
    tokenizer = stage.context.tokenizer
    return [(tokenizer.decode(e.prompt), tokenizer.decode(e.completion)) for e in examples]


def flat(groups):
    return [example for group in groups for example in group]


# Demonstrations


def test_demonstrations_are_right_and_of_the_styles_asked_for(stage_of):
    styles = {"long": 0.25, "short": 0.25, "answer": 0.5}
    data = {"num_examples": 400, "styles": styles}
    stage = stage_of("cold", data=data, max_length=140)
    verify = stage.context.task.verify
    problems = stage.problems(0, 400)
    made = Counter()
    examples = flat(demonstrations(stage))
    for problem, (prompt, completion) in zip(problems, texts(stage, examples), strict=True):
        assert prompt == f"<user> {problem.prompt} <assistant>"
        assert completion.endswith(" <eos>")
        assert verify(problem, completion.removesuffix("<eos>")).correct
        style = "answer" if "= " not in completion else "long" if "check" in completion else "short"
        made[style] += 1
    for style, share in styles.items():
        assert made[style] / 400 == pytest.approx(share, abs=0.08)
    assert examples == flat(demonstrations(stage))


def test_stages_and_steps_draw_with_different_keys(stage_of):
    stages = [stage_of("cold"), stage_of("reason")]
    keys = {str(jax.random.key_data(s.key(step))) for s in stages for step in (0, 1, 2)}
    assert len(keys) == 6
    assert len({stage.seed for stage in stages}) == 2


def test_stages_draw_different_problems(stage_of):
    prompts = lambda stage: [problem.prompt for problem in stage.problems(0, 40)]
    assert prompts(stage_of("cold")) != prompts(stage_of("reason"))
    first, second = (stage_of("reason").problems(start, 20) for start in (0, 20))
    assert prompts(stage_of("reason")) == [problem.prompt for problem in first + second]


def test_demonstrations_of_a_file_are_its_rows(stage_of, tmp_path):
    rows = [{"prompt": f"a = {n} ; a ?", "completion": ANSWER.format(n)} for n in (0, 1, 2)]
    data = {"kind": "file", "path": write(tmp_path / "rows.jsonl", rows)}
    stage = stage_of("cold", data=data)
    assert texts(stage, flat(demonstrations(stage))) == [
        (f"<user> {row['prompt']} <assistant>", f"{row['completion']} <eos>") for row in rows
    ]


GOOD = {"prompt": "a = 1 ; a ?", "completion": ANSWER.format(1)}
BAD_DEMONSTRATIONS = [
    ('{"prompt": "a ?", ', r"rows.jsonl:2: got .*no valid JSON"),
    ({"prompt": "a ?"}, r"rows.jsonl:2: got columns prompt; needed: messages, or prompt and"),
    (GOOD | {"completion": 4}, r"rows.jsonl:2: column 'completion' is 4; it must be str or list"),
    (GOOD | {"completion": "four"}, r"rows.jsonl:2: the word 'four' is not in the tokenizer"),
    (GOOD | {"prompt": "a <eos> ?"}, r"rows.jsonl:2: the text contains the marker '<eos>'"),
    (
        GOOD | {"completion": "1 + " * 20 + "1"},
        r"rows.jsonl:2: prompt and completion have \d+ tokens; stages.cold.max_length=40 is the",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_DEMONSTRATIONS, ids=lambda x: str(x)[:40])
def test_a_bad_demonstration_is_named_by_file_and_line(stage_of, tmp_path, row, message):
    data = {"kind": "file", "path": write(tmp_path / "rows.jsonl", [GOOD, row, GOOD])}
    with pytest.raises(InputError, match=message):
        demonstrations(stage_of("cold", data=data))


def test_a_trace_longer_than_a_row_is_refused(stage_of, four, tmp_path, capsys):
    overrides = ["name=long", "stages.cold.data.styles={long: 1}", "stages.cold.max_length=20"]
    assert main(["run", str(four.yaml), f"output_dir={tmp_path}", *overrides]) == 2
    said = capsys.readouterr().err
    assert "tokens" in said
    assert "max_length=20" in said


# Pairs


def pair(first="1", second="2", prompt="a = 1 ; a ?"):
    answers = {"chosen": ANSWER.format(first), "rejected": ANSWER.format(second)}
    return {"prompt": prompt} | answers


def test_pairs_of_a_file_are_its_rows(stage_of, tmp_path):
    rows = [pair(), pair("2", "0", prompt="b = 2 ; b ?")]
    data = {"kind": "file", "path": write(tmp_path / "pairs.jsonl", rows)}
    stage = stage_of("prefer", data=data)
    for row, (chosen, rejected) in zip(rows, preference_pairs(stage), strict=True):
        prompt = f"<user> {row['prompt']} <assistant>"
        assert texts(stage, [chosen]) == [(prompt, f"{row['chosen']} <eos>")]
        assert texts(stage, [rejected]) == [(prompt, f"{row['rejected']} <eos>")]


BAD_PAIRS = [
    ('["a"]', r"pairs.jsonl:2: got .*one JSON object a line"),
    (
        {"prompt": "a ?", "chosen": "1"},
        r"pairs.jsonl:2: got columns prompt, chosen; needed: prompt, chosen, rejected",
    ),
    (pair("one"), r"pairs.jsonl:2: the word 'one' is not in the tokenizer"),
    (
        pair("1" + " + 1" * 20),
        r"pairs.jsonl:2: prompt and completion have \d+ tokens; stages.prefer.max_length=32 is",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS, ids=lambda x: str(x)[:40])
def test_a_bad_pair_is_named_by_file_and_line(stage_of, tmp_path, row, message):
    data = {"kind": "file", "path": write(tmp_path / "pairs.jsonl", [pair(), row])}
    with pytest.raises(InputError, match=message):
        preference_pairs(stage_of("prefer", data=data))


def test_sampled_pairs_are_right_against_wrong(four):
    (path,) = (four.directory / "prefer").glob("pairs-*.jsonl")
    rows = read_jsonl(path, ("prompt", "chosen", "rejected"))
    assert len(rows) >= 8
    stage = plan_of(four, "prefer")
    problems = {problem.prompt: problem for problem in stage.problems(0, 16)}
    decode = stage.context.decode
    for row in rows:
        verify = lambda text, problem=problems[row["prompt"]]: stage.context.task.verify(
            problem, text
        )
        assert verify(row["chosen"]).correct
        assert not verify(row["rejected"]).correct
        assert decode([row["chosen_ids"], row["rejected_ids"]]) == [row["chosen"], row["rejected"]]
        # Only completions that ended by themselves have an end to learn from.
        end = stage.context.tokenizer.eos_token_id
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == end
    assert max(Counter(row["prompt"] for row in rows).values()) == 1


def plan_of(four, name):
    return next(stage for stage in plan(Context.create(four.config)) if stage.name == name)


def test_reference_log_probs_are_computed_once_and_are_those_of_the_parent(four):
    assert four.reference_calls == 1
    first = read_metrics(four.directory / "prefer" / "metrics.jsonl")[0]
    # At the first step the policy is the reference.
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6)


def test_reference_log_probs_are_sums_over_each_completion(four):
    """Against one forward pass of all, whatever fills up the last batch."""
    stage = plan_of(four, "prefer")
    every = preference_pairs(stage)
    pairs, length = every[:9], row_length(stage, every)
    assert length == 32
    got = reference_logprobs(stage, pairs, length)
    assert got.shape == (9, 2)
    model = stage.context.model
    params = jax.device_get(stage.parent_params())
    rows = pair_rows(stage, pairs, length)
    flat = {name: x.reshape(-1, length) for name, x in rows.items()}
    names = ("positions", "segment_ids")
    forward = functools.partial(model_logprobs, model, params, temperature=1.0, chunk_size=10_000)
    logprobs, _ = jax.jit(forward)(flat["tokens"], **{name: flat[name] for name in names})
    expected = jnp.sum(logprobs, axis=1, where=flat["completion_mask"])
    np.testing.assert_allclose(got.reshape(-1), expected, rtol=1e-5, atol=1e-5)
    assert (got < 0).all()
    assert len(np.unique(got)) > 5


def test_too_few_pairs_are_refused_with_their_number(four, tmp_path, capsys):
    """An untrained model solves nothing."""
    stages = json.dumps({"prefer": to_json(four.config.stages["prefer"]) | {"parent": "init"}})
    assert main(["run", str(four.yaml), f"output_dir={tmp_path}", f"stages={stages}"]) == 2
    message = "stages.prefer: the parent's samples for 16 problems gave 0 pairs and batch_size=8"
    assert message in capsys.readouterr().err
    assert checkpoint.latest(tmp_path / "four" / "prefer" / "checkpoints") is None


def test_stages_train_on_files(four, tmp_path, capsys):
    """SFT, then DPO, from JSONL; a file that changes in the middle of a stage is noticed."""
    tasks = [(n, name) for n in (0, 1, 2) for name in "abcd"]
    rows = [{"prompt": f"{x} = {n} ; {x} ?", "completion": ANSWER.format(n)} for n, x in tasks]
    pairs = [pair(n, (n + 1) % 3, prompt=f"{x} = {n} ; {x} ?") for n, x in tasks]
    stages = {
        "cold": {
            "kind": "sft",
            "steps": 3,
            "save_steps": 1,
            "batch_size": 8,
            "max_length": 40,
            "packing": False,
            "data": {"kind": "file", "path": write(tmp_path / "rows.jsonl", rows)},
            "optimizer": {"learning_rate": 2.0e-2},
        },
        "prefer": {
            "kind": "dpo",
            "parent": "cold",
            "steps": 3,
            "batch_size": 8,
            "max_length": 32,
            "data": {"kind": "file", "path": write(tmp_path / "pairs.jsonl", pairs)},
            "optimizer": {"learning_rate": 1.0e-2},
        },
    }
    command = ["run", str(four.yaml), f"output_dir={tmp_path}", f"stages={json.dumps(stages)}"]
    assert main(command) == 0
    run = tmp_path / "four"
    cold = read_metrics(run / "cold" / "metrics.jsonl")
    assert cold[-1]["loss"] < cold[0]["loss"]
    # Eight rows a step, of six completion tokens each.
    assert {row["num_tokens"] for row in cold} == {8 * 6}
    prefer = read_metrics(run / "prefer" / "metrics.jsonl")
    assert prefer[-1]["rewards/margins"] > prefer[0]["rewards/margins"] == 0
    hashes = {meta["stage"]: meta.get("data_hash") for meta in checkpoint.lineage(run / "prefer")}
    assert len(set(hashes.values())) == 3

    checkpoints = run / "cold" / "checkpoints"
    assert checkpoint.steps(checkpoints) == [2, 3]
    (checkpoints / "3").rename(tmp_path / "3")
    write(tmp_path / "rows.jsonl", rows[1:])
    capsys.readouterr()
    assert main(command) == 2
    assert "stages.cold: its data has changed since" in capsys.readouterr().err
    assert checkpoint.steps(checkpoints) == [2]
    # A finished stage needs its data no more.
    (tmp_path / "3").rename(checkpoints / "3")
    (tmp_path / "rows.jsonl").unlink()
    assert main(command) == 0
