"""Completion format, draws and the constant-answer baseline."""

import random
from dataclasses import dataclass

import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.tasks import (
    Problem,
    chance_accuracy,
    constant_answer_accuracy,
    problem,
    read_completion,
)

GOOD = "<think> b = 4 ; </think> <answer> 4 </answer>"


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Numbers below `size`; the answer is 0 for three quarters of them, and repeats are likely."""

    seed: int = 0
    size: int = 4000
    name = "numbers"

    def difficulties(self):
        return (1, 2)

    def propose(self, rng: random.Random, difficulty: int):
        value = rng.randrange(self.size)
        canonical = f"{difficulty} {value}"
        split = problem.hash_split(self.name, canonical, 0.5)
        return problem.Candidate(canonical=canonical, split=split, content=(difficulty, value))

    def generate(self, split, index, difficulty=None):
        level, value = problem.draw(self, split, index, difficulty)
        answer = str(0 if value % 4 else level)
        columns = {"difficulty": level, "answer_class": answer}
        return Problem(prompt=str(value), answer=answer, columns=columns)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "4"),
        ("<think></think><answer>4</answer>", "4"),
        ("  <think>\n a \n</think>\n<answer>\n(1) A\n(2) B\n</answer>\n", "(1) A\n(2) B"),
    ],
)
def test_read_completion_accepts(text, answer):
    assert read_completion(text).answer == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "<answer> 4 </answer>",
        "<think> a </think> 4",
        "<think> a <answer> 4 </answer>",
        "<answer> 4 </answer> <think> a </think>",
        "<think> a </think> so <answer> 4 </answer>",
        "so <think> a </think> <answer> 4 </answer>",
        GOOD + " 4",
        GOOD + " " + GOOD,
        "<think> a </think> " + GOOD,
        GOOD + " <answer> 4 </answer>",
        "<think> a </think> <answer>  </answer>",
        "<think> a <answer> 4 </answer> </think>",
        "<think> a </think> <answer> <think> 4 </answer>",
        "<Think> a </Think> <answer> 4 </answer>",
    ],
)
def test_read_completion_refuses(text):
    read = read_completion(text)
    assert read.answer is None
    assert read.reason


def test_written_completions_are_read_back():
    assert read_completion(problem.write_completion("", " 4 ")).answer == "4"
    assert problem.write_completion(" a b ", "4") == "<think> a b </think> <answer> 4 </answer>"
    assert problem.write_completion("", "4") == "<think> </think> <answer> 4 </answer>"


def test_hash_split_is_stable_and_has_the_asked_share():
    splits = [problem.hash_split("t", str(value), 0.2) for value in range(20_000)]
    # Standard deviation of the share is 0.0028.
    assert abs(splits.count("test") / 20_000 - 0.2) < 0.012
    # Written down once; a changed hash would let held-out problems into old training sets.
    assert [value for value in range(24) if splits[value] == "test"] == [1, 2, 13]


def test_test_draws_are_distinct_across_blocks_and_splits_are_disjoint():
    task = Numbers()
    test = {problem.draw(task, "test", index, None) for index in range(1000)}
    train = {problem.draw(task, "train", index, None) for index in range(4000)}
    assert len(test) == 1000
    assert not test & train
    # With 4,000 problems of which half are in the split, independent draws would repeat.
    assert len(train) < 3500


def test_test_draws_do_not_depend_on_the_order_of_asking():
    later_first = [problem.draw(Numbers(seed=1), "test", index, 1) for index in (700, 3)]
    problem._test_block.cache_clear()
    assert [problem.draw(Numbers(seed=1), "test", index, 1) for index in (3, 700)] == (
        later_first[::-1]
    )


def test_a_small_space_repeats_only_when_it_is_used_up():
    task = Numbers(size=100)
    seen = [problem.draw(task, "test", index, 1) for index in range(300)]
    held_out = {
        value for value in range(100) if problem.hash_split("numbers", f"1 {value}", 0.5) == "test"
    }
    assert {value for _, value in seen} == held_out
    assert len(set(seen[: len(held_out) - 3])) == len(held_out) - 3


def test_an_empty_split_is_an_error():
    task = Numbers(size=1)
    split = problem.hash_split("numbers", "1 0", 0.5)
    other = "train" if split == "test" else "test"
    with pytest.raises(InputError, match=f"no {other} problem of difficulty 1"):
        problem.draw(task, other, 0, 1)


@pytest.mark.parametrize(("split", "index"), [("valid", 0), ("train", -1)])
def test_bad_places_are_errors(split, index):
    with pytest.raises(InputError, match=r"split=|index="):
        problem.draw(Numbers(), split, index, None)


def test_constant_answer_accuracy():
    # 0 is right for three quarters; the standard deviation over 1,000 problems is 0.014.
    assert abs(constant_answer_accuracy(Numbers(), 1000) - 0.75) < 0.06
    with pytest.raises(InputError, match="n=0"):
        constant_answer_accuracy(Numbers(), 0)


def test_chance_accuracy_is_that_of_answers_by_their_frequency():
    # 0 three quarters of the time and the right other answer else: 9/16 + 1/16.
    assert abs(chance_accuracy(Numbers(), 1000) - 0.625) < 0.05
    with pytest.raises(InputError, match="n=0"):
        chance_accuracy(Numbers(), 0)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Problems whose answers are written down: train, test."""

    answers: tuple[str, str]
    name = "listed"

    def generate(self, split, index, difficulty=None):
        of_split = self.answers[split == "test"]
        answer = of_split[index % len(of_split)]
        level = index % 2 if difficulty is None else difficulty
        return Problem(
            prompt="", answer=answer, columns={"difficulty": level, "answer_class": answer}
        )


def test_baselines_by_hand():
    # Difficulty 0 has the answers a, a, a, c in training and a, b, a, b held out; difficulty 1
    # has b, b, b, b and c, c, b, b.
    task = Listed(answers=("ababab" + "cb", "acbcabbb"))
    assert constant_answer_accuracy(task, 8) == (2 + 2) / 8
    assert chance_accuracy(task, 8) == (2 * 0.75 + 2 * 1.0) / 8


def test_baselines_of_chosen_difficulties():
    # All problems are of difficulty 5 now: a 3, b 4, c 1 of 8 in training.
    task = Listed(answers=("abababcb", "acbcabbb"))
    assert constant_answer_accuracy(task, 8, [5]) == 4 / 8
    assert chance_accuracy(task, 8, [5]) == (2 * 3 / 8 + 4 * 4 / 8 + 2 * 1 / 8) / 8
    # Two in turn: a, b, a, b of each in training; a, c, b, c held out.
    assert constant_answer_accuracy(task, 8, [5, 6]) == 2 * 1 / 8
    assert chance_accuracy(task, 8, [5, 6]) == 2 * (1 * 0.5 + 1 * 0.5) / 8
    # Three in four of 5: a, b, a, b, a, b and a, b in training; a, c, b, c, a, b and a, c held out.
    expected = (2 * 0.5 + 2 * 0.5) + 1 * 0.5
    assert chance_accuracy(task, 8, [5, 5, 5, 6]) == expected / 8


def test_an_answer_or_difficulty_never_seen_in_training_counts_as_missed():
    task = Listed(answers=("aa", "zz"))
    assert constant_answer_accuracy(task, 4) == chance_accuracy(task, 4) == 0


def test_split_words():
    assert problem.split_words(['A said, "b7".', "b7 (1)"]) == tuple(
        sorted(["A", "said", ",", '"', "b7", ".", "(", "1", ")"])
    )
