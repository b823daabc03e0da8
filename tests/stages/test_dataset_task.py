"""Rows of a data set as a task: splits, orders, verdicts."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.stages.dataset_task import DatasetTask
from jaxrl_reason.tasks import Task

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
COLUMNS = {"prompt": "{question} Put the answer in \\boxed{{}}."}
ROWS = [{"question": f"What is {n} + 1?", "answer": f"It is\n#### {n + 1}"} for n in range(200)]


def prompts(task, split, indices):
    return [task.generate(split, i).prompt for i in indices]


def refused(function, *given, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*given, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def task():
    return DatasetTask.load(ROWS, columns=COLUMNS, test_fraction=0.2)


def test_it_is_a_task(task):
    problem = task.generate("train", 3)
    assert problem.prompt.endswith("+ 1? Put the answer in \\boxed{}.")
    n = int(problem.prompt.split()[2])
    assert problem.answer == str(n + 1)
    assert problem.columns["difficulty"] == 0
    assert problem.columns["answer_class"] == problem.answer
    assert problem.columns["question"] == ROWS[n]["question"]
    as_task: Task = task
    assert as_task.name == "dataset"
    assert "no closed vocabulary" in refused(task.words)
    assert "index=-1 is negative" in refused(task.generate, "train", -1)
    assert "split='dev' is unknown" in refused(task.generate, "dev", 0)


def test_splits_share_no_problem_and_have_all(task):
    train = prompts(task, "train", range(task.size("train")))
    test = prompts(task, "test", range(task.size("test")))
    assert 20 <= len(test) <= 60
    assert not set(train) & set(test)
    assert len({*train, *test}) == len(train) + len(test) == 200
    # What a row is decides, not where it stands.
    again = DatasetTask.load(ROWS[::-1], columns=COLUMNS, test_fraction=0.2)
    assert set(prompts(again, "test", range(len(test)))) == set(test)


def test_epochs_have_every_problem_in_another_order(task):
    size = task.size("train")
    epochs = [prompts(task, "train", range(e * size, (e + 1) * size)) for e in (0, 1, 2**30)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    assert prompts(task, "train", range(size)) == epochs[0]
    other = DatasetTask.load(ROWS, columns=COLUMNS, test_fraction=0.2, seed=1)
    assert prompts(other, "train", range(size)) != epochs[0]
    held_out = task.size("test")
    assert prompts(task, "test", [held_out]) == prompts(task, "test", [0])


def test_rows_of_a_test_file_are_not_trained_on():
    held_out = [*ROWS[:2], {"question": "what is  2 + 1?", "answer": "3"}, ROWS[0]]
    task = DatasetTask.load(ROWS[:10], test_source=held_out, columns=COLUMNS)
    assert task.size("train") == 7
    assert task.size("test") == 3
    found = [task.generate("train", i).columns["question"] for i in range(7)]
    assert sorted(found) == [row["question"] for row in ROWS[3:10]]


def test_images_make_problems_different():
    rows = [
        {"prompt": "How many?", "answer": n, "images": [np.full((2, 2, 3), n, np.uint8)]}
        for n in range(40)
    ]
    task = DatasetTask.load(rows, test_fraction=0.5)
    assert task.size("train") + task.size("test") == 40
    problem = task.generate("test", 1)
    assert "images" not in problem.columns
    (image,) = task.record("test", 1).row["images"]
    assert str(image[0, 0, 0]) == problem.answer


def test_conversations_are_shown_by_their_last_turn():
    parts = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    turns = [{"role": "system", "content": "Count."}, {"role": "user", "content": parts}]
    task = DatasetTask.load(
        [{"prompt": turns, "answer": 4, "difficulty": 2}],
        test_source=[{"prompt": "a", "answer": "b"}],
    )
    problem = task.generate("train", 0)
    assert problem.prompt == "How many?"
    assert problem.columns["prompt"] == turns
    assert problem.columns["difficulty"] == 2


@pytest.mark.parametrize(
    ("text", "correct", "formatted", "answer", "reason"),
    [
        (r"It is \boxed{1}", True, True, "1", ""),
        ("<think> 0 + 1 </think> <answer> 1.0 </answer>", True, True, "1.0", ""),
        ("#### 2", False, True, "2", "2 is not 1"),
        ("It is 1", False, False, None, "no final answer; it is read from <answer>"),
        (r"<think> \boxed{1}", False, False, None, "no final answer"),
    ],
)
def test_verdicts(text, correct, formatted, answer, reason):
    task = DatasetTask.load(ROWS[:1], test_source=ROWS[1:2], columns=COLUMNS)
    verdict = task.verify(task.generate("train", 0), text)
    assert (verdict.correct, verdict.formatted, verdict.answer) == (correct, formatted, answer)
    assert verdict.reason.startswith(reason)


def test_an_answer_that_cannot_be_parsed_is_told():
    task = DatasetTask.load(
        [{"prompt": "a", "answer": r"\foo{"}], test_source=[{"prompt": "b", "answer": "1"}]
    )
    verdict = task.verify(task.generate("train", 0), r"\boxed{1}")
    assert (verdict.correct, verdict.formatted) == (False, True)
    assert "cannot be parsed" in verdict.reason


def test_a_process_of_rewards_gets_no_rows(task):
    sent = pickle.dumps(task)
    assert len(sent) < 1000
    problem = task.generate("train", 0)
    right = rf"\boxed{{{problem.answer}}}"
    assert pickle.loads(sent).verify(problem, right) == task.verify(problem, right)


def test_demonstrations_are_the_rows_own():
    rows = [row | {"completion": row["answer"]} for row in ROWS]
    task = DatasetTask.load(rows, columns=COLUMNS)
    problem = task.generate("train", 0)
    assert task.verify(problem, task.trace(problem, "long")).correct
    other = DatasetTask.load(ROWS, columns=COLUMNS)
    assert "no column 'completion'" in refused(other.trace, other.generate("train", 0), "long")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, ":2: no column 'answer'; "),
        ({"prompt": "a", "answer": None}, ":2: column 'answer' is null; it must be str or int"),
        ({"prompt": "a", "answer": " "}, ":2: column 'answer' is empty"),
        ({"prompt": [], "answer": "1"}, ":2: column 'prompt' is empty"),
    ],
)
def test_a_row_without_question_or_answer_is_named(tmp_path, row, expected):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in ({"prompt": "a", "answer": 1}, row)]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert refused(DatasetTask.load, path).startswith(f"{path}{expected}")


def test_a_split_without_rows_is_refused():
    message = refused(DatasetTask.load, ROWS[:3], columns=COLUMNS, test_fraction=0.0)
    assert "none is left for the split 'test'; change test_fraction=0.0" in message
    message = refused(DatasetTask.load, ROWS[:3], test_source=ROWS, columns=COLUMNS)
    assert "none is left for the split 'train'" in message


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not there")
def test_gsm8k_is_a_task():
    columns = {"prompt": "question", "completion": "answer"}
    task = DatasetTask.load(
        GSM8K / "train.jsonl", test_source=GSM8K / "test.jsonl", columns=columns
    )
    assert (task.size("train"), task.size("test")) == (7473, 1319)
    for split in ("train", "test"):
        for index in range(200):
            problem = task.generate(split, index)
            assert task.verify(problem, task.trace(problem, "long")).correct
            wrong = task.verify(problem, f"#### {problem.answer}7")
            assert (wrong.correct, wrong.formatted) == (False, True)
