"""Memory and time of `chunked_token_logprobs` against the plain log-softmax over [B, T, V].

    python scripts/bench/logprobs.py                    # the width and vocabulary of Qwen2.5-0.5B
    python scripts/bench/logprobs.py --length 4096 --chunk-size 64 --repeats 10

Both versions compute the gradient of sum(log p) + 0.1 sum(entropy) in hidden states and output
head, float32. Memory is what the compiled program needs beside its arguments and results (the
compiler's figure), and the peak resident memory of a process of its own, less that of one which
holds only arguments and results. Times alternate between the versions in one process; the ratio is
that of neighbouring runs, given as median and range.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

from jaxrl_reason.logprobs import chunked_token_logprobs, token_entropy, token_logprobs


def gradient(version: str, options: argparse.Namespace):
    """The compiled gradient of one version, and its arguments."""

    def plain(hidden, head, tokens):
        logits = jnp.einsum("btd,dv->btv", hidden, head)
        return token_logprobs(logits, tokens), token_entropy(logits)

    def chunked(hidden, head, tokens):
        return chunked_token_logprobs(hidden, head, tokens, chunk_size=options.chunk_size)

    def loss(hidden, head, tokens):
        logprobs, entropy = (plain if version == "plain" else chunked)(hidden, head, tokens)
        return jnp.sum(logprobs) + 0.1 * jnp.sum(entropy)

    @functools.partial(jax.jit, static_argnums=0)
    def spread(shape):
        # Not random, but written in one pass: a generator's own memory would raise the floor.
        rows, columns = (jax.lax.broadcasted_iota(jnp.float32, shape, i) for i in (0, 1))
        return 0.05 * jnp.sin(12.9 * rows + 78.2 * columns + rows * columns)

    shape = (options.batch, options.length)
    hidden = spread((options.batch * options.length, options.width)).reshape(*shape, -1)
    head = spread((options.width, options.vocabulary))
    tokens = jax.random.randint(jax.random.key(0), shape, 0, options.vocabulary)
    arguments = (hidden, head, tokens)
    function = jax.grad(loss, argnums=(0, 1)) if version != "nothing" else lambda h, w, _: (-h, -w)
    return jax.jit(function).lower(*arguments).compile(), arguments


def peak_resident(version: str, options: argparse.Namespace) -> float:
    """Peak resident MB of a process that runs one version once."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--only", version],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        compiled, arguments = gradient(options.only, options)
        jax.block_until_ready(compiled(*arguments))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
        return

    floor = peak_resident("nothing", options)
    resident = {name: peak_resident(name, options) - floor for name in ("plain", "chunked")}
    programs = {name: gradient(name, options) for name in ("plain", "chunked")}
    temporary = {
        name: compiled.memory_analysis().temp_size_in_bytes / 1e6
        for name, (compiled, _) in programs.items()
    }
    seconds = {"plain": [], "chunked": []}
    for repeat in range(options.repeats + 1):
        for name, (compiled, arguments) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            if repeat:  # the first touches memory that later runs reuse
                seconds[name].append(time.perf_counter() - start)
    ratios = [c / p for c, p in zip(seconds["chunked"], seconds["plain"], strict=True)]
    result = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "temporary_mb": temporary,
        "temporary_ratio": temporary["chunked"] / temporary["plain"],
        "resident_mb": resident,
        "resident_ratio": resident["chunked"] / resident["plain"],
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "time_ratio": [statistics.median(ratios), min(ratios), max(ratios)],
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{'':10}{'temporary MB':>14}{'resident MB':>14}{'seconds':>10}")
    for name in seconds:
        print(
            f"{name:10}{temporary[name]:14.0f}{resident[name]:14.0f}{result['seconds'][name]:10.2f}"
        )
    low, high = min(ratios), max(ratios)
    print(
        f"{'ratio':10}{result['temporary_ratio']:14.3f}{result['resident_ratio']:14.3f}"
        f"{result['time_ratio'][0]:10.2f}  ({low:.2f}-{high:.2f} over {options.repeats} runs)"
    )


if __name__ == "__main__":
    main()
