"""Decoding over pages of keys and values: memory follows the tokens, the cache is read in place.

A page holds W consecutive tokens of one sequence, for all heads of a layer. There are two kinds:
pages of a context (a prompt), read by all the rows that continue it, and pages of a row's own
tokens. Which row reads which page is data (`PageTable`), so rows come, go and move without a copy
of what they have seen.

Usual paged attention gathers the pages of every row and so copies the cache at every step. Here the
*queries* are gathered, one set for every page, and they are tiny: each page answers those of its
readers (a shared page is read once for all of them), and a row then merges the partial softmaxes
of its pages. Keys lie with their tokens innermost, so that scores are sums over contiguous memory.

A token is written into its page in place, where the device does that. A TPU would copy the whole
cache at every step, into an order of axes that suits an update here and there. For it the page that
a row writes to, and the one after it, are apart from the others while tokens are drawn
(`OpenPages`) and go back once a dispatch, and steps only read the cache.

Rows and pages are cut over the devices of a mesh alike: a device has pages of its own rows, and
its part of the table counts both from its own first. So no key or value is ever sent.

Einsum alphabet: R rows, A context pages, Q readers of a context page, N own pages, W tokens of a
page, E pages of a row, K key/value heads, G query heads of each, H head size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.mesh import cut

_NEVER = float(jnp.finfo(jnp.float32).min)


class Pages(NamedTuple):
    """Keys and values by layer."""

    context_keys: tuple[Float[Array, "A K H W"], ...]
    context_values: tuple[Float[Array, "A K W H"], ...]
    own_keys: tuple[Float[Array, "N K H W"], ...]
    own_values: tuple[Float[Array, "N K W H"], ...]

    def of_layer(self, layer: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Keys and values of its context pages, and of its own pages."""
        context = (self.context_keys[layer], self.context_values[layer])
        return context, (self.own_keys[layer], self.own_values[layer])


class OpenPages(NamedTuple):
    """Own pages that are being written: those of row r are 2 r and 2 r + 1, in order."""

    keys: tuple[Float[Array, "2R K H W"], ...]
    values: tuple[Float[Array, "2R K W H"], ...]


class PageTable(NamedTuple):
    """Who reads what. Indices one past the end stand for none.

    Of several devices each has its own part, whose indices begin at 0.
    """

    readers: Int[Array, "A Q"]
    """Rows that read a context page."""
    context_tokens: Int[Array, " A"]
    """Tokens in a context page."""
    context_numbers: Int[Array, " A"]
    """Place of a context page in its context: page i has its tokens from i W on."""
    owners: Int[Array, " N"]
    """Row of an own page."""
    numbers: Int[Array, " N"]
    """Place of an own page among its row's: page i has the row's own tokens from i W on."""
    of_row: Int[Array, "R E"]
    """Pages of a row: a Q + q for its place q among the readers of context page a, A Q + n for own
    page n."""
    writing: Int[Array, "R 2"]
    """Own page of the next token, and the own page after it."""


class Place(NamedTuple):
    """Where the next token of every row goes."""

    positions: Int[Array, " R"]
    """Its position in its sequence."""
    before: Int[Array, " R"]
    """The row's own tokens written so far."""
    boundary: Int[Array, " R"]
    """Number of own tokens before the page `PageTable.writing[:, 0]`."""


def empty_pages(config: ModelConfig, context: int, own: int, size: int) -> Pages:
    """Pages without tokens: how many for contexts, how many own ones, and their tokens."""
    heads, width = config.num_key_value_heads, config.head_dim
    layers = range(config.num_hidden_layers)
    zeros = lambda *shape: tuple(jnp.zeros(shape, jnp.dtype(config.dtype)) for _ in layers)
    return Pages(
        zeros(context, heads, width, size),
        zeros(context, heads, size, width),
        zeros(own, heads, width, size),
        zeros(own, heads, size, width),
    )


def write_contexts(
    pages: Pages,
    keys: Float[Array, "L B S K H"],
    values: Float[Array, "L B S K H"],
    places: Int[Array, " P"],
) -> Pages:
    """Put rows of prefilled tokens into context pages; piece p of the B S / W goes to places[p].

    A device puts its own rows into its own pages.
    """

    def specs(rows, heads):
        of_pages, of_tokens = PartitionSpec(rows, heads), PartitionSpec(None, rows, None, heads)
        return (of_pages, of_tokens, of_tokens, PartitionSpec(rows)), of_pages

    context = (pages.context_keys, pages.context_values)
    write = cut(_write_contexts, keys.shape[1], specs)
    new_keys, new_values = write(context, keys, values, places)
    return pages._replace(context_keys=new_keys, context_values=new_values)


