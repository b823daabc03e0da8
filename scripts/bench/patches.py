"""Time and memory of attention among patches of a video: parts with neighbours, and all pairs.

    python scripts/bench/patches.py --patches 14336 --frame 896 --repeats 5

A run is the value and the gradients in queries, keys and values, float32, of one row whose frames
have an id each. Both versions alternate in one process; they differ in `attention_equal.NEAR`
alone. Seconds are medians and ranges; ratios are all pairs / parts of neighbouring runs, given as
median and range. Memory is what the compiled program needs beside its arguments and results (the
compiler's figure).
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason.models import attention_equal
from jaxrl_reason.models.attention_equal import attend_equal


def compiled(near: tuple[int, ...], *shapes: jax.ShapeDtypeStruct):
    """The value and gradients with parts of these sizes."""

    def loss(queries, keys, values, ids):
        return jnp.sum(jnp.sin(attend_equal(queries, keys, values, ids)))

    attention_equal.NEAR = near
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()


def middle(values: list[float], unit: str = "") -> str:
    """Median and range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.3g}{unit} ({low:.3g} to {high:.3g})"


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patches", type=int, default=14336)
    parser.add_argument("--frame", type=int, default=896, help="patches of a frame")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (1, arguments.patches, arguments.heads, arguments.width)
    given = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3)]
    given.append(jnp.asarray(1 + np.arange(arguments.patches) // arguments.frame, jnp.int32)[None])
    near = attention_equal.NEAR
    versions = {"all pairs": compiled((), *given), "parts": compiled(near, *given)}
    took: dict[str, list[float]] = {name: [] for name in versions}
    found = {}
    for _ in range(arguments.repeats + 1):
        for name, version in versions.items():
            began = time.perf_counter()
            found[name] = jax.block_until_ready(version(*given))
            took[name].append(time.perf_counter() - began)
    for a, b in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    print("| version | seconds, median (range) | memory |")
    print("|---|---|---|")
    for name, version in versions.items():
        memory = version.memory_analysis().temp_size_in_bytes
        print(f"| {name} | {middle(took[name][1:], ' s')} | {memory / 1e6:.0f} MB |")
    ratios = [a / b for a, b in zip(*(seconds[1:] for seconds in took.values()), strict=True)]
    print(f"\nall pairs / parts: {middle(ratios)}")


if __name__ == "__main__":
    main()
