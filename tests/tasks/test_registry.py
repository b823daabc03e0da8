"""What must hold for every task."""

import dataclasses
import itertools
import json
import re

import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.tasks import TASKS, Problem, VisualTask, make_task, media_of, problem

OPTIONS = {
    "arithmetic": {},
    "countdown": {},
    "knights_knaves": {"min_people": 3, "max_people": 4},
    "shapes": {},
    # So that only the expected interval is correct, as with the answers of the other tasks.
    "moving_shapes": {"min_iou": 1.0},
}
STYLES = ("long", "short", "answer")
TAG = r"</?\w+>|\[\w+\]"


def seen(task, entry):
    """The pixels of a problem."""
    media = media_of(task, entry)
    arrays = (*media.images, *(video.frames for video in media.videos))
    return b"".join(array.tobytes() for array in arrays)


@pytest.fixture(params=sorted(TASKS))
def task(request):
    return make_task(request.param, OPTIONS[request.param])


def test_every_task_is_covered_here():
    assert set(OPTIONS) == set(TASKS)
    assert all(make_task(name, {}).name == name for name in TASKS)


def test_generation_is_deterministic(task):
    for split in ("train", "test"):
        first = [task.generate(split, index) for index in range(20)]
        problem._test_block.cache_clear()
        again = [type(task)(**dataclasses.asdict(task)).generate(split, i) for i in range(20)]
        assert first == again
        assert len({(entry.prompt, seen(task, entry)) for entry in first}) == 20
    other = dataclasses.replace(task, seed=1)
    assert other.generate("train", 0) != task.generate("train", 0)


def test_difficulty_is_obeyed_and_mixed(task):
    mixed = {task.generate("train", index).columns["difficulty"] for index in range(60)}
    assert mixed == set(task.difficulties())
    for difficulty in (*task.difficulties(), max(task.difficulties()) + 1):
        assert task.generate("test", 0, difficulty).columns["difficulty"] == difficulty
    for difficulty in (0, 99, 2.0, True):
        with pytest.raises(InputError, match="difficulty="):
            task.generate("train", 0, difficulty)


def test_traces_verify(task):
    for index in range(150):
        entry = task.generate("train", index)
        for style in STYLES:
            text = task.trace(entry, style)
            verdict = task.verify(entry, text)
            assert verdict.correct, (entry, text, verdict)
            assert verdict.formatted
            assert verdict.answer == re.search(r"<answer> (.*) </answer>", text, re.S).group(1)
            assert text == task.trace(entry, style)
        assert task.verify(entry, problem.write_completion("", entry.answer)).correct
        assert task.trace(entry, "answer").startswith("<think> </think>")
    with pytest.raises(InputError, match="style="):
        task.trace(entry, "medium")


def test_long_traces_back_track_and_lengths_are_ordered(task):
    words = {
        "arithmetic": "wait",
        "countdown": "back to",
        "knights_knaves": "return to",
        "shapes": " no ;",
        "moving_shapes": " no ;",
    }
    entries = [task.generate("train", index) for index in range(200)]
    long, short = ([task.trace(entry, style) for entry in entries] for style in STYLES[:2])
    share = sum(words[task.name] in text for text in long) / 200
    assert 0.2 < share < 0.9
    assert not any(words[task.name] in text for text in short)
    assert sum(map(len, long)) > 1.5 * sum(map(len, short))


def test_wrong_answers_and_broken_formats_are_not_correct(task):
    entries = [task.generate("train", index) for index in range(60)]
    for entry, other in itertools.pairwise(entries):
        text = task.trace(entry, "short")
        if entry.answer != other.answer:
            wrong = problem.write_completion("", other.answer)
            verdict = task.verify(entry, wrong)
            assert not verdict.correct
            assert verdict.formatted
            assert verdict.reason
        for broken in (
            entry.answer,
            text + " .",
            text.replace("<think> ", ""),
            text.replace(" </answer>", ""),
            text + text,
            "so " + text,
            text.replace("</think>", "</think> so"),
        ):
            verdict = task.verify(entry, broken)
            assert not verdict.correct
            assert not verdict.formatted
            assert verdict.answer is None
        unusable = task.verify(entry, problem.write_completion("", "who knows"))
        assert (unusable.formatted, unusable.correct, unusable.answer) == (True, False, None)


