"""Coloured shapes: answers recounted from the pixels."""

import collections
import hashlib
import re
import time

import pytest

from jaxrl_reason.tasks import Shapes, constant_answer_accuracy, media_of
from jaxrl_reason.tasks.problem import write_completion

EVERY = {
    "colours": ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white"),
    "shapes": ("circle", "square", "triangle", "cross", "diamond"),
}
TASK = Shapes()
KINDS = ("count", "compare", "locate")
LOOK = r"([a-z]+) ([a-z]+)"


def image_of(task, problem):
    (image,) = media_of(task, problem).images
    return image


def fitting(words, scene):
    """The blobs that `red circles`, `red shapes` or `circles` means."""
    *colour, shape = words.split()
    shape = "cross" if shape in ("cross", "crosses") else shape.removesuffix("s")
    return [
        blob
        for blob in scene
        if shape in ("shape", blob.shape) and (not colour or colour[0] == blob.colour)
    ]


def recount(pixels, prompt, scene, size):
    """The answer to a prompt from what is seen; asserts that it is beyond doubt."""
    if match := re.fullmatch(r"How many (.+) are there\?", prompt):
        return str(len(fitting(match[1], scene)))
    if match := re.fullmatch(
        r"Are there more (.+) than (.+)\? Answer more, fewer or equal\.", prompt
    ):
        first, second = (fitting(words, scene) for words in match.groups())
        assert first or second
        assert not set(first) & set(second)
        return "more" if len(first) > len(second) else ("equal", "fewer")[len(first) < len(second)]
    if match := re.fullmatch(rf"In which quarter is the {LOOK}: top left, .*\?", prompt):
        (blob,) = fitting(" ".join(match.groups()), scene)
        return pixels.quarter(blob, size)
    if match := re.fullmatch(r"Where is the (.+) as seen from the (.+): left, .*\?", prompt):
        (first,), (second,) = (fitting(words, scene) for words in match.groups())
        across, down = first.x - second.x, first.y - second.y
        assert max(abs(across), abs(down)) >= 2 * min(abs(across), abs(down))
        if abs(across) > abs(down):
            return "left" if across < 0 else "right"
        return "above" if down < 0 else "below"
    edge = re.fullmatch(r"Which shape is closest to the (\w+) edge\? .*", prompt)[1]
    place = ("left", "right", "top", "bottom").index(edge)
    sign = -1 if edge in ("right", "bottom") else 1
    first, second, *_ = sorted(scene, key=lambda blob: sign * blob.box[place])
    assert sign * (second.box[place] - first.box[place]) >= size // 16
    assert len(fitting(first.name, scene)) == 1
    return first.name


@pytest.mark.parametrize("size", [32, 64, 100])
def test_answers_are_those_of_the_pixels(pixels, size):
    task = Shapes(canvas_size=size, **EVERY)
    for index in range(90):
        problem = task.generate("train", index, 2 + index % 9)
        image = image_of(task, problem)
        assert (image.shape, image.dtype) == ((size, size, 3), "uint8")
        scene = pixels.blobs(image)
        assert len(scene) == problem.columns["difficulty"]
        assert recount(pixels, problem.prompt, scene, size) == problem.answer
        drawn = sorted((f"{f[0]} {f[1]}", *f[3:]) for f in problem.columns["figures"])
        assert drawn == sorted((blob.name, blob.x, blob.y) for blob in scene)


def test_shapes_keep_their_distance_and_stay_on_the_canvas(pixels):
    for index in range(150):
        scene = pixels.blobs(image_of(TASK, TASK.generate("train", index, 2 + index % 9)))
        for number, blob in enumerate(scene):
            assert min(blob.box) >= 1
            assert max(blob.box) <= 62
            assert not any(pixels.near(blob, other, 2) for other in scene[:number])


def test_all_colours_shapes_and_forms_come_up():
    seen, forms = set(), collections.Counter()
    task = Shapes(**EVERY)
    for index in range(600):
        problem = task.generate("train", index)
        forms[problem.columns["question"]["form"]] += 1
        seen |= {tuple(figure[:2]) for figure in problem.columns["figures"]}
    assert len(seen) == 40
    kinds = [forms["count"], forms["compare"], forms["quarter"] + forms["side"] + forms["edge"]]
    # Standard deviation 11.5.
    assert all(abs(number - 200) < 50 for number in kinds)
    assert min(forms.values()) > 40


def scene_key(pixels, image):
    """Looks and rough places, in any size: what must not be in both splits."""
    size = len(image)
    return tuple(
        sorted((b.name, int(4 * b.x / size), int(4 * b.y / size)) for b in pixels.blobs(image))
    )


def test_no_scene_is_in_both_splits(pixels):
    few = {"colours": ("red", "green", "blue"), "shapes": ("circle", "square", "cross")}
    keys = {"train": set(), "test": set()}
    for size, seed in ((32, 0), (40, 1)):
        task = Shapes(canvas_size=size, seed=seed, min_shapes=2, max_shapes=2, **few)
        for split, number in (("train", 1000), ("test", 200)):
            problems = [task.generate(split, index) for index in range(number)]
            keys[split] |= {scene_key(pixels, image_of(task, problem)) for problem in problems}
    assert not keys["train"] & keys["test"]
    # There are 10,000 scenes or so: had they no split of their own, 400 would share many with 2000.
    assert len(keys["train"]) < 1950
    assert len(keys["test"]) > 300


