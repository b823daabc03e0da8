"""Calling reward functions on a batch, and refusing what they return wrongly.

A reward function is `f(prompts, completions, completion_ids=..., **columns) -> list[float | None]`,
plain or async. None means that the reward does not apply to that completion: it is masked, not 0.
"""

import asyncio
import concurrent.futures
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxrl_reason.errors import InputError
from jaxrl_reason.plugins import load_object

RewardFunction = Callable[..., Sequence[float | None]]
Scores = tuple[Float[np.ndarray, "B M"], Bool[np.ndarray, "B M"]]
"""Rewards of B completions by M functions, and which apply."""

_LARGEST = float(np.finfo(np.float32).max)


def score(
    functions: Mapping[str, RewardFunction],
    *,
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    first: int | None = None,
) -> Scores:
    """Every reward of every completion.

    Args:
        functions: M reward functions by name; async ones run concurrently.
        prompts: text of the prompt of each completion.
        completions: text of each completion.
        completion_ids: its token ids, the stop token included.
        columns: further columns of the data set, one entry per completion.
        first: number of the first completion in messages, where they are part of a batch.

    Returns:
        `(rewards, mask)`: 0 and false where a function returned None.

    Raises:
        InputError: a function raised, returned a wrong number of values, or a value that is not a
            finite number; the message names the reward and the row.
    """
    given = {"completion_ids": completion_ids, **columns}
    where = _where(len(completions), first)
    returned = _call(functions, prompts, completions, given, where)
    if any(map(inspect.isawaitable, returned.values())):
        # In a thread of its own: a notebook's has a loop running already.
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
            returned = thread.submit(asyncio.run, _gather(returned, where)).result()
    return _collected(returned, len(completions), first or 0)


async def score_async(
    functions: Mapping[str, RewardFunction],
    *,
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    first: int | None = None,
) -> Scores:
    """`score` for a program that has an event loop, whose other tasks go on meanwhile."""
    given = {"completion_ids": completion_ids, **columns}
    where = _where(len(completions), first)
    returned = await _gather(_call(functions, prompts, completions, given, where), where)
    return _collected(returned, len(completions), first or 0)


def load_function(where: str) -> RewardFunction:
    """The function at `package.module:function`.

    Raises:
        InputError: there is no such module or function.
    """
    return load_object(where, "reward function")


def _call(
    functions: Mapping[str, RewardFunction],
    prompts: Sequence[str],
    completions: Sequence[str],
    given: Mapping[str, Sequence[Any]],
    where: str,
) -> dict[str, Any]:
    returned: dict[str, Any] = {}
    for name, function in functions.items():
        try:
            returned[name] = function(prompts, completions, **given)
        except Exception as error:
            for started in filter(inspect.iscoroutine, returned.values()):
                started.close()
            raise _raised(name, error, where) from error
    return returned


async def _gather(returned: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What functions returned, with the results of the async ones, in the same order."""
    waiting = {name: value for name, value in returned.items() if inspect.isawaitable(value)}
    results = await asyncio.gather(*waiting.values(), return_exceptions=True)
    for name, value in zip(waiting, results, strict=True):
        if isinstance(value, BaseException):
            raise _raised(name, value, where) from value
    return {**returned, **dict(zip(waiting, results, strict=True))}


def _raised(name: str, error: BaseException, where: str) -> InputError:
    return InputError(f"reward {name!r} raised {type(error).__name__}{where}: {error}")


def _where(count: int, first: int | None) -> str:
    if first is None:
        return ""
    last = first + count - 1
    return f" for completion {first}" if count == 1 else f" for completions {first} to {last}"


def _collected(returned: Mapping[str, Any], count: int, first: int) -> Scores:
    rewards = np.zeros((count, len(returned)), np.float32)
    mask = np.zeros(rewards.shape, bool)
    for m, (name, values) in enumerate(returned.items()):
        rewards[:, m], mask[:, m] = _checked(name, values, count, first)
    return rewards, mask


def _checked(name: str, values: Any, count: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        values = list(values)
    except TypeError as error:
        raise InputError(
            f"reward {name!r} returned {type(values).__name__}; return a list with one number, or "
            "None, for each completion"
        ) from error
    if len(values) != count:
        raise InputError(
            f"reward {name!r} returned {len(values)} values for {count} completions; return one "
            "for each, None where the reward does not apply"
        )
    rewards, mask = np.zeros(count, np.float32), np.zeros(count, bool)
    for row, value in enumerate(values):
        if value is None:
            continue
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= _LARGEST:
            raise InputError(
                f"reward {name!r} returned {value!r} for completion {first + row}; return a finite "
                "number, or None where the reward does not apply"
            )
        rewards[row], mask[row] = number, True
    return rewards, mask
