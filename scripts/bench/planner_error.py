"""How far the planner's bound is from what an update takes, on this machine.

    python scripts/bench/planner_error.py --presets 0.7m 3m 10m 30m > table.md

For models of several sizes the updates of supervised fine-tuning and of GRPO are planned for
`cpu:1` and then run as the quickstart has them, from random weights. A bound that is right is at
most what is measured; how far below it lies says how much the roofline leaves out. GRPO is planned
with the longest completions; those sampled are shorter, so its seconds are those measured for a
token of the rows that are multiplied, padding too, times those that were planned. Its reward is
the length, so that all groups count, and its learning rate next to nothing, so that lengths stay as
they are. Run it on a machine that does nothing else.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
STAGES = {
    "cold_start": {},
    "reason": {
        "rewards": [{"kind": "overlong", "cache": 144}],
        "optimizer": {"learning_rate": 1e-9},
    },
}
"""Of the quickstart, with what is changed."""
STEPS = 14
SKIPPED = 4
"""First steps, in which programs are compiled."""


def write_run(folder: Path, stage: str, preset: str) -> Path:
    """The quickstart with one of its stages alone, and few steps of it."""
    run = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    run["model"]["preset"] = preset
    run["evaluation"] |= {"problems": 8, "batch_size": 8, "max_completion_length": 8}
    alone = {name: value for name, value in run["stages"][stage].items() if name != "parent"}
    run["stages"] = {stage: alone | STAGES[stage] | {"steps": STEPS, "save_steps": STEPS}}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def command(*words: str) -> str:
    """Standard output of `jaxrl-reason`."""
    told = subprocess.run(
        [sys.executable, "-m", "jaxrl_reason.cli", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if told.returncode:
        raise SystemExit(told.stderr)
    return told.stdout


def compare(stage: str, preset: str) -> tuple[dict[str, Any], list[float]]:
    """The planned update, and the seconds of the updates of some steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = str(write_run(folder, stage, preset))
        told = command("plan", path, "--topology", "cpu:1", "--json", "-")
        (plan,) = json.loads(told[told.index("{") :])["stages"]
        command("run", path, f"output_dir={folder}")
        log = folder / "quickstart" / plan["stage"] / "metrics.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    (update,) = (program for program in plan["programs"] if program["program"] == "update")
    return update, [seconds_of(update, row) for row in rows[SKIPPED:]]


def seconds_of(update: dict[str, Any], row: dict[str, float]) -> float:
    """Of the update of a step, if it had the tokens that were planned."""
    if "time/update" not in row:
        return row["step_time"]
    multiplied = row["tokens_per_second/update"] / (1 - row["padding_share"])
    return update["per_step"] * update["tokens"] / multiplied


def main() -> None:
    """Prints a line for each update."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["0.7m", "3m", "10m", "30m"])
    arguments = parser.parse_args()
    print("| stage | model | bound | limit | measured, median (range) | measured / bound |")
    print("|---|---|---:|---|---:|---:|", flush=True)
    for stage in STAGES:
        for preset in arguments.presets:
            update, took = compare(stage, preset)
            bound = update["per_step"] * max(update["seconds"].values())
            ratios = [seconds / bound for seconds in took]
            cells = (stage, preset, f"{bound:.3g} s", update["limit"], spread(took, " s"))
            print("| " + " | ".join((*cells, spread(ratios))) + " |", flush=True)


def spread(values: list[float], unit: str = "") -> str:
    """Median and range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.3g}{unit} ({low:.3g} to {high:.3g})"


if __name__ == "__main__":
    main()
