"""Factum: responses, the log of a film, data of the stages, rewards, metrics, and the recipe."""

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.papers import factum
from jaxrl_reason.papers import factum_rewards as rewards
from jaxrl_reason.papers.factum import EventLog, FactsFirst, write_log
from jaxrl_reason.reproduce import load_experiment
from jaxrl_reason.tasks import ModularArithmetic, Problem, VisualTask
from jaxrl_reason.tasks.facts import Fact, read_facts, write_facts
from jaxrl_reason.tasks.problem import split_words

CONFIGS = Path(__file__).parents[2] / "configs/papers/factum"
LOG = EventLog()
FILM = FactsFirst(frames=12, canvas_size=32)
PROBLEMS = [LOG.generate("train", i) for i in range(600)]
TOKEN = re.compile(r"</?\w+>|\[\w+\]|[A-Za-z0-9]+|[^\sA-Za-z0-9]")
TAGS = {"<think>", "</think>", "<answer>", "</answer>"}


def fact(start: int, end: int, name: str, action: str, scene: str = "", cause: str = "none"):
    return Fact(time=(start, end), object=name, action=action, scene=scene, cause=cause)


RED, BLUE = "red circle", "blue square"
FACTS = (
    fact(0, 2, RED, "rests", "top left"),
    fact(0, 4, BLUE, "rests", "top right"),
    fact(2, 4, RED, "moves right", "top right"),
    fact(3, 4, RED, f"hits {BLUE}", "top right"),
    fact(4, 5, BLUE, "turns green", "top right", f"hit by {RED}"),
    fact(4, 5, RED, "stops", "top right", f"hits {BLUE}"),
    fact(6, 7, "red cross", "appears", "bottom left"),
    fact(8, 9, "red cross", "disappears", "bottom left"),
)
EVENTS = (
    "<facts> [time] 2-4 [object] red circle [action] moves right [cause] none "
    "[time] 3-4 [object] red circle [action] hits blue square [cause] none "
    "[time] 4-5 [object] blue square [action] turns green [cause] hit by red circle "
    "[time] 6-7 [object] red cross [action] appears [cause] none "
    "[time] 8-9 [object] red cross [action] disappears [cause] none </facts>"
)


def problem_of(form: str, answer: str, **question) -> Problem:
    asked = {"form": form, "object": RED, "action": "moves right", "time": 0.0, **question}
    columns = {
        "difficulty": 2,
        "answer_class": answer,
        "kind": "interval",
        "question": asked,
        "facts": [f.to_json() for f in FACTS],
    }
    return Problem(prompt="?", answer=answer, columns=columns)


WHEN = problem_of("interval", "2 4")
WHY = problem_of("cause", f"hit by {RED}", object=BLUE, action="turns green")


# Responses and the log


def test_a_log_says_what_changes_in_each_frame():
    assert write_log(FACTS) == (
        "0 red circle top left , blue square top right ; 2 red circle right ; 3 red circle right ; "
        "4 red circle touches blue square , blue square green , red circle stops top right ; "
        "6 red cross appears bottom left ; 8 red cross disappears bottom left"
    )


def test_no_interval_longer_than_a_frame_stands_in_the_log():
    for problem in PROBLEMS[:100]:
        log = problem.prompt.partition(" . ")[0]
        assert "-" not in log
        moves = [f for f in LOG.facts(problem) if f.verb == "moves"]
        steps = sum(f.time[1] - f.time[0] for f in moves)
        words = log.split()
        shown = sum(
            word in ("left", "right", "up", "down") and before not in ("top", "bottom")
            for before, word in itertools.pairwise(words)
        )
        assert shown == steps