def _write_contexts(context, keys, values, places):
    old_keys, old_values = context
    size, (heads, width) = old_keys[0].shape[-1], keys.shape[-2:]
    pieces = lambda x: x.reshape(x.shape[0], -1, size, heads, width)
    put = lambda old, new: old.at[places].set(new.astype(old.dtype), mode="drop")
    new_keys = pieces(keys).transpose(0, 1, 3, 4, 2)
    new_values = pieces(values).transpose(0, 1, 3, 2, 4)
    return (
        tuple(put(old, new_keys[i]) for i, old in enumerate(old_keys)),
        tuple(put(old, new_values[i]) for i, old in enumerate(old_values)),
    )


def open_pages(pages: Pages, table: PageTable) -> OpenPages:
    """The pages that `table.writing` names, taken out for `attend_pages`."""

    def specs(rows, heads):
        return (PartitionSpec(rows, heads), PartitionSpec(rows)), PartitionSpec(rows, heads)

    take = lambda own, writing: jax.tree.map(
        lambda x: jnp.take(x, writing.reshape(-1), axis=0, mode="clip"), own
    )
    own = (pages.own_keys, pages.own_values)
    return OpenPages(*cut(take, table.writing.shape[0], specs)(own, table.writing))


def close_pages(pages: Pages, opened: OpenPages, table: PageTable) -> Pages:
    """The pages with those of `open_pages` put back."""

    def specs(rows, heads):
        of_pages = PartitionSpec(rows, heads)
        return (of_pages, of_pages, PartitionSpec(rows)), of_pages

    put = lambda own, opened, writing: jax.tree.map(
        lambda old, new: old.at[writing.reshape(-1)].set(new, mode="drop"), own, opened
    )
    own, close = (pages.own_keys, pages.own_values), cut(put, table.writing.shape[0], specs)
    keys, values = close(own, tuple(opened), table.writing)
    return pages._replace(own_keys=keys, own_values=values)


def attend_pages(
    queries: Float[Array, "R 1 N H"],
    keys: Float[Array, "R 1 K H"],
    values: Float[Array, "R 1 K H"],
    pages: tuple[tuple[Array, Array], tuple[Array, Array]],
    opened: tuple[Array, Array] | None,
    table: PageTable,
    place: Place,
    window: int | None = None,
) -> tuple[Float[Array, "R 1 N H"], tuple[Array, Array]]:
    """One token of every row: its keys and values are written, then it looks at its pages.

    Args:
        queries: of the token.
        keys: of the token.
        values: of the token.
        pages: `Pages.of_layer`; of own ones that are open, what `opened` has counts.
        opened: keys and values of the layer's `OpenPages`; None: tokens are written into own pages.
        table: who reads what.
        place: where the token goes.
        window: how many positions a token of a sliding layer sees.

    Returns:
        The mixed values, and the layer's keys and values with the token added: open or own ones.
    """

    def specs(rows, heads):
        of_rows, of_tokens = PartitionSpec(rows), PartitionSpec(rows, None, heads)
        of_pages = PartitionSpec(rows, heads)
        tokens = (of_tokens, of_tokens, of_tokens)
        return (tokens, of_pages, of_pages, of_rows, of_rows), (of_tokens, of_pages)

    attend = cut(functools.partial(_attend, window=window), queries.shape[0], specs)
    return attend((queries, keys, values), opened, pages, table, place)


