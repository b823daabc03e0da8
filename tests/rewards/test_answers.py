"""Answers of mathematics: extraction, equality, time limits, threads, and all of GSM8K."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxrl_reason.rewards import answers, math_accuracy, verify_math
from jaxrl_reason.rewards.answers import answers_match, extract_answer, gold_answer

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
FOREVER = r"9^{9^{9^9}}"

# Two solutions of GSM8K (Cobbe et al., MIT licence).
SOLUTIONS = [
    "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 "
    "every day at the farmer’s market.\n#### 18",
    "So the new value of the house is 120,000+80,000=$<<120000+80000=200000>>200,000\n"
    "So he made a profit of 200,000-130,000=$<<200000-130000=70000>>70,000\n#### 70000",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SOLUTIONS[0], "18"),
        ("#### $1,080.50.", "$1,080.50"),
        ("#### 18\n\nShe makes $18.", "18"),
        ("#### 17\nNo:\n#### 18", "18"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{ 2. }", "2"),
        (r"\[\boxed{x = \{1, 2\}}\]", r"x = \{1, 2\}"),
        ("<think> 3 </think> <answer> 4 </answer>", "4"),
        ("<answer>3</answer> no, <answer>\n**4**.\n</answer>", "4"),
        (r"<answer>It is $\boxed{4}$</answer>", "4"),
        (r"<answer>3</answer> and \boxed{4}", "3"),
        ("<answer>$4$</answer>", "4"),
        ("<answer>$4$ and $5$</answer>", "$4$ and $5$"),
        (r"<answer>\(4\)</answer>", "4"),
        # What has no mark, or does not end, states nothing.
        ("The answer is 18.", None),
        ("####", None),
        (r"\boxed{4", None),
        (r"\boxed{3} \boxed{4", None),
        (r"\boxed{}", None),
        ("<answer>4", None),
        ("", None),
        # A thought states nothing.
        (r"<think> \boxed{3}", None),
        (r"<think> \boxed{3} </think> so 3", None),
        (r"it may be \boxed{3} </think> \boxed{4}", "4"),
    ],
)
def test_the_answer_is_what_the_text_states_last(text, expected):
    assert extract_answer(text) == expected


def test_gold_answers_come_with_or_without_their_solution():
    assert [gold_answer(text) for text in SOLUTIONS] == ["18", "70000"]
    assert gold_answer(r" $\frac{1}{2}$ ") == r"\frac{1}{2}"
    assert gold_answer(r"Thus \boxed{5}.") == "5"


EQUAL = [
    ("18", "18"),
    ("18.00", "18"),
    ("$70,000", "70000"),
    (r"\$1{,}000", "1000"),
    ("-$5", "-5"),
    ("−5", "-5"),
    ("18 dollars", "18"),
    (r"18\text{ dollars}", "18"),
    (".5", "0.5"),
    ("3.1415926", "3.1415927"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac{3}{4}", "0.75"),
    ("1 + x", "x + 1"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("2, 1", "1, 2"),
    ("(1, 2)", "(1, 2)"),
    ("x = 5", "5"),
    (r"50\%", "0.5"),
    ("10^{2}", "100"),
    ("tuesday", "Tuesday"),
    (r"\text{Ann  Lee}", "Ann Lee"),
    ("B", "B"),
]
DIFFERENT = [
    ("18", "19"),
    ("1,8", "18"),
    ("5 million", "5"),
    ("2 x", "2"),
    ("18 or 19", "18"),
    ("1, 2", "2"),
    ("0.33", "1/3"),
    ("(2, 1)", "(1, 2)"),
    ("silent", "listen"),
    ("Tuesday or Wednesday", "Tuesday"),
    ("C", "B"),
    ("", "5"),
    (r"\foo{", "3"),
    (r"3}+\boxed{4", "4"),
    ("x" * 5000, "4"),
]


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_equal_answers_match(answer, gold):
    assert answers_match(answer, gold) is True


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_different_answers_do_not_match(answer, gold):
    assert answers_match(answer, gold) is False


@pytest.mark.parametrize("gold", [r"\foo{", r"\frac{1}{", "", "?"])
def test_a_gold_answer_that_cannot_be_parsed_says_nothing(gold):
    assert answers_match("3", gold) is None
    assert math_accuracy(["q"] * 2, [r"\boxed{3}", "3"], answer=[gold] * 2) == [None, None]
    assert not verify_math(r"\boxed{3}", gold)


def test_numbers_are_compared_as_math_verify_compares_them():
    numbers = ["18", "18.0", "-18", "+18", "1,800", "1800", "0.5", ".5", "0.25", "1800.00", "1.8"]
    for answer in numbers:
        for gold in numbers:
            by_math_verify = answers._math_verify(answer, gold, 5.0)
            assert answers_match(answer, gold) is by_math_verify, (answer, gold)


def test_the_reward_has_the_signature_of_trl():
    completions = [SOLUTIONS[0], "#### 19", "so it is 18", SOLUTIONS[1]]
    given = {"completion_ids": [[1]] * 4, "verdict": [None] * 4}
    golds = [*SOLUTIONS[:1] * 3, SOLUTIONS[1]]
    assert math_accuracy(["q"] * 4, completions, answer=golds, **given) == [1.0, 0.0, 0.0, 1.0]


# Time, threads and processes


@pytest.mark.parametrize("answer", [FOREVER, r"10^{10^{10}} + x"])
def test_an_answer_that_takes_for_ever_is_wrong_in_time(answer):
    assert answers_match("1/2", "0.5") is True
    begin = time.monotonic()
    assert answers_match(answer, "5", timeout=0.5) is False
    assert time.monotonic() - begin < 20
    assert answers_match("1/2", "0.5") is True, "the next question finds a new process"


def test_threads_get_their_own_answers():
    pairs = [(f"{n}/{7}", f"{n}/{7 + n % 2}") for n in range(1, 41)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda pair: answers_match(*pair), pairs))
    assert found == [n % 2 == 0 for n in range(1, 41)]
    assert threading.current_thread() is threading.main_thread()
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL, "no signal handler is touched"


def test_a_killed_process_is_replaced():
    assert answers_match("1/2", "0.5") is True
    process = answers._math_verify._process
    process.kill()
    process.wait()
    assert answers_match("1/2", "0.5") is True
    assert answers._math_verify._process.pid != process.pid


def test_the_time_limit_ends_with_the_answer():
    assert answers_match("1/2", "0.5", timeout=0.5) is True
    pid = answers._math_verify._process.pid
    time.sleep(0.8)
    assert answers_match("1/2", "0.5") is True
    assert answers._math_verify._process.pid == pid


PROGRAM = """
import os, sys
from jaxrl_reason.rewards import verify_math
assert verify_math(r"\\boxed{1/2}", "0.5")
from jaxrl_reason.rewards.answers import _math_verify
print(_math_verify._process.pid, "math_verify" in sys.modules, flush=True)
if sys.argv[1] == "dies":
    os._exit(1)
