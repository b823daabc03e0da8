"""Time of a GRPO update on prefix-shared rows against one on a row for each completion.

    python scripts/bench/update.py                       # W1: 8 prompts of 64, 8 completions of 128
    python scripts/bench/update.py --workload W2 --row-lengths 512 1024 2048
    python scripts/bench/update.py --live 0.5            # half of the groups teach something

Random weights and tokens; the loss is `dapo`, without KL term, and AdamW updates every parameter.
The layouts are timed in turn in one process, so that all meet the same disturbances; their losses
agree. The learning rate is so small that no parameter moves. CPU seconds are of all threads.
"""

import argparse
import json
import statistics
import time
import types

import jax
import numpy as np

from jaxrl_reason.models import Model, ModelConfig
from jaxrl_reason.sharding import MeshConfig, make_mesh
from jaxrl_reason.stages.policy_rows import PolicyRows
from jaxrl_reason.steps import (
    OptimizerConfig,
    PolicyObjective,
    init_state,
    make_optimizer,
    make_policy_step,
)

SHAPES = {
    "tiny": dict(zip("DFLNKH", (256, 768, 4, 8, 4, 32), strict=True)),
    "small": dict(zip("DFLNKH", (512, 1536, 8, 8, 4, 64), strict=True)),
}
VOCABULARY = {"tiny": 4096, "small": 32_000}
GROUPS, GROUP = 8, 8


def model_of(options: argparse.Namespace) -> Model:
    """A model of one of the two shapes."""
    size = SHAPES[options.shape]
    return Model(
        ModelConfig(
            vocab_size=VOCABULARY[options.shape],
            hidden_size=size["D"],
            intermediate_size=size["F"],
            num_hidden_layers=size["L"],
            num_attention_heads=size["N"],
            num_key_value_heads=size["K"],
            head_dim=size["H"],
            dtype=options.dtype,
            remat=options.remat,
            attention=options.attention,
        )
    )


def completions_of(workload: str, vocabulary: int):
    """A rollout of random tokens, its longest prompt and its longest completion."""
    rng = np.random.default_rng(0)
    longest_prompt, longest = {"W1": (64, 128), "W2": (256, 256)}[workload]
    prompts, lengths = np.full(GROUPS, 64), np.full(GROUPS * GROUP, 128)
    if workload == "W2":
        prompts = rng.integers(64, 257, GROUPS)
        lengths = np.minimum(rng.geometric(1 / 64, GROUPS * GROUP), longest)
    mask = np.arange(longest) < lengths[:, None]
    rollout = types.SimpleNamespace(
        prompts=[rng.integers(vocabulary, size=n).tolist() for n in prompts],
        num_generations=GROUP,
        tokens=rng.integers(vocabulary, size=mask.shape).astype(np.int32),
        completion_mask=mask,
        sampled=np.ones_like(mask),
        sampling_logprobs=np.full(mask.shape, -np.log(vocabulary), np.float32),
        kept_logmass=np.zeros(mask.shape, np.float32),
    )
    return rollout, longest_prompt, longest


def layouts(options: argparse.Namespace, longest_prompt: int, longest: int):
    """Each layout by name."""
    given = {
        "mesh": make_mesh(MeshConfig()),
        "pad_id": 0,
        "max_prompt_length": longest_prompt,
        "max_completion_length": longest,
        "completions": GROUPS * GROUP,
        "num_generations": GROUP,
        "microbatch_tokens": options.microbatch_tokens,
        "drop": True,
    }
    found = {"padded": PolicyRows(**given | {"prefix_sharing": False, "drop": False})}
    for length in options.row_lengths or [None]:
        rows = PolicyRows(**given, row_length=length)
        found[f"shared {rows.length}"] = rows
    return found


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Sizes and times of each layout, by name."""
    model = model_of(options)
    rollout, *longest = completions_of(options.workload, model.config.vocab_size)
    advantages = np.random.default_rng(1).normal(size=GROUPS * GROUP).astype(np.float32)
    advantages[round(options.live * GROUPS) * GROUP :] = 0
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-30), 100)
    objective = PolicyObjective(
        loss_type="dapo",
        options={"epsilon": 0.2},
        beta=0.0,
        temperature=1.0,
        max_completion_length=longest[1],
    )
    step = jax.jit(
        make_policy_step(model, optimizer, objective, logprob_chunk_size=options.chunk_size),
        donate_argnums=0,
    )
    state = init_state(jax.jit(model.init)(jax.random.key(0)), optimizer)
    results, programs, batches = {}, {}, {}
    for name, rows in layouts(options, *longest).items():
        batches[name], info = rows.place(rollout, advantages)
        began = time.perf_counter()
        programs[name] = step.lower(state, batches[name]).compile()
        results[name] = {
            "rows": rows.shape[1],
            "tokens": info["tokens"],
            "padding_share": info["padding_share"],
            "compile_seconds": time.perf_counter() - began,
            "temporary_mb": programs[name].memory_analysis().temp_size_in_bytes / 1e6,
        }
    seconds = {name: [] for name in programs}
    cpu_seconds = {name: [] for name in programs}
    for repeat in range(options.repeats + 1):
        for name, program in programs.items():
            began, cpu = time.perf_counter(), time.process_time()
            state, metrics = jax.block_until_ready(program(state, batches[name]))
            if not repeat:  # the first touches memory that later runs reuse
                results[name]["loss"] = float(metrics["loss"])
                continue
            seconds[name].append(time.perf_counter() - began)
            cpu_seconds[name].append(time.process_time() - cpu)
    for name, result in results.items():
        result["seconds"] = statistics.median(seconds[name])
        result["cpu_seconds"] = statistics.median(cpu_seconds[name])
        ratios = [a / b for a, b in zip(seconds["padded"], seconds[name], strict=True)]
        result["speedup"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return results


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workload", choices=["W1", "W2"], default="W1")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--remat", choices=["none", "dots", "full"], default="none")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--row-lengths", type=int, nargs="*")
    parser.add_argument("--microbatch-tokens", type=int, default=1536)
    parser.add_argument("--chunk-size", type=int)
    parser.add_argument("--live", type=float, default=1.0, help="share of groups with advantages")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = measure(options)
    if options.json:
        device = jax.devices()[0].device_kind
        print(json.dumps({"jax": jax.__version__, "device": device, "layouts": results}))
        return
    columns = ("rows", "tokens", "padding_share", "compile_seconds", "temporary_mb", "loss")
    columns = (*columns, "seconds", "cpu_seconds")
    print(f"{'':14}" + "".join(f"{name:>16}" for name in (*columns, "speedup")))
    for name, result in results.items():
        low, high = result["speedup"][1:]
        numbers = "".join(f"{result[column]:16.4g}" for column in columns)
        print(f"{name:14}{numbers}{result['speedup'][0]:9.2f} ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    main()
