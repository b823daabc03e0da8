"""Files that appear whole or not at all, and what storage refuses, said in a sentence."""

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxrl_reason.errors import InputError, StorageError

_CHOSEN_BADLY = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""What is wrong with a place, and stays wrong until another is chosen."""


@contextlib.contextmanager
def storing(what: str | Path) -> Iterator[None]:
    """Within, what storage refuses is said as something that may pass: in a folder of the run's.

    Args:
        what: is written, such as a path.

    Raises:
        StorageError: naming it and the reason.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"{what} could not be written: {_reason(error)}") from error


@contextlib.contextmanager
def chosen(what: str | Path, instead: str) -> Iterator[None]:
    """Within, a place where nothing can be written is a mistake of whoever chose it.

    Args:
        what: is written, such as a path.
        instead: what to do, such as "choose another file".

    Raises:
        InputError: there is no such folder, or one may not write there.
        StorageError: the place is good, and storage refuses: it is full, or broken.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _CHOSEN_BADLY:
            raise InputError(f"cannot write {what}: {_reason(error)}; {instead}") from error
        raise StorageError(f"cannot write {what}: {_reason(error)}") from error


def replace(path: str | Path, content: str | bytes) -> None:
    """Write a file under another name and rename it; a failed one leaves nothing.

    Raises:
        OSError: storage refuses it.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    data = content.encode() if isinstance(content, str) else content
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write a file of a run as indented JSON, in a folder that is made for it.

    Raises:
        StorageError: storage refuses it.
    """
    with storing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of a run with one JSON object a line, in a folder that is made for it.

    Raises:
        StorageError: storage refuses it.
    """
    with storing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace(path, jsonl(rows))


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
