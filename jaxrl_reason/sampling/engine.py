"""Sampling with continuous batching: prompts enter and completions leave while the batch runs.

    engine = Engine(model=model, mesh=mesh, sampling=SamplingConfig(), ...)
    session = engine.session(params, key)
    session.submit(requests)
    for completion in session:       # in the order in which they end
        ...

A prompt is prefilled once for all its completions on a device. Rows that end make room for requests
that wait; when nothing waits, the batch moves to smaller arrays. All array sizes come from a closed
set (`shapes.Level`), so the number of compiled programs has a bound, and `precompile` makes them
all.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Key

from jaxrl_reason.models import Params
from jaxrl_reason.sampling.decode import Dispatch
from jaxrl_reason.sampling.device import Device
from jaxrl_reason.sampling.requests import Request
from jaxrl_reason.sampling.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine(Device):
    """A `Device` that takes requests."""

    def session(
        self,
        params: Params,
        key: Key,
        *,
        version: int = 0,
        on_tokens: Callable[[Request, np.ndarray], None] | None = None,
    ) -> Session:
        """A run of requests under one key.

        Args:
            params: parameters of the model, as they lie for training.
            key: the draws of a request depend on it and on the request only.
            version: number of these weights, recorded for every token.
            on_tokens: called with a request and its new tokens after every dispatch (streaming).
        """
        return Session(self, params, key, version=version, on_tokens=on_tokens)

    def precompile(self, params: Params) -> int:
        """Compile all that the engine may need; returns how many programs were compiled.

        From then on, compiling anything is reported as a warning with its sizes.
        """
        before = self.programs.compiled
        params = self.place(params)
        idle = (None, jax.random.key(0), *(np.int32(0),) * 3)
        sizes = [(level, own) for level in self.levels for own in level.own_pages]
        for level, own in sizes:
            pages = self.pages_like(level, own)
            self.empty_program(level, own)
            self.decode_program(
                params, level, pages, Dispatch(*self.batch(level, own).arrays(), *idle)
            )
            for other, there in sizes:
                context, own_at = np.zeros(other.context_pages, np.int32), np.zeros(there, np.int32)
                for array, at in zip(pages, (context, context, own_at, own_at), strict=True):
                    self.move_program(array[0], at)
        for level in self.levels:
            context = self.pages_like(level, 0)._replace(own_keys=(), own_values=())
            for count in self.prefill_sizes[0]:
                for length in self.prefill_sizes[1]:
                    shape = self.row_shape(length, level.of_device.context_pages)
                    group = shape.empty(count * self.devices)
                    self.prefill_program(params, context, group)
        self.programs.warm = True
        return self.programs.compiled - before
