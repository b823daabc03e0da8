"""How memory and traffic of a chip grow with the number of chips, the batch growing with it.

    python scripts/bench/weak_scaling.py --kind v5e --sizes 2x4 8x8 16x16 --rows 2 > table.md

Plans one stage for slices of several sizes, each with as many rows a chip, and sets what the
planner says beside what it should be with `mesh.fsdp` over all n chips: parameters and optimiser
state of a chip fall as 1 / n, temporary arrays as a constant (activations) and a part that falls
as 1 / n (gradients), and what a chip sends grows as (n - 1) / n, because every gathered parameter
comes from all others and every gradient goes to all others once. The first size is the measure of
the others, and the first two are for temporary arrays. Fields of the run follow as key=value.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = ("chips", "parameters", "optimizer", "temporary", "sent", "step", "MFU")


def plan(config: str, stage: str, topology: str, fields: list[str]) -> dict:
    """The plan of the update of one stage, by the command."""
    command = [sys.executable, "-m", "jaxrl_reason.cli", "plan", config, *fields]
    command += ["--topology", topology, "--stages", stage, "--json", "-"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if told.returncode not in (0, 1):
        raise SystemExit(told.stderr)
    found = json.loads(told.stdout[told.stdout.index("{") :])
    (update,) = (p for p in found["stages"][0]["programs"] if p["program"] == "update")
    return {"chips": found["chips"], **update}


def expected(known: list[dict], chips: int) -> dict[str, float | None]:
    """What theory makes of plans of other sizes; the first, and the first two for temporaries."""
    first, share = known[0], lambda n: (n - 1) / n
    fewer, memory = first["chips"] / chips, first["memory"]
    temporary = None
    if len(known) > 1:
        # Activations of a chip stay; gradients and their sums fall as parameters do.
        (a, x), (b, y) = ((p["chips"], p["memory"]["temporary"]) for p in known[:2])
        falling = (x - y) / (1 / a - 1 / b)
        temporary = y + falling * (1 / chips - 1 / b)
    return {
        "parameters": memory["parameters"] * fewer,
        "optimizer": memory["optimizer"] * fewer,
        "temporary": temporary,
        "sent": first["collective_bytes"] * share(chips) / share(first["chips"]),
    }


def row(found: dict, theory: dict[str, float | None]) -> str:
    """A line of the table: planned, and in brackets planned divided by expected."""
    planned = {**found["memory"], "sent": found["collective_bytes"]}
    cells = [str(found["chips"])]
    for name, value in theory.items():
        against = "" if value is None else f" ({planned[name] / value:.2f})"
        cells.append(f"{planned[name] / 1e9:.3g} GB{against}")
    cells += [f"{max(found['seconds'].values()):.3g} s", f"{found['mfu']:.0%}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints the table, line by line, as plans come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/pods/qwen2_5_7b.yaml")
    parser.add_argument("--stage", default="cold_start")
    parser.add_argument("--kind", default="v5e", help="of chip")
    parser.add_argument("--sizes", nargs="+", default=["2x4", "8x8", "16x16"], help="of slices")
    parser.add_argument("--rows", type=int, default=2, help="of a chip in a step")
    parser.add_argument("fields", nargs="*", metavar="key=value", help="fields of the run")
    arguments = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    known: list[dict] = []
    for size in arguments.sizes:
        chips = math.prod(map(int, size.split("x")))
        batch = f"stages.{arguments.stage}.batch_size={arguments.rows * chips}"
        fields = ["mesh.data=1", "mesh.fsdp=-1", batch, *arguments.fields]
        found = plan(arguments.config, arguments.stage, f"{arguments.kind}:{size}", fields)
        theory = expected(known or [found], chips)
        print(row(found, theory), flush=True)
        known.append(found)


if __name__ == "__main__":
    main()
