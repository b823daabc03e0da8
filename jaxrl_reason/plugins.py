"""Functions and classes of the user's, which a configuration names as `package.module:name`."""

import importlib
from collections.abc import Callable
from typing import Any

from jaxrl_reason.errors import InputError, nearest

PATTERN = r"^[\w.]+:\w+$"
"""What such a name looks like."""


def load_object(where: str, what: str) -> Callable[..., Any]:
    """The function or class at `package.module:name`.

    Args:
        where: its place.
        what: what it is for, in messages, such as `reward function`.

    Raises:
        InputError: there is no such module, or nothing in it that has the name and can be called.
    """
    module_name, _, name = where.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: anything may go wrong in it
        raise InputError(
            f"{what} {where!r}: {type(error).__name__} on import: {error}; a module must "
            "be installed, or its folder be in PYTHONPATH"
        ) from error
    if not callable(vars(module).get(name)):
        functions = [known for known, value in vars(module).items() if callable(value)]
        raise InputError(
            f"{what} {where!r}: module {module_name} has no function {name!r}; "
            f"{nearest(name, functions)}"
        )
    return vars(module)[name]
