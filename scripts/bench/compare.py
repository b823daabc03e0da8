r"""Ours beside TRL, transformers and tunix on the standard workloads, taking turns in one run.

    bash scripts/bench/peers/setup.sh environments
    python scripts/bench/compare.py --environments environments --out results.json
    python scripts/bench/compare.py --environments environments --out results.json \
        --workloads W2 --shapes small --contestants ours trl tunix

Every contestant is a process of its own that stays alive; in each repeat all run one after the
other, in an order that turns with the repeat, and those whose turn it is not are stopped. A ratio
is that of one repeat. Results are written after every measurement, and the same command goes on
where it stopped: a repeat counts once all its contestants have been measured.
"""

import argparse
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxrl_reason.bench import machine
from jaxrl_reason.bench.results import OURS, markdown, summaries
from jaxrl_reason.bench.workloads import SHAPES, WORKLOADS

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "scripts" / "bench" / "peers"
ON_REQUEST = {"trl-one-pass"}  # needs several times the memory and is no faster
WARM_UP = 0  # the repeat that is run first and not recorded
MARKS = ("<!-- comparison -->", "<!-- end of comparison -->")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """How a worker is started, by kind of workload."""

    environment: str | None
    script: str
    options: Mapping[str, Sequence[str]]

    def command(self, environments: Path, kind: str) -> list[str]:
        """Its command line for a kind of workload."""
        if self.environment is None:
            return [sys.executable, "-m", *self.script.split(), *self.options[kind]]
        python = environments.absolute() / self.environment / "bin" / "python"
        return [str(python), str(PEERS / self.script), *self.options[kind]]


CONTESTANTS = {
    OURS: Contestant(
        None, "jaxrl_reason.cli bench --worker", {"grpo": (), "generate": (), "sft": ()}
    ),
    # Its batch size by default; in fine-tuning, documents that do not see each other.
    "trl": Contestant(
        "torch",
        "peer_trl.py",
        {
            "grpo": ("--rows-per-pass", "8"),
            "sft": ("--packing", "bfd", "--rows-per-pass", "1"),
        },
    ),
    # All rows of a step at once.
    "trl-one-pass": Contestant(
        "torch",
        "peer_trl.py",
        {
            "grpo": ("--rows-per-pass", "64"),
            "sft": ("--packing", "bfd", "--rows-per-pass", "4"),
        },
    ),
    # Documents cut at the ends of rows and seeing those before them.
    "trl-wrapped": Contestant(
        "torch", "peer_trl.py", {"sft": ("--packing", "wrapped", "--rows-per-pass", "4")}
    ),
    "transformers": Contestant("torch", "peer_transformers.py", {"generate": ("--batch", "64")}),
    "transformers-continuous": Contestant(
        "torch", "peer_transformers.py", {"generate": ("--continuous",)}
    ),
    "tunix": Contestant("jax", "peer_tunix.py", {"grpo": (), "generate": ()}),
}


class ContestantError(Exception):
    """A contestant gave up."""


class Worker:
    """The process of a contestant: stopped, but while it answers."""

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_WAIT_POLICY": "PASSIVE",  # a spinning barrier counts as work and slows the wall
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_OFFLINE": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # contestants share a GPU
        }
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def ask(self, **request) -> dict:
        """Its answer to a request.

        Raises:
            ContestantError: it answered with an error, or not at all.
        """
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise ContestantError(f"{self.name}: {answer['error']}")
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        return f"ended with {code}; {self._errors.read()[-2000:]}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()


def measure(worker: Worker, repeat: int) -> dict:
    """One measurement, with the share of the machine that other processes took meanwhile."""
    before = machine.busy_seconds()
    answer = worker.ask(do="run", repeat=repeat)
    took = {name: answer[name] for name in ("seconds", "cpu_seconds")}
    return {**answer, "others": machine.others_share(before, **took)}