def test_media_are_the_same_bits_and_only_of_visual_tasks(task):
    for index in range(5):
        entry = task.generate("test", index)
        read = Problem(**json.loads(json.dumps(dataclasses.asdict(entry))))
        assert seen(task, read) == seen(task, entry)
        assert bool(seen(task, entry)) == isinstance(task, VisualTask)
        assert isinstance(task, VisualTask) == (task.name in ("shapes", "moving_shapes"))


def test_problems_survive_json(task):
    for index in range(20):
        entry = task.generate("test", index)
        read = Problem(**json.loads(json.dumps(dataclasses.asdict(entry))))
        assert read == entry
        for style in STYLES:
            assert task.trace(read, style) == task.trace(entry, style)
        assert task.verify(read, task.trace(entry, "long")).correct


def test_words_cover_prompts_and_traces(task):
    known = set(task.words())
    assert len(known) == len(task.words())
    for index in range(300):
        entry = task.generate("train", index)
        texts = [entry.prompt, *(task.trace(entry, style) for style in STYLES)]
        tags = set(re.findall(TAG, " ".join(texts)))
        assert tags - {"<think>", "</think>", "<answer>", "</answer>"} <= known
        plain = [re.sub(TAG, "", text) for text in texts]
        assert set(problem.split_words(plain)) <= known


def test_unknown_names_are_errors():
    with pytest.raises(InputError, match=r"task 'countdwn' is unknown; did you mean 'countdown'"):
        make_task("countdwn", {})
    with pytest.raises(InputError, match=r"option 'min_step' .* did you mean 'min_steps'"):
        make_task("arithmetic", {"min_step": 2})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("arithmetic", "modulus", 2),
        ("arithmetic", "modulus", 23.0),
        ("arithmetic", "modulus", "23"),
        ("arithmetic", "min_steps", 0),
        ("arithmetic", "max_steps", 1),
        ("arithmetic", "max_steps", 8),
        ("arithmetic", "max_constant", 23),
        ("arithmetic", "slip_rate", 1.5),
        ("arithmetic", "operations", ["+", "^"]),
        ("arithmetic", "operations", []),
        ("arithmetic", "operations", "+"),
        ("arithmetic", "seed", -1),
        ("arithmetic", "seed", True),
        ("countdown", "min_numbers", 1),
        ("countdown", "max_numbers", 7),
        ("countdown", "largest", 201),
        ("countdown", "max_target", 201),
        ("countdown", "min_target", 100),
        ("countdown", "search_width", 1),
        ("countdown", "use_all", "yes"),
        ("countdown", "test_fraction", 0.0),
        ("knights_knaves", "min_people", 1),
        ("knights_knaves", "max_people", 9),
        ("knights_knaves", "max_people", 2),
        ("knights_knaves", "test_fraction", None),
        ("shapes", "min_shapes", 1),
        ("shapes", "max_shapes", 11),
        ("shapes", "canvas_size", 28),
        ("shapes", "canvas_size", 66),
        ("shapes", "colours", ["red", "green"]),
        ("shapes", "colours", ["red", "green", "pink"]),
        ("shapes", "colours", ["red", "green", "blue", "red"]),
        ("shapes", "shapes", ["circle", "square", "star"]),
        ("shapes", "questions", []),
        ("shapes", "questions", ["interval"]),
        ("shapes", "test_fraction", 0),
        ("moving_shapes", "max_shapes", 7),
        ("moving_shapes", "frames", 11),
        ("moving_shapes", "fps", 3),
        ("moving_shapes", "fps", True),
        ("moving_shapes", "canvas_size", 1024),
        ("moving_shapes", "shapes", ["circle"]),
        ("moving_shapes", "questions", "cause"),
        ("moving_shapes", "min_iou", 0.0),
    ],
)
def test_bad_options_are_errors_that_name_them(name, option, value):
    with pytest.raises(InputError, match=f"{option}="):
        make_task(name, {option: value})


def test_lists_become_tuples():
    task = make_task("arithmetic", {"operations": ["+"]})
    assert " * " not in task.generate("test", 0).prompt