"""


@pytest.mark.parametrize("end", ["ends", "dies"])
def test_no_process_is_left_behind(end):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, end], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == (end == "dies")
    assert done.stderr == ""
    pid, loaded = done.stdout.split()
    assert loaded == "False"
    for _ in range(100):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the process that checks answers is still there")


# GSM8K


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not there")
def test_every_gold_answer_of_gsm8k_verifies_against_itself():
    for split, size in (("train", 7473), ("test", 1319)):
        lines = (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        solutions = [json.loads(line)["answer"] for line in lines]
        golds = [gold_answer(text) for text in solutions]
        assert len(golds) == size
        assert math_accuracy([""] * size, solutions, answer=solutions) == [1.0] * size
        boxed = [rf"so \boxed{{{gold}}}" for gold in golds]
        assert math_accuracy([""] * size, boxed, answer=golds) == [1.0] * size
        shifted = math_accuracy([""] * size, boxed[1:] + boxed[:1], answer=golds)
        others = golds[1:] + golds[:1]
        number = lambda gold: float(gold.replace(",", ""))
        same = [number(a) == number(b) for a, b in zip(golds, others, strict=True)]
        assert shifted == [float(x) for x in same]


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not there")
def test_math_verify_agrees_on_all_of_gsm8k():
    for split in ("train", "test"):
        lines = (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        for gold in sorted({gold_answer(json.loads(line)["answer"]) for line in lines}):
            assert answers._math_verify(gold, gold, 5.0) is True
            assert answers._math_verify(f"{gold}1", gold, 5.0) is False
