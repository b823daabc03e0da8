"""Log-probabilities and entropies of given tokens; the only place that shifts targets.

One alignment everywhere: column t of a result belongs to `tokens[:, t]` and reads the logits (or
hidden state) of column t - 1. Column 0 has nothing before it and is 0. In a packed row the first
token of a document reads the end of the one before; it belongs to a prompt, so its mask is false.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

_SHARDS = 64
"""Blocks of the vocabulary take an equal part of this many (or fewer) stretches of it, so that an
output head that is cut over up to 64 devices is read where it lies."""
_WIDTHS = 8
"""At most so many widths, that `count` is rounded up to."""


def token_logprobs(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], *, temperature: float = 1.0
) -> Float[Array, "B T"]:
    """log p(tokens[:, t] | earlier tokens) at a sampling temperature, float32."""
    _check(logits, tokens, temperature)
    logprobs, _ = _logprobs_entropy(logits[:, :-1], tokens[:, 1:], temperature)
    return _shift(logprobs)


def token_entropy(
    logits: Float[Array, "B T V"], *, temperature: float = 1.0
) -> Float[Array, "B T"]:
    """Entropy in nats of the distribution that token t was drawn from; aligned as the log-probs."""
    _check(logits, None, temperature)
    zeros = jnp.zeros(logits[:, 1:].shape[:2], jnp.int32)
    return _shift(_logprobs_entropy(logits[:, :-1], zeros, temperature)[1])


def chunked_token_logprobs(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    chunk_size: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_logprobs` and `token_entropy` straight from hidden states, in values and gradients.

    `chunked_target_logprobs` of the tokens that follow: column t is predicted by hidden[:, t - 1].
    """
    _check(hidden, tokens, temperature)
    logprobs, entropy = chunked_target_logprobs(
        hidden[:, :-1], unembedding, tokens[:, 1:], temperature=temperature, chunk_size=chunk_size
    )
    return _shift(logprobs), _shift(entropy)


