"""Questions about a film that its facts answer exactly: wording, answers, and the way to them.

Nothing but facts is read here, so the same questions can be asked about the text of the facts.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxrl_reason.tasks.facts import NO_CAUSE, Fact, write_facts
from jaxrl_reason.tasks.intervals import read_interval, write_interval, write_seconds
from jaxrl_reason.tasks.motion import DIRECTIONS
from jaxrl_reason.tasks.render import PALETTE, SHAPES
from jaxrl_reason.tasks.scene import QUARTERS, plain

# The forms of each kind, equally often; "no cause" asks like "cause" where the answer is `none`.
KINDS = {
    "interval": ("interval",),
    "spatial": ("direction", "place", "side"),
    "cause": ("cause", "cause", "cause", "no cause"),
}
_SIDES = {"right": "left", "left": "right", "down": "above", "up": "below"}
_PROMPTS = {
    "interval": "When does the {object} {action}? Give its start and its end in seconds.",
    "direction": "In which direction does the {object} move: left, right, up or down?",
    "place": (
        "In which quarter is the {object} at second {time}: "
        "top left, top right, bottom left or bottom right?"
    ),
    "side": "From which side does the {object} {action}: left, right, above or below?",
    "cause": (
        'Why does the {object} {action}? Answer "hit by" or "hits" with the other shape, or "none".'
    ),
}
WORDS = (
    *(prompt.format(object="", action="", time="") for prompt in _PROMPTS.values()),
    *DIRECTIONS,
    "rest rests move moves hit hits stop stops turn turns appear appears disappear disappears",
    "search until yes no check none so : ; -",
)
_TIMED = ("moves", "hits", "turns", "appears", "disappears")
_CAUSED = ("moves", "stops", "turns", "disappears")
_CAUSE = re.compile(rf"none|(?:hit by|hits) (?:{'|'.join(PALETTE)}) (?:{'|'.join(SHAPES)})")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A form of question about an object: about what it does, or where it is at some time."""

    form: str
    object: str
    action: str = ""
    time: float = 0.0

    def prompt(self) -> str:
        """The text of the user's turn."""
        verb, _, rest = self.action.partition(" ")
        rest = f" the {rest}" if verb == "hits" else f" {rest}" if rest else ""
        return _PROMPTS[self.form].format(
            object=self.object,
            action=verb.removesuffix("s") + rest,
            time=write_seconds(self.time),
        )


def ask(rng: random.Random, form: str, facts: Sequence[Fact]) -> Question | None:
    """A question of a form with one answer; None if there is none about these facts.

    Half of the questions about intervals are about moves, which take longest. One about something
    without a cause is about something that began when another shape was hit, if there is such.
    """
    once = [fact for fact in facts if sum(_same(fact, other) for other in facts) == 1]
    if form == "direction":
        moves = [fact for fact in facts if fact.verb == "moves"]
        names = [fact.object for fact in moves]
        movers = [name for name in names if names.count(name) == 1]
        return Question(form=form, object=rng.choice(movers)) if movers else None
    if form == "place":
        rests = [
            Question(form=form, object=name, time=time)
            for name, first, last in _rests(facts)
            for time in _times(facts)
            if first <= time <= last
        ]
        return rng.choice(rests) if rests else None
    if form == "side":
        fitting = [fact for fact in once if fact.verb == "hits"]
    elif form == "no cause":
        form, fitting = "cause", [f for f in once if f.verb in _CAUSED and f.cause == NO_CAUSE]
        hits = [fact.time[1] for fact in facts if fact.verb == "hits"]
        fitting = [fact for fact in fitting if fact.time[0] in hits] or fitting
    elif form == "cause":
        fitting = [f for f in once if f.cause != NO_CAUSE]
    else:
        fitting = [fact for fact in once if fact.verb in _TIMED]
        moves = [fact for fact in fitting if fact.verb == "moves"]
        fitting = moves if moves and rng.random() < 0.5 else fitting
    if not fitting:
        return None
    verb = rng.choice(sorted({fact.verb for fact in fitting}))
    fact = rng.choice([fact for fact in fitting if fact.verb == verb])
    return Question(form=form, object=fact.object, action=fact.action)


