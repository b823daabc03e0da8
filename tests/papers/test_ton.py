"""What TON adds: data with emptied thoughts, its measures, rewards and baselines."""

import random

import pytest

from jaxrl_reason.data.tokenizer import build_tokenizer
from jaxrl_reason.errors import InputError
from jaxrl_reason.papers import ton
from jaxrl_reason.rewards import accuracy, format_followed
from jaxrl_reason.stages.groups import Group, Sampled
from jaxrl_reason.tasks import ModularArithmetic, Problem, Verdict

TASK = ModularArithmetic(modulus=10, max_constant=9, min_steps=1, max_steps=3)
HYBRID = ton.HybridArithmetic(modulus=10, max_constant=9, min_steps=1, max_steps=3)
PROBLEMS = [TASK.generate("train", i) for i in range(2000)]
VERDICT = Verdict(correct=True, formatted=True, answer="4", reason="right")
SKIPPED = "<think> </think> <answer> 4 </answer>"


def rows(p: float, seed: int = 0) -> list[dict]:
    made = ton.dropout_traces(TASK, PROBLEMS, random.Random(seed), p=p, style="long")
    return list(made)


def is_empty(row: dict) -> bool:
    return ton.skip(PROBLEMS[row["problem"]], row["completion"], VERDICT, 6)


def click(*position: float, action: str = "click", thought: str = "there") -> str:
    text = f"{{'action': '{action}', 'value': None, 'position': {list(position)}}}"
    return f"<think>{thought}</think><action>{text}</action>"


def gold(*position: float, action: str = "CLICK") -> list[str]:
    return [f"{{'action': '{action}', 'value': None, 'position': {list(position)}}}"]


@pytest.mark.parametrize(("p", "low", "high"), [(0.0, 0, 0), (0.5, 0.46, 0.54), (1.0, 1, 1)])
def test_dropout_empties_a_share_of_the_thoughts(p, low, high):
    made = rows(p)
    assert [row["problem"] for row in made] == list(range(2000))
    assert low <= sum(map(is_empty, made)) / len(made) <= high


def test_what_is_not_emptied_is_the_solvers_trace_and_all_are_right():
    for row in rows(0.5):
        problem = PROBLEMS[row["problem"]]
        style = "answer" if is_empty(row) else "long"
        assert row["completion"] == TASK.trace(problem, style)
        assert TASK.verify(problem, row["completion"]).correct


def test_dropout_is_drawn_once_by_the_generator_it_is_given():
    assert rows(0.5) == rows(0.5)
    assert rows(0.5) != rows(0.5, seed=1)


def test_dropout_refuses_a_share_that_is_none():
    with pytest.raises(InputError, match=r"p=1.5 must be a number from 0.0 to 1.0"):
        rows(1.5)


def test_the_published_empty_thought_is_the_same_words():
    tokenizer = build_tokenizer(TASK.words())
    published = f"<think>{ton.EMPTY}</think><answer>4</answer>"
    assert tokenizer(published)["input_ids"] == tokenizer(SKIPPED)["input_ids"]
    assert ton.skip(PROBLEMS[0], published, VERDICT, 6)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (SKIPPED, True),
        ("<think></think>", True),
        ("<think> a = 4 ; </think> <answer> 4 </answer>", False),
        ("<think> <answer> 4 </answer>", False),
        ("<answer> 4 </answer>", False),
        ("a <think> </think> <answer> 4 </answer>", False),
        ("<think> a </think> <think> </think> <answer> 4 </answer>", False),
    ],
)
def test_skip_is_an_empty_thought(completion, expected):
    assert ton.skip(PROBLEMS[0], completion, VERDICT, 9) is expected
    assert ton.think_length(PROBLEMS[0], completion, VERDICT, 9) == (None if expected else 9.0)
    bonus = ton.skip_bonus(["?"], [completion], problem=[PROBLEMS[0]], verdict=[VERDICT])
    assert bonus == [float(expected)]


def test_an_empty_thought_has_the_layout_and_no_reward_but_the_bonus_looks_at_it():
    problem = PROBLEMS[0]
    for style in ("answer", "long"):
        verdict = [TASK.verify(problem, TASK.trace(problem, style))]
        assert accuracy(["?"], ["?"], verdict=verdict) == [1.0]
        assert format_followed(["?"], ["?"], verdict=verdict) == [1.0]


def test_selectivity_is_the_difference_of_the_shares():
    records = {"rl": {"measures_by_difficulty": {"skip": {"1": 0.75, "2": 0.5, "3": 0.125}}}}
    assert ton.selectivity(records, "rl", easy=1, hard=3) == 0.625


