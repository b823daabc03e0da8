"""Factum (arXiv 2604.04415): facts about a video first, then a thought about the facts alone.

    facts     <- SFT: what happens, as a block of records
    format    <- SFT on a few short responses: facts, thought, answer
    thinking  <- SFT: facts, a thought that searches and checks them, answer
    P-FAB     <- RL with four rewards, balanced by the shortest vector in their convex hull

Balancing is the library's (`objectives`, stage kind `morl`). Here are the responses, the data of
the stages, and the same films as a log of changes, frame by frame, for a model of text. Rewards and
what is measured are in `factum_rewards`, the recipe in `configs/papers/factum/`.
"""

import dataclasses
import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_reason.errors import InputError
from jaxrl_reason.tasks import Problem, Task, Verdict, write_completion
from jaxrl_reason.tasks import moving_shapes_questions as questions
from jaxrl_reason.tasks.facts import Fact, write_facts
from jaxrl_reason.tasks.intervals import write_seconds
from jaxrl_reason.tasks.moving_shapes import MovingShapes
from jaxrl_reason.tasks.problem import Split, Style, check_rate, split_words

FIELDS = ("time", "object", "action", "cause")
"""Fields of a record in a response; those of a film also have a scene."""
PUBLISHED = ("time", "person", "human_action", "scene", "object", "camera", "casual_event_caption")
"""Fields of the paper, whose spelling this is."""
_EVENTS = ("moves", "hits", "turns", "appears", "disappears")
_TAGS = ("<facts>", "</facts>", "<think>", "</think>", "<answer>", "</answer>")
_RESPONSE = re.compile(
    r"\s*(<facts>.*?</facts>)?\s*(?:<think>(.*?)</think>)?\s*<answer>(.*?)</answer>\s*", re.DOTALL
)


# Responses


class Response(NamedTuple):
    """A response taken apart; None for a part that is not there."""

    facts: str | None
    thought: str | None
    answer: str


def read_response(text: str) -> Response | None:
    """Facts, thought and answer in this order; None if there is no answer or anything else.

    Facts and thought may be missing: which ones must be there is up to a reward.
    """
    match = _RESPONSE.fullmatch(text)
    if match is None or any(text.count(tag) > 1 for tag in _TAGS):
        return None
    return Response(*match.groups())


def events(facts: Sequence[Fact]) -> list[Fact]:
    """The facts that a response has: those of what happens, not of what rests or stops."""
    return [fact for fact in facts if fact.verb in _EVENTS]


# Tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactsFirst(MovingShapes):
    """Films whose questions are answered by facts, a thought and an answer; see `MovingShapes`."""

    def trace(self, problem: Problem, style: Style) -> str:
        """Facts, a long or a short thought, and the answer; or the answer alone."""
        if style == "answer":
            return super().trace(problem, style)
        return write_response(self, problem, facts=True, thought=style)

    def verify(self, problem: Problem, text: str) -> Verdict:
        """As for `MovingShapes`, with or without facts and a thought before the answer."""
        response = read_response(text)
        if response is None:
            return super().verify(problem, "")
        return super().verify(problem, write_completion("", response.answer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EventLog:
    """The same questions for a model of text: a log says what changes in each frame.

    A move is in the log once for each frame, a touch stands beside what happens at the same time,
    with or because of it. Intervals, the hits and the causes have to be put together from that.

        0 red square top left , blue circle top right ; 3 red square right ; 4 red square right ;
        5 red square touches blue circle , red square stops top right , blue circle green
    """

    seed: int = 0
    """Seed of the streams of problems; the split of a problem does not depend on it."""
    min_shapes: int = 2
    """Fewest shapes when difficulties are mixed."""
    max_shapes: int = 2
    """Most shapes when difficulties are mixed."""
    frames: int = 12
    """Frames of a film, one a second."""
    colours: tuple[str, ...] = ("red", "green", "blue")
    """Colours to draw from."""
    shapes: tuple[str, ...] = ("circle", "square", "triangle")
    """Shapes to draw from."""
    questions: tuple[str, ...] = (*["interval"] * 8, *["spatial"] * 4, *["cause"] * 3)
    """Kinds of questions, as in `MovingShapes`; a third of the spatial ones are about places."""
    test_fraction: float = 0.1
    """Share of all openings that is held out."""

    name = "event_log"

    def __post_init__(self) -> None:
        """Check ranges."""
        _ = self.film

    @functools.cached_property
    def film(self) -> FactsFirst:
        """The task of videos."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return FactsFirst(**options, canvas_size=32)

    def generate(self, split: Split, index: int, difficulty: int | None = None) -> Problem:
        """The question of that number about a film, behind the log of the film."""
        problem = self.film.generate(split, index, difficulty)
        prompt = f"{write_log(self.film.facts(problem))} . {problem.prompt}"
        return dataclasses.replace(problem, prompt=prompt)

    def facts(self, problem: Problem) -> tuple[Fact, ...]:
        """Everything that happens, in order of time."""
        return self.film.facts(problem)

    def trace(self, problem: Problem, style: Style) -> str:
        """That of the film."""
        return self.film.trace(problem, style)

    def verify(self, problem: Problem, text: str) -> Verdict:
        """That of the film."""
        return self.film.verify(problem, text)

    def words(self) -> tuple[str, ...]:
        """Those of the film and of logs."""
        return (*self.film.words(), *split_words(["touches , ; ."]))


def write_log(facts: Sequence[Fact]) -> str:
    """What a viewer sees change from each frame to the next, with the first frame before it."""
    entries: dict[float, list[str]] = {}
    for fact in facts:
        start, end = fact.time
        what = fact.action.partition(" ")[2]
        text = {
            "rests": fact.scene,
            "moves": what,
            "hits": f"touches {what}",
            "turns": what,
        }.get(fact.verb, f"{fact.verb} {fact.scene}".strip())
        times = [float(t) for t in range(int(start), int(end))] if fact.verb == "moves" else [start]
        if fact.verb in ("rests", "hits"):
            times = [0.0] if fact.verb == "rests" else [end]
        for time in times:
            entries.setdefault(time, []).append(f"{fact.object} {text}")
    return " ; ".join(f"{write_seconds(t)} {' , '.join(entries[t])}" for t in sorted(entries))


# Data


def write_response(
    task: "FactsFirst | EventLog", problem: Problem, *, facts: bool, thought: Style | None
) -> str:
    """A right response.

    Args:
        task: of the problem.
        problem: that is answered.
        facts: whether it has a block of facts.
        thought: `long` searches all facts about the object and checks what led to the one that is
            asked about; `short` names the facts that decide; None leaves the block out.
    """
    record = task.facts(problem)
    parts = [write_facts(events(record), FIELDS)] if facts else []
    if thought is not None:
        question = questions.Question(**problem.columns["question"])
        text = questions.thought(question, record, long=thought == "long")
        text = text.rpartition("</facts>")[2].strip()
        parts.append(f"<think> {text} ; so {problem.answer} </think>")
    return " ".join([*parts, f"<answer> {problem.answer} </answer>"])


def facts_rows(task: Task, problems: Sequence[Problem], rng: random.Random) -> Iterator[dict]:
    """The first stage: the block of facts and nothing behind it."""
    for number, problem in enumerate(problems):
        facts = write_facts(events(_has_facts(task).facts(problem)), FIELDS)
        yield {"problem": number, "completion": facts}


def response_rows(
    task: Task,
    problems: Sequence[Problem],
    rng: random.Random,
    *,
    facts: bool = True,
    thoughts: Mapping[Style, float] | None,
) -> Iterator[dict[str, Any]]:
    """Right responses.

    Args:
        task: with facts.
        problems: what they are about.
        rng: draws the style of each thought.
        facts: whether they begin with facts.
        thoughts: styles with their shares; None: no thought.
    """
    for share in (thoughts or {}).values():
        check_rate("thoughts", share)
    for number, problem in enumerate(problems):
        style = rng.choices(list(thoughts), list(thoughts.values()))[0] if thoughts else None
        text = write_response(_has_facts(task), problem, facts=facts, thought=style)
        yield {"problem": number, "completion": text}


def _has_facts(task: Task) -> "FactsFirst | EventLog":
    if not isinstance(task, FactsFirst | EventLog):
        raise InputError(
            f"task {task.name!r} has no facts; use EventLog or FactsFirst of {__name__}"
        )
    return task
