"""Mistakes in a user's configuration, data or files, and the notice that a run has to end."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A user's input was refused; the message says what was got, what is allowed and what to do."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Phrase the candidates closest to `name`, e.g. `did you mean 'grpo' or 'gspo'?`.

    Falls back to listing every candidate when none is close, so that the text always helps.
    """
    known = sorted(candidates)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(candidate) for candidate in close) + "?"
    if not known:
        return "nothing is allowed here"
    return "allowed: " + ", ".join(known)


class StorageError(Exception):
    """Something could not be written. What was written before stays, and a run goes on from it."""


class Preemption(BaseException):
    """The run was asked to end; the same command goes on where it stopped.

    No `Exception`, so that what catches the mistakes of rewards or seeds lets it pass.
    """
