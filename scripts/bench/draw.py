"""Time of `draw` against a cumulative sum over the vocabulary with sorting, and Gumbel noise.

    python scripts/bench/draw.py                                       # 64 rows of 32000
    python scripts/bench/draw.py --vocabulary 151936 --spread 1 --repeats 9

`sorted` is the textbook way: sort for top-p, `lax.top_k` for top-k, a cumulative sum over the row.
`gumbel` is `jax.random.categorical` with the log-softmax of what it drew; it truncates like
`sorted`. Logits are normal with the standard deviation `--spread`. Runs of the contestants
alternate in one process; a ratio is that of neighbouring runs, given as median and range.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp

from jaxrl_reason.sampling.filters import SamplingConfig, draw

OPTIONS = {
    "all": {},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.95},
    "min-p": {"min_p": 0.05},
    "all three": {"top_k": 50, "top_p": 0.95, "min_p": 0.01},
    "greedy": {"temperature": 0.0},
}


def kept_by_sorting(p: jax.Array, config: SamplingConfig) -> jax.Array:
    """The mask of tokens that may be drawn."""
    kept = jnp.ones(p.shape, bool)
    if config.top_k is not None:
        kept &= p >= jax.lax.top_k(p, config.top_k)[0][:, -1:]
    if config.top_p < 1:
        left = jnp.where(kept, p, 0)
        descending = -jnp.sort(-left, axis=-1)
        before = jnp.cumsum(descending, axis=-1) - descending
        inside = before < config.top_p * jnp.sum(left, axis=-1, keepdims=True)
        kept &= left >= jnp.min(jnp.where(inside, descending, 2), axis=-1, keepdims=True)
    return kept & (p >= config.min_p * jnp.max(p, axis=-1, keepdims=True))


def textbook(noise: str, logits: jax.Array, seed: jax.Array, config: SamplingConfig):
    """`(tokens, logprobs, kept_logmass)` by sorting and noise of one kind."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    at = lambda tokens: jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0]
    if config.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
        return tokens, jnp.zeros(tokens.shape), at(tokens)
    kept = jnp.ones((), bool)
    if config.truncates:
        kept = kept_by_sorting(jnp.exp(log_p), config)
    p = jnp.where(kept, jnp.exp(log_p), 0)
    key = jax.random.key(seed)
    if noise == "gumbel":
        tokens = jax.random.categorical(key, jnp.where(kept, logits, -jnp.inf))
    else:
        cumulative = jnp.cumsum(p, axis=-1)
        target = jax.random.uniform(key, (len(p), 1)) * cumulative[:, -1:]
        tokens = jnp.sum((cumulative <= target).astype(jnp.int32), axis=-1)
    log_mass = jnp.log(jnp.sum(p, axis=-1))
    return tokens, at(tokens) - log_mass, log_mass


def ours(logits: jax.Array, seed: jax.Array, config: SamplingConfig):
    """The package's."""
    return draw(logits, jax.random.uniform(jax.random.key(seed), (len(logits),)), config)


def compare(logits: jax.Array, config: SamplingConfig, repeats: int) -> dict:
    """Milliseconds of each contestant, and ratios to `draw`."""
    functions = {"draw": ours} | {
        name: functools.partial(textbook, name) for name in ("sorted", "gumbel")
    }
    programs = {
        name: jax.jit(functools.partial(function, config=config)).lower(logits, 0).compile()
        for name, function in functions.items()
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(repeats + 2):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(logits, repeat))
            if repeat > 1:
                times[name].append(1e3 * (time.perf_counter() - start))
    result = {}
    for name, taken in times.items():
        ratios = [t / d for t, d in zip(taken, times["draw"], strict=True)]
        result[name] = {
            "milliseconds": statistics.median(taken),
            "least": min(taken),
            "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
            "temporary_mb": programs[name].memory_analysis().temp_size_in_bytes / 1e6,
        }
    return result


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--spread", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", choices=list(OPTIONS), nargs="+", default=list(OPTIONS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shape = (options.rows, options.vocabulary)
    logits = options.spread * jax.random.normal(jax.random.key(0), shape)
    results = {
        name: compare(logits, SamplingConfig(**OPTIONS[name]), options.repeats)
        for name in options.only
    }
    if options.json:
        device = jax.devices()[0].device_kind
        print(json.dumps({"jax": jax.__version__, "device": device, "results": results}))
        return
    print(f"{'':20}{'ms':>9}{'least':>9}{'temp MB':>9}{'times draw':>12}")
    for kept, contestants in results.items():
        for name, row in contestants.items():
            middle, low, high = row["ratio"]
            print(
                f"{kept:12}{name:8}{row['milliseconds']:9.2f}{row['least']:9.2f}"
                f"{row['temporary_mb']:9.1f}{middle:12.2f}  ({low:.2f}-{high:.2f})"
            )


if __name__ == "__main__":
    main()
