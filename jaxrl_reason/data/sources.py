"""Where rows come from: files, directories, the Hugging Face hub, TFDS, or an object in memory.

A source is a `.jsonl`, `.json` or `.parquet` file; a directory written by `datasets`; a hub id
`owner/name` or `owner/name:subset`; `tfds:name`; or anything with rows in it, such as a list, a
Grain data source or a `datasets.Dataset`.
"""

import codecs
import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxrl_reason.errors import InputError, nearest

Row = dict[str, Any]
Result = TypeVar("Result")

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<subset>[\w.-]+))?")
_TFDS = "tfds:"
_MEDIA = ("image", "images", "video", "videos")
_CONVERSATIONS = ("prompt", "completion", "chosen", "rejected", "messages")


class RandomAccess(Protocol):
    """Rows by number, such as a Grain data source."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """Row `index`."""
        ...


Source = str | Path | RandomAccess | Iterable[Mapping[str, Any]]


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


def read_source(source: Source, split: str) -> Iterator[Record]:
    """The rows of a source, one by one.

    Args:
        source: as the head of this file says.
        split: of a data set that has splits; files have none.

    Raises:
        InputError: no such source, or a malformed row, by file and line.
    """
    if not isinstance(source, str | Path):
        yield from _object(source)
        return
    path, hub = Path(source), _HUB_ID.fullmatch(str(source))
    if path.suffix in _FILES:
        for record in _FILES[path.suffix](path):
            yield Record(_found(record.row, path.parent, record.where), record.where)
    elif str(source).startswith(_TFDS):
        yield from _tfds(str(source).removeprefix(_TFDS), split)
    elif path.is_dir():
        yield from _saved(path, split)
    elif hub is not None and not path.exists():
        yield from _hub(hub["name"], hub["subset"], split)
    else:
        raise InputError(
            f"{source}: give a .jsonl, .json or .parquet file, a directory saved by datasets, a "
            "hub id such as owner/name, or tfds:name"
        )


# Files


def read_lines(path: Path) -> Iterator[Record]:
    """The objects of a JSONL file, whatever its suffix."""
    for number, line in enumerate(_bytes(path).rstrip().splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: byte {error.start + 1} of the line is not UTF-8; re-encode the file"
            ) from error
        except json.JSONDecodeError as error:
            found = show(line.decode("utf-8")) if line.strip() else "an empty line"
            raise InputError(
                f"{where}: got {found}, no valid JSON ({error.msg} at column {error.colno}); "
                "write one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: got {show(row)}; write one JSON object a line")
        yield Record(row, where)


def _json(path: Path) -> Iterator[Record]:
    try:
        rows = json.loads(_bytes(path).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start + 1} is not UTF-8; re-encode the file"
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}: no valid JSON ({error.msg} at column {error.colno}); write a "
            "list of objects, or name a file of one object a line .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: got {show(rows)}; write a list of objects")
    for number, row in enumerate(rows, start=1):
        where = f"{path} row {number}"
        if not isinstance(row, dict):
            raise InputError(f"{where}: got {show(row)}; write a list of objects")
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
    yield from _table(table, str(path))


_FILES: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_lines,
    ".json": _json,
    ".parquet": _parquet,
}


def _bytes(path: Path) -> bytes:
    try:
        return _existing(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _existing(path: Path) -> Path:
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a file")
    if not path.exists():
        folder = path.parent
        names = [other.name for other in folder.iterdir()] if folder.is_dir() else []
        raise InputError(f"{path}: no such file; in {folder}: {nearest(path.name, names)}")
    return path


def _found(row: Row, folder: Path, where: str) -> Row:
    """A row with the paths of its images and videos made those of the data file's folder."""

    def located(value: Any) -> Any:
        if isinstance(value, list):
            return [located(x) for x in value]
        if isinstance(value, Mapping) and value.get("path") and value.get("bytes") is None:
            return {**value, "path": located(value["path"])}
        # URLs and encoded images are for whoever reads them.
        if not isinstance(value, str) or len(value) > 500 or re.match(r"\w+:", value):
            return value
        if Path(value).is_absolute():
            return value
        path = folder / value
        if not path.exists():
            raise InputError(f"{where}: {path}: no such file; paths begin at the data's folder")
        return str(path)

    def searched(value: Any) -> Any:
        if isinstance(value, list):
            return [searched(x) for x in value]
        if isinstance(value, Mapping):
            return {k: located(x) if k in _MEDIA else searched(x) for k, x in value.items()}
        return value

    return {
        column: located(value)
        if column in _MEDIA
        else searched(value)
        if column in _CONVERSATIONS
        else value
        for column, value in row.items()
    }


# Tables of datasets


def _saved(path: Path, split: str) -> Iterator[Record]:
    import datasets

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise InputError(f"{path}: a directory that datasets has not saved; give a file in it")
    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:  # as with Parquet
        raise InputError(f"{path}: not readable by datasets: {_first_line(error)}") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise InputError(f"{path}: no split {split!r}; {nearest(split, map(str, table))}")
        path, table = path / split, table[split]
    yield from _table(table, str(path))


def _hub(name: str, subset: str | None, split: str) -> Iterator[Record]:
    import datasets

    try:
        table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # no network, no such data set, no such split, no permission, ...
        raise InputError(
            f"{name}: neither a file nor readable on the Hugging Face hub with subset {subset} and "
            f"split {split}: {_first_line(error)}"
        ) from error
    yield from _table(table, f"{name} {split}")


def _table(table: Any, name: str) -> Iterator[Record]:
    """Rows as Arrow has them, so that images stay compressed."""
    for number, row in enumerate(table.with_format(None).to_list(), start=1):
        yield Record({key: _shortened(x) for key, x in row.items()}, f"{name} row {number}")


def _shortened(value: Any) -> Any:
    """Without the keys that Arrow adds to make all mappings of a column alike."""
    if isinstance(value, list):
        return [_shortened(x) for x in value]
    if isinstance(value, dict):
        return {key: _shortened(x) for key, x in value.items() if x is not None}
    return value


# Other sources


def _tfds(name: str, split: str) -> Iterator[Record]:
    import tensorflow_datasets as tfds

    try:
        source: Any = tfds.data_source(name, split=split)
    except Exception as error:  # no such data set, no such split, not downloadable, ...
        raise InputError(
            f"{_TFDS}{name}: not readable with split {split}: {_first_line(error)}"
        ) from error
    for number in range(len(source)):
        row = {key: _from_numpy(x) for key, x in source[number].items()}
        yield Record(row, f"{_TFDS}{name} {split} row {number + 1}")


def _from_numpy(value: Any) -> Any:
    """Texts and numbers as Python has them; arrays stay."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:  # a compressed image
            return value
    if isinstance(value, Mapping):
        return {key: _from_numpy(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_from_numpy(x) for x in value]
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_from_numpy(x) for x in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


def _object(source: Any) -> Iterator[Record]:
    name = type(source).__name__
    if hasattr(source, "to_list") and hasattr(source, "with_format"):
        yield from _table(source, name)
        return
    # Not all sources that have rows by number can be walked through.
    indexed = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    rows = (source[i] for i in range(len(source))) if indexed else iter(source)
    for number, row in enumerate(rows, start=1):
        where = f"{name} row {number}"
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: got {type(row).__name__}; rows must be mappings")
        yield Record({key: _from_numpy(x) for key, x in row.items()}, where)


def show(value: Any) -> str:
    """A value in a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