def test_hybrid_problems_are_the_same_with_a_marker():
    for split in ("train", "test"):
        for index in range(20):
            ours, theirs = HYBRID.generate(split, index, 2), TASK.generate(split, index, 2)
            assert ours.prompt == f"[hybrid] {theirs.prompt}"
            assert (ours.answer, ours.columns) == (theirs.answer, theirs.columns)
            assert HYBRID.verify(ours, HYBRID.trace(ours, "long")).correct
    tokenizer = build_tokenizer(HYBRID.words())
    ids = tokenizer("[hybrid] a = 4")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[hybrid]", "a", "=", "4"]


def explained(*texts: str, finished: bool = True) -> Group:
    problem = Problem(prompt="Explain.", answer="3", columns={"problem": "How many cubes?"})
    verdict = Verdict(correct=False, formatted=False, answer=None, reason="")
    return Group(7, problem, [Sampled(text, [], verdict, finished) for text in texts], [])


def reversed_rows(group: Group, p: float) -> list[dict]:
    prompt = "{problem} Think in <think> </think>."
    return list(ton.reverse_thinking([group], random.Random(0), p=p, prompt=prompt))


def test_reverse_thinking_makes_an_explanation_the_thought():
    (row,) = reversed_rows(explained(" Two red and one blue. "), 0.0)
    assert row == {
        "problem": 7,
        "prompt": "How many cubes? Think in <think> </think>.",
        "completion": "<think>Two red and one blue.</think><answer>3</answer>",
    }


def test_reverse_thinking_drops_thoughts_to_two_line_ends():
    (row,) = reversed_rows(explained("Two red and one blue."), 1.0)
    assert row["completion"] == "<think>\n\n</think><answer>3</answer>"


def test_reverse_thinking_leaves_out_what_states_the_answer_or_does_not_end():
    stated = "Two and one. <answer> 3 </answer>"
    assert reversed_rows(explained(stated, "<think> Two", "Two <|im_start|>", " "), 0.0) == []
    assert reversed_rows(explained("Two and one.", finished=False), 0.0) == []
    (row,) = reversed_rows(explained(stated, "Two and one."), 0.0)
    assert row["completion"].startswith("<think>Two and one.</think>")


def test_gui_rewards_of_a_point():
    near, far = click(0.5, 0.63), click(0.5, 0.65)
    reward = lambda f, text, goal: f(["?"], [text], answer=goal)[0]
    assert reward(ton.gui_value, near, gold(0.5, 0.5)) == 1.0
    assert reward(ton.gui_value, far, gold(0.5, 0.5)) == 0.0
    assert reward(ton.gui_type, far, gold(0.5, 0.5)) == 1.0
    assert reward(ton.gui_value, click(0.5, 0.5, action="scroll"), gold(0.5, 0.5)) == 0.0
    # Actions other than clicks have a type and no value.
    press = click(0.5, 0.5, action="press_home")
    assert reward(ton.gui_type, press, gold(0.5, 0.5, action="press_home")) == 1.0
    assert reward(ton.gui_value, press, gold(0.5, 0.5, action="press_home")) == 0.0


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        (click(0.2, 0.4), 1.0, 1.0),
        (click(0.31, 0.4), 1.0, 0.0),
        (click(0.2), 1.0, 0.0),
        ("<think></think><action>{'action': 'click', 'position': 'left'}</action>", 1.0, 0.0),
        ("<think></think><action>{'action': 'click', 'position': ['a', 1]}</action>", 1.0, 0.0),
        ("<think></think><action>{'action': 3}</action>", 0.0, 0.0),
        ("<think></think><action>click</action>", 0.0, 0.0),
        ("<think></think><action>__import__('os')</action>", 0.0, 0.0),
        ("{'action': 'click', 'position': [0.2, 0.4]}", 0.0, 0.0),
    ],
)
def test_gui_rewards_of_a_box(text, kind, value):
    box = gold(0.1, 0.3, 0.3, 0.5)
    assert ton.gui_type(["?"], [text], answer=box) == [kind]
    assert ton.gui_value(["?"], [text], answer=box) == [value]


def test_layout_is_a_thought_and_an_answer_or_an_action():
    texts = [click(0.1, 0.1, thought=ton.EMPTY), SKIPPED, "<think>a</think>", click(0.1) + " so"]
    texts += ["<think>\n\n</think><answer>4</answer>", "<think></think><answer>4</action>"]
    assert ton.layout(["?"] * 6, texts) == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]


def test_gui_rewards_refuse_an_answer_that_is_no_action():
    with pytest.raises(InputError, match="'click' is no dictionary"):
        ton.gui_type(["?"], [click(0.1, 0.1)], answer=["click"])
