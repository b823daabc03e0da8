"""What the hardware can do, measured here and now, and how much of it a workload must ask for."""

import functools
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from jaxrl_reason.bench.workloads import Shape

_TRIES = 5


def measure(dtype: str) -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s of reading and writing memory, one device."""
    large = jax.default_backend() != "cpu"
    return {
        "matmul_flops": _matmul(8192 if large else 2048, dtype),
        "memory_bytes": _memory(2**30 if large else 2**26),
    }


def update_flops(shape: Shape, lengths: Iterable[int]) -> float:
    """FLOPs of forward and backward pass on documents; causal attention counted once."""
    heads = shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers
    forward = sum(2 * shape.num_parameters * n + 2 * heads * n * n for n in lengths)
    return 3.0 * forward


def decode_bytes(shape: Shape, steps: int, rows: Iterable[tuple[int, int]]) -> float:
    """Bytes that decoding must read: the parameters at every step, and each row's keys and values.

    Args:
        shape: of the model.
        steps: decode steps.
        rows: tokens of prompt and completion of each.
    """
    size = jnp.dtype(shape.dtype).itemsize
    kept = 2 * shape.num_key_value_heads * shape.head_dim * shape.num_hidden_layers
    slots = sum(completion * prompt + completion * completion // 2 for prompt, completion in rows)
    return float(size * (steps * shape.num_parameters + kept * slots))


def _best(run: Callable[[], jax.Array]) -> float:
    """Seconds of the fastest of several runs after the first, which compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _matmul(n: int, dtype: str) -> float:
    x = jnp.ones((n, n), dtype)
    return 2 * n**3 / _best(functools.partial(jax.jit(jnp.dot), x, x))


def _memory(count: int) -> float:
    x = jnp.zeros((count,), jnp.float32)
    return 2 * x.nbytes / _best(functools.partial(jax.jit(jnp.negative), x))