def answer(question: Question, facts: Sequence[Fact]) -> str:
    """The answer in its normal form."""
    key = _key_facts(question, facts)
    if question.form == "interval":
        return write_interval(key[0].time)
    if question.form == "place":
        return key[-1].scene
    if question.form == "cause":
        return key[0].cause
    direction = key[-1].action.split()[1]
    return direction if question.form == "direction" else _SIDES[direction]


def usable(form: str, text: str) -> str | None:
    """An answer in normal form if it is of the kind that this form asks for."""
    if form == "interval":
        interval = read_interval(text)
        return None if interval is None else write_interval(interval)
    text = plain(text)
    if form == "cause":
        text = text.replace(" the ", " ")
        return text if _CAUSE.fullmatch(text) else None
    kinds = {"direction": DIRECTIONS, "place": QUARTERS, "side": _SIDES.values()}
    return text if text in kinds[form] else None


def thought(question: Question, facts: Sequence[Fact], *, long: bool) -> str:
    """The way to the answer, ending before it.

    The long way is that of arXiv 2604.04415: all facts, a search for those about the object, a
    check of what led to the one asked about. The short one has the facts that decide.
    """
    key = _key_facts(question, facts)
    if not long:
        lines = [f"{fact.span} {fact.object} {fact.action}" for fact in key]
        if question.form == "place":
            lines = [f"{lines[-1]} {key[-1].scene}"]
        return " ; ".join(lines)
    heading, steps = f"search {question.object}", []
    if question.form == "place":
        heading += f" until {write_seconds(question.time)}"
        steps = [f"{fact.span} {fact.action} {fact.scene}" for fact in key]
    else:
        for fact in facts:
            if fact.object == question.object:
                steps.append(f"{fact.span} {fact.action} {'yes' if fact in key else 'no'}")
    lines = [f"{heading} : {' ; '.join(steps)}"]
    if question.form == "cause":
        time = key[0].time[0]
        hits = [fact for fact in facts if fact.verb == "hits" and fact.time[1] == time]
        steps = [f"{f.span} {f.object} {f.action} {'yes' if f in key else 'no'}" for f in hits]
        lines.append(f"check {write_seconds(time)} : {' ; '.join(steps or [NO_CAUSE])}")
    return f"{write_facts(facts)}\n{' ; '.join(lines)}"


def _same(fact: Fact, other: Fact) -> bool:
    return (fact.object, fact.action) == (other.object, other.action)


def _key_facts(question: Question, facts: Sequence[Fact]) -> list[Fact]:
    """The facts from which the answer follows.

    For `place` all about the object up to that time. For `side` the hit and the move that led to
    it. For `cause` what is asked about and the hit that caused it, if one did.
    """
    own = [fact for fact in facts if fact.object == question.object]
    if question.form == "direction":
        return [fact for fact in own if fact.verb == "moves"]
    if question.form == "place":
        return [f for f in own if f.verb == "rests" or f.time[1] <= question.time]
    (asked,) = [fact for fact in own if fact.action == question.action]
    if question.form == "side":
        return [asked, *(f for f in own if f.verb == "moves" and f.time[1] == asked.time[1])]
    if question.form == "interval" or asked.cause == NO_CAUSE:
        return [asked]
    hits = [fact for fact in facts if fact.verb == "hits" and fact.time[1] == asked.time[0]]
    if asked.verb == "stops":
        return [asked, *(fact for fact in hits if fact.object == asked.object)]
    return [asked, *(fact for fact in hits if fact.action == f"hits {asked.object}")]


def _rests(facts: Sequence[Fact]) -> list[tuple[str, float, float]]:
    """Name, start and end of the times in which an object rests under one name."""
    spans = []
    for fact in facts:
        if fact.verb not in ("rests", "appears", "moves"):
            continue
        first = fact.time[0] if fact.verb == "rests" else fact.time[1]
        later = [
            other.time[0]
            for other in facts
            if other.object == fact.object
            and other.verb in ("moves", "turns", "disappears")
            and other.time[0] >= first
        ]
        spans.append((fact.object, first, min(later, default=_times(facts)[-1])))
    return spans


def _times(facts: Sequence[Fact]) -> list[float]:
    """When anything begins or ends."""
    return sorted({time for fact in facts for time in fact.time})
