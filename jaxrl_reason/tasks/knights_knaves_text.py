"""How a knights-and-knaves puzzle, its search and its answer are worded.

The carrier sentences, the form of a claim and the answer lines are those of arXiv 2410.23123;
names, opening and trace lines are our own wording.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_reason.tasks.knights_knaves_logic import Puzzle, Statement, Step

CARRIERS = (
    "{name} said that {claim}.",
    "{name} told you that {claim}.",
    '{name} said, "{claim}."',
    '{name} stated, "{claim}".',
    'According to {name}, "{claim}".',
    'In {name}\'s words: "{claim}".',
    '{name} remarked, "{claim}".',
    '"{claim}," {name} declared.',
    '{name} was heard saying, "{claim}".',
    "{name} expressed that {claim}.",
    '"{claim}" - {name}.',
    'As {name} put it, "{claim}".',
    '{name} asserted: "{claim}".',
    '"{claim}," {name} mentioned.',
    '{name} commented, "{claim}".',
    'In a statement by {name}: "{claim}".',
    '{name} noted, "{claim}".',
    '"{claim}," {name} claimed.',
)

_COMMON = (
    "Adam Alice Anna Ben Bob Carol Charles Clara Daniel David Diana Edward Ella Emily Eric Eva "
    "Frank George Grace Hannah Helen Henry Ian Irene Jack James Jane John Julia Karen Kevin Laura "
    "Leo Linda Lisa Mark Martin Mary Michael Nina Nora Oscar Paul Peter Rachel Robert Rose Sarah "
    "Simon Susan Thomas"
)
COMMON_NAMES = tuple(_COMMON.split())

_UNCOMMON = (
    "Aldwin Amaranth Anselm Balthazar Beatrix Berengar Caspian Celestine Cosima Crispin Cyprian "
    "Damaris Drusilla Eberhard Elowen Emeric Euphemia Evander Fenella Florian Gawain Ginevra "
    "Griselda Hildegard Horatio Ignatius Isolde Jocasta Kester Leocadia Leopold Lucasta Lysander "
    "Marcellus Melisande Nerissa Octavian Ottoline Peregrine Perpetua Quentin Rosamund Sabina "
    "Septimus Tancred Thaddeus Theodora Ursula Wilhelmina Zenobia"
)
UNCOMMON_NAMES = tuple(_UNCOMMON.split())

# Truth-teller and liar; the first pair is the usual one, the others are for perturbed puzzles.
ROLE_PAIRS = (
    ("knight", "knave"),
    ("saint", "sinner"),
    ("hero", "villain"),
    ("sage", "fool"),
    ("friend", "foe"),
    ("pilgrim", "pirate"),
    ("monk", "bandit"),
)
_PLURALS = {"hero": "heroes"}

_OPENING = (
    "An island is inhabited only by {truthful}, who always tell the truth, and {lying}, who always "
    "lie. You meet {count} inhabitants: {people}."
)
_CLOSING = "Who is a {truthful} and who is a {lying}?"
_SHORT = "{name} is a {role} and claims {claim}: {value}."
_ACCEPT = "Assume {name} is a {role}: no contradiction in {name}'s {claim}."
_REJECT = "{name} cannot be a {role}: contradiction in {other}'s {claim}."
_BACK = "Options for {name} are used up: return to {other} and reset {name}."
_DONE = "This assignment is feasible."
_CLAIM = {True: "claim", False: "false claim"}
_VALUE = {True: "true", False: "false"}
_ANSWER = "({number}) {name} is a {role}"

MAX_PEOPLE = 8


def templates() -> tuple[str, ...]:
    """Every fixed sentence, and a claim of every form, with neutral fillers, for the vocabulary."""
    filler = dict.fromkeys(
        ("name", "other", "role", "claim", "truthful", "lying", "people", "count", "number"), ""
    )
    fixed = (*CARRIERS, _OPENING, _CLOSING, _SHORT, _ACCEPT, _REJECT, _BACK, _DONE, _ANSWER)
    leaf = ("knight", 0)
    forms = (leaf, ("not", leaf), *((form, leaf, leaf) for form in ("and", "or", "implies", "iff")))
    claims = tuple(phrase(form, [""], ("knight", "knave")) for form in forms)
    roles = tuple(word for pair in ROLE_PAIRS for role in pair for word in (role, _plural(role)))
    values = (*_CLAIM.values(), *_VALUE.values())
    return (*(text.format(value="", **filler) for text in fixed), *claims, *roles, *values)


def phrase(statement: Statement, names: Sequence[str], roles: Sequence[str]) -> str:
    """A statement in words; `roles` are the words for truth-teller and liar."""
    if statement[0] in ("knight", "knave"):
        return f"{names[statement[1]]} is a {roles[statement[0] == 'knave']}"
    if statement[0] == "not":
        kind, person = statement[1]
        return f"{names[person]} is not a {roles[kind == 'knave']}"
    first, second = (phrase(leaf, names, roles) for leaf in statement[1:])
    if statement[0] == "implies":
        return f"If {first} then {second}"
    joint = {"and": "and", "or": "or", "iff": "if and only if"}[statement[0]]
    return f"{first} {joint} {second}"


def write_prompt(columns: Mapping[str, Any], puzzle: Puzzle) -> str:
    """The quiz: opening, one carrier sentence per person, question."""
    names, roles = columns["people"], columns["roles"]
    words = {"truthful": _plural(roles[0]), "lying": _plural(roles[1])}
    listing = f"{', '.join(names[:-1])}, and {names[-1]}"
    sentences = [_OPENING.format(count=len(names), people=listing, **words)]
    for person in columns["order"]:
        claim = phrase(puzzle[person], names, roles)
        carrier = CARRIERS[columns["carriers"][person]]
        sentences.append(carrier.format(name=names[person], claim=claim))
    sentences.append(_CLOSING.format(truthful=roles[0], lying=roles[1]))
    return " ".join(sentences)


def write_answer(names: Sequence[str], roles: Sequence[str], solution: Sequence[bool]) -> str:
    """One line per person, in the order in which they were introduced."""
    lines = [
        _ANSWER.format(number=number, name=name, role=roles[not knight])
        for number, (name, knight) in enumerate(zip(names, solution, strict=True), start=1)
    ]
    return "\n".join(lines)


def write_check(columns: Mapping[str, Any], puzzle: Puzzle) -> str:
    """The solution checked statement by statement."""
    names, roles = columns["people"], columns["roles"]
    lines = []
    for person, knight in enumerate(columns["solution"]):
        claim = phrase(puzzle[person], names, roles)
        role = roles[not knight]
        lines.append(
            _SHORT.format(name=names[person], role=role, claim=claim, value=_VALUE[knight])
        )
    return "\n".join(lines)


def write_search(columns: Mapping[str, Any], puzzle: Puzzle, steps: Sequence[Step]) -> str:
    """A search in words, one line per step."""
    names, roles = columns["people"], columns["roles"]
    lines = []
    for step in steps:
        if step.kind == "done":
            lines.append(_DONE)
            continue
        name, other = names[step.person], names[step.other]
        if step.kind == "back":
            lines.append(_BACK.format(name=name, other=other))
            continue
        about = step.person if step.kind == "accept" else step.other
        claim = f"{_CLAIM[step.truthful]} {phrase(puzzle[about], names, roles)}"
        line = _ACCEPT if step.kind == "accept" else _REJECT
        role = roles[not step.knight]
        lines.append(line.format(name=name, role=role, claim=claim, other=other))
    return "\n".join(lines)


def _plural(role: str) -> str:
    return _PLURALS.get(role, role + "s")
