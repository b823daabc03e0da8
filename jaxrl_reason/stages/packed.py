"""Completions as text, for what a checkpoint says of itself."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_reason.sampling import Completion, Request

_ARRAYS = ("tokens", "logprobs", "kept_logmass", "sampled", "versions")
_NOBODY = Request(prompt=(), id=0)

Placed = tuple[int, int, Completion]
"""Number of a prompt, number of a completion among those of the prompt, and the completion."""


def pack(completions: Sequence[Placed]) -> str:
    """All of the completions, at least one, but their requests: compressed, bit for bit."""
    made = [completion for _, _, completion in completions]
    join = lambda name: np.concatenate([getattr(one, name) for one in made])
    arrays: dict[str, Any] = {name: join(name) for name in _ARRAYS}
    arrays["places"] = np.asarray([(number, index) for number, index, _ in completions], np.int64)
    arrays["lengths"] = np.asarray([len(one.tokens) for one in made], np.int64)
    arrays["reasons"] = np.asarray([one.finish_reason for one in made], np.str_)
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def unpack(text: str) -> list[Placed]:
    """What `pack` was given, with requests that say nothing."""
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as arrays:
        found = dict(arrays)
    ends = np.cumsum(found["lengths"])
    completions = []
    for place, end, length, reason in zip(
        found["places"], ends, found["lengths"], found["reasons"], strict=True
    ):
        here = slice(end - length, end)
        cut = {name: found[name][here] for name in _ARRAYS}
        one = Completion(request=_NOBODY, finish_reason=str(reason), **cut)
        completions.append((int(place[0]), int(place[1]), one))
    return completions
