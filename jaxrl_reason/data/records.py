"""Rows of a data set, each knowing where it came from, so that an error names the file and line.

A source is a JSONL file, a Parquet file, or the id of a data set on the Hugging Face hub. Columns
have TRL's names: `prompt` and `completion`; `prompt`, `chosen` and `rejected`; `prompt` alone; or
`messages`. A text column holds a string or a list of `{"role": ..., "content": ...}`.
"""

import codecs
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxrl_reason.errors import InputError, nearest

Row = dict[str, Any]
Types = Mapping[str, type | tuple[type, ...]]
Format = Literal["preference", "prompt_completion", "messages", "prompt_only"]
Result = TypeVar("Result")

# The columns of each format; a row has the first format of which it has all columns.
FORMATS: Mapping[Format, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "prompt_only": ("prompt",),
}
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<subset>[\w.-]+))?")


@dataclasses.dataclass(frozen=True)
class Record:
    """A row and its place, such as `data/train.jsonl:17`."""

    row: Row
    where: str

    def check(self, function: Callable[[Row], Result]) -> Result:
        """`function(row)`; a `ValueError` becomes an `InputError` that names the row's place."""
        try:
            return function(self.row)
        except ValueError as error:
            raise InputError(f"{self.where}: {error}") from error


def load_records(
    source: str | Path,
    *,
    required: Sequence[str] = (),
    types: Types | None = None,
    split: str = "train",
) -> list[Record]:
    """Read all rows of a file or of a data set on the hub.

    Args:
        source: a `.jsonl` or `.parquet` file, or a hub id `owner/name` or `owner/name:subset`.
        required: columns that every row must have.
        types: types of columns, where present; a required column that is not named is a string.
        split: split of a data set on the hub; files have none.

    Raises:
        InputError: no such source, no rows, or a row that is malformed, lacks a column or has a
            value of another type, by file and line.
    """
    path, hub = Path(source), _HUB_ID.fullmatch(str(source))
    if path.suffix == ".jsonl":
        records = _jsonl(path)
    elif path.suffix == ".parquet":
        records = _parquet(path)
    elif hub is not None and not path.exists():
        records = _hub(hub["name"], hub["subset"], split)
    else:
        raise InputError(
            f"{source}: give a .jsonl or .parquet file, or a hub id such as owner/name"
        )
    checked = [_checked(record, required, types or {}) for record in records]
    if not checked:
        raise InputError(f"{source}: no rows")
    return checked


def read_jsonl(
    path: str | Path, required: Sequence[str] = (), types: Types | None = None
) -> list[Row]:
    """The rows of a JSONL file, whatever its suffix; checks and errors as in `load_records`."""
    rows = [_checked(record, required, types or {}).row for record in _jsonl(Path(path))]
    if not rows:
        raise InputError(f"{path}: no rows; write one JSON object a line")
    return rows


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; the file appears whole or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another folder") from error


def recognise(records: Sequence[Record]) -> Format:
    """The format that all rows share, decided by the columns of the first.

    Raises:
        InputError: columns of no format, a row without the columns of the first, or a column that
            is neither a string nor a list of messages.
    """
    columns = records[0].row.keys()
    for name, needed in FORMATS.items():
        if columns >= set(needed):
            for record in records:
                for column in needed:
                    _check_text(record, column)
            return name
    known = "; ".join(", ".join(needed) for needed in FORMATS.values())
    raise InputError(f"{records[0].where}: got columns {', '.join(columns)}; needed: {known}")


def content_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """Sixteen hexadecimal digits of the rows and their order, whatever file they come from."""
    digest = hashlib.sha256()
    for row in rows:
        # Values that JSON has not, such as the dates of a Parquet file, count by their text.
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


# Sources


def _jsonl(path: Path) -> Iterator[Record]:
    try:
        content = _existing(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(content.rstrip().splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: byte {error.start + 1} of the line is not UTF-8; re-encode the file"
            ) from error
        except json.JSONDecodeError as error:
            found = _show(line.decode("utf-8")) if line.strip() else "an empty line"
            raise InputError(
                f"{where}: got {found}, no valid JSON ({error.msg} at column {error.colno}); "
                "write one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: got {_show(row)}; write one JSON object a line")
        yield Record(row, where)


def _parquet(path: Path) -> Iterator[Record]:
    import datasets

    _existing(path)
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # a local file is read faster than a bar is drawn
    try:
        with tempfile.TemporaryDirectory() as cache:
            table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # pyarrow and datasets raise half a dozen kinds
        raise InputError(f"{path}: not a readable Parquet file: {_first_line(error)}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    for number, row in enumerate(table.to_list(), start=1):
        yield Record(row, f"{path} row {number}")


def _hub(name: str, subset: str | None, split: str) -> Iterator[Record]:
    import datasets

    try:
        table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # no network, no such data set, no such split, no permission, ...
        raise InputError(
            f"{name}: neither a file nor readable on the Hugging Face hub with subset {subset} and "
            f"split {split}: {_first_line(error)}"
        ) from error
    for number, row in enumerate(table, start=1):
        yield Record(dict(row), f"{name} {split} row {number}")


def _existing(path: Path) -> Path:
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a file")
    if not path.exists():
        folder = path.parent
        names = [other.name for other in folder.iterdir()] if folder.is_dir() else []
        raise InputError(f"{path}: no such file; in {folder}: {nearest(path.name, names)}")
    return path


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
            f"{record.where}: column {column!r} is {_show(row[column])}; it must be {names}"
        )


def _check_text(record: Record, column: str) -> None:
    _check_column(record, column, list if column == "messages" else (str, list))
    value = record.row[column]
    conversation = isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    )
    if not value or not (conversation or isinstance(value, str)):
        raise InputError(
            f"{record.where}: column {column!r} is {_show(value)}; it must be text or a list of "
            '{"role": ..., "content": ...}, and not empty'
        )


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
