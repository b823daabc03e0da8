import pytest

from jaxrl_reason.report.completions import Block, blocks, number, show_sample, show_text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "<think> a\nb </think> <answer> 4 </answer>",
            [("think", "a\nb", True), ("answer", "4", True)],
        ),
        ("<think></think><answer> </answer>", [("think", "", True), ("answer", "", True)]),
        (
            "so <think> a </think> then <answer> 4 </answer> !",
            [
                ("outside", "so", True),
                ("think", "a", True),
                ("outside", "then", True),
                ("answer", "4", True),
                ("outside", "!", True),
            ],
        ),
        ("<think> cut off", [("think", "cut off", False)]),
        ("<think> a <answer> 4 </answer>", [("think", "a", False), ("answer", "4", True)]),
        (
            "<think> a <think> b </think>",
            [("think", "a", False), ("think", "b", True)],
        ),
        ("</think> a </answer>", [("outside", "</think> a </answer>", True)]),
        ("no layout <work> x </work>", [("outside", "no layout <work> x </work>", True)]),
        ("", []),
        ("  \n", []),
    ],
)
def test_blocks_hold_the_whole_text_in_order(text, parts):
    assert blocks(text) == [Block(*part) for part in parts]


def test_a_long_text_is_folded():
    assert "<details>" not in show_text("word " * 140)
    folded = show_text("word " * 150)
    assert folded.startswith("<details><summary>word word")
    assert "(750 characters)</summary>" in folded
    assert folded.count("word") == 150 + 90 // 5


def test_a_sample_says_how_it_ended_and_what_the_verifier_made_of_it(sample_row):
    right = show_sample("reason", sample_row(3, True))
    assert "13 tokens, ended by itself" in right
    assert "verifier" not in right
    assert "read as" not in right
    wrong = sample_row(3, False, finished=False, formatted=False, given=None, completion="3 <4")
    shown = show_sample("reason", wrong)
    for part in (
        "cut off at the longest length",
        "verifier: expected another",
        "layout missing",
        "no think or answer block",
        "3 &lt;4",
    ):
        assert part in shown


def test_an_answer_that_was_read_in_another_way_is_shown(sample_row):
    assert "read as: 0.5" in show_sample("a", sample_row(1, True, given="0.5"))


def test_rewards_are_shown_by_name_and_null_does_not_apply(sample_row):
    row = sample_row(1, True, rewards={"accuracy": 1.0, "length": None, "a<b": 0.12345})
    shown = show_sample("a", row)
    assert "accuracy <b>1</b>" in shown
    assert "length <b>does not apply</b>" in shown
    assert "a&lt;b <b>0.1235</b>" in shown
    for without in (sample_row(1, True), sample_row(1, True, rewards={}, measures={})):
        assert "rewards" not in show_sample("a", without)
        assert "measures" not in show_sample("a", without)


def test_numbers():
    shown = [number(value) for value in (None, True, False, 0, 1.0, 1 / 3, float("nan"))]
    assert shown == ["does not apply", "yes", "no", "0", "1", "0.3333", "nan"]
