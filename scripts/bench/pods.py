"""What the planner says of every full-scale configuration, as the table of docs/pods.md.

    python scripts/bench/pods.py --plans plans > table.md

Plans each for the slice that it is meant for, one after the other, which takes two to ten minutes
each on two cores. Plans that are in the folder are read and not made again. Stages of one kind
whose numbers are equal share a line.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLANS = (
    ("pods/qwen2_5_7b", "v5e:8x8"),
    ("pods/qwen2_5_7b", "v6e:4x8"),
    ("pods/qwen3_8b", "v5p:2x2x4"),
    ("pods/qwen3_32b", "v5p:4x4x4"),
    ("pods/qwen3_30b_a3b", "v5p:2x4x4"),
    ("pods/qwen2_5_vl_7b", "v5p:2x2x4"),
    ("papers/factum/full", "v6e:8x8"),
    ("papers/metis_specs/full", "v5p:2x2x2"),
    ("papers/rl_cold_start/full", "v5p:2x2x2"),
    ("papers/ton/full", "v5p:2x2x2"),
    ("papers/vision_r1/full", "v5p:2x2x2"),
    ("papers/warmup_kk/full", "v5p:2x2x2"),
)
COLUMNS = (
    "configuration",
    "stage",
    "slice",
    "memory of a chip, in its fullest program",
    "a step at least",
    "of it the update",
    "MFU of the update at most",
)


def planned(name: str, topology: str, folder: Path) -> dict:
    """The plan of a file, from the folder or by the command."""
    path = folder / f"{name}-{topology}.json".replace("/", "_").replace(":", "_")
    if not path.exists():
        command = [sys.executable, "-m", "jaxrl_reason.cli", "plan", f"configs/{name}.yaml"]
        command += ["--topology", topology, "--json", "-"]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if told.returncode not in (0, 1):  # 1: does not fit
            raise SystemExit(told.stderr)
        path.write_text(told.stdout[told.stdout.index("{") :], encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def duration(seconds: float) -> str:
    """Three digits, and no power of ten."""
    return f"{float(f'{seconds:.3g}'):g} s"


def cells(stage: dict, capacity: float) -> tuple[str, str, str, str]:
    """The last four columns of a stage."""
    fullest = max(stage["programs"], key=lambda program: sum(program["memory"].values()))
    kind = fullest["program"].partition(",")[0]
    memory = f"{stage['memory'] / 1e9:.3g} of {capacity / 1e9:.3g} GB, {kind}"
    if not stage["fits"]:
        return f"{memory} (too much)", "", "", ""
    updates = [program for program in stage["programs"] if program["work"] == "update"]
    if not updates:
        return memory, "", "none", ""
    (update,) = updates
    seconds = max(update["seconds"].values()) * update["per_step"]
    share = "all" if seconds > 0.999 * stage["seconds"] else duration(seconds)
    return (
        memory,
        duration(stage["seconds"]),
        f"{share}, by {update['limit']}",
        f"{100 * update['mfu']:.0f} %",
    )


def rows(name: str, topology: str, plan: dict) -> list[str]:
    """The lines of a file; of its stages, those with equal numbers share one."""
    lines: dict[tuple, list[str]] = {}
    for stage in plan["stages"]:
        if stage["kind"] != "evaluation":
            key = (stage["kind"], *cells(stage, plan["chip"]["memory"]))
            lines.setdefault(key, []).append(f"`{stage['stage']}`")
    table: list[str] = []
    for (_, *found), stages in lines.items():
        file = "" if table else f"`{name}.yaml`"
        line = (file, ", ".join(stages), f"`{topology}`", *found)
        table.append("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|")
    return table


def main() -> None:
    """Prints the table, line by line, as plans come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=Path, required=True, metavar="FOLDER", help="of JSON")
    arguments = parser.parse_args()
    arguments.plans.mkdir(parents=True, exist_ok=True)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for name, topology in PLANS:
        for line in rows(name, topology, planned(name, topology, arguments.plans)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
