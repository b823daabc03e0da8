"""Rejection sampling, and the rows that stages and functions make for later stages."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from jaxrl_reason.cli import main
from jaxrl_reason.config import validate
from jaxrl_reason.data.records import read_jsonl
from jaxrl_reason.errors import InputError
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.context import Context
from jaxrl_reason.stages.dpo import preference_pairs
from jaxrl_reason.stages.groups import Group, Sampled
from jaxrl_reason.stages.pipeline import check_inputs, plan
from jaxrl_reason.stages.reject import _balanced, _can_be_read, _choose, _distinct
from jaxrl_reason.stages.reject_config import RejectConfig
from jaxrl_reason.stages.sft import demonstrations
from jaxrl_reason.tasks import Verdict

BUILDERS = """
def answers(task, problems, rng, *, word):
    for number, problem in enumerate(problems):
        if problem.columns["difficulty"] == 1:
            yield {"problem": number, "completion": f"<think> {word} </think> {rng.random() < 2}"}


def signs(task, problems, rng):
    for number, problem in enumerate(problems):
        right = task.trace(problem, "answer")
        yield {"problem": number, "chosen": right, "rejected": right + " " + right, "prompt": "a ?"}


def none(task, problems, rng):
    return []


def lost(task, problems, rng):
    return [{"problem": 99, "completion": "1"}]


def halves(task, problems, rng):
    return [{"problem": 0, "chosen": "1"}]


def fails(task, problems, rng):
    raise KeyError("x")


def wrong_of_others(groups, rng):
    for group in groups:
        right = [c for c in group.completions if c.is_right]
        if right and group.others:
            sides = {"chosen": right[0].text, "rejected": group.others[0].text + " ?"}
            yield {"problem": group.number, **sides}


def is_short(problem, completion, verdict, length):
    return length < 8 if verdict.formatted else None
