"""The host's side of the batch: which completion is in which row, and which pages it reads."""

import dataclasses
import heapq
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_reason.models import PageTable
from jaxrl_reason.sampling.decode import LogitBias, Rows
from jaxrl_reason.sampling.requests import Completion, Shown
from jaxrl_reason.sampling.shapes import Level


@dataclasses.dataclass(eq=False)
class Context:
    """A prompt (with what is known of the completion, but for the last token) in its pages."""

    tokens: tuple[int, ...]
    shown: Shown | None
    pages: list[int]
    readers: list["Row | None"]
    """By place; as many places as the level allows."""

    @property
    def next_position(self) -> int:
        """Of the token behind it."""
        if self.shown is None:
            return len(self.tokens)
        return self.shown.next_position + len(self.tokens) - len(self.shown.visual_index)

    @property
    def num_features(self) -> int:
        """Features of images and videos."""
        return 0 if self.shown is None else len(self.shown.features)


@dataclasses.dataclass(eq=False)
class Row:
    """A completion in flight."""

    progress: Completion
    limit: int
    """Its longest length in tokens."""
    last: int
    """Last token, not yet in the pages."""
    part: "Part"
    """Where it is."""
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


class Part:
    """The rows and pages of one device; it reads no other's."""

    def __init__(self, number: int, level: Level, own_pages: int, page_size: int):
        self.number = number
        self.level = level.of_device
        self.own_pages = own_pages // level.devices
        self.rows: list[Row | None] = [None] * self.level.rows
        self.fresh: list[Context] = []
        """Contexts that are not yet prefilled."""
        self.contexts: dict[tuple[tuple[int, ...], Shown | None], list[Context]] = {}
        self.free_context = list(range(self.level.context_pages))
        self.free_own = list(range(self.own_pages))
        self._page_size = page_size

    @property
    def live(self) -> list[Row]:
        """The completions in flight."""
        return [row for row in self.rows if row is not None]

    def has_place(self, tokens: tuple[int, ...], shown: Shown | None) -> bool:
        """Whether one more row could read a context that is there already."""
        contexts = self.contexts.get((tokens, shown), [])
        return None in self.rows and any(None in context.readers for context in contexts)

    def context(self, tokens: tuple[int, ...], shown: Shown | None) -> Context | None:
        """A context of these tokens with a free place, made if need be."""
        contexts = self.contexts.setdefault((tokens, shown), [])
        for context in contexts:
            if None in context.readers:
                return context
        count = -(-len(tokens) // self._page_size)
        if count > len(self.free_context):
            return None
        pages = [heapq.heappop(self.free_context) for _ in range(count)]
        context = Context(tokens, shown, pages, [None] * self.level.readers)
        contexts.append(context)
        self.fresh.append(context)
        return context

    def put(self, row: Row) -> None:
        """Let a row in that has been given a context here."""
        row.context.readers[row.context.readers.index(None)] = row
        self.rows[self.rows.index(None)] = row

    def release(self, row: Row) -> None:
        """Take a completion out, and give back what only it used."""
        self.rows[self.rows.index(row)] = None
        for page in row.pages:
            heapq.heappush(self.free_own, page)
        context = row.context
        context.readers[context.readers.index(row)] = None
        if not any(context.readers):
            for page in context.pages:
                heapq.heappush(self.free_context, page)
            self.contexts[context.tokens, context.shown].remove(context)
            if context in self.fresh:
                self.fresh.remove(context)

    def pages_of(self, row: Row, steps: int) -> int:
        """Own pages of a row after so many more tokens."""
        return -(-(row.before + min(steps, row.remaining)) // self._page_size)

    def missing_pages(self, steps: int) -> int:
        """Own pages that all rows need for so many more tokens, those they have included."""
        return sum(max(len(row.pages), self.pages_of(row, steps)) for row in self.live)

    def reserve(self, steps: int) -> None:
        """Give every row the pages for so many more tokens; there must be enough."""
        for row in self.live:
            while len(row.pages) < self.pages_of(row, steps):
                row.pages.append(heapq.heappop(self.free_own))

    def move_to(self, new: "Part") -> Move | None:
        """Put the same completions into another part, or None if they do not fit there."""
        context_at = np.full(new.level.context_pages, self.level.context_pages, np.int32)
        own_at = np.full(new.own_pages, self.own_pages, np.int32)
        source: dict[Context, Context] = {}
        if len(self.live) > new.level.rows:
            return None
        for row in self.live:
            context = new.context(row.context.tokens, row.context.shown)
            if context is None:
                return None
            source.setdefault(context, row.context)
            copy = dataclasses.replace(row, part=new, context=context, pages=[])
            for page in row.pages:
                copy.pages.append(heapq.heappop(new.free_own))
                own_at[copy.pages[-1]] = page
            new.put(copy)
        for context, old in source.items():
            context_at[context.pages] = old.pages
        # Contexts that wait for their prefill wait in the new part too.
        waiting = set(map(id, self.fresh))
        new.fresh = [context for context, old in source.items() if id(old) in waiting]
        return Move(context_at, own_at)

    def arrays(self, pages_per_row: int) -> tuple[Rows, PageTable]:
        """What the next dispatch is told about this part, with indices within it."""
        level, size = self.level, self._page_size
        first_own = level.context_pages * level.readers
        zeros = lambda: np.zeros(level.rows, np.int32)
        rows = Rows(*(zeros() for _ in Rows._fields[:-1]), np.zeros(level.rows, bool))
        table = PageTable(
            readers=np.full((level.context_pages, level.readers), level.rows, np.int32),
            context_tokens=np.zeros(level.context_pages, np.int32),
            context_numbers=np.zeros(level.context_pages, np.int32),
            owners=np.full(self.own_pages, level.rows, np.int32),
            numbers=np.zeros(self.own_pages, np.int32),
            of_row=np.full((level.rows, pages_per_row), first_own + self.own_pages, np.int32),
            writing=np.full((level.rows, 2), self.own_pages, np.int32),
        )
        for r, row in enumerate(self.rows):
            if row is None:
                continue
            request, current = row.progress.request, row.before // size
            rows.tokens[r], rows.before[r] = row.last, row.before
            rows.positions[r] = row.context.next_position + row.before
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
        for contexts in self.contexts.values():
            for context in contexts:
                numbers = np.arange(len(context.pages))
                filled = len(context.tokens) - numbers * size
                table.context_numbers[context.pages] = numbers
                table.context_tokens[context.pages] = np.minimum(filled, size)
        return rows, table


class Batch:
    """Rows and pages at one level, with a number of own pages, in a part for each device."""

    def __init__(self, level: Level, own_pages: int, page_size: int, pages_per_row: int):
        self.level = level
        self.own_pages = own_pages
        self.parts = [Part(d, level, own_pages, page_size) for d in range(level.devices)]
        self._page_size = page_size
        self._pages_per_row = pages_per_row

    @property
    def rows(self) -> list[Row | None]:
        """Of all parts, in the order of the arrays."""
        return [row for part in self.parts for row in part.rows]

    @property
    def live(self) -> list[Row]:
        """The completions in flight."""
        return [row for part in self.parts for row in part.live]

    @property
    def most_live(self) -> int:
        """Completions of the fullest part."""
        return max(len(part.live) for part in self.parts)

    @property
    def used_pages(self) -> tuple[int, int]:
        """Context pages and own pages that hold something."""
        free_context = sum(len(part.free_context) for part in self.parts)
        free_own = sum(len(part.free_own) for part in self.parts)
        return self.level.context_pages - free_context, self.own_pages - free_own

    def admit(self, progress: Completion, limit: int) -> bool:
        """Give a completion a row and a context; false if there is no room now.

        It goes where its context is, otherwise to the emptiest part.
        """
        known = (*progress.request.prompt, *progress.tokens.tolist())
        of = (known[:-1], progress.request.shown)
        emptiest = lambda part: (not part.has_place(*of), len(part.live), part.number)
        for part in sorted(self.parts, key=emptiest):
            if None in part.rows and (context := part.context(*of)) is not None:
                part.put(Row(progress, limit, known[-1], part, context, []))
                return True
        return False

    def missing_pages(self, steps: int) -> int:
        """Own pages that the batch must have for so many more tokens, as many in every part."""
        return len(self.parts) * max(part.missing_pages(steps) for part in self.parts)

    def reserve(self, steps: int) -> None:
        """Give every row the pages for so many more tokens; there must be enough."""
        for part in self.parts:
            part.reserve(steps)

    def moved(self, level: Level, own_pages: int) -> tuple["Batch", Move] | None:
        """The same completions at another level, or None if they do not fit there."""
        new = Batch(level, own_pages, self._page_size, self._pages_per_row)
        moves = []
        for old, part in zip(self.parts, new.parts, strict=True):
            if (move := old.move_to(part)) is None:
                return None
            moves.append(move)
        return new, Move(*(np.concatenate(at) for at in zip(*moves, strict=True)))

    def arrays(self) -> tuple[Rows, PageTable]:
        """What the next dispatch is told, on the host."""
        parts = [part.arrays(self._pages_per_row) for part in self.parts]
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

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
    positions: np.ndarray  # [B, S], or [B, S, 3] where prompts may show something
    segment_ids: np.ndarray  # [B, S]
    places: np.ndarray  # [B S / W]: context page of each piece; one past the end for none
    visual: dict[str, np.ndarray] | None = None  # what `Model.prefill` takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShape:
    """Sizes of the rows that contexts are prefilled in."""

    length: int
    """Tokens of a row, whole pages."""
    page_size: int
    """Tokens of a page."""
    none: int
    """Index that stands for no page."""
    features: tuple[int, int, int] | None = None
    """Features of images and videos, their width, and levels of deepstack; None: text alone."""

    def empty(self, rows: int) -> Prefill:
        """Rows without contexts."""
        shape = (rows, self.length)
        tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
        places = np.full(rows * self.length // self.page_size, self.none, np.int32)
        if self.features is None:
            return Prefill(tokens, positions, segment_ids, places)
        count, width, levels = self.features
        visual = {
            "visual_index": np.full(shape, -1, np.int32),
            "features": np.zeros((rows, count, width), np.float32),
        }
        if levels:
            visual["deep_features"] = np.zeros((rows, levels, count, width), np.float32)
        return Prefill(tokens, np.zeros((*shape, 3), np.int32), segment_ids, places, visual)


def pack_contexts(contexts: list[Context], shape: RowShape) -> tuple[list[Context], list[Prefill]]:
    """Rows, one `Prefill` of one row each, and contexts too long for them."""
    up = lambda n: -(-n // shape.page_size) * shape.page_size
    longer = [context for context in contexts if up(len(context.tokens)) > shape.length]
    rest = [context for context in contexts if 0 < up(len(context.tokens)) <= shape.length]
    rows: list[list[Context]] = []
    room: list[tuple[int, int]] = []
    most = shape.features[0] if shape.features else 0
    for context in sorted(rest, key=lambda context: -len(context.tokens)):
        need, features = up(len(context.tokens)), context.num_features
        fits = (r for r, (left, free) in enumerate(room) if left >= need and free >= features)
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            room.append((shape.length, most))
        rows[row].append(context)
        left, free = room[row]
        room[row] = (left - need, free - features)
    return longer, [_fill(row, shape) for row in rows]


def _fill(row: list[Context], shape: RowShape) -> Prefill:
    made = shape.empty(1)
    at = first = 0
    for number, context in enumerate(row, start=1):
        count, page = len(context.tokens), at // shape.page_size
        here = (0, slice(at, at + count))
        made.tokens[here], made.segment_ids[here] = context.tokens, number
        made.positions[here] = _positions(context, made.positions.ndim)
        made.places[page : page + len(context.pages)] = context.pages
        if context.shown is not None:
            first = _show(made.visual, context.shown, at, first)
        at += len(context.pages) * shape.page_size
    return made


def _positions(context: Context, ndim: int) -> np.ndarray:
    count, shown = len(context.tokens), context.shown
    if shown is None:
        return np.arange(count) if ndim == 2 else np.arange(count)[:, None]
    behind = shown.next_position + np.arange(count - len(shown.positions))
    return np.concatenate([shown.positions[:count], np.repeat(behind[:, None], 3, axis=1)])


def _show(visual: dict[str, np.ndarray], shown: Shown, at: int, first: int) -> int:
    """Put in what a context shows, from feature `first` on; returns the next feature."""
    index, end = shown.visual_index, first + len(shown.features)
    # The last token of a prompt is not in its context.
    here = visual["visual_index"][0, at : at + len(index)]
    here[:] = np.where(index >= 0, index + first, -1)[: len(here)]
    visual["features"][0, first:end] = shown.features
    if shown.deep_features is not None:
        visual["deep_features"][0, :, first:end] = shown.deep_features
    return end