def test_the_block_has_events_without_their_scene():
    block = write_facts(factum.events(FACTS), factum.FIELDS)
    assert " ".join(block.split()) == EVENTS
    read = read_facts(block, factum.FIELDS)
    assert read is not None
    assert [f.to_json()[:4] for f in read] == [f.to_json()[:4] for f in factum.events(FACTS)]
    assert {f.scene for f in read} == {""}
    assert read_facts(block) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> 2 4 </answer>", (None, None, " 2 4 ")),
        ("<facts> </facts><answer>a</answer>", ("<facts> </facts>", None, "a")),
        ("<think></think> <answer>a</answer>", (None, "", "a")),
        ("<facts>x</facts><think>b</think><answer>a</answer>", ("<facts>x</facts>", "b", "a")),
        ("<think>b</think><facts>x</facts><answer>a</answer>", None),
        ("<facts>x</facts><think>b</think>", None),
        ("<think>b</think><think>c</think><answer>a</answer>", None),
        ("<think>b<think></think><answer>a</answer>", None),
        ("so <answer>a</answer>", None),
        ("<answer>a</answer> so", None),
    ],
)
def test_responses_are_taken_apart(text, expected):
    assert factum.read_response(text) == expected


def test_traces_are_right_complete_and_in_the_vocabulary():
    known = {*LOG.words(), *TAGS}
    lengths = {"long": [], "short": []}
    for problem in PROBLEMS:
        assert {*split_words([problem.prompt])} <= known
        for style in ("long", "short"):
            text = LOG.trace(problem, style)
            verdict = LOG.verify(problem, text)
            assert (verdict.correct, verdict.score) == (True, 1.0)
            assert rewards.full_layout(problem, text, verdict, 0) == 1.0
            assert rewards.facts_f1(problem, text, verdict, 0) == 1.0
            lengths[style].append(rewards.thought_length(problem, text, verdict, 0))
        assert LOG.verify(problem, LOG.trace(problem, "answer")).correct
    # What the configuration says of them.
    means = {style: np.mean(values) for style, values in lengths.items()}
    assert means == pytest.approx({"long": 31, "short": 13}, abs=1)


def test_questions_are_mixed_as_in_the_paper():
    forms = Counter(p.columns["question"]["form"] for p in PROBLEMS)
    shares = [forms["interval"], forms["direction"] + forms["side"], forms["cause"]]
    assert np.array(shares) / len(PROBLEMS) == pytest.approx([0.53, 0.18, 0.20], abs=0.05)


def test_logs_and_films_are_the_same_problems():
    assert isinstance(FILM, VisualTask)
    assert not isinstance(LOG, VisualTask)
    problem = LOG.generate("test", 3, 2)
    assert problem.prompt.endswith(LOG.film.generate("test", 3, 2).prompt)
    assert LOG.film.media(problem).videos[0].frames.shape == (12, 32, 32, 3)
    assert EventLog(seed=1).generate("train", 0) != PROBLEMS[0]
    with pytest.raises(InputError, match="frames=11"):
        EventLog(frames=11)


# Data of the stages


def test_rows_of_the_stages():
    rng = random.Random(0)
    (first, *_) = factum.facts_rows(LOG, PROBLEMS[:8], rng)
    facts = factum.events(LOG.facts(PROBLEMS[0]))
    assert first == {"problem": 0, "completion": write_facts(facts, factum.FIELDS)}

    def parts(**options):
        rows = list(factum.response_rows(LOG, PROBLEMS, random.Random(0), **options))
        assert [row["problem"] for row in rows] == list(range(len(PROBLEMS)))
        found = [factum.read_response(row["completion"]) for row in rows]
        answers = [response.answer.strip() for response in found]
        assert answers == [problem.answer for problem in PROBLEMS]
        return found

    whole = parts(thoughts={"long": 0.75, "short": 0.25})
    searched = [response.thought.split()[0] == "search" for response in whole]
    assert np.mean(searched) == pytest.approx(0.75, abs=0.06)
    assert all(read_facts(response.facts, factum.FIELDS) is not None for response in whole)
    assert {response.facts for response in parts(facts=False, thoughts={"short": 1.0})} == {None}
    assert {response.thought for response in parts(thoughts=None)} == {None}
    with pytest.raises(InputError, match="task 'arithmetic' has no facts"):
        list(factum.facts_rows(ModularArithmetic(), PROBLEMS[:1], rng))