"""


@pytest.fixture(scope="module", autouse=True)
def builders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("builders")
    (folder / "builders_of_tests.py").write_text(BUILDERS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


KEEP = {
    "kind": "reject",
    "parent": "cold",
    "num_prompts": 24,
    "num_generations": 8,
    "max_completion_length": 12,
}


@pytest.fixture(scope="module")
def kept(four, tiny, tmp_path_factory):
    """A run that goes on from a trained stage with what it wrote itself."""
    short = {"steps": 2, "batch_size": 8, "max_length": 40, "optimizer": {"learning_rate": 1e-3}}
    stages = {
        "cold": tiny["stages"]["cold"],
        "keep": KEEP,
        "built": KEEP
        | {"rejected_from": "cold", "builder": "builders_of_tests:wrong_of_others"}
        | {"num_generations": 4, "problems": {"difficulties": [1], "pool": 5}},
        "more": {
            **short,
            "kind": "sft",
            "parent": "cold",
            "data": {"kind": "stage", "stage": "keep"},
        },
        "like": {
            **short,
            "kind": "dpo",
            "parent": "more",
            "data": {"kind": "stage", "stage": "built"},
        },
    }
    short["packing"] = False
    stages["more"]["packing"] = False
    folder = tmp_path_factory.mktemp("kept")
    evaluation = tiny["evaluation"] | {
        "sets": {"hard": {"task": "far", "problems": 8}, "both": {"difficulties": [2, 1]}},
        "measures": {"short": "builders_of_tests:is_short"},
    }
    raw = tiny | {
        "name": "kept",
        "output_dir": str(folder),
        "tasks": {
            "far": {
                "name": "arithmetic",
                "options": {"modulus": 5, "max_constant": 4, "min_steps": 1, "max_steps": 2},
            }
        },
        "words": ["<work>", "hmm"],
        "evaluation": evaluation,
        "stages": stages,
    }
    path = folder / "kept.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    assert main(["run", str(path)]) == 0
    context = Context.create(validate(RunConfig, raw, "test"))
    return context, {stage.name: stage for stage in plan(context)}, path


def test_rows_are_right_and_pairs_right_against_wrong(kept):
    context, stages, _ = kept
    rows, pairs = (
        read_jsonl(stages["keep"].directory / f"{kind}.jsonl", types={"problem": dict})
        for kind in ("rows", "pairs")
    )
    assert len(rows) > 4
    assert len(pairs) > 4
    for row in rows:
        assert context.tasks.verify(context.tasks.at(row["problem"]), row["completion"]).correct
        assert context.decode([row["completion_ids"]]) == [row["completion"]]
    for row in pairs:
        verify = lambda text, p=row["problem"]: context.tasks.verify(context.tasks.at(p), text)
        assert verify(row["chosen"]).correct
        assert not verify(row["rejected"]).correct
    prompts = {problem.prompt for problem in stages["keep"].problems(0, 24)}
    assert {row["prompt"] for row in rows} <= prompts
    counts = json.loads((stages["keep"].directory / "data.json").read_text())["counts"]
    assert (counts["rows"], counts["pairs"]) == (len(rows), len(pairs))
    assert counts["completions"] == 24 * 8
    assert counts["left_out"] == 0


def test_a_text_that_spells_special_tokens_is_left_out_unless_its_tokens_are_known(kept):
    _, stages, _ = kept
    can = lambda kind, **row: _can_be_read(stages["built"], kind, row)
    assert can("rows", completion="1 <eo s>")
    assert not can("rows", completion="1 <eos> 2")
    assert can("rows", completion="1 <eos> 2", completion_ids=[5, 1, 6])
    assert can("pairs", chosen="1", rejected="2")
    assert not can("pairs", chosen="1", rejected="2 <eos>")


def test_later_stages_read_what_was_kept_token_by_token(kept):
    _, stages, _ = kept
    rows = read_jsonl(stages["keep"].directory / "rows.jsonl", types={"problem": dict})
    assert [e.completion for (e,) in demonstrations(stages["more"])] == [
        row["completion_ids"] for row in rows
    ]
    pairs = read_jsonl(stages["built"].directory / "pairs.jsonl", types={"problem": dict})
    decode = stages["like"].context.tokenizer.decode
    for (chosen, rejected), row in zip(preference_pairs(stages["like"]), pairs, strict=True):
        assert decode(chosen.completion) == row["chosen"] + " <eos>"
        assert decode(rejected.completion) == row["rejected"] + " <eos>"
        assert decode(chosen.prompt) == f"<user> {row['prompt']} <assistant>"


def test_a_builder_sees_both_policies_and_the_problems_asked_for(kept):
    _, stages, _ = kept
    pairs = read_jsonl(stages["built"].directory / "pairs.jsonl", types={"problem": dict})
    assert {row["problem"]["difficulty"] for row in pairs} == {1}
    assert len({row["problem"]["index"] for row in pairs}) <= 5
    assert all(row["rejected"].endswith(" ?") for row in pairs)


def test_a_finished_stage_is_skipped_and_a_changed_one_refused(kept, capsys):
    _, stages, path = kept
    before = (stages["keep"].directory / "rows.jsonl").stat().st_mtime_ns
    assert main(["run", str(path)]) == 0
    assert "keep: complete, skipped" in capsys.readouterr().out
    assert (stages["keep"].directory / "rows.jsonl").stat().st_mtime_ns == before
    assert main(["run", str(path), "stages.keep.num_prompts=25"]) == 2
    assert "num_prompts: 24 -> 25" in capsys.readouterr().err


def test_what_a_stage_learns_from_is_part_of_its_identity(kept):
    _, stages, _ = kept
    raw = json.loads(kept[2].read_text())
    raw["stages"]["keep"]["rows_per_prompt"] = 2
    other = {s.name: s.hash for s in plan(Context.create(validate(RunConfig, raw, "test")))}
    assert other["cold"] == stages["cold"].hash
    assert other["more"] != stages["more"].hash
    assert other["like"] != stages["like"].hash


def test_evaluation_has_its_sets_and_measures(kept):
    context, stages, _ = kept
    result = json.loads((stages["like"].directory / "eval.json").read_text())
    rows = read_jsonl(stages["like"].directory / "samples.jsonl", types={"difficulty": int})
    assert result["sets"]["hard"]["problems"] == 8
    assert set(result["sets"]["both"]["accuracy_by_difficulty"]) == {"1", "2"}
    short = [row["length"] < 8 for row in rows if row["formatted"]]
    assert result["measures"]["short"] == pytest.approx(np.mean(short))
    assert [row["measures"]["short"] for row in rows if not row["formatted"]] == [
        None for row in rows if not row["formatted"]
    ]
    assert set(result["measures_by_difficulty"]["short"]) == set(result["accuracy_by_difficulty"])
    assert "hmm" in context.tokenizer.get_vocab()
    assert "<work>" in context.tokenizer.get_vocab()


# Choosing


def sampled(text, correct, *, finished=True, length=None):
    verdict = Verdict(correct=correct, formatted=True, answer="1", reason="")
    return Sampled(text, list(range(length or len(text))), verdict, finished)


def choose(completions, others=(), **options):
    config = validate(RejectConfig, KEEP | options, "test")
    group = Group(0, None, list(completions), list(others))
    return list(_choose([group], config, random.Random(0)))


MIXED = [
    sampled("aaa", True),
    sampled("b", True),
    sampled("cc", True),
    sampled("dddd", True, finished=False),
    sampled("e", False),
    sampled("f", False, finished=False),
]


@pytest.mark.parametrize(
    ("select", "expected"), [("shortest", ["b", "cc"]), ("longest", ["aaa", "cc"])]
)
def test_rows_by_length(select, expected):
    made = choose(MIXED, select=select, rows_per_prompt=2, pairs_per_prompt=0)
    assert [(kind, row["completion"]) for kind, row in made] == [("rows", t) for t in expected]


def test_what_was_cut_is_neither_right_nor_wrong():
    made = choose(MIXED, rows_per_prompt=9, pairs_per_prompt=9)
    texts = Counter(kind for kind, _ in made)
    assert texts == {"rows": 3, "pairs": 1}
    (pair,) = [row for kind, row in made if kind == "pairs"]
    assert pair["rejected"] == "e"
    assert pair["chosen"] in ("aaa", "b", "cc")


def test_the_rejected_side_may_come_from_another_policy():
    made = choose(MIXED, [sampled("other", False)], rejected_from="cold", rows_per_prompt=0)
    assert [row["rejected"] for _, row in made] == ["other"]


def test_equal_completions_count_once():
    group = [sampled("a", True, length=3), sampled("b", False), sampled("a", True, length=4)]
    assert [(c.text, len(c.ids)) for c in _distinct(group)] == [("a", 3), ("b", 1)]


def test_balance_takes_as_many_of_each_difficulty(kept):
    _, stages, _ = kept
    problems = stages["keep"].problems(0, 24)
    made = [("rows", {"problem": n, "completion": ""}) for n in range(24)]
    counts = Counter(p.columns["difficulty"] for p in problems)
    found = Counter(
        problems[row["problem"]].columns["difficulty"]
        for _, row in _balanced(made, problems, stages["keep"])
    )
    assert set(found.values()) == {min(counts.values())}
    assert found.keys() == counts.keys()
    level = problems[0].columns["difficulty"]
    few = [m for m in made if problems[m[1]["problem"]].columns["difficulty"] != level]
    with pytest.raises(InputError, match=f"none of the rows is of difficulty {level}; raise"):
        _balanced(few, problems, stages["keep"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_accuracy": 0.9, "max_accuracy": 0.5}, "min_accuracy=0.9 exceeds max_accuracy=0.5"),
        ({"sampling": {"temperature": 0}}, "temperature=0 gives 8 equal completions"),
        ({"rows_per_prompt": 0, "pairs_per_prompt": 0}, "keep nothing; raise one"),
        ({"rows_per_prompt": 0, "select": "longest"}, "select=longest cannot act"),
        ({"pairs_per_prompt": 0, "rejected_from": "cold"}, "rejected_from cannot act"),
        ({"options": {"a": 1}}, "are of a builder; set builder"),
        ({"builder": "a:b", "select": "longest"}, "select cannot act beside builder"),
        ({"parent": "keep"}, "keep.parent='keep' is no earlier stage"),
        ({"rejected_from": "hot"}, "rejected_from='hot' is no earlier stage"),
        ({"problems": {"task": "hard"}}, r"problems.task='hard' is none of tasks=\[\]"),
        ({"problems": {"difficulties": [99]}}, "keep.problems.difficulties: difficulty=99 must be"),
    ],
)
def test_what_cannot_be_is_refused(tiny, changes, message):
    stages = {"cold": tiny["stages"]["cold"], "keep": KEEP | changes}
    with pytest.raises(InputError, match=message):
        validate(RunConfig, tiny | {"stages": stages}, "test")


def test_a_stage_of_this_kind_has_no_model(tiny):
    more = tiny["stages"]["cold"] | {"parent": "keep"}
    stages = {"cold": tiny["stages"]["cold"], "keep": KEEP, "more": more}
    with pytest.raises(InputError, match="kind reject and has no model; its rows are read with"):
        validate(RunConfig, tiny | {"stages": stages}, "test")
    more = tiny["stages"]["cold"] | {"data": {"kind": "stage", "stage": "cold"}}
    with pytest.raises(InputError, match=r"data.stage='cold' is no earlier stage of kind reject"):
        validate(RunConfig, tiny | {"stages": {**stages, "more": more}}, "test")


# Rows of a function


def made_by(tiny, make_context, tmp_path, function, kind="cold", **options):
    data = {"kind": "python", "function": f"builders_of_tests:{function}", "num_examples": 20}
    stage = tiny["stages"][kind] | {"parent": "init", "data": data | {"options": options}}
    stage |= {"max_length": 40}
    context = make_context(tmp_path, stages={kind: stage}, words=["hmm", "True"])
    return plan(context)[0]


def test_a_function_writes_demonstrations(tiny, make_context, tmp_path):
    stage = made_by(tiny, make_context, tmp_path, "answers", word="hmm")
    easy = [p for p in stage.problems(0, 20) if p.columns["difficulty"] == 1]
    decode = stage.context.tokenizer.decode
    found = [(decode(e.prompt), decode(e.completion)) for (e,) in demonstrations(stage)]
    assert found == [
        (f"<user> {p.prompt} <assistant>", "<think> hmm </think> True <eos>") for p in easy
    ]


def test_a_function_writes_pairs_with_a_prompt_of_its_own(tiny, make_context, tmp_path):
    stage = made_by(tiny, make_context, tmp_path, "signs", "prefer")
    pairs = preference_pairs(stage)
    assert len(pairs) == 20
    decode = stage.context.tokenizer.decode
    assert {decode(chosen.prompt) for chosen, _ in pairs} == {"<user> a ? <assistant>"}
    assert all(len(r.completion) == 2 * len(c.completion) - 1 for c, r in pairs)


def test_a_row_with_an_unknown_word_is_named(tiny, make_context, tmp_path):
    stage = made_by(tiny, make_context, tmp_path, "answers", word="unheard")
    with pytest.raises(InputError, match=r"^builders_of_tests:answers, row 0: .*unheard"):
        check_inputs(stage)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("none", "stages.cold.data gave no rows"),
        ("lost", "builders_of_tests:lost, row 0: problem=99 must be a number from 0 to 19"),
        ("halves", "halves, row 0: got the columns problem, chosen; needed: completion"),
        ("fails", "builders_of_tests:fails raised KeyError: 'x'"),
        ("nothing", "has no function 'nothing'"),
    ],
)
def test_a_function_that_is_wrong_is_named_before_anything_runs(
    tiny, make_context, tmp_path, function, message
):
    stage = made_by(tiny, make_context, tmp_path, function)
    with pytest.raises(InputError, match=message):
        check_inputs(stage)


# Which problems


def test_streams_pools_and_difficulties(tiny, make_context, tmp_path):
    reason = tiny["stages"]["reason"] | {"parent": "init"}
    problems = lambda **chosen: reason | {"problems": chosen}
    stages = {
        "one": problems(stream="rl"),
        "two": problems(stream="rl"),
        "pool": problems(stream="rl", pool=7),
        "easy": problems(difficulties=[1]),
        "plan": reason
        | {"curriculum": [{"steps": 2, "difficulties": [1]}, {"steps": 1, "difficulties": [2]}]},
    }
    of = {stage.name: stage for stage in plan(make_context(tmp_path, stages=stages))}
    prompts = lambda name, *given: [p.prompt for p in of[name].problems(*given)]
    assert prompts("one", 0, 20) == prompts("two", 0, 20)
    assert prompts("one", 0, 20) != prompts("easy", 0, 20)
    pooled = prompts("pool", 0, 21)
    assert sorted(pooled[:7]) == sorted(pooled[7:14]) == sorted(pooled[14:])
    assert sorted(pooled[:7]) == sorted(prompts("one", 0, 7))
    assert pooled[:7] != pooled[7:14]
    assert pooled[5:9] == prompts("pool", 5, 4)
    assert {p.columns["difficulty"] for p in of["easy"].problems(0, 20)} == {1}
    config = of["plan"].config
    assert [config.difficulties(step) for step in range(5)] == [(1,), (1,), (2,), (2,), (2,)]
    levels = {p.columns["difficulty"] for p in of["plan"].problems(0, 9, config.difficulties(3))}
    assert levels == {2}