def _attend(token, opened, pages, table: PageTable, place: Place, *, window: int | None):
    """`attend_pages` of one device."""
    (queries, keys, values), (context, own) = token, pages
    rows, _, heads, width = queries.shape
    kv_heads, size = keys.shape[2], own[0].shape[-1]
    ahead, slot = (place.before - place.boundary) // size, place.before % size

    def write(pair, page):
        store = lambda old, at, new: old.at[at].set(new[:, 0].astype(old.dtype), mode="drop")
        return (
            store(pair[0], (page, slice(None), slice(None), slot), keys),
            store(pair[1], (page, slice(None), slot), values),
        )

    if opened is None:
        own = write(own, jnp.take_along_axis(table.writing, ahead[:, None], axis=1)[:, 0])
    else:
        opened = write(opened, jnp.arange(0, 2 * rows, 2, dtype=jnp.int32) + ahead)

    grouped = queries.reshape(rows, kv_heads, heads // kv_heads, width)
    slots = jnp.arange(size, dtype=jnp.int32)[None]

    def of_rows(pair, row, first):
        """Own pages with tokens from number `first` on, asked by their rows."""
        written = jnp.take(place.before, row, mode="clip") + 1 - first
        visible = slots < written[:, None]
        if window is not None:
            visible &= (written - 1)[:, None] - slots < window
        asked = jnp.take(grouped, row[:, None], axis=0, mode="clip")
        return _answer(asked, *pair, visible[:, None])

    of_context = (slots < table.context_tokens[:, None])[:, None]
    if window is not None:
        at = jnp.take(place.positions, table.readers, mode="clip")[..., None]
        first = (table.context_numbers * size)[:, None, None]
        of_context = of_context & (at - (first + slots[None]) < window)
    asked = jnp.take(grouped, table.readers, axis=0, mode="clip")
    of_row = table.of_row
    parts = [_answer(asked, *context, of_context), of_rows(own, table.owners, table.numbers * size)]
    if opened is not None:
        each = jnp.repeat(jnp.arange(rows, dtype=jnp.int32), 2)
        first = (place.boundary[:, None] + jnp.asarray([[0, size]], jnp.int32)).reshape(-1)
        parts.append(of_rows(opened, each, first))
        of_row = _with_opened(table, context[0].shape[0], own[0].shape[0])
    mixed = _merge(jax.tree.map(lambda *each: jnp.concatenate(each), *parts), of_row)
    mixed = mixed.astype(queries.dtype).reshape(rows, 1, heads, width)
    return mixed, own if opened is None else opened


def _with_opened(table: PageTable, contexts: int, own: int) -> Int[Array, "R E"]:
    """`table.of_row` where open pages follow the own ones, and stand for those they were."""
    rows, readers = table.writing.shape[0], table.readers.shape[1]
    first_own = contexts * readers
    first_open = first_own + own
    of_row = jnp.where(table.of_row < first_open, table.of_row, first_open + 2 * rows)
    for i in range(2):
        here = first_open + 2 * jnp.arange(rows, dtype=jnp.int32) + i
        is_open = table.of_row == (first_own + table.writing[:, i])[:, None]
        of_row = jnp.where(is_open & (table.writing[:, i] < own)[:, None], here[:, None], of_row)
    return of_row


class _Part(NamedTuple):
    """A softmax over the tokens of one page, not yet normalised, for each of its readers."""

    top: Float[Array, "P K G"]
    total: Float[Array, "P K G"]
    mixed: Float[Array, "P K G H"]


def _answer(
    queries: Float[Array, "A Q K G H"],
    keys: Float[Array, "A K H W"],
    values: Float[Array, "A K W H"],
    visible: Bool[Array, "A Q W"] | Bool[Array, "A 1 W"],
) -> _Part:
    pages, readers, kv_heads, groups, width = queries.shape
    by_head = queries.swapaxes(1, 2).reshape(pages, kv_heads, readers * groups, width)
    scores = jnp.einsum("akqh,akhw->akqw", by_head, keys, preferred_element_type=jnp.float32)
    if visible.shape[1] > 1:
        visible = jnp.repeat(visible, groups, axis=1)
    scores = jnp.where(visible[:, None], scores * jnp.float32(width**-0.5), _NEVER)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    mixed = jnp.einsum(
        "akqw,akwh->akqh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )

    def by_reader(x):
        x = x.reshape(pages, kv_heads, readers, groups, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(pages * readers, *x.shape[2:])

    return _Part(by_reader(top), by_reader(total), by_reader(mixed))


def _merge(parts: _Part, of_row: Int[Array, "R E"]) -> Float[Array, "R K G H"]:
    take = lambda x, fill: jnp.take(x, of_row, axis=0, mode="fill", fill_value=fill)
    tops = take(parts.top, _NEVER)
    shares = jnp.exp(tops - jnp.max(tops, axis=1, keepdims=True))
    # A row without pages is nobody's; a total of 1 keeps it finite.
    total = jnp.sum(shares * take(parts.total, 1.0), axis=1)
    mixed = jnp.sum(shares[..., None] * take(parts.mixed, 0.0), axis=1)
    return mixed / total[..., None]
