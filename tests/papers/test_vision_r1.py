"""What Vision-R1 adds: over-thinking traces, rewards, measures, and the bridging to text."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from jaxrl_reason.config import load_yaml
from jaxrl_reason.errors import InputError
from jaxrl_reason.papers import vision_r1, vision_r1_bridging, vision_r1_scene
from jaxrl_reason.rewards import accuracy
from jaxrl_reason.tasks import ModularArithmetic, Problem, Verdict, make_task
from jaxrl_reason.tasks.problem import split_words

RUN = load_yaml(Path(__file__).parents[2] / "configs/papers/vision_r1/small.yaml")["run"]
TASK = ModularArithmetic(**RUN["task"]["options"])
PROBLEMS = [TASK.generate("train", i) for i in range(4000)]
DETOURS = RUN["stages"]["ci"]["data"]["options"]
SHAPES = make_task("shapes", {})
SCENES = [SHAPES.generate("train", i) for i in range(300)]
RIGHT = Verdict(correct=True, formatted=True, answer="4", reason="right")
WRONG = Verdict(correct=False, formatted=True, answer="5", reason="expected 4")
TAGS = {"<think>", "</think>", "<answer>", "</answer>"}


def detours(seed: int = 0, **changes) -> list[str]:
    rng = random.Random(seed)
    rows = list(vision_r1.detour_traces(TASK, PROBLEMS, rng, **{**DETOURS, **changes}))
    assert [row["problem"] for row in rows] == list(range(len(PROBLEMS)))
    return [row["completion"] for row in rows]


TRACES = detours()
LENGTHS = np.array([len(text.split()) + 1 for text in TRACES])
LEVELS = np.array([problem.columns["difficulty"] for problem in PROBLEMS])


# Data


def test_traces_with_detours_are_right_and_begin_with_the_derivation():
    known = {*TASK.words(), *RUN["words"], *TAGS}
    for problem, text in zip(PROBLEMS, TRACES, strict=True):
        assert TASK.verify(problem, text).correct
        assert set(text.split()) <= known
        own = re.findall(r"\w = \d [-+*] \d = \d", TASK.trace(problem, "short"))
        places = [text.index(step) for step in own]
        assert places == sorted(places)


def test_a_wrong_computation_of_a_detour_is_taken_back():
    wrong = checked = 0
    for text in TRACES:
        for left, sign, right, value, then in re.findall(
            r"(\d) ([-+*]) (\d) = (\d) (ok ;|; \w+|;)", text
        ):
            checked += 1
            if eval(f"({left} {sign} {right}) % 10") != int(value):
                wrong += 1
                assert then == "; no"
    assert 0.02 < wrong / checked < 0.2


def test_detours_are_long_tailed_and_no_more_on_hard_problems():
    extra = LENGTHS - np.where(LEVELS == 2, 22, 30)
    is_easy = LEVELS == 2
    assert extra[is_easy].mean() == pytest.approx(extra[~is_easy].mean(), rel=0.1)
    assert np.median(extra) < 0.75 * extra.mean()
    assert LENGTHS.max() == DETOURS["max_tokens"] + 1
    # What the configuration says of them.
    assert LENGTHS.mean() == pytest.approx(76, abs=2)
    assert (LENGTHS > 64).mean() == pytest.approx(0.46, abs=0.02)
    assert (LENGTHS > 128).mean() == pytest.approx(0.13, abs=0.02)
    for difficulty, bounds in vision_r1.QUARTILES.items():
        lengths = LENGTHS[np.equal(LEVELS, difficulty)]
        below = [(lengths < bound).mean() for bound in bounds]
        assert below == pytest.approx([0.25, 0.5, 0.75], abs=0.05)


def test_options_of_detours():
    assert detours() == TRACES
    assert detours(seed=1) != TRACES
    assert "mistake" not in " ".join(detours(mistake_rate=0.0))
    assert np.mean([len(t.split()) for t in detours(mean_detours=1)]) < 0.7 * LENGTHS.mean()
    assert max(len(t.split()) for t in detours(max_tokens=60)) <= 60
    with pytest.raises(InputError, match=r"mean_detours=0 and spread=1.0 must be above 0"):
        detours(mean_detours=0)
    with pytest.raises(InputError, match=r"mistake_rate=2 must be a number from 0.0 to 1.0"):
        detours(mistake_rate=2)
    with pytest.raises(InputError, match="task 'shapes' has no steps such as"):
        list(vision_r1.detour_traces(SHAPES, SCENES, random.Random(0), **DETOURS))


def test_brief_traces_have_mixed_layouts():
    rows = vision_r1.brief_traces(TASK, PROBLEMS, random.Random(0), formatted=0.6)
    texts = [row["completion"] for row in rows]
    kinds = [("<think>" in text, "<answer>" in text) for text in texts]
    shares = [
        kinds.count(kind) / len(kinds) for kind in ((True, True), (False, True), (False,) * 2)
    ]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.03)
    untagged = [[word for word in text.split() if word not in TAGS] for text in texts]
    for problem, text, words in zip(PROBLEMS, texts, untagged, strict=True):
        assert TASK.verify(problem, text).correct == ("<think>" in text)
        assert words[-1] == problem.answer


# Rewards

LAID_OUT = "<think> a = 4 ; </think> <answer> 4 </answer>"
CASES = [
    # text, verdict, hard, stated
    (LAID_OUT, RIGHT, 1.0, 1.0),
    ("<think>\na</think><answer>4</answer>", RIGHT, 1.0, 1.0),
    (LAID_OUT.replace("4 </answer>", "5 </answer>"), WRONG, 0.0, 0.0),
    # Verifiers of data sets read an answer without a layout.
    ("a = 4 ; <answer> 4 </answer>", RIGHT, 0.0, 1.0),
    (LAID_OUT + " so", RIGHT, 0.0, 1.0),
    ("<think> a = 4 ;", WRONG, 0.0, 0.0),
    ("a = 4 ; 4", WRONG, 0.0, 0.0),
]


@pytest.mark.parametrize(("text", "verdict", "hard", "stated"), CASES)
def test_rewards(text, verdict, hard, stated):
    given = {"verdict": [verdict], "answer": ["4"]}
    assert vision_r1.formatted_result(["?"], [text], **given) == [hard]
    assert vision_r1.stated_result(["?"], [text], **given) == [stated]


def test_accuracy_of_the_library_is_gated_and_the_stated_result_is_not():
    problem = PROBLEMS[0]
    text = f"<answer> {problem.answer} </answer>"
    given = {"verdict": [TASK.verify(problem, text)], "answer": [problem.answer]}
    assert accuracy(["?"], [text], **given) == [0.0]
    assert vision_r1.formatted_result(["?"], [text], **given) == [0.0]
    assert vision_r1.stated_result(["?"], [text], **given) == [1.0]


# Measures


def test_measures_of_a_completion():
    problem = PROBLEMS[0]
    assert vision_r1.valid_but_wrong(problem, LAID_OUT, WRONG, 10) is True
    assert vision_r1.valid_but_wrong(problem, LAID_OUT, RIGHT, 10) is False
    assert vision_r1.valid_but_wrong(problem, "<think> a", WRONG, 10) is False
    text = "<think> Wait ; check a = 4 ok ; mistaken ; hmm </think>"
    assert vision_r1.reflections(problem, text, RIGHT, 10) == 3.0
    sizes = (vision_r1.tokens, vision_r1.squared_tokens, vision_r1.right_tokens)
    assert [size(problem, LAID_OUT, RIGHT, 10) for size in sizes] == [10, 100, 10]
    assert [size(problem, LAID_OUT, WRONG, 10) for size in sizes] == [10, 100, 0]


@pytest.mark.parametrize("difficulty", [2, 3])
def test_every_length_is_in_one_quarter(difficulty):
    problem = next(p for p in PROBLEMS if p.columns["difficulty"] == difficulty)
    bounds = vision_r1.QUARTILES[difficulty]
    for length, quarter in [(1, 1), (bounds[0] - 1, 1), (bounds[0], 2), (bounds[2], 4), (256, 4)]:
        found = [
            getattr(vision_r1, f"right_in_quarter_{k}")(problem, LAID_OUT, RIGHT, length)
            for k in (1, 2, 3, 4)
        ]
        assert found == [True if k == quarter else None for k in (1, 2, 3, 4)]


def records_of(correct: np.ndarray, lengths: np.ndarray, difficulty: np.ndarray) -> dict:
    """The record of a stage, as the evaluation makes it."""
    here = {str(d): difficulty == d for d in np.unique(difficulty)}
    mean = lambda values: {d: float(f"{values[m].mean():.6g}") for d, m in here.items()}
    measures = {
        "tokens": mean(lengths),
        "squared_tokens": mean(lengths**2),
        "right_tokens": mean(lengths * correct),
    }
    return {"ci": {"measures_by_difficulty": measures, "accuracy_by_difficulty": mean(correct)}}


def test_slope_is_that_of_a_regression_within_difficulties():
    rng = np.random.default_rng(0)
    difficulty = np.repeat([2, 3], 500)
    lengths = np.floor(rng.lognormal(3.5, 0.6, 1000)) + 40 * (difficulty == 3)
    centred = lengths - np.where(
        difficulty == 2, *(lengths[difficulty == d].mean() for d in (2, 3))
    )
    correct = (rng.random(1000) < 0.8 - 0.1 * centred / centred.std()).astype(float)
    slope = vision_r1.length_slope(records_of(correct, lengths, difficulty), "ci")
    line = np.polyfit(centred, correct - correct.mean(), 1)[0] * centred.std()
    assert slope == pytest.approx(line, abs=0.002)
    assert -0.14 < slope < -0.06


def test_slope_is_0_where_all_are_equal():
    same = np.full(10, 256.0)
    assert vision_r1.length_slope(records_of(np.eye(10)[0], same, np.full(10, 3)), "ci") == 0.0


def test_metrics_of_an_experiment():
    records = {
        "ci": {"measures": {"right_in_quarter_1": 0.75, "right_in_quarter_2": 0.5}},
        "long": {"accuracy": 0.5},
        "short": {"accuracy": 0.75},
        "ptst": {"accuracy": 0.75, "train": {"cut": [0.5, None, 0.25, 0.25, 0.0, 0.25]}},
    }
    assert vision_r1.accuracy_drop(records, "ci", quarter=1) == 0.25
    recovery = lambda stage: vision_r1.recovery(records, stage, start="long", end="ptst", share=0.5)
    assert [recovery(stage) for stage in ("long", "short")] == [-0.125, 0.125]
    assert vision_r1.training_fall(records, "ptst", series="cut", steps=2) == 0.25


# Bridging


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ("<think> two and one </think> <answer> 3 </answer>", None),
        ("<think> The final answer is 3. So: </think> <answer> Final Answer: 3 </answer>", None),
        (r"The final answer is \boxed{3} <answer>3</answer>", None),
        ("the final answer: 2 ; no, <answer> 3 </answer>", "two answers"),
        ("The final answer is 3.5. <answer> 3 </answer>", "two answers"),
        ("I cannot see the image <answer> 3 </answer>", "unseen"),
        ("Since the picture is not provided <answer> 3 </answer>", "unseen"),
        ("there is no image <answer> 3 </answer>", "unseen"),
        ("the image has no red circle and is not symmetric <answer> 3 </answer>", None),
        ('It reads "Two cubes and a ball" here <answer> 3 </answer>', "quotes"),
        ('the "two cubes" of the left <answer> 3 </answer>', None),
        ('"We count cubes, not balls" <answer> 3 </answer>', None),
    ],
)
def test_faults(trace, expected):
    description = "There are two cubes and a ball. The ball is red."
    assert vision_r1_bridging.fault(trace, description) == expected


def test_words_are_replaced_in_the_thought():
    text = "Description: it says so, essays aside; the description <answer> says </answer>"
    expected = "Image: it displays so, essays aside; the image <answer> says </answer>"
    assert vision_r1_bridging.substitute(text, vision_r1_bridging.SUBSTITUTIONS) == expected


def bridged(passes: int, detail: float = 0.5) -> list[vision_r1_bridging.Bridged]:
    teacher = vision_r1_scene.SceneTeacher(task=SHAPES, rng=random.Random(0), detail=detail)
    return list(vision_r1_bridging.bridge(SHAPES, SCENES, teacher, passes=passes))


def test_the_solver_of_scenes_needs_what_the_question_is_about():
    assert {found.fault for found in bridged(1, detail=1.0)} == {None}
    assert {found.fault for found in bridged(2, detail=0.0)} == {None}
    blind = [found.fault for found in bridged(1)]
    assert set(blind) == {None, "wrong", "unseen"}
    assert 0.3 < blind.count(None) / len(blind) < 0.6


def test_a_description_after_a_draft_leaves_figures_out_that_do_not_count():
    teacher = vision_r1_scene.SceneTeacher(task=SHAPES, rng=random.Random(0), detail=0.0)
    asked = [p for p in SCENES if p.columns["kind"] == "count" and p.answer not in "0"]
    told = teacher.describe(asked, teacher.draft(asked))
    assert [str(len(facts.split(" ; "))) for facts in told] == [p.answer for p in asked]


def test_bridged_rows_are_kept_traces_as_if_the_image_was_seen():
    known = {*SHAPES.words(), "image", "displays", *TAGS}
    rows = {
        passes: list(
            vision_r1_bridging.bridged_rows(
                SHAPES, SCENES, random.Random(0), passes=passes, options={"detail": 0.5}
            )
        )
        for passes in (1, 2)
    }
    kept = [number for number, found in enumerate(bridged(1)) if found.fault is None]
    assert [row["problem"] for row in rows[1]] == kept
    assert len(rows[2]) == len(SCENES)
    for row in rows[1] + rows[2]:
        assert SHAPES.verify(SCENES[row["problem"]], row["completion"]).correct
        assert row["completion"].startswith("<think> the image displays ")
        assert {*split_words([re.sub("<.*?>", "", row["completion"])])} <= known


def test_keep_rates_are_shares_of_all_scenes():
    options = {"problems": 200, "detail": 0.5}
    one, two = (vision_r1_scene.keep_rate({}, "ci", passes=p, **options) for p in (1, 2))
    fates = vision_r1_scene.fates(passes=1, **options)
    assert sum(fates.values()) == pytest.approx(1)
    assert (one, two) == (fates["kept"], 1.0)
    assert vision_r1_scene.keep_gain({}, "ci", **options) == pytest.approx(two - one)


def test_other_passes_and_tasks_are_refused():
    with pytest.raises(InputError, match="passes=3 must be 1"):
        bridged(3)
    with pytest.raises(InputError, match="got 'arithmetic'"):
        vision_r1_scene.SceneTeacher(task=TASK, rng=random.Random(0))


ASKED: list[str] = []


def see(prompts: list[str], problems: list[Problem]) -> list[str]:
    ASKED.extend(prompts)
    return [f"two cubes ({number})" for number in range(len(problems))]


def think(prompts: list[str]) -> list[str]:
    ASKED.extend(prompts)
    return ["<think> The description says so. </think> <answer> 4 </answer>" for _ in prompts]


def test_models_are_asked_in_passes():
    ASKED.clear()
    problem = Problem(prompt="How many {cubes}?", answer="4", columns=PROBLEMS[0].columns)
    where = {"see": f"{__name__}:see", "think": f"{__name__}:think"}
    rows = vision_r1_bridging.bridged_rows(
        TASK,
        [problem],
        random.Random(0),
        passes=2,
        teacher="jaxrl_reason.papers.vision_r1_bridging:PromptedTeacher",
        options=where,
    )
    expected = "<think> The image displays so. </think> <answer> 4 </answer>"
    assert list(rows) == [{"problem": 0, "completion": expected}]
    draft, describe, reason = ASKED
    assert all(part in draft for part in ("How many {cubes}?", "answer is: 4"))
    assert "two cubes (0)" in describe
    assert "described: two cubes (0)" in reason
    assert "4" not in describe + reason