# Rewards


def scores(problem: Problem, text: str) -> dict[str, float | None]:
    given = {"problem": [problem], "verdict": [FILM.verify(problem, text)]}
    return {
        name: getattr(rewards, f"{name}_reward")(["?"], [text], **given)[0]
        for name in ("format", "iou", "accuracy", "length")
    }


def response(answer: str, thought: str = "2 - 4 moves ; so", facts: str = EVENTS) -> str:
    return f"{facts} <think> {thought} </think> <answer> {answer} </answer>"


LONG = "a " * 25


@pytest.mark.parametrize(
    ("problem", "text", "expected"),
    [
        (WHEN, response("2 4"), (1.0, 1.0, None, 1.0)),
        (WHEN, response("2 6"), (1.0, 0.5, None, 1.0)),
        # Overlap 1 of 5 s: too little for the gate of the length.
        (WHEN, response("3 7"), (1.0, 0.2, None, 0.0)),
        (WHEN, response("5 7"), (1.0, 0.0, None, 0.0)),
        (WHEN, response("left"), (1.0, 0.0, None, 0.0)),
        # 25 words: half way from 10 to 40. Facts do not count.
        (WHEN, response("2 4", LONG), (1.0, 1.0, None, 0.5)),
        (WHEN, response("2 4", "a " * 40), (1.0, 1.0, None, 0.0)),
        (WHEN, response("2 4", facts=""), (0.0, 1.0, None, 1.0)),
        (WHEN, response("2 4", facts="<facts> [time] 2 </facts>"), (0.0, 1.0, None, 1.0)),
        (WHEN, f"{EVENTS} <answer> 2 4 </answer>", (0.0, 1.0, None, 1.0)),
        (WHEN, f"{EVENTS} <think> 2 4", (0.0, 0.0, None, 0.0)),
        (WHY, response("hit by red circle", LONG), (1.0, None, 1.0, 0.5)),
        (WHY, response("none", LONG), (1.0, None, 0.0, 0.0)),
    ],
)
def test_rewards(problem, text, expected):
    assert tuple(scores(problem, text).values()) == pytest.approx(expected)


def test_layouts_of_the_ablations():
    texts = {
        "full": response("2 4"),
        "no_facts": response("2 4", facts=""),
        "no_thought": f"{EVENTS} <answer> 2 4 </answer>",
    }
    for name in texts:
        layout = getattr(rewards, f"{name}_layout")
        passed = [kind for kind, text in texts.items() if layout(WHEN, text, None, 0)]
        assert passed == [name]


def test_records_and_thoughts_of_a_published_model():
    values = ("3.5 - 7", "a woman", "opens a door", "kitchen", "door", "static", "she was called")
    record = " ".join(f"[{f}] {v}" for f, v in zip(factum.PUBLISHED, values, strict=True))
    text = f"<facts>\n{record}\n{record}\n</facts>\n<think>{'so ' * 320}</think>\n"
    text += "<answer>3.5 to 7</answer>"
    row = Problem(prompt="When?", answer="3.5 7", columns={"difficulty": 0, "answer_class": ""})
    given = {"problem": [row], "verdict": [None]}
    assert rewards.published_format_reward(["?"], [text], **given) == [1.0]
    assert rewards.format_reward(["?"], [text], **given) == [0.0]
    assert rewards.iou_reward(["?"], [text], **given) == [1.0]
    assert rewards.published_length_reward(["?"], [text], **given) == [0.5]


