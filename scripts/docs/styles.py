"""Prints how often each style of thought was sampled after each stage, and how often it was right.

python scripts/docs/styles.py runs/quickstart

Reads the samples of a run on the arithmetic task, where a long thought has a `check` and a short
one has none, and prints a Markdown table.
"""

import json
import sys
from pathlib import Path

STYLES = ("long", "short", "answer")


def style_of(completion: str) -> str:
    """Which kind of demonstration a completion resembles."""
    thought = completion.partition("<think>")[2].partition("</think>")[0]
    if not thought.strip():
        return "answer"
    return "long" if "check" in thought.split() else "short"


def row_of(stage: str, samples: list[dict]) -> str:
    """A line of the table: for each style its share and the accuracy within it."""
    cells = []
    for style in STYLES:
        right = [row["correct"] for row in samples if style_of(row["completion"]) == style]
        share = f"{100 * len(right) / len(samples):.1f} %"
        accuracy = f"{100 * sum(right) / len(right):.1f} %" if right else "-"
        cells += [share, accuracy]
    return f"| {stage} | {' | '.join(cells)} |"


def main(run: str) -> None:
    """Print the table of a run, without the untrained model."""
    header = [cell for style in STYLES for cell in (style, "right")]
    print(f"| stage | {' | '.join(header)} |")
    print("|---|" + "---:|" * len(header))
    for summary in json.loads((Path(run) / "summary.json").read_text()):
        if summary["stage"] != "init":
            path = Path(run) / summary["stage"] / "samples.jsonl"
            samples = [json.loads(line) for line in path.read_text().splitlines()]
            print(row_of(summary["stage"], samples))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