def chunked_target_logprobs(
    hidden: Float[Array, "B M D"],
    unembedding: Float[Array, "D V"],
    targets: Int[Array, "B M"],
    *,
    temperature: float = 1.0,
    chunk_size: int,
    count: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """Log-probs and entropies of targets, each predicted by the hidden state in its own column.

    The vocabulary is cut into blocks; logits of one block exist at a time. The forward pass keeps a
    running log-sum-exp, as in online softmax (arXiv 1805.02867). The backward pass computes every
    block again and turns it at once into its part of the two gradients, so neither pass holds more
    than chunk_size x V numbers. Blocks of the vocabulary rather than spans of tokens, because then
    the gradient of the output head is written once instead of being added up in every span. Only
    reverse-mode differentiation is defined.

    Args:
        hidden: hidden states after the final norm.
        unembedding: the output head.
        targets: the tokens whose log-probs are wanted.
        temperature: logits are divided by it.
        chunk_size: as many logits may exist at once as this number of tokens has. With
            chunk_size >= B x M nothing is cut and nothing computed twice.
        count: only the first so many columns are wanted; the others get 0 and cost nothing, but for
            rounding up to an eighth of M or so. One program serves every value.
    """
    _check(hidden, targets, temperature)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1 token")
    if unembedding.ndim != 2 or hidden.shape[-1] != unembedding.shape[0]:
        raise ValueError(
            f"hidden has width {hidden.shape[-1]} and unembedding {unembedding.shape}: "
            "the first axis of unembedding must equal that width"
        )
    heat = jnp.asarray(temperature, _wide(hidden.dtype))
    pair = _target_logprobs(hidden, unembedding, targets, heat, count, chunk_size)
    if count is None:
        return pair
    wanted = jnp.arange(targets.shape[1], dtype=jnp.int32)[None] < count
    return jnp.where(wanted, pair[0], 0), jnp.where(wanted, pair[1], 0)


def _primal(states, head, targets, temperature, count, chunk_size) -> tuple[Array, Array]:
    """Log-probs and entropies [B, M] from states [B, M, D] and head [D, V]."""
    return _forward(states, head, targets, temperature, count, chunk_size)[0]


_target_logprobs = jax.custom_vjp(_primal, nondiff_argnums=(5,))


def _forward(states, head, targets, temperature, count, chunk_size):
    columns = targets.shape[1]

    def at(width):
        some = states[:, :width], head, targets[:, :width], temperature
        if chunk_size >= targets.size:
            results = _whole(*some)
        else:
            results = _blockwise(*some, _block_size(some[2], head, chunk_size))
        return tuple(_widened(x, columns) for x in results)

    logprobs, log_normalizers, entropy, *logits = _at_width(count, columns, at)
    saved = (states, head, targets, temperature, count, log_normalizers, entropy, logits)
    return (logprobs, entropy), saved


def _backward(chunk_size, saved, gradients):
    states, head, targets, temperature, count, log_normalizers, entropy, logits = saved
    of_tokens = (log_normalizers, entropy, *gradients)

    def at(width):
        some = states[:, :width], head, targets[:, :width], temperature
        rest = [x[:, :width] for x in of_tokens]
        if logits:
            of_states, of_head = _whole_gradients(logits[0][:, :width], some, rest)
        else:
            size = _block_size(some[2], head, chunk_size)
            of_states, of_head = _blockwise_gradients(some, rest, size)
        return _widened(of_states, states.shape[1]), of_head

    of_states, of_head = _at_width(count, states.shape[1], at)
    # Logits are states . head / temperature: a larger temperature acts as smaller states do.
    of_temperature = -jnp.sum(of_states * states.astype(of_states.dtype)) / temperature
    return of_states.astype(states.dtype), of_head.astype(head.dtype), None, of_temperature, None


_target_logprobs.defvjp(_forward, _backward)


def _at_width(count, columns, function):
    """`function(width)` at the least of some widths that holds `count`; at all columns if None."""
    if count is None:
        return function(columns)
    # A power of two, because products of other sizes are slower.
    stride = 1 << ((columns - 1) // _WIDTHS).bit_length()
    widths = [*range(stride, columns, stride), columns]
    enough = jnp.sum(jnp.asarray(widths[:-1], jnp.int32) < count)
    return jax.lax.switch(enough, [functools.partial(function, width) for width in widths])


def _widened(values, columns):
    """Zeros to the right of [B, n, ...] up to [B, columns, ...]."""
    missing = columns - values.shape[1]
    return jnp.pad(values, ((0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)))


def _whole(states, head, targets, temperature):
    """Log-probs, log normalisers, entropies [B, M], and the logits [B, M, V]."""
    logits = _product("bmd,dv->bmv", states, head.astype(states.dtype)) / temperature
    return *_from_logits(logits, targets), logits


def _whole_gradients(logits, some, of_tokens):
    """Gradients [B, M, D] and [D, V]; `of_tokens` are the arrays that `_slope` takes."""
    states, head, targets, temperature = some
    token = jnp.arange(head.shape[1], dtype=jnp.int32)[None, None]
    wanted = token == targets.astype(jnp.int32)[..., None]
    slope = _slope(logits, wanted, *(x[..., None] for x in of_tokens))
    slope = (slope / temperature).astype(states.dtype)
    of_states = _product("bmv,dv->bmd", slope, head.astype(states.dtype))
    return of_states, _product("bmv,bmd->dv", slope, states)


def _slope(logits, wanted, log_normalizers, entropy, of_logprob, of_entropy):
    """Gradient in the logits: d log p(token) = 1[token] - p and dH = -p (log p + H)."""
    logprobs = logits - log_normalizers
    # p log p is 0 where p is 0, and not NaN.
    surprise = jnp.where(jnp.isneginf(logits), 0, logprobs) + entropy
    slope = jnp.exp(logprobs) * (of_logprob + of_entropy * surprise)
    return jnp.where(wanted, of_logprob, 0) - slope


def _blockwise(states, head, targets, temperature, size):
    """Log-probs, log normalisers and entropies [B, M]; see `_block`."""
    head = _stretches(head)
    zeros = jnp.zeros(targets.shape, _wide(states.dtype))

    def add(i, sums):
        top, total, weighted, chosen = sums
        _, _, logits, wanted = _block(states, head, targets, temperature, i, size)
        highest = jnp.maximum(top, jnp.max(logits, axis=(-2, -1)))
        # Logits are taken from the highest, so that neither exp nor entropy loses digits. Where all
        # so far are -inf there is no finite highest.
        drop = jnp.where(jnp.isneginf(top), 0, top - highest)
        below = jnp.where(jnp.isneginf(logits), 0, logits - highest[..., None, None])
        likelihood = jnp.where(jnp.isneginf(logits), 0, jnp.exp(below))
        shrink = jnp.exp(drop)
        weighted = shrink * (weighted + drop * total) + jnp.sum(likelihood * below, axis=(-2, -1))
        total = shrink * total + jnp.sum(likelihood, axis=(-2, -1))
        chosen += jnp.sum(jnp.where(wanted, logits, 0), axis=(-2, -1))
        return highest, total, weighted, chosen

    start = (zeros - jnp.inf, zeros, zeros, zeros)
    top, total, weighted, chosen = jax.lax.fori_loop(0, _count(head, size), add, start)
    log_normalizers = top + jnp.log(total)
    return chosen - log_normalizers, log_normalizers, jnp.log(total) - weighted / total


def _blockwise_gradients(some, of_tokens, size):
    """The same block by block, which computes the logits again."""
    states, head, targets, temperature = some
    width, vocabulary = head.shape
    head = _stretches(head)
    of_tokens = [x[..., None, None] for x in of_tokens]

    def add(i, sums):
        of_states, of_head = sums
        start, part, logits, wanted = _block(states, head, targets, temperature, i, size)
        slope = (_slope(logits, wanted, *of_tokens) / temperature).astype(states.dtype)
        of_states += _product("bmsv,dsv->bmd", slope, part)
        of_part = _product("bmsv,bmd->dsv", slope, states)
        # Added and not set, because the last block may overlap the one before.
        old = jax.lax.dynamic_slice_in_dim(of_head, start, size, axis=2)
        return of_states, jax.lax.dynamic_update_slice_in_dim(of_head, old + of_part, start, axis=2)

    wide = _wide(states.dtype)
    zeros = (jnp.zeros(states.shape, wide), jnp.zeros(head.shape, wide))
    of_states, of_head = jax.lax.fori_loop(0, _count(head, size), add, zeros)
    return of_states, of_head.reshape(width, vocabulary)


def _stretches(head):
    """The head [D, V] as [D, S, V / S]; a block is some columns of each of the S stretches."""
    width, vocabulary = head.shape
    return head.reshape(width, math.gcd(vocabulary, _SHARDS), -1)


def _block_size(targets, head, chunk_size):
    """Columns of a stretch in a block, so that its logits are no more than chunk_size x V."""
    columns = head.shape[1] // math.gcd(head.shape[1], _SHARDS)
    return min(columns, max(1, columns * chunk_size // max(1, targets.size)))


def _count(head, size):
    return -(-head.shape[-1] // size)


def _block(states, head, targets, temperature, i, size):
    """Block i: its first column, its part of the head, its logits [B, M, S, n], which is wanted.

    The last block ends with the vocabulary; columns that it shares with the one before get -inf.
    """
    i = i.astype(jnp.int32)
    stretches, columns = head.shape[1:]
    start = jnp.minimum(i * size, columns - size)
    part = jax.lax.dynamic_slice_in_dim(head, start, size, axis=2).astype(states.dtype)
    logits = _product("bmd,dsv->bmsv", states, part) / temperature
    column = start + jnp.arange(size, dtype=jnp.int32)[None, None, None]
    new = column >= i * size
    token = columns * jnp.arange(stretches, dtype=jnp.int32)[None, None, :, None] + column
    wanted = (token == targets.astype(jnp.int32)[..., None, None]) & new
    return start, part, jnp.where(new, logits, -jnp.inf), wanted


def _product(subscripts, left, right):
    return jnp.einsum(subscripts, left, right, preferred_element_type=_wide(left.dtype))


def _logprobs_entropy(logits, targets, temperature):
    logprobs, _, entropy = _from_logits(logits.astype(_wide(logits.dtype)) / temperature, targets)
    return logprobs, entropy


def _from_logits(logits, targets):
    """Log-probs, log normalisers and entropies [B, M] from logits [B, M, V]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # XLA's CPU backend adds along one long axis number by number, and along two with vectors.
    logits = logits.reshape(*targets.shape, math.gcd(logits.shape[-1], _SHARDS), -1)
    log_normalizers = jax.nn.logsumexp(logits, axis=(-2, -1))
    # Where a logit is -inf its probability is 0; the product must be 0 and not NaN. XLA's CPU
    # backend makes a maximum part of the sum.
    finite = jnp.maximum(logits, jnp.finfo(logits.dtype).min)
    probabilities = jnp.exp(logits - log_normalizers[..., None, None])
    entropy = log_normalizers - jnp.sum(probabilities * finite, axis=(-2, -1))
    return chosen - log_normalizers, log_normalizers, entropy


def _wide(dtype) -> jnp.dtype:
    """Float32, or float64 where that is what came in."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _shift(values: Array) -> Array:
    return jnp.pad(values, ((0, 0), (1, 0)))


def _check(outputs: Array, tokens: Array | None, temperature: float) -> None:
    if outputs.ndim != 3:
        raise ValueError(f"logits or hidden must be [B, T, channels], got shape {outputs.shape}")
    if tokens is not None and tokens.shape != outputs.shape[:2]:
        raise ValueError(
            f"tokens {tokens.shape} must match the first two axes of logits or hidden "
            f"{outputs.shape}; the shift is made here, so pass them unshifted"
        )
    if isinstance(temperature, (int, float)) and temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive")
