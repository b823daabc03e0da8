"""The host's side of the batch: which completion is in which row, and which pages it reads."""

import dataclasses
import heapq
from typing import NamedTuple

import numpy as np

from jaxrl_reason.models import PageTable
from jaxrl_reason.sampling.decode import LogitBias, Rows
from jaxrl_reason.sampling.requests import Completion
from jaxrl_reason.sampling.shapes import Level


@dataclasses.dataclass(eq=False)
class Context:
    """A prompt (with what is known of the completion, but for the last token) in its pages."""

    tokens: tuple[int, ...]
    pages: list[int]
    readers: list["Row | None"]
    """By place; as many places as the level allows."""


@dataclasses.dataclass(eq=False)
class Row:
    """A completion in flight."""

    progress: Completion
    limit: int
    """Its longest length in tokens."""
    last: int
    """Last token, not yet in the pages."""
    context: Context
    pages: list[int]
    before: int = 0
    """Own tokens in the pages."""

    @property
    def remaining(self) -> int:
        """Tokens that may still be drawn."""
        return self.limit - len(self.progress.tokens)


class Move(NamedTuple):
    """How the pages of a batch become those of another: for every new page the old one."""

    context: np.ndarray
    own: np.ndarray


class Batch:
    """Rows and pages at one level, with a number of own pages."""

    def __init__(self, level: Level, own_pages: int, page_size: int, pages_per_row: int):
        self.level = level
        self.own_pages = own_pages
        self.rows: list[Row | None] = [None] * level.rows
        self.fresh: list[Context] = []
        """Contexts that are not yet prefilled."""
        self._page_size = page_size
        self._pages_per_row = pages_per_row
        self._contexts: dict[tuple[int, ...], list[Context]] = {}
        self._free_context = list(range(level.context_pages))
        self._free_own = list(range(own_pages))

    @property
    def live(self) -> list[Row]:
        """The completions in flight."""
        return [row for row in self.rows if row is not None]

    @property
    def used_pages(self) -> tuple[int, int]:
        """Context pages and own pages that hold something."""
        return (
            self.level.context_pages - len(self._free_context),
            self.own_pages - len(self._free_own),
        )

    def admit(self, progress: Completion, limit: int) -> bool:
        """Give a completion a row and a context; false if there is no room now."""
        if None not in self.rows:
            return False
        known = (*progress.request.prompt, *progress.tokens.tolist())
        context = self._context(known[:-1])
        if context is None:
            return False
        row = Row(progress, limit, known[-1], context, [])
        context.readers[context.readers.index(None)] = row
        self.rows[self.rows.index(None)] = row
        return True

    def _context(self, tokens: tuple[int, ...]) -> Context | None:
        """A context of these tokens with a free place, made if need be."""
        contexts = self._contexts.setdefault(tokens, [])
        for context in contexts:
            if None in context.readers:
                return context
        count = -(-len(tokens) // self._page_size)
        if count > len(self._free_context):
            return None
        pages = [heapq.heappop(self._free_context) for _ in range(count)]
        context = Context(tokens, pages, [None] * self.level.readers)
        contexts.append(context)
        self.fresh.append(context)
        return context

    def release(self, row: Row) -> None:
        """Take a completion out, and give back what only it used."""
        self.rows[self.rows.index(row)] = None
        for page in row.pages:
            heapq.heappush(self._free_own, page)
        context = row.context
        context.readers[context.readers.index(row)] = None
        if not any(context.readers):
            for page in context.pages:
                heapq.heappush(self._free_context, page)
            self._contexts[context.tokens].remove(context)
            if context in self.fresh:
                self.fresh.remove(context)

    def missing_pages(self, steps: int) -> int:
        """Own pages that all rows need for so many more tokens, those they have included."""
        return sum(max(len(row.pages), self._pages(row, steps)) for row in self.live)

    def _pages(self, row: Row, steps: int) -> int:
        return -(-(row.before + min(steps, row.remaining)) // self._page_size)

    def reserve(self, steps: int) -> None:
        """Give every row the pages for so many more tokens; there must be enough."""
        for row in self.live:
            while len(row.pages) < self._pages(row, steps):
                row.pages.append(heapq.heappop(self._free_own))

    def moved(self, level: Level, own_pages: int) -> tuple["Batch", Move] | None:
        """The same completions at another level, or None if their contexts do not fit there."""
        new = Batch(level, own_pages, self._page_size, self._pages_per_row)
        context_at = np.full(level.context_pages, self.level.context_pages, np.int32)
        own_at = np.full(own_pages, self.own_pages, np.int32)
        source: dict[Context, Context] = {}
        for row in self.live:
            context = new._context(row.context.tokens)
            if context is None:
                return None
            source.setdefault(context, row.context)
            copy = dataclasses.replace(row, context=context, pages=[])
            for page in row.pages:
                copy.pages.append(heapq.heappop(new._free_own))
                own_at[copy.pages[-1]] = page
            context.readers[context.readers.index(None)] = copy
            new.rows[new.rows.index(None)] = copy
        for context, old in source.items():
            context_at[context.pages] = old.pages
        # Contexts that wait for their prefill wait in the new batch too.
        waiting = set(map(id, self.fresh))
        new.fresh = [context for context, old in source.items() if id(old) in waiting]
        return new, Move(context_at, own_at)

    def arrays(self) -> tuple[Rows, PageTable]:
        """What the next dispatch is told, on the host."""
        level, size = self.level, self._page_size
        first_own = level.context_pages * level.readers
        zeros = lambda: np.zeros(level.rows, np.int32)
        rows = Rows(*(zeros() for _ in Rows._fields[:-1]), np.zeros(level.rows, bool))
        table = PageTable(
            readers=np.full((level.context_pages, level.readers), level.rows, np.int32),
            context_tokens=np.zeros(level.context_pages, np.int32),
            owners=np.full(self.own_pages, level.rows, np.int32),
            numbers=np.zeros(self.own_pages, np.int32),
            of_row=np.full((level.rows, self._pages_per_row), first_own + self.own_pages, np.int32),
            writing=np.full((level.rows, 2), self.own_pages, np.int32),
        )
        for r, row in enumerate(self.rows):
            if row is None:
                continue
            request, current = row.progress.request, row.before // size
            rows.tokens[r], rows.before[r] = row.last, row.before
            rows.positions[r] = len(row.context.tokens) + row.before
            rows.boundary[r] = current * size
            rows.ids[r], rows.indices[r] = request.id, request.index
            rows.drawn[r], rows.remaining[r] = len(row.progress.tokens), row.remaining
            rows.live[r] = True
            place = row.context.readers.index(row)
            table.readers[row.context.pages, place] = r
            own = np.asarray(row.pages, np.int32)
            table.owners[own], table.numbers[own] = r, np.arange(len(own))
            pages = [page * level.readers + place for page in row.context.pages]
            pages += [first_own + page for page in row.pages]
            table.of_row[r, : len(pages)] = pages
            writing = row.pages[current : current + 2]
            table.writing[r, : len(writing)] = writing
        for contexts in self._contexts.values():
            for context in contexts:
                filled = len(context.tokens) - np.arange(len(context.pages)) * size
                table.context_tokens[context.pages] = np.minimum(filled, size)
        return rows, table

    def bias(self, size: int) -> LogitBias | None:
        """The logit biases of the rows; None when there is none."""
        if not any(row.progress.request.logit_bias for row in self.live):
            return None
        tokens = np.full((self.level.rows, size), np.iinfo(np.int32).max, np.int32)
        values = np.zeros(tokens.shape, np.float32)
        for r, row in enumerate(self.rows):
            if row is not None:
                biases = row.progress.request.logit_bias
                tokens[r, : len(biases)] = list(biases)
                values[r, : len(biases)] = list(biases.values())
        return LogitBias(tokens, values)


class Prefill(NamedTuple):
    """Contexts packed into rows, each beginning on a page boundary."""

    tokens: np.ndarray  # [B, S]
    positions: np.ndarray  # [B, S]
    segment_ids: np.ndarray  # [B, S]
    places: np.ndarray  # [B S / W]: context page of each piece; one past the end for none


def pack_contexts(
    contexts: list[Context], length: int, page_size: int, none: int
) -> tuple[list[Context], list[Prefill]]:
    """Rows of at most `length` tokens, one `Prefill` of one row each, and contexts too long for it.

    Args:
        contexts: what to prefill.
        length: tokens of a row, whole pages.
        page_size: tokens of a page.
        none: index that stands for no page.
    """
    up = lambda n: -(-n // page_size) * page_size
    longer = [context for context in contexts if up(len(context.tokens)) > length]
    rest = [context for context in contexts if 0 < up(len(context.tokens)) <= length]
    rows: list[list[Context]] = []
    room: list[int] = []
    for context in sorted(rest, key=lambda context: -len(context.tokens)):
        need = up(len(context.tokens))
        row = next((r for r, left in enumerate(room) if left >= need), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(context)
        room[row] -= need
    return longer, [_fill(row, length, page_size, none) for row in rows]


def _fill(row: list[Context], length: int, page_size: int, none: int) -> Prefill:
    zeros = lambda: np.zeros((1, length), np.int32)
    tokens, positions, segment_ids = zeros(), zeros(), zeros()
    places = np.full(length // page_size, none, np.int32)
    at = 0
    for number, context in enumerate(row, start=1):
        count, first = len(context.tokens), at // page_size
        tokens[0, at : at + count] = context.tokens
        positions[0, at : at + count] = np.arange(count)
        segment_ids[0, at : at + count] = number
        places[first : first + len(context.pages)] = context.pages
        at += len(context.pages) * page_size
    return Prefill(tokens, positions, segment_ids, places)
