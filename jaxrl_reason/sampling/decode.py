"""What runs on the device while sampling: many decode steps in one dispatch, and prefill.

The host knows every row (`Rows`, `PageTable`) and sends both with each dispatch; the device keeps
the pages of keys and values and nothing else. A row enters a step with its last token not yet in
the pages: the step writes it, and draws the next one.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_reason.models import (
    Model,
    Pages,
    PageTable,
    Params,
    Place,
    close_pages,
    open_pages,
    write_contexts,
)
from jaxrl_reason.sampling.filters import SamplingConfig, draw


class Rows(NamedTuple):
    """Completions in flight; a row that is not live is computed and ignored."""

    tokens: Int[Array, " R"]
    """Last token, not yet in the pages."""
    positions: Int[Array, " R"]
    """Its position, prompt and completion counted together."""
    before: Int[Array, " R"]
    """Own tokens already in the pages."""
    boundary: Int[Array, " R"]
    """Own tokens before the page that is being written."""
    ids: Int[Array, " R"]
    """Number of the prompt."""
    indices: Int[Array, " R"]
    """Number of the completion."""
    drawn: Int[Array, " R"]
    """Number of the next token in its completion."""
    remaining: Int[Array, " R"]
    """Tokens that may still be drawn."""
    live: Bool[Array, " R"]


class LogitBias(NamedTuple):
    """Added to the logits; a token id past the vocabulary stands for none."""

    tokens: Int[Array, "R J"]
    values: Float[Array, "R J"]


class Dispatch(NamedTuple):
    """What the host sends along for some steps."""

    rows: Rows
    table: PageTable
    """It has room for the tokens of all the steps."""
    bias: LogitBias | None
    key: Key[Array, ""]
    """A draw is a function of (key, id, index, token number)."""
    steps: Int[Array, ""]
    enough: Int[Array, ""]
    """The steps end when this many rows or fewer are live, so that the host can act."""
    enough_of_each: Int[Array, ""]
    """And when no device has more live rows than this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """What is fixed in a compiled program."""

    most_steps: int
    """Size S of `Drawn`."""
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    """A completion ends with any of them."""
    devices: int
    """Over which the rows are cut."""
    opens: bool
    """Keep the pages that are written apart while tokens are drawn (`models.OpenPages`)."""
    unstack: bool
    """Take the layers out of their stack once a dispatch: faster where a step would copy them, and
    for the time of the dispatch a second copy of the layers' parameters."""


class Drawn(NamedTuple):
    """Tokens of one dispatch."""

    tokens: Int[Array, "R S"]
    logprobs: Float[Array, "R S"]
    kept_logmass: Float[Array, "R S"]
    counts: Int[Array, " R"]
    """How many of a row's are real."""
    steps: Int[Array, ""]
    """Steps that were run."""


def decode(
    model: Model, options: DecodeOptions, params: Params, pages: Pages, dispatch: Dispatch
) -> tuple[Drawn, Pages]:
    """Up to `dispatch.steps` tokens for every live row, and the pages with them."""
    rows, table, bias = dispatch.rows, dispatch.table, dispatch.bias
    if options.unstack:
        params = model.unstack(params)
    count = rows.tokens.shape[0]
    uniforms = _uniforms(dispatch.key, rows, options.most_steps)
    empty = jnp.zeros((count, options.most_steps), jnp.float32)
    start = Drawn(
        empty.astype(jnp.int32), empty, empty, jnp.zeros(count, jnp.int32), jnp.zeros((), jnp.int32)
    )

    def unfinished(carry):
        drawn, _, _, live = carry
        of_each = jnp.sum(live.reshape(options.devices, -1).astype(jnp.int32), axis=1)
        busy = jnp.sum(of_each) > dispatch.enough
        return (drawn.steps < dispatch.steps) & busy & (jnp.max(of_each) > dispatch.enough_of_each)

    def one(carry):
        drawn, last, written, live = carry
        t = drawn.steps
        hidden, written = model.decode(
            params,
            last,
            pages=pages if options.opens else written,
            opened=written if options.opens else None,
            table=table,
            place=Place(rows.positions + t, rows.before + t, rows.boundary),
        )
        logits = model.unembed(params, hidden)
        if bias is not None:
            at = jnp.arange(count, dtype=jnp.int32)[:, None]
            logits = logits.at[at, bias.tokens].add(bias.values, mode="drop")
        u = jax.lax.dynamic_index_in_dim(uniforms, t, axis=1, keepdims=False)
        tokens, logprobs, kept_logmass = draw(logits, u, options.sampling)
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new[:, None], t, axis=1)
        drawn = Drawn(
            put(drawn.tokens, tokens),
            put(drawn.logprobs, logprobs),
            put(drawn.kept_logmass, kept_logmass),
            drawn.counts + live.astype(jnp.int32),
            t + 1,
        )
        stops = jnp.isin(tokens, jnp.asarray(options.stop_ids, jnp.int32))
        return drawn, tokens, written, live & ~stops & (t + 1 < rows.remaining)

    begin = (start, rows.tokens, open_pages(pages, table) if options.opens else pages, rows.live)
    with jax.named_scope(f"at_most_{options.most_steps}"):
        drawn, _, written, _ = jax.lax.while_loop(unfinished, one, begin)
    return drawn, close_pages(pages, written, table) if options.opens else written


def prefill(
    model: Model,
    params: Params,
    pages: Pages,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"] | Int[Array, "B S 3"],
    segment_ids: Int[Array, "B S"],
    places: Int[Array, " P"],
    visual: dict[str, Array] | None,
) -> Pages:
    """Write contexts, packed into rows and each beginning on a page boundary, into their pages."""
    keys, values = model.prefill(
        params, tokens, positions=positions, segment_ids=segment_ids, visual=visual
    )
    return write_contexts(pages, keys, values, places)


def _uniforms(key: Array, rows: Rows, steps: int) -> Float[Array, "R S"]:
    """One number in [0, 1) for each token of each row."""

    def of_row(number, index, first):
        row_key = jax.random.fold_in(jax.random.fold_in(key, number), index)
        at = first + jnp.arange(steps, dtype=jnp.int32)
        return jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(row_key, t)))(at)

    return jax.vmap(of_row)(rows.ids, rows.indices, rows.drawn)
