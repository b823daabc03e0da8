"""Rows about problems of a run, which its own stages or functions of the user's have made.

A row has `completion`, or `chosen` and `rejected`, as text and perhaps as the token ids that were
sampled, which text might not give back.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_reason.data.batching import Example
from jaxrl_reason.data.loading import Maker
from jaxrl_reason.data.records import load_records
from jaxrl_reason.errors import InputError
from jaxrl_reason.plugins import load_object
from jaxrl_reason.processes import from_first
from jaxrl_reason.stages.context import Stage
from jaxrl_reason.stages.data_config import PythonData, StageData
from jaxrl_reason.tasks import Problem

SIDES = {"rows": ("completion",), "pairs": ("chosen", "rejected")}
"""Columns of text of the two kinds of rows."""


class Made(NamedTuple):
    """A row, the problem it is about, and its place for messages."""

    problem: Problem
    row: Mapping[str, Any]
    where: str


def made_rows(stage: Stage, kind: str) -> list[Made]:
    """The rows of a stage's data.

    Args:
        stage: whose data is of kind `python` or `stage`.
        kind: `rows` or `pairs`.

    Raises:
        InputError: no such function, it failed, it gave no row, or a malformed one.
    """
    data = stage.config.data
    made = _kept(stage, data, kind) if isinstance(data, StageData) else _written(stage, data, kind)
    if not made:
        raise InputError(f"stages.{stage.name}.data gave no {kind}; {_ADVICE[data.kind]}")
    return made


_ADVICE = {
    "python": "its function yields rows with `problem` and the columns of this kind of stage",
    "stage": "the stage that it names kept none of this kind",
}


def checked_rows(
    rows: Iterable[Any], problems: Sequence[Problem], where: str, kinds: Sequence[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Rows that a function yielded, each with its kind.

    Raises:
        InputError: naming the function, the row and what it lacks.
    """
    found = []
    for number, row in enumerate(rows):
        place = f"{where}, row {number}"
        if not isinstance(row, Mapping):
            raise InputError(f"{place}: got {type(row).__name__}; a row is a dict")
        kind = next((k for k in kinds if all(side in row for side in SIDES[k])), None)
        if kind is None:
            needed = " or ".join(" and ".join(SIDES[k]) for k in kinds)
            raise InputError(f"{place}: got the columns {', '.join(row)}; needed: {needed}")
        index = row.get("problem")
        if type(index) is not int or not 0 <= index < len(problems):
            raise InputError(
                f"{place}: problem={index!r} must be a number from 0 to {len(problems) - 1}, of "
                "the problem that the row is about"
            )
        for column in (*SIDES[kind], *(["prompt"] if "prompt" in row else [])):
            if not isinstance(row[column], str):
                raise InputError(f"{place}: {column} is {type(row[column]).__name__}, not text")
        found.append((kind, dict(row)))
    return found


def call_builder(
    function: str, arguments: Sequence[Any], seed: int, options: Mapping[str, Any]
) -> list[Any]:
    """What a function of the user's yields.

    Raises:
        InputError: there is no such function, or it failed.
    """
    builder = load_object(function, "function")
    try:
        return list(builder(*arguments, random.Random(seed), **options))
    except InputError:
        raise
    except Exception as error:  # the function is the user's: anything may go wrong in it
        raise InputError(f"{function} raised {type(error).__name__}: {error}") from error


def _written(stage: Stage, data: PythonData, kind: str) -> list[Made]:
    problems = stage.problems(0, data.num_examples)
    task = stage.context.tasks.named(data.problems.task)
    # A function may ask others than this program, so one process calls it.
    rows = from_first(
        lambda: call_builder(data.function, (task, problems), stage.seed, data.options)
    )
    checked = checked_rows(rows, problems, data.function, [kind])
    return [
        Made(problems[row["problem"]], row, f"{data.function}, row {number}")
        for number, (_, row) in enumerate(checked)
    ]


def _kept(stage: Stage, data: StageData, kind: str) -> list[Made]:
    path = stage.other / f"{kind}.jsonl"
    if path.stat().st_size == 0:
        return []
    required = ("problem", *SIDES[kind])
    types = dict.fromkeys(SIDES[kind], str) | {"problem": dict}
    records = load_records(path, required=required, types=types)
    return [
        Made(stage.context.tasks.at(record.row["problem"]), record.row, record.where)
        for record in records[: data.num_examples]
    ]


def made_maker(stage: Stage, made: Made) -> Maker:
    """What makes the example of a row with a completion.

    Made, it raises InputError for text that the vocabulary cannot express, by the row's place.
    """
    return _maker(made, lambda: [_example(stage, made, "completion")])


def pair_maker(stage: Stage, made: Made) -> Maker:
    """What makes the chosen and the rejected example of a row; it raises as `made_maker`'s."""
    return _maker(made, lambda: _pair(stage, made))


def _maker(made: Made, make: Callable[[], Sequence[Example]]) -> Maker:
    def placed() -> Sequence[Example]:
        try:
            return make()
        except InputError as error:
            raise InputError(f"{made.where}: {error}") from error

    return Maker(placed, made.where)


def _pair(stage: Stage, made: Made) -> tuple[Example, Example]:
    row = made.row
    if "chosen_ids" in row:
        return _example(stage, made, "chosen"), _example(stage, made, "rejected")
    return stage.context.encoder.pair(
        made.problem, row["chosen"], row["rejected"], prompt=row.get("prompt")
    )


def _example(stage: Stage, made: Made, side: str) -> Example:
    encoder, row, problem = stage.context.encoder, made.row, made.problem
    if (ids := row.get(f"{side}_ids")) is not None:
        return encoder.completed(problem, ids)
    return encoder.demonstration(problem, row[side], prompt=row.get("prompt"))
