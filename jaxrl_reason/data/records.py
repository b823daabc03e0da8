"""Rows of a data set, each knowing where it came from, so that an error names the file and line.

Columns have TRL's names: `messages`; `prompt` and `completion`; `prompt`, `chosen` and `rejected`,
or these two without the prompt that they share; or `prompt` alone. Such a column holds a string or
a list of `{"role": ..., "content": ...}`, whose content is a string or a list of parts
`{"type": "text" | "image" | "video", ...}`. `columns` of `load_records` makes them from others.
"""

import hashlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxrl_reason.data.sources import Record, Row, Source, read_lines, read_source, show
from jaxrl_reason.errors import InputError, nearest

Types = Mapping[str, type | tuple[type, ...]]
Format = Literal[
    "preference", "prompt_completion", "implicit_preference", "messages", "prompt_only"
]

# The columns of each format; a row has the first format of which it has all columns.
FORMATS: Mapping[Format, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "implicit_preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "prompt_only": ("prompt",),
}


def load_records(
    source: Source,
    *,
    required: Sequence[str] = (),
    types: Types | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
) -> list[Record]:
    """Read all rows of a file or of a data set.

    Args:
        source: what `data.sources` reads: a file, a directory, a hub id, `tfds:name`, or an object
            with rows in it.
        required: columns that every row must have, once `columns` are made.
        types: types of columns, where present; a required column that is not named is a string.
        split: split of a data set that has splits; files have none.
        columns: what columns are made of: the name of another, as in `{"prompt": "question"}`, or
            a text with names in braces, as in `{"prompt": "Question: {question}"}`. Other columns
            stay.

    Raises:
        InputError: no such source, no rows, or a row that is malformed, lacks a column or has a
            value of another type, by file and line.
    """
    records = (_with_columns(record, columns or {}) for record in read_source(source, split))
    checked = [_checked(record, required, types or {}) for record in records]
    if not checked:
        raise InputError(f"{source}: no rows")
    return checked


def read_jsonl(
    path: str | Path, required: Sequence[str] = (), types: Types | None = None
) -> list[Row]:
    """The rows of a JSONL file, whatever its suffix; checks and errors as in `load_records`."""
    rows = [_checked(record, required, types or {}).row for record in read_lines(Path(path))]
    if not rows:
        raise InputError(f"{path}: no rows; write one JSON object a line")
    return rows


def format_of(row: Mapping[str, Any]) -> Format:
    """The format of one row, by its columns.

    Raises:
        ValueError: columns of no format.
    """
    for name, needed in FORMATS.items():
        if row.keys() >= set(needed):
            return name
    known = "; ".join(", ".join(needed) for needed in FORMATS.values())
    raise InputError(f"got columns {', '.join(row)}; needed: {known}")


def recognise(records: Sequence[Record]) -> Format:
    """The format that all rows share, decided by the columns of the first.

    Raises:
        InputError: columns of no format, a row without the columns of the first, or a column that
            is neither a string nor a list of messages.
    """
    name = records[0].check(format_of)
    for record in records:
        for column in FORMATS[name]:
            _check_text(record, column)
    return name


def content_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Sixteen hexadecimal digits of the rows and their order, whatever file they come from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=_fixed).encode() + b"\n")
    return digest.hexdigest()[:16]


def _fixed(value: Any) -> str:
    """What stands for a value that JSON has not: of an array or image all of it, else its text."""
    if isinstance(value, bytes) or hasattr(value, "tobytes"):
        data = value if isinstance(value, bytes) else value.tobytes()
        return f"{getattr(value, 'shape', '')} {hashlib.sha256(data).hexdigest()}"
    return str(value)


def _with_columns(record: Record, columns: Mapping[str, str]) -> Record:
    """A record with columns made of others."""
    made = {}
    for column, origin in columns.items():
        if "{" not in origin and "}" not in origin:
            made[column] = record.row[_known(record, origin)]
            continue
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(origin) if name is not None}
        except ValueError as error:
            raise InputError(
                f"columns.{column}={origin!r}: {error}; a brace that is text is written twice"
            ) from error
        made[column] = origin.format_map({name: record.row[_known(record, name)] for name in names})
    return Record({**record.row, **made}, record.where) if made else record


def _known(record: Record, column: str) -> str:
    if column not in record.row:
        raise InputError(
            f"{record.where}: no column {column!r} to make another of; "
            f"{nearest(column, record.row)}"
        )
    return column


# Checks


def _checked(record: Record, required: Sequence[str], types: Types) -> Record:
    for column in required:
        _check_column(record, column, types.get(column, str))
    for column, wanted in types.items():
        if column in record.row:
            _check_column(record, column, wanted)
    return record


def _check_column(record: Record, column: str, wanted: type | tuple[type, ...]) -> None:
    row = record.row
    if column not in row:
        raise InputError(f"{record.where}: no column {column!r}; {nearest(column, row)}")
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    # True is an int to Python and an error to whoever wrote the column.
    fits = isinstance(row[column], wanted) and (bool in wanted or not isinstance(row[column], bool))
    if not fits:
        names = " or ".join(kind.__name__ for kind in wanted)
        raise InputError(
            f"{record.where}: column {column!r} is {show(row[column])}; it must be {names}"
        )


def _check_text(record: Record, column: str) -> None:
    _check_column(record, column, list if column == "messages" else (str, list))
    value = record.row[column]
    conversation = isinstance(value, list) and all(map(_is_message, value))
    if not value or not (conversation or isinstance(value, str)):
        raise InputError(
            f"{record.where}: column {column!r} is {show(value)}; it must be text or a list of "
            '{"role": ..., "content": ...}, and not empty'
        )


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if content is None:
        return bool(message.get("tool_calls"))
    parts = isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content
    )
    return parts or isinstance(content, str)