def test_recall_and_facts_are_measured():
    verdict = FILM.verify(WHEN, response("2 6"))
    overlaps = [rewards.recall(WHEN, response(given), None, 0) for given in ("2 6", "2 7", "3")]
    assert overlaps == [True, False, False]
    assert rewards.recall(WHY, response("none"), None, 0) is None
    two = EVENTS.partition("[time] 4-5")[0] + "</facts>"
    assert rewards.facts_f1(WHEN, response("2 4", facts=EVENTS), verdict, 0) == 1.0
    assert rewards.facts_f1(WHEN, two, verdict, 0) == pytest.approx(4 / 7)
    assert rewards.facts_f1(WHEN, response("2 4", facts=two), verdict, 0) == pytest.approx(4 / 7)
    assert rewards.facts_f1(WHEN, response("2 4", facts=""), verdict, 0) == 0.0


# Metrics of the experiment


def test_metrics_of_an_experiment():
    names = {"objectives": ["format", "iou", "length"]}
    means = lambda *values: {
        "measures": dict(zip(("format", "iou", "length"), values, strict=True))
    }
    records = {
        "pfab": {**means(1.0, 0.5, 0.5), "accuracy": 0.6},
        "sum": {**means(1.0, 0.25, 0.5), "accuracy": 0.5},
        "clones": {**means(1.0, 0.4, 0.5), "accuracy": 0.5},
        "sum_clones": {**means(0.9, 0.2, 0.5), "accuracy": 0.2},
    }
    assert rewards.volume(records, "pfab", **names) == pytest.approx(0.25)
    assert rewards.worst(records, "sum", **names) == 0.25
    gap = rewards.volume_gap(records, "pfab", **names, against={"pfab": "sum"})
    assert gap == pytest.approx(0.125)
    drop = rewards.excess_drop(
        records, "clones", plain="pfab", other="sum_clones", other_plain="sum", share=0.5
    )
    assert drop == pytest.approx(0.1 - 0.15)


# The recipe


@pytest.fixture(scope="module")
def experiment():
    return load_experiment(str(CONFIGS / "small.yaml"))


def test_arms_differ_in_one_thing(experiment):
    stages = experiment.config.run.stages
    plain = stages["pfab"].model_dump()
    changed = {
        name: {key for key, value in stages[name].model_dump().items() if value != plain[key]}
        for name, stage in stages.items()
        if stage.kind == "morl"
    }
    for name, keys in changed.items():
        allowed = {"aggregator", "aggregator_options", "conflict_steps"}
        allowed |= {"rewards"} if name.endswith("_clones") or name == "tuned" else set()
        allowed |= {"prompts_per_step", "num_generations"} if name.endswith("_4") else set()
        allowed |= {"parent", "rewards"} if name.startswith("no_") else set()
        allowed |= {"hypervolume_weighting"} if name == "front" else set()
        assert keys <= allowed, name
    assert {stages[name].conflict_steps for name in ("pfab", "gdpo")} == {5}
    assert [reward.name for reward in stages["pfab"].rewards] == list(
        experiment.config.metrics["volume"].options["objectives"]
    )


def test_sft_in_place_of_rl_has_as_many_tokens(experiment):
    stages = experiment.config.run.stages
    rl, sft = stages["pfab"], stages["no_rl"]
    sampled = rl.steps * rl.prompts_per_step * rl.num_generations * rl.max_completion_length
    assert sft.steps * sft.batch_size * sft.max_length == pytest.approx(sampled, rel=0.01)


def test_prompts_and_responses_fit(experiment):
    run = experiment.config.run
    problems = {d: [LOG.generate("train", i, d) for i in range(300)] for d in (2, 4)}
    prompts = [len(tokens(problem.prompt)) for of in problems.values() for problem in of]
    assert max(prompts) + 3 <= run.max_prompt_length
    both = [(len(tokens(p.prompt)), len(tokens(LOG.trace(p, "long")))) for p in problems[2]]
    assert max(sum(pair) for pair in both) + 4 <= run.stages["thinking"].max_length - 32
    lengths = [length for _, length in both]
    assert max(lengths) < run.evaluation.max_completion_length
    assert np.mean(lengths) == pytest.approx(74, abs=3)


def tokens(text: str) -> list[str]:
    return TOKEN.findall(text)
