"""One entry of the conformance suite: a function, inputs, and what a float64 oracle says of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

ROWS = 8
"""Rows of the inputs of a case, so that they split over eight devices."""

Inputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A function called in one way, and an independent NumPy version of it."""

    function: str
    """Name under which the implementation offers the function."""
    label: str = ""
    """Tells several cases of one function apart."""
    inputs: Callable[[np.random.Generator], Inputs]
    """Draws the arrays, by name, in the order of the function's positional arguments.

    Floats are float64 and at least 0.01 away from every kink of the function (a clip, a hinge);
    masks are bool, indices int32.
    """
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments; a float64 array among them is cast like an input."""
    keywords: tuple[str, ...] = ()
    """Names of the inputs that the function takes by keyword; function and oracle get them so."""
    oracle: Callable[..., Any]
    """`oracle(*arrays, **options)` in float64 NumPy; the same structure as the function's result.

    Written from the paper and not from our code: no function of jaxrl_reason is called in it.
    """
    moving: tuple[str, ...] = ()
    """Names of the inputs that receive a gradient; that of every other float input must be 0."""
    surrogate: Callable[..., Any] | None = None
    """`surrogate(frozen, *arrays, **options)`: what the gradient is that of, where a part of the
    function is detached. `frozen` holds the inputs by name at the point of differentiation;
    detached parts read it, the rest reads the arrays. The oracle itself when None."""
    knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options to another value; value or gradient must differ from that of `options`."""
    mask: str | None = None
    """Name of the input that is the mask, if the function takes one."""
    masked: tuple[str, ...] = ()
    """Inputs that may hold NaN or inf where the mask is false (leading axes agree with the mask).

    Without `mask`, entries of these inputs are made bad, and only those of the result may change.
    """
    rowwise: bool = True
    """Row i of the result depends on row i of the inputs alone."""
    transforms: tuple[str, ...] = ("jit", "vmap", "devices")
    """The transformations under which the result must not change; () for functions of the host."""

    @property
    def name(self) -> str:
        """Function and label, the identity of the case in a test report."""
        return f"{self.function}-{self.label}" if self.label else self.function

    def draw(self, seed: int = 0) -> Inputs:
        """The inputs of a seed."""
        return self.inputs(np.random.default_rng(seed))
