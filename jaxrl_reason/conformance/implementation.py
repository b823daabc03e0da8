"""Whose functions are checked: those of a module that is named, or those of this package."""

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

OWN = "jaxrl_reason"
"""Name of the implementation that is checked when none is named."""


class ImplementationError(Exception):
    """A named module that cannot be checked."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Functions by the names that the cases use."""

    name: str
    functions: Mapping[str, Callable[..., Any]]

    @property
    def is_own(self) -> bool:
        """Whether these are the functions of this package."""
        return self.name == OWN


def own() -> Implementation:
    """All public functions of the library of losses, in one namespace."""
    from jaxrl_reason import advantages, arrays, logprobs, losses, objectives

    found = {}
    for module in (arrays, logprobs, losses, advantages, objectives):
        found.update(public_functions(module))
    return Implementation(OWN, found)


def public_functions(module: Any) -> dict[str, Callable[..., Any]]:
    """The functions that a module lists in `__all__`, or that it defines without underscore."""
    listed = getattr(module, "__all__", None)
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and (
            name in listed
            if listed is not None
            else value.__module__ == module.__name__ and not name.startswith("_")
        )
    }


def load(name: str, wanted: Iterable[str]) -> Implementation:
    """The functions of a module that have one of the wanted names.

    Raises:
        ImplementationError: when the module cannot be imported or has none of them.
    """
    if name == OWN:
        return own()
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise ImplementationError(
            f"--impl {name}: the module cannot be imported ({type(error).__name__}: {error})"
        ) from error
    wanted = sorted(set(wanted))
    functions = {each: getattr(module, each) for each in wanted if hasattr(module, each)}
    if not functions:
        raise ImplementationError(
            f"--impl {name}: the module has none of the functions that are checked; it should "
            f"offer some of {', '.join(wanted)}"
        )
    return Implementation(name, functions)


def prepare_devices() -> None:
    """Eight devices of the CPU, unless the environment or an earlier use of jax decides otherwise.

    XLA sizes its thread pools from NPROC. With fewer threads than twice the devices a program that
    is spread over them can wait for a collective for ever.
    """
    os.environ["NPROC"] = "16"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    imported = "jax" in sys.modules
    import jax

    if imported and jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    try:
        jax.config.update("jax_num_cpu_devices", 8)
    except RuntimeError:
        # The backend runs already; tests that need eight devices are then skipped.
        return
