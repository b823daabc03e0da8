"""Log-probabilities and entropies of given tokens; the only place that shifts targets.

One alignment everywhere: column t of a result belongs to `tokens[:, t]` and reads the logits (or
hidden state) of column t - 1. Column 0 has nothing before it and is 0. In a packed row the first
token of a document reads the end of the one before; it belongs to a prompt, so its mask is false.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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

    The sequence is cut into spans of chunk_size // B positions of every row; logits of one span
    exist at a time, in the forward pass and, by recomputation, in the backward pass. Spans run over
    positions and not over rows, so a batch sharded over devices stays where it is.

    Args:
        hidden: hidden states after the final norm.
        unembedding: the output head.
        tokens: the tokens whose log-probs are wanted; column t is predicted by hidden[:, t - 1].
        temperature: logits are divided by it.
        chunk_size: tokens whose logits may exist at once; at least one position of every row does.

    Returns:
        `(logprobs, entropy)`, values and gradients of `token_logprobs` and `token_entropy`.
    """
    _check(hidden, tokens, temperature)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1 token")
    if hidden.shape[-1] != unembedding.shape[0]:
        raise ValueError(
            f"hidden has width {hidden.shape[-1]} and unembedding {unembedding.shape}: "
            "the first axis of unembedding must equal that width"
        )
    states, targets = hidden[:, :-1], tokens[:, 1:]
    batch, length = targets.shape
    span = max(1, chunk_size // batch)
    of_span = functools.partial(_from_hidden, unembedding=unembedding, temperature=temperature)
    if span >= length:
        logprobs, entropy = of_span(states, targets)
        return _shift(logprobs), _shift(entropy)
    num_spans = -(-length // span)
    padding = num_spans * span - length
    states = jnp.pad(states, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    states = states.reshape(batch, num_spans, span, -1).swapaxes(0, 1)
    targets = targets.reshape(batch, num_spans, span).swapaxes(0, 1)
    recompute = jax.checkpoint(of_span)
    logprobs, entropy = jax.lax.map(lambda xs: recompute(*xs), (states, targets))
    join = lambda x: _shift(x.swapaxes(0, 1).reshape(batch, -1)[:, :length])
    return join(logprobs), join(entropy)


def _from_hidden(states, targets, *, unembedding, temperature):
    logits = jnp.einsum(
        "btd,dv->btv",
        states,
        unembedding.astype(states.dtype),
        preferred_element_type=_wide(states.dtype),
    )
    return _logprobs_entropy(logits, targets, temperature)


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
