"""How far the planner's bound is from what a step takes, on this machine.

    python scripts/bench/planner_error.py --presets 0.7m 3m 10m 30m > table.md

For models of several sizes the update of supervised fine-tuning is planned for `cpu:1` and then
run, on the same shapes, as the quickstart has it. A bound that is right is at most what is
measured; how far below it lies says how much the roofline leaves out. Run it on a machine that does
nothing else.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
STEPS = 14
SKIPPED = 4
"""First steps, in which programs are compiled."""


def write_run(folder: Path, preset: str) -> Path:
    """The quickstart with few steps of its first stage."""
    run = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    run["model"]["preset"] = preset
    run["evaluation"] |= {"problems": 8, "batch_size": 8, "max_completion_length": 8}
    sft = run["stages"]["cold_start"] | {"steps": STEPS, "save_steps": STEPS}
    run["stages"] = {"sft": sft}
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


def main() -> None:
    """Prints a line for each preset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["0.7m", "3m", "10m", "30m"])
    arguments = parser.parse_args()
    print("| model | bound | limit | measured, median (range) | measured / bound |")
    print("|---|---|---|---|---|", flush=True)
    for preset in arguments.presets:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = str(write_run(folder, preset))
            told = command("plan", path, "--topology", "cpu:1", "--json", "-")
            (plan,) = json.loads(told[told.index("{") :])["stages"]
            command("run", path, f"output_dir={folder}")
            (update,) = plan["programs"]
            log = folder / "quickstart" / plan["stage"] / "metrics.jsonl"
            rows = [json.loads(line) for line in log.read_text().splitlines()][SKIPPED:]
            took = [row["step_time"] for row in rows]
            bound, middle = max(update["seconds"].values()), statistics.median(took)
            spread = f"{middle:.3g} s ({min(took):.3g} to {max(took):.3g})"
            cells = (preset, f"{bound:.3g} s", update["limit"], spread, f"{middle / bound:.2f}")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
