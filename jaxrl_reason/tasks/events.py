"""Plans of short films: which shape does what, when and because of what.

Frame k is what is seen at time k, and an event over [a, b] is what changes between frames a and b.
A shape that hits another stops there, and what follows from the hit (the other turns another
colour, is pushed on, disappears, or nothing) begins in the very frame in which they touch. Moves,
turns and disappearances without a hit are the distractors; for three frames after a hit nothing
happens to the two without a cause.

A plan is a value: a step returns the next plan, or None where there is none that a viewer could
follow, because shapes would overlap, come too close or end on a middle line.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxrl_reason.tasks.facts import NO_CAUSE, Fact
from jaxrl_reason.tasks.motion import (
    DIRECTIONS,
    Body,
    course,
    gap_of,
    lines_of,
    radius_of,
    room,
    track,
)
from jaxrl_reason.tasks.scene import Look, quarter, within_quarter

_EFFECTS = {"turn": 3, "push": 3, "vanish": 2, "nothing": 2}  # of a hit, with their weights
# What can happen, with weights; a hit comes with its effect.
_STEPS = {**_EFFECTS, "free move": 3, "free turn": 3, "free vanish": 1}
_LATE = 0.25  # share of shapes after the first that appear in the course of the film
_CHAIN = 0.7  # how often a pushed shape that can hit another is made to
_BESIDE = 0.7  # how often what has no cause happens at the time of a hit, if it can
_REST = 2  # least frames between the ends of a shape's event and the start of its next
_AFTER_HIT = 3  # the same after a hit
_TRIES = 12  # times a step of some kind is tried before another kind is


@dataclass(frozen=True)
class Event:
    """What shape number `body` does between two frames.

    `what` is the direction of a move, the new colour of a turn, "" otherwise. `other` is the
    number of the shape that is hit, or of the other one in the hit that is the cause of the event.
    """

    start: int
    end: int
    body: int
    verb: str
    what: str = ""
    other: int | None = None


@dataclass(frozen=True)
class Plan:
    """A film so far.

    Attributes:
        size: of the canvas.
        frames: how many.
        colours: to turn to.
        bodies: the shapes.
        ready: for each shape the first frame in which it can begin something new.
        events: in the order in which they were thought of.
    """

    size: int
    frames: int
    colours: tuple[str, ...]
    bodies: tuple[Body, ...]
    ready: tuple[int, ...]
    events: tuple[Event, ...] = ()

    def put(self, number: int, body: Body, ready: int, *events: Event) -> "Plan":
        """The plan with another fate of one shape."""
        bodies, times = list(self.bodies), list(self.ready)
        bodies[number], times[number] = body, ready
        events = (*self.events, *events)
        return replace(self, bodies=tuple(bodies), ready=tuple(times), events=events)


def begin(
    rng: random.Random, looks: Sequence[Look], colours: tuple[str, ...], size: int, frames: int
) -> Plan:
    """Shapes with these looks, all different, at rest; some appear in the course of the film.

    The first is there from the start. It is in one row or column with the second, at some distance.
    """
    places = _places(rng, looks, size)
    bodies, ready, events = [], [], []
    for number, (look, place) in enumerate(zip(looks, places, strict=True)):
        seen = rng.randint(1, frames // 3) if number and rng.random() < _LATE else 0
        if seen:
            events.append(Event(seen, seen + 1, number, "appears"))
        known = ((0, ""), (seen + 1, look.colour)) if seen else ((0, look.colour),)
        bodies.append(Body(look.shape, radius_of(size), ((0, *place),), known))
        ready.append(seen + 1 + _REST if seen else 1)
    return Plan(size, frames, colours, tuple(bodies), tuple(ready), tuple(events))


def _places(rng: random.Random, looks: Sequence[Look], size: int) -> list[tuple[int, int]]:
    """Where shapes with these looks begin, far enough from each other."""
    radius, gap = radius_of(size), gap_of(size)
    crossings = [(x, y) for x in lines_of(size) for y in lines_of(size)]
    while True:
        places = rng.sample(crossings, len(looks))
        one, two = (Body(looks[i].shape, radius, ((0, *places[i]),), ()) for i in range(2))
        way = course(one, two)
        if way is None or way[1] < 2 * gap:
            continue
        pairs = itertools.combinations(places, 2)
        if all(max(abs(a - c), abs(b - d)) > 2 * radius + gap for (a, b), (c, d) in pairs):
            return places


def go_on(rng: random.Random, plan: Plan) -> Plan:
    """What happens to the shapes: two steps or a few more, as far as there is room and time.

    In half of the films hits are planned first, so that events without a cause can be put beside
    them.
    """
    kinds = rng.choices(list(_STEPS), list(_STEPS.values()), k=rng.randint(2, len(plan.bodies) + 1))
    if rng.random() < 0.5:
        kinds.sort(key=lambda kind: kind not in _EFFECTS)
    for kind in kinds:
        for _ in range(_TRIES):
            step = _step(rng, plan, kind)
            if step is not None and _is_clear(step, plan):
                plan = step
                break
    return plan


def describe(plan: Plan, fps: int) -> tuple[Fact, ...]:
    """Every event as a record, in order of time, with a first record of each shape at rest."""
    facts = [_fact(plan, event, fps) for event in plan.events]
    for number, body in enumerate(plan.bodies):
        own = [event.start for event in plan.events if event.body == number]
        if body.colour(0):
            rest = Event(0, min(own, default=plan.frames - 1), number, "rests")
            facts.append(_fact(plan, rest, fps))
    return tuple(sorted(facts, key=lambda fact: (fact.time, fact.object, fact.action)))


def _fact(plan: Plan, event: Event, fps: int) -> Fact:
    body = plan.bodies[event.body]
    named = event.end if event.verb == "appears" else event.start
    other = plan.bodies[event.other].name(event.start) if event.other is not None else ""
    what, cause = event.what, NO_CAUSE
    if event.verb == "hits":
        what = other
    elif other:
        cause = f"{'hits' if event.verb == 'stops' else 'hit by'} {other}"
    places = track(body, plan.frames)
    return Fact(
        time=(event.start / fps, event.end / fps),
        object=body.name(named),
        action=f"{event.verb} {what}".strip(),
        scene=quarter(int(places.x[event.end]), int(places.y[event.end]), plan.size),
        cause=cause,
    )


def _step(rng: random.Random, plan: Plan, kind: str) -> Plan | None:
    """Something of a kind happens to random shapes."""
    number, other = rng.sample(range(len(plan.bodies)), 2)
    if kind in _EFFECTS:
        return _strike(rng, plan, number, other, effect=kind)
    start = _start(rng, plan, number)
    if kind == "free move":
        return _move(rng, plan, number, rng.choice(list(DIRECTIONS)), start)
    return _turn(rng, plan, number, start) if kind == "free turn" else _vanish(plan, number, start)


def _start(rng: random.Random, plan: Plan, number: int) -> int:
    """A frame to begin something in, more often than not one in which another shape is hit."""
    ready = plan.ready[number]
    hits = [event.end for event in plan.events if event.verb == "hits" and event.end >= ready]
    if hits and rng.random() < _BESIDE:
        return rng.choice(hits)
    return ready + rng.randint(0, plan.frames // 4)


def _strike(
    rng: random.Random,
    plan: Plan,
    mover: int,
    target: int,
    *,
    effect: str,
    start: int | None = None,
    by: int | None = None,
) -> Plan | None:
    """One shape moves up to another, with what follows; a pushed one starts at a given frame."""
    way = course(plan.bodies[mover], plan.bodies[target])
    if way is None:
        return None
    direction, far = way
    length = _length(rng, plan, far)
    if length is None:
        return None
    if start is None:
        start = max(plan.ready[mover], plan.ready[target] - length)
        start += rng.randint(0, plan.frames // 4)
    hit = start + length
    if hit < plan.ready[target] or hit > plan.frames - 2:
        return None
    across, down = DIRECTIONS[direction]
    x, y = plan.bodies[mover].last
    body = plan.bodies[mover].moved(start, hit, (x + across * far, y + down * far))
    plan = plan.put(
        mover,
        body,
        hit + _AFTER_HIT,
        Event(start, hit, mover, "moves", direction, by),
        Event(hit - 1, hit, mover, "hits", "", target),
        Event(hit, hit + 1, mover, "stops", "", target),
    )
    plan = plan.put(target, plan.bodies[target], hit + _AFTER_HIT)
    if effect == "turn":
        return _turn(rng, plan, target, hit, mover)
    if effect == "push":
        return _push(rng, plan, target, direction, hit, mover)
    return _vanish(plan, target, hit, mover) if effect == "vanish" else plan


def _push(
    rng: random.Random, plan: Plan, number: int, direction: str, start: int, by: int
) -> Plan | None:
    """A shape that was hit moves on, into the next one if there is one."""
    for other in rng.sample(range(len(plan.bodies)), len(plan.bodies)):
        way = None if other == number else course(plan.bodies[number], plan.bodies[other])
        if way is not None and way[0] == direction and rng.random() < _CHAIN:
            effect = rng.choices(list(_EFFECTS), list(_EFFECTS.values()))[0]
            return _strike(rng, plan, number, other, effect=effect, start=start, by=by)
    return _move(rng, plan, number, direction, start, by)


def _move(
    rng: random.Random, plan: Plan, number: int, direction: str, start: int, by: int | None = None
) -> Plan | None:
    """A shape moves to another line and stops without a cause."""
    body = plan.bodies[number]
    across, down = DIRECTIONS[direction]
    here = body.last[0 if across else 1]
    ways = [(line - here) * (across + down) for line in lines_of(plan.size)]
    ways = [way for way in ways if way >= plan.size // 8]
    far = rng.choice(ways) if ways else 0
    length = _length(rng, plan, far)
    if length is None or start + length > plan.frames - 2:
        return None
    end = start + length
    place = (body.last[0] + across * far, body.last[1] + down * far)
    return plan.put(
        number,
        body.moved(start, end, place),
        end + _REST,
        Event(start, end, number, "moves", direction, by),
        Event(end, end + 1, number, "stops"),
    )


def _length(rng: random.Random, plan: Plan, far: int) -> int | None:
    """Frames for a way: at least two, at a speed at which one sees it move and can follow."""
    least, most = max(2, -(-far // (plan.size // 8))), far // gap_of(plan.size)
    return rng.randint(least, most) if least <= most else None


def _turn(
    rng: random.Random, plan: Plan, number: int, start: int, by: int | None = None
) -> Plan | None:
    """A shape takes a colour in which it is like no shape that was or is."""
    body = plan.bodies[number]
    taken = {look for other in plan.bodies if other.shape == body.shape for _, look in other.looks}
    free = [colour for colour in plan.colours if colour not in taken]
    if not free or start + 1 > plan.frames - 1:
        return None
    colour = rng.choice(free)
    event = Event(start, start + 1, number, "turns", colour, by)
    return plan.put(number, body.turned(start + 1, colour), start + 1 + _REST, event)


def _vanish(plan: Plan, number: int, start: int, by: int | None = None) -> Plan | None:
    """A shape disappears for good."""
    if start + 1 > plan.frames - 1:
        return None
    body = plan.bodies[number].turned(start + 1, "")
    return plan.put(
        number, body, plan.frames, Event(start, start + 1, number, "disappears", "", by)
    )


def _is_clear(plan: Plan, before: Plan) -> bool:
    """Whether a viewer can tell what happens; what was so `before` is not looked at again.

    Shapes rest clear of the middle lines. Two of them are far enough apart, or one has hit the
    other, neither has moved since, and their colours differ.
    """
    bodies = enumerate(zip(plan.bodies, before.bodies, strict=True))
    new = [number for number, (body, old) in bodies if body is not old]
    for body in (plan.bodies[number] for number in new):
        if not all(within_quarter(x, y, body.radius, plan.size) for _, x, y in body.knots):
            return False
    for one, two in itertools.combinations(range(len(plan.bodies)), 2):
        if one not in new and two not in new:
            continue
        a, b = (track(plan.bodies[number], plan.frames) for number in (one, two))
        apart = room(plan.bodies[one], plan.bodies[two], plan.frames) >= gap_of(plan.size)
        for event in plan.events:
            if event.verb == "hits" and {event.body, event.other} == {one, two}:
                after = slice(event.end, None)
                across, down = b.x[after] - a.x[after], b.y[after] - a.y[after]
                still = np.logical_and.accumulate((across == across[0]) & (down == down[0]))
                apart[after] |= still & (a.hue != b.hue)[after]
        if not np.all(apart | (a.hue == 0) | (b.hue == 0)):
            return False
    return True
