"""A run of requests through the engine."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jaxtyping import Key

from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Params
from jaxrl_reason.sampling.batch import Batch, Row, pack_contexts
from jaxrl_reason.sampling.decode import Dispatch
from jaxrl_reason.sampling.device import BIASED_TOKENS, Device
from jaxrl_reason.sampling.requests import Completion, Request
from jaxrl_reason.sampling.shapes import Level


class Session:
    """Requests under one key; iterating over it yields completions in the order in which they end.

    More may be submitted at any time, also inside the loop over it.
    """

    def __init__(
        self,
        engine: Device,
        params: Params,
        key: Key,
        *,
        version: int = 0,
        on_tokens: Callable[[Request, np.ndarray], None] | None = None,
    ):
        """See `Engine.session`."""
        self._engine, self._key, self._on_tokens = engine, key, on_tokens
        self._params, self._version = engine.place(params), version
        self._waiting: deque[Completion] = deque()
        self._ended: deque[Completion] = deque()
        self._batch: Batch | None = None
        self._pages = None
        self._compiled_before = (engine.programs.compiled, engine.programs.seconds)
        self._counts = dict.fromkeys(
            (
                "tokens",
                "row_steps",
                "steps",
                "dispatches",
                "moves",
                "prefill_tokens",
                "prefill_padding",
                "most_pages",
            ),
            0,
        )
        self._seconds = 0.0

    @property
    def stats(self) -> dict[str, float]:
        """Counts since the session began.

        `tokens` drawn and kept; `row_steps`, rows x decode steps computed for them, so that
        `wasted_tokens` is their difference; prefilled tokens and padding; `most_pages` of keys and
        values at once; `seconds` inside the engine, compiling included; `compiles`.
        """
        programs, (count, seconds) = self._engine.programs, self._compiled_before
        return {
            **self._counts,
            "wasted_tokens": self._counts["row_steps"] - self._counts["tokens"],
            "seconds": self._seconds,
            "compiles": programs.compiled - count,
            "compile_seconds": programs.seconds - seconds,
        }

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests, in this order.

        Raises:
            InputError: an empty or too long prompt, or one whose completion has no room.
        """
        for request in requests:
            self._check(request)
            progress = Completion.begin(request)
            if len(progress.tokens) >= self._limit(request):
                self._ended.append(progress.ended("length", self._limit(request)))
            else:
                self._waiting.append(progress)

    def _limit(self, request: Request) -> int:
        longest = self._engine.max_completion_length
        return longest if request.max_tokens is None else min(longest, request.max_tokens)

    def _check(self, request: Request) -> None:
        longest = self._engine.max_prompt_length
        if not 0 < len(request.prompt) <= longest:
            raise InputError(
                f"prompt {request.id} has {len(request.prompt)} tokens; allowed are 1 to "
                f"max_prompt_length={longest}; shorten it or raise max_prompt_length"
            )
        self._check_shown(request)
        if request.stop and self._engine.detokenize is None:
            raise ValueError("stop strings need an engine with detokenize")
        if len(request.logit_bias) > BIASED_TOKENS:
            raise ValueError(
                f"logit_bias has {len(request.logit_bias)} tokens; at most {BIASED_TOKENS}"
            )

    def _check_shown(self, request: Request) -> None:
        shown, most = request.shown, self._engine.visual_tokens
        if shown is None:
            return
        if len(shown.features) > most:
            raise InputError(
                f"prompt {request.id} shows {len(shown.features)} tokens of images and videos; "
                f"max_visual_tokens={most} is the most; show fewer or smaller ones, or raise it"
            )
        if len(shown.visual_index) != len(request.prompt):
            raise ValueError(
                f"prompt {request.id} has {len(request.prompt)} tokens and visual_index "
                f"{len(shown.visual_index)}"
            )

    def update(self, params: Params, *, version: int) -> None:
        """Go on with other weights. Keys and values of tokens already seen stay as they were."""
        self._params, self._version = self._engine.place(params), version

    def abort(self) -> list[Completion]:
        """Stop everything. What was begun comes back with reason "aborted", to be resumed."""
        rows = self._batch.live if self._batch is not None else []
        unfinished = [row.progress.ended("aborted") for row in rows]
        unfinished += [progress.ended("aborted") for progress in self._waiting]
        self._waiting.clear()
        self._batch = self._pages = None
        return unfinished

    def __iter__(self) -> Iterator[Completion]:
        return self

    def __next__(self) -> Completion:
        while not self._ended:
            if not self._waiting and (self._batch is None or not self._batch.live):
                self._batch = self._pages = None
                raise StopIteration
            self._advance()
        return self._ended.popleft()

    def _advance(self) -> None:
        """One dispatch, and what must be done before it."""
        began = time.monotonic()
        self._fit()
        self._admit()
        steps = min(self._engine.most_steps, max(row.remaining for row in self._batch.live))
        self._grow(steps)
        batch = self._batch
        batch.reserve(steps)
        context, own = batch.used_pages
        self._counts["most_pages"] = max(self._counts["most_pages"], context + own)
        dispatch = Dispatch(
            *batch.arrays(),
            bias=batch.bias(BIASED_TOKENS),
            key=self._key,
            steps=np.int32(steps),
            **self._enough(),
        )
        drawn, self._pages = self._engine.run_decode(
            self._params, batch.level, self._pages, dispatch
        )
        drawn = jax.device_get(drawn)
        self._counts["dispatches"] += 1
        self._counts["steps"] += int(drawn.steps)
        self._counts["row_steps"] += int(drawn.steps) * batch.level.rows
        for r, row in enumerate(batch.rows):
            if row is not None:
                n = int(drawn.counts[r])
                self._collect(
                    row, drawn.tokens[r, :n], drawn.logprobs[r, :n], drawn.kept_logmass[r, :n]
                )
        self._seconds += time.monotonic() - began

    def _fit(self) -> None:
        """Use the smallest arrays that hold all that is in flight or waits."""
        levels = self._engine.levels
        live = len(self._batch.live) if self._batch is not None else 0
        fitting = [level for level in levels if level.rows >= live + len(self._waiting)]
        if self._batch is None:
            level = fitting[-1] if fitting else levels[0]
            self._batch = self._engine.batch(level, level.own_pages[0])
            self._pages = self._engine.empty_pages(level, level.own_pages[0])
            return
        current = self._batch.level
        if not fitting and current.rows < levels[0].rows:
            fitting = [levels[0]]
        for level in reversed(fitting):
            if level == current or self._move(level):
                return

    def _move(self, level: Level) -> bool:
        need = self._batch.missing_pages(0)
        moved = None
        if need <= level.own_pages[-1]:
            moved = self._batch.moved(level, level.least_own_pages(need))
        if moved is None:
            return False
        self._batch, (context_at, own_at) = moved
        self._pages = self._engine.run_move(self._pages, context_at, own_at)
        self._counts["moves"] += 1
        return True

    def _grow(self, steps: int) -> None:
        """Have enough pages for the next tokens."""
        need = self._batch.missing_pages(steps)
        if need > self._batch.own_pages:
            level = self._batch.level
            own = level.least_own_pages(need)
            self._batch, (context_at, own_at) = self._batch.moved(level, own)
            self._pages = self._engine.run_move(self._pages, context_at, own_at)
            self._counts["moves"] += 1

    def _admit(self) -> None:
        """Give waiting requests their rows, in order, and prefill their contexts."""
        while self._waiting and self._batch.admit(
            self._waiting[0], self._limit(self._waiting[0].request)
        ):
            self._waiting.popleft()
        engine, parts = self._engine, self._batch.parts
        none = self._batch.level.of_device.context_pages
        counts, lengths = engine.prefill_sizes
        fresh = [part.fresh for part in parts]
        for length in lengths:
            shape = engine.row_shape(length, none)
            packed = [pack_contexts(contexts, shape) for contexts in fresh]
            fresh, rows = zip(*packed, strict=True)
            while most := max(map(len, rows)):
                count = next((n for n in counts if n >= most), counts[-1])
                filled = [[*own[:count], *[shape.empty(1)] * (count - len(own))] for own in rows]
                together = [row for own in filled for row in own]
                group = jax.tree.map(lambda *x: np.concatenate(x), *together)
                self._pages = engine.run_prefill(self._params, self._pages, group)
                used = int(np.count_nonzero(group.segment_ids))
                self._counts["prefill_tokens"] += used
                self._counts["prefill_padding"] += group.tokens.size - used
                rows = [own[count:] for own in rows]
        for part in parts:
            part.fresh = []

    def _enough(self) -> dict[str, np.int32]:
        """How few live rows end a dispatch early: when others may enter, or fewer arrays do."""
        batch = self._batch
        live, most = len(batch.live), batch.most_live
        if self._waiting:
            enough, of_each = live - max(1, batch.level.rows // 8), 0
        else:
            smaller = [n.of_device.rows for n in self._engine.levels if n.rows < batch.level.rows]
            enough, of_each = 0, 0
            if smaller:
                of_each = smaller[0] if most > smaller[0] else most - 1
        return {"enough": np.int32(enough), "enough_of_each": np.int32(of_each)}

    def _collect(
        self, row: Row, tokens: np.ndarray, logprobs: np.ndarray, kept_logmass: np.ndarray
    ) -> None:
        """Add a row's new tokens, and let it go if it has ended."""
        row.progress = row.progress.extended(tokens, logprobs, kept_logmass, self._version)
        row.before += len(tokens)
        row.last = int(tokens[-1])
        length, ends_by_text = self._stop_string(row.progress, len(tokens))
        new = tokens[: len(tokens) - (len(row.progress.tokens) - length)]
        self._counts["tokens"] += len(new)
        if self._on_tokens is not None:
            self._on_tokens(row.progress.request, new)
        if ends_by_text or int(new[-1]) in self._engine.stop_ids:
            self._end(row, row.progress.ended("stop", length))
        elif row.remaining <= 0:
            self._end(row, row.progress.ended("length"))

    def _end(self, row: Row, completion: Completion) -> None:
        row.part.release(row)
        self._ended.append(completion)

    def _stop_string(self, progress: Completion, new: int) -> tuple[int, bool]:
        """Tokens up to the end of the first stop string, and whether there is one."""
        tokens, stops = progress.tokens, progress.request.stop
        whole = len(tokens)
        if not stops:
            return whole, False
        has_stop = lambda n: any(s in self._engine.detokenize(tokens[:n].tolist()) for s in stops)
        if not has_stop(whole):
            return whole, False
        return next(n for n in range(whole - new + 1, whole + 1) if has_stop(n)), True
