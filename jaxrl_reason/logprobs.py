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
    """Log-probs and entropies straight from hidden states, without the [B, T, V] logits.

    The vocabulary is cut into blocks; logits of one block exist at a time. The forward pass keeps a
    running log-sum-exp, as in online softmax (arXiv 1805.02867). The backward pass computes every
    block again and turns it at once into its part of the two gradients, so neither pass holds more
    than chunk_size x V numbers. Blocks of the vocabulary rather than spans of tokens, because then
    the gradient of the output head is written once instead of being added up in every span. Only
    reverse-mode differentiation is defined.

    Args:
        hidden: hidden states after the final norm.
        unembedding: the output head.
        tokens: the tokens whose log-probs are wanted; column t is predicted by hidden[:, t - 1].
        temperature: logits are divided by it.
        chunk_size: as many logits may exist at once as this number of tokens has. With
            chunk_size >= B x (T - 1) nothing is cut and nothing computed twice.

    Returns:
        `(logprobs, entropy)`, values and gradients of `token_logprobs` and `token_entropy`.
    """
    _check(hidden, tokens, temperature)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1 token")
    if unembedding.ndim != 2 or hidden.shape[-1] != unembedding.shape[0]:
        raise ValueError(
            f"hidden has width {hidden.shape[-1]} and unembedding {unembedding.shape}: "
            "the first axis of unembedding must equal that width"
        )
    states, targets = hidden[:, :-1], tokens[:, 1:]
    width, vocabulary = unembedding.shape
    shards = math.gcd(vocabulary, _SHARDS)
    columns = vocabulary // shards
    size = max(1, columns * chunk_size // max(1, targets.size))
    if size >= columns:
        logits = _product("btd,dv->btv", states, unembedding.astype(states.dtype))
        logprobs, entropy = _logprobs_entropy(logits, targets, temperature)
    else:
        head = unembedding.reshape(width, shards, columns)
        heat = jnp.asarray(temperature, _wide(states.dtype))
        logprobs, entropy = _blockwise(states, head, targets, heat, size)
    return _shift(logprobs), _shift(entropy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(states, head, targets, temperature, size):
    """Log-probs and entropies [B, T] from states [B, T, D] and head [D, S, V / S].

    A block is `size` columns of each of the S stretches.
    """
    return _blockwise_forward(states, head, targets, temperature, size)[0]


def _blockwise_forward(states, head, targets, temperature, size):
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
    entropy = jnp.log(total) - weighted / total
    saved = (states, head, targets, temperature, log_normalizers, entropy)
    return (chosen - log_normalizers, entropy), saved


def _blockwise_backward(size, saved, gradients):
    """With p the probabilities, d log p(token) = 1[token] - p and dH = -p (log p + H)."""
    states, head, targets, temperature, log_normalizers, entropy = saved
    of_logprob, of_entropy = (g[..., None, None] for g in gradients)

    def add(i, sums):
        of_states, of_head = sums
        start, part, logits, wanted = _block(states, head, targets, temperature, i, size)
        logprobs = logits - log_normalizers[..., None, None]
        # p log p is 0 where p is 0, and not NaN.
        surprise = jnp.where(jnp.isneginf(logits), 0, logprobs) + entropy[..., None, None]
        slope = jnp.exp(logprobs) * (of_logprob + of_entropy * surprise)
        slope = ((jnp.where(wanted, of_logprob, 0) - slope) / temperature).astype(states.dtype)
        of_states += _product("btsv,dsv->btd", slope, part)
        of_part = _product("btsv,btd->dsv", slope, states)
        # Added and not set, because the last block may overlap the one before.
        old = jax.lax.dynamic_slice_in_dim(of_head, start, size, axis=2)
        return of_states, jax.lax.dynamic_update_slice_in_dim(of_head, old + of_part, start, axis=2)

    wide = _wide(states.dtype)
    zeros = (jnp.zeros(states.shape, wide), jnp.zeros(head.shape, wide))
    of_states, of_head = jax.lax.fori_loop(0, _count(head, size), add, zeros)
    # Logits are states . head / temperature: a larger temperature acts as smaller states do.
    of_temperature = -jnp.sum(of_states * states.astype(wide)) / temperature
    return of_states.astype(states.dtype), of_head.astype(head.dtype), None, of_temperature


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _count(head, size):
    return -(-head.shape[-1] // size)


def _block(states, head, targets, temperature, i, size):
    """Block i: its first column, its part of the head, its logits [B, T, S, n], which is wanted.

    The last block ends with the vocabulary; columns that it shares with the one before get -inf.
    """
    i = i.astype(jnp.int32)
    stretches, columns = head.shape[1:]
    start = jnp.minimum(i * size, columns - size)
    part = jax.lax.dynamic_slice_in_dim(head, start, size, axis=2).astype(states.dtype)
    logits = _product("btd,dsv->btsv", states, part) / temperature
    column = start + jnp.arange(size, dtype=jnp.int32)[None, None, None]
    new = column >= i * size
    token = columns * jnp.arange(stretches, dtype=jnp.int32)[None, None, :, None] + column
    wanted = (token == targets.astype(jnp.int32)[..., None, None]) & new
    return start, part, jnp.where(new, logits, -jnp.inf), wanted


def _product(subscripts, left, right):
    return jnp.einsum(subscripts, left, right, preferred_element_type=_wide(left.dtype))


def _logprobs_entropy(logits, targets, temperature):
    logits = logits.astype(_wide(logits.dtype)) / temperature
    log_normalizers = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # Where a logit is -inf its probability is 0; the product must be 0 and not NaN.
    finite = jnp.where(jnp.isneginf(logits), 0, logits)
    probabilities = jnp.exp(logits - log_normalizers[..., None])
    entropy = log_normalizers - jnp.sum(probabilities * finite, axis=-1)
    return chosen - log_normalizers, entropy


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