def test_test_problems_are_distinct(pixels):
    entries = [TASK.generate("test", index, 2) for index in range(300)]
    keys = {(scene_key(pixels, image_of(TASK, entry)), entry.prompt) for entry in entries}
    assert len(keys) == 300


def test_long_traces_see_what_is_there(pixels):
    for index in range(150):
        problem = TASK.generate("train", index)
        scene = pixels.blobs(image_of(TASK, problem))
        thought = TASK.trace(problem, "long").split("<think> see ")[1].split("</think>")[0]
        count = problem.columns["difficulty"]
        seen = thought.split(" ; ")[:count]
        tenths = lambda value: int(10 * value / 64)
        assert sorted(seen) == sorted(f"{b.name} {tenths(b.x)} {tenths(b.y)}" for b in scene)
        for kind, steps in re.findall(r"count ([a-z ]+) : (.*?) ; (?=count|so|\d)", thought):
            steps = steps.split(" ; ")
            fits = {blob.name for blob in fitting(kind, scene)}
            assert len(steps) == count
            told = [step.split(" yes ") for step in steps if " yes " in step]
            assert [name for name, _ in told] == [
                name for name in (" ".join(step.split()[:2]) for step in steps) if name in fits
            ]
            assert [int(number) for _, number in told] == list(range(1, len(told) + 1))
            assert len(told) == len(fitting(kind, scene))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_balanced(kind):
    task = Shapes(questions=(kind,))
    answers = collections.defaultdict(collections.Counter)
    for index in range(1200):
        problem = task.generate("train", index)
        answers[problem.columns["question"]["form"]][problem.answer] += 1
    for form, counts in answers.items():
        share = max(counts.values()) / sum(counts.values())
        # A count from 0 to 3 ... 6, one of three, one of four, one of 24.
        bound = {"count": 0.27, "compare": 0.4, "quarter": 0.34, "side": 0.34, "edge": 0.12}[form]
        assert share < bound, (form, counts)


def test_constant_answers():
    found = {kind: constant_answer_accuracy(Shapes(questions=(kind,)), 250) for kind in KINDS}
    # Expected: (1/4 + 1/5 + 1/6 + 1/7) / 4 = 0.19, 1/3, 1/12 or a little more.
    assert 0.1 < found["count"] < 0.29
    assert 0.22 < found["compare"] < 0.44
    assert 0.03 < found["locate"] < 0.17


def problem_of(form):
    for index in range(1000):
        problem = TASK.generate("train", index)
        if problem.columns["question"]["form"] == form:
            return problem
    raise AssertionError(form)


@pytest.mark.parametrize(
    ("form", "other", "unusable"),
    [
        ("count", "99", "two"),
        ("count", "7", "-1"),
        ("compare", None, "most"),
        ("quarter", None, "left"),
        ("side", None, "top"),
        ("edge", "orange diamond", "diamond"),
        ("edge", None, "pink circle"),
    ],
)
def test_what_an_answer_may_look_like(form, other, unusable):
    problem = problem_of(form)
    judge = lambda answer: TASK.verify(problem, write_completion("because", answer))
    for text in (problem.answer, f"  {problem.answer.upper()} ", f"{problem.answer}."):
        assert judge(text).correct
        assert judge(text).score == 1.0
    if form == "edge":
        assert judge(f"The {problem.answer}").correct
    if other is not None:
        verdict = judge(other)
        assert (verdict.correct, verdict.score, verdict.answer) == (False, 0.0, other)
        assert problem.answer in verdict.reason
    verdict = judge(unusable)
    assert (verdict.correct, verdict.formatted, verdict.answer) == (False, True, None)


def test_a_kind_named_twice_comes_twice_as_often():
    task = Shapes(questions=("count", "count", "locate"))
    kinds = [task.generate("train", index).columns["kind"] for index in range(600)]
    # Standard deviation 11.5.
    assert abs(kinds.count("count") - 400) < 50


def test_rendering_is_fast():
    problems = [TASK.generate("train", index) for index in range(100)]
    start = time.process_time()
    for problem in problems:
        TASK.media(problem)
    assert time.process_time() - start < 0.5  # 5 ms an image; alone on a core it takes 0.05 ms


def test_a_known_problem():
    """A stream and its pixels written down once: they must not change between releases."""
    problem = Shapes().generate("train", 1, 3)
    digest = hashlib.sha256(image_of(TASK, problem).tobytes()).hexdigest()
    assert problem.prompt == (
        "Are there more purple shapes than green shapes? Answer more, fewer or equal."
    )
    assert problem.columns["figures"] == [
        ["blue", "circle", 6, 49, 14],
        ["purple", "circle", 8, 25, 25],
        ["red", "triangle", 6, 35, 46],
    ]
    assert digest[:12] == "4df3223402be"
