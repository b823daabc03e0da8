"""Prints the accuracies, lengths and times of several runs of one configuration, stage by stage.

python scripts/docs/seeds.py runs/seed0 runs/seed1 runs/seed2
"""

import json
import sys
from pathlib import Path


def cell(row: dict) -> str:
    """Accuracy with its interval, and the mean length."""
    low, high = (100 * bound for bound in row["accuracy_ci95"])
    accuracy = f"{100 * row['accuracy']:.1f} % ({low:.1f} - {high:.1f})"
    return f"{accuracy}, {row['mean_length']:.1f} tokens"


def main() -> None:
    """Print the table of the runs that are named on the command line."""
    runs = [json.loads((Path(run) / "summary.json").read_text()) for run in sys.argv[1:]]
    names = [
        f"seed {json.loads((Path(run) / 'config.json').read_text())['seed']}"
        for run in sys.argv[1:]
    ]
    print("| stage | kind | " + " | ".join(names) + " | mean accuracy | mean length |")
    print("| --- | --- |" + " ---: |" * (len(names) + 2))
    for rows in zip(*runs, strict=True):
        accuracy = sum(row["accuracy"] for row in rows) / len(rows)
        length = sum(row["mean_length"] for row in rows) / len(rows)
        cells = [rows[0]["stage"], rows[0]["kind"], *map(cell, rows)]
        print(f"| {' | '.join(cells)} | {100 * accuracy:.1f} % | {length:.1f} |")
    totals = ", ".join(f"{sum(row['seconds'] for row in run):.0f}" for run in runs)
    print(f"\nSeconds of all stages with their evaluations: {totals}.")


if __name__ == "__main__":
    main()