def run_workload(
    workload: str, shape: str, names: Sequence[str], options: argparse.Namespace, book: "Book"
) -> None:
    """All repeats of a workload that the book does not have yet."""
    todo = book.missing(workload, shape, names, options.repeats)
    kind = WORKLOADS[workload].kind
    names = [name for name in names if kind in CONTESTANTS[name].options]
    workers: dict[str, Worker] = {}
    try:
        for name in names if todo else []:
            command = CONTESTANTS[name].command(options.environments, kind)
            workers[name] = Worker(name, command)
            request = {"workload": workload, "shape": shape, "changes": options.changes}
            try:
                info = workers[name].ask(do="prepare", **request)
                warm = workers[name].ask(do="run", repeat=WARM_UP)
            except ContestantError as error:
                _drop(workers, name, error)
                continue
            book.note(workload, shape, name, {**info, "first_seconds": warm["seconds"]})
        for repeat in todo:
            order = [*workers][:: 1 if repeat % 2 else -1]
            for name in order:
                try:
                    row = measure(workers[name], repeat)
                except ContestantError as error:
                    _drop(workers, name, error)
                    continue
                book.add(workload, shape, name, repeat, row)
                print(
                    f"{workload} {shape} repeat {repeat} {name}: {row['seconds']:.2f} s, "
                    f"{row['useful_tokens'] / row['seconds']:.0f} tokens/s, "
                    f"{row['peak_rss_mb']:.0f} MB, others {row['others']:.0%}",
                    flush=True,
                )
    finally:
        for worker in workers.values():
            worker.close()


def _drop(workers: dict[str, Worker], name: str, error: ContestantError) -> None:
    print(f"left out: {error}", file=sys.stderr, flush=True)
    workers.pop(name).close()


class Book:
    """The file of results."""

    def __init__(self, path: Path):
        self.path = path
        empty = {"machine": machine.describe(), "contestants": {}, "rows": []}
        self.content = json.loads(path.read_text()) if path.exists() else empty

    def missing(self, workload: str, shape: str, names: Sequence[str], repeats: int) -> list[int]:
        """Repeats, counted from 1, that lack a contestant; all of the repeat is run again."""
        kind = WORKLOADS[workload].kind
        able = {name for name in names if kind in CONTESTANTS[name].options}
        have: dict[int, set[str]] = {}
        for row in self.content["rows"]:
            if (row["workload"], row["shape"]) == (workload, shape):
                have.setdefault(row["repeat"], set()).add(row["contestant"])
        return [n for n in range(1, repeats + 1) if not able <= have.get(n, set())]

    def note(self, workload: str, shape: str, contestant: str, info: dict) -> None:
        """What a contestant says of itself."""
        self.content["contestants"][f"{workload} {shape} {contestant}"] = info
        self._write()

    def add(self, workload: str, shape: str, contestant: str, repeat: int, row: dict) -> None:
        """A measurement, in place of an earlier one of the same repeat."""
        key = {"workload": workload, "shape": shape, "contestant": contestant, "repeat": repeat}
        is_other = lambda old: any(old[name] != value for name, value in key.items())
        rows = [old for old in self.content["rows"] if is_other(old)]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.content["rows"] = [*rows, {**key, **row, "commit": commit(), "at": now}]
        self._write()

    def _write(self) -> None:
        self.content["summary"] = summaries(self.content["rows"])
        scratch = self.path.with_suffix(".part")
        scratch.write_text(json.dumps(self.content, indent=1) + "\n")
        scratch.replace(self.path)


def commit() -> str:
    """The commit of the working tree; marked where it has changes."""
    git = ["git", "-C", str(ROOT)]
    run = lambda *words: subprocess.run([*git, *words], capture_output=True, text=True).stdout
    changed = "+changes" if run("status", "--porcelain", "--", "jaxrl_reason").strip() else ""
    return run("rev-parse", "--short", "HEAD").strip() + changed


def write_into(page: Path, table: str) -> None:
    """Replace what stands between the marks of a page."""
    before, _, rest = page.read_text().partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise SystemExit(f"{page} lacks {MARKS[0]} and {MARKS[1]}")
    page.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    standard = ["W1", "W2", "W3", "W4"]
    parser.add_argument("--workloads", nargs="+", default=standard, choices=WORKLOADS)
    parser.add_argument("--shapes", nargs="+", default=["small", "tiny"], choices=SHAPES)
    usual = [name for name in CONTESTANTS if name not in ON_REQUEST]
    parser.add_argument("--contestants", nargs="+", default=usual, choices=CONTESTANTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--environments", type=Path, required=True, help="made by peers/setup.sh")
    parser.add_argument("--out", type=Path, required=True, help="JSON; gone on with if it exists")
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    parser.add_argument(
        "--changes", type=json.loads, default={}, help="fields of the workload, as JSON, to try out"
    )
    options = parser.parse_args()
    book = Book(options.out)
    for workload in options.workloads:
        for shape in options.shapes:
            run_workload(workload, shape, options.contestants, options, book)
    table = markdown(summaries(book.content["rows"]))
    print(table)
    if options.page is not None:
        write_into(options.page, table)


if __name__ == "__main__":
    main()
