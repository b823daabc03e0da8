"""Time and memory of attention of whole rows by blocks against the plain masked softmax, on a CPU.

    python scripts/bench/attention.py                          # all workloads, heads 8/4 of size 64
    python scripts/bench/attention.py --workload group --rows 4 --repeats 9 --json

A run is the value and the gradients in queries, keys and values, float32. The versions alternate in
one process. Wall seconds and processor seconds are medians; ratios are plain / blockwise of
neighbouring runs, given as median and range. Memory is what the compiled program needs beside its
arguments and results (the compiler's figure).

Workloads: `group` is a prompt of 64 tokens with 8 completions of 128; `groups` are such groups with
ragged lengths in rows of 2048; `packed` are documents of log-normal length, mean 120, in rows of
1024; `full` is one document of 1024 tokens.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason.models.attention import attend, row_mask
from jaxrl_reason.models.attention_blockwise import attend_blocks, plan_blocks

WORKLOADS = ("group", "groups", "packed", "full")


def documents(workload: str, rng: np.random.Generator):
    """Endless lengths of trunk and branches, one document after the other."""
    while True:
        if workload == "group":
            yield 64, [128] * 8
        elif workload == "groups":
            yield int(rng.integers(64, 257)), np.minimum(rng.geometric(1 / 64, 8), 256).tolist()
        elif workload == "packed":
            yield int(np.clip(rng.lognormal(np.log(120) - 0.32, 0.8), 1, 1024)), []
        else:
            yield 1024, []


def row(workload: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Segment and branch ids of one row, filled until the next document does not fit."""
    length = {"group": 1088, "groups": 2048}.get(workload, 1024)
    segments, branches = np.zeros((2, length), np.int32)
    at, branch = 0, 0
    for number, (trunk, sizes) in enumerate(documents(workload, rng), 1):
        end = at + trunk + sum(sizes)
        if end > length:
            return segments, branches
        segments[at:end] = number
        at += trunk
        for size in sizes:
            branch += 1
            branches[at : at + size] = branch
            at += size


def programs(options: argparse.Namespace, segments, branches):
    """The compiled gradient of both versions, and their arguments."""
    versions = {
        "plain": lambda q, k, v, s, b: attend(q, k, v, row_mask(s, b)),
        "blockwise": lambda q, k, v, s, b: attend_blocks(q, k, v, plan_blocks(s, b)),
    }
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (
        jax.random.normal(key, (*segments.shape, n, options.head_dim))
        for key, n in zip(keys, heads, strict=True)
    )
    arguments = (q, k, v, jnp.asarray(segments), jnp.asarray(branches))
    weight = weight * (segments > 0)[..., None, None]

    def gradient(version):
        loss = lambda *given: jnp.sum(versions[version](*given) * weight)
        function = jax.value_and_grad(loss, argnums=(0, 1, 2))
        return jax.jit(function).lower(*arguments).compile()

    return {version: gradient(version) for version in versions}, arguments


def measure(compiled, arguments) -> tuple[float, float]:
    """Wall and processor seconds of one run."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - wall, time.process_time() - processor


def compare(workload: str, options: argparse.Namespace) -> dict:
    """Both versions on one workload."""
    rng = np.random.default_rng(0)
    rows = [row(workload, rng) for _ in range(options.rows)]
    segments, branches = (np.stack(ids) for ids in zip(*rows, strict=True))
    compiled, arguments = programs(options, segments, branches)
    times = {version: [] for version in compiled}
    for repeat in range(options.repeats + 1):
        for version, program in compiled.items():
            seconds = measure(program, arguments)
            if repeat:  # the first touches memory that later runs reuse
                times[version].append(seconds)
    plain, blockwise = np.asarray(times["plain"]), np.asarray(times["blockwise"])
    summary = lambda x: [statistics.median(x), min(x), max(x)]
    return {
        "workload": workload,
        "shape": list(segments.shape),
        "wall_s": {v: statistics.median(w for w, _ in t) for v, t in times.items()},
        "processor_s": {v: statistics.median(p for _, p in t) for v, t in times.items()},
        "wall_ratio": summary((plain / blockwise)[:, 0].tolist()),
        "processor_ratio": summary((plain / blockwise)[:, 1].tolist()),
        "temporary_mb": {
            v: program.memory_analysis().temp_size_in_bytes / 1e6 for v, program in compiled.items()
        },
    }


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = [compare(name, options) for name in options.workload or WORKLOADS]
    if options.json:
        print(json.dumps({"jax": jax.__version__, "results": results}))
        return
    print(f"{'':20}{'wall ms':>16}{'cpu ms':>16}{'memory MB':>14}   plain / blockwise: wall, cpu")
    for r in results:
        name = f"{r['workload']} {r['shape'][0]} x {r['shape'][1]}"
        pair = lambda x, scale=1e3: f"{x['plain'] * scale:.0f} / {x['blockwise'] * scale:.0f}"
        spread = lambda x: f"{x[0]:.1f} ({x[1]:.1f}-{x[2]:.1f})"
        print(
            f"{name:20}{pair(r['wall_s']):>16}{pair(r['processor_s']):>16}"
            f"{pair(r['temporary_mb'], 1):>14}   "
            f"{spread(r['wall_ratio'])}, {spread(r['processor_ratio'])}"
        )


if __name__ == "__main__":
    main()
