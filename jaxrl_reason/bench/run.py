"""`jaxrl-reason bench`: the standard workloads on whatever hardware there is."""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxrl_reason import __version__
from jaxrl_reason.bench import ceilings, machine
from jaxrl_reason.bench.ours import make
from jaxrl_reason.bench.results import rate
from jaxrl_reason.bench.worker import measure, serve
from jaxrl_reason.bench.workloads import SHAPES, WORKLOADS, changed

_WARM_UP = 0


def default_shapes() -> list[str]:
    """What fits the hardware."""
    return ["tiny", "small"] if jax.default_backend() == "cpu" else ["1b"]


def bench(
    workloads: Sequence[str],
    shapes: Sequence[str],
    *,
    repeats: int,
    changes: Mapping[str, Any],
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Run every workload with every shape.

    Args:
        workloads: names in `WORKLOADS`.
        shapes: names in `SHAPES`.
        repeats: measured repeats of each, after one that is not.
        changes: fields of the workloads to change, to try something out.
        say: takes a line of progress.

    Returns:
        What is written as JSON: `machine`, `ceilings` by dtype, `rows` of single repeats.
    """
    devices = [device.device_kind for device in jax.devices()]
    dtypes = sorted({SHAPES[name].dtype for name in shapes})
    rows = []
    for shape in shapes:
        for workload in workloads:
            rows += _repeats(workload, shape, repeats, changes, say)
    return {
        "version": __version__,
        "jax": jax.__version__,
        "machine": {**machine.describe(), "devices": devices},
        "ceilings": {dtype: ceilings.measure(dtype) for dtype in dtypes},
        "rows": rows,
    }


def _repeats(workload, shape, repeats, changes, say) -> list[dict[str, Any]]:
    say(f"{workload} {shape}: compiling")
    contestant = make(changed(WORKLOADS[workload], changes), SHAPES[shape])
    measure(contestant, _WARM_UP)
    rows = []
    for repeat in range(1, repeats + 1):
        before = machine.busy_seconds()
        got = measure(contestant, repeat)
        others = machine.others_share(before, seconds=got.seconds, cpu_seconds=got.cpu_seconds)
        row = {"workload": workload, "shape": shape, "repeat": repeat, **vars(got)}
        rows.append({**row, "others": others})
        speed = f"{got.seconds:.2f} s, {rate(row):.0f} tokens/s"
        say(f"{workload} {shape} {repeat} of {repeats}: {speed}")
    del contestant
    gc.collect()
    return rows


def serve_worker() -> None:
    """Answer `scripts/bench/compare.py`."""
    serve(make)


_HEAD = """\
| workload | shape | seconds | tokens/s | rollout | rewards | update | peak MB | padding | wasted \
| compiles | of matmul | of memory |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def table(result: Mapping[str, Any]) -> str:
    """Medians of the repeats in Markdown.

    `padding` is the share of the update's slots, `wasted` that of the decoded row-steps; `of
    matmul` and `of memory` compare update and rollout with what the same hardware did in a large
    matrix product and in copying memory.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["workload"], row["shape"]), []).append(row)
    lines = [_line(*key, rows, result["ceilings"]) for key, rows in groups.items()]
    return "\n".join([_HEAD, *lines])


def _line(workload: str, shape: str, rows: Sequence[Mapping[str, Any]], tops) -> str:
    top = tops[SHAPES[shape].dtype]
    median = lambda value: statistics.median(map(value, rows))
    part = lambda name: median(lambda row: row["parts"].get(name, 0.0))
    has = lambda name: name in rows[0]["counts"]
    count = lambda name: median(lambda row: row["counts"][name])
    reached = lambda name, of, seconds: f"{count(name) / seconds / top[of]:.0%}"
    memory = "peak_device_mb" if has("peak_device_mb") else None
    cells = (
        workload,
        shape,
        f"{median(lambda row: row['seconds']):.2f}",
        f"{median(rate):.0f}",
        *(f"{part(name):.2f}" if part(name) else "" for name in ("rollout", "rewards", "update")),
        f"{max(row['counts'][memory] if memory else row['peak_rss_mb'] for row in rows):.0f}",
        f"{count('padding_share'):.0%}" if has("padding_share") else "",
        f"{median(lambda row: 1 - row['useful_tokens'] / row['computed_tokens']):.0%}"
        if has("wasted_tokens")
        else "",
        f"{sum(row['counts']['compiles'] for row in rows):.0f}",
        reached("update_flops", "matmul_flops", part("update")) if has("update_flops") else "",
        reached("decode_bytes", "memory_bytes", part("rollout")) if has("decode_bytes") else "",
    )
    return f"| {' | '.join(cells)} |"
