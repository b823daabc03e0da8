"""Kill runs at random moments, damage what they left, start them again, and compare the bits.

    python scripts/chaos.py --runs 63 --jobs 2 --out docs/reliability.json

The four stages of the quickstart, with fewer steps, are run once without being disturbed. Every
other run is killed with SIGKILL and started again until it ends; then its parameters are compared,
stage by stage and bit by bit, with those of the first, and its metrics must have every step once.
Where files were damaged, the log must name the checkpoint and say so. Kinds of trouble, in turn:

    starting   killed at a random moment before the first step, or in it
    once       killed at a random moment of a random stage
    twice      and again after it was started again
    saving     killed while a checkpoint is being written
    shortened  killed, and a random file of the newest checkpoint cut to half its length
    removed    killed, and a random file of the newest checkpoint removed
    notice     SIGTERM in place of SIGKILL
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
SMALLER = (
    "model.preset=0.3m",
    "evaluation.problems=16",
    "evaluation.batch_size=16",
    "evaluation.max_completion_length=48",
    "stages.cold_start.steps=120",
    "stages.cold_start.save_steps=20",
    "stages.cold_start.data.num_examples=512",
    "stages.prefer.steps=12",
    "stages.prefer.save_steps=3",
    "stages.prefer.batch_size=8",
    "stages.prefer.data.num_prompts=128",
    "stages.reason.steps=8",
    "stages.reason.save_steps=2",
    "stages.reason.prompts_per_step=8",
    "stages.reason.num_generations=4",
    "stages.reason.max_completion_length=48",
    "stages.balance.steps=8",
    "stages.balance.save_steps=2",
    "stages.balance.prompts_per_step=8",
    "stages.balance.num_generations=4",
    "stages.balance.max_completion_length=48",
)
STAGES = ("cold_start", "prefer", "reason", "balance")
KINDS = ("starting", "once", "twice", "saving", "shortened", "removed", "notice")
MOST_STARTS = 8
STARTING = 12.0
"""Seconds: about as long as a run takes to its first step where its programs are compiled."""


def start(folder: Path, overrides: list[str]) -> subprocess.Popen:
    """A run of the quickstart in a folder."""
    command = [
        sys.executable,
        "-m",
        "jaxrl_reason.cli",
        "run",
        str(ROOT / "configs/quickstart.yaml"),
    ]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            [*command, f"output_dir={folder}", *SMALLER, *overrides],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, **cache},
        )


def bits(folder: Path) -> dict[str, str]:
    """A digest of the parameters that each stage ended with."""
    import orbax.checkpoint as ocp

    found = {}
    for stage in STAGES:
        checkpoints = folder / "quickstart" / stage / "checkpoints"
        last = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
        handler = ocp.StandardCheckpointHandler()
        tree = handler.restore((checkpoints / str(last) / "params").resolve())
        digest = hashlib.sha256(str(last).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.asarray(leaf).tobytes())
        found[stage] = digest.hexdigest()
    return found


def has_every_step_once(folder: Path, sizes: dict[str, int]) -> bool:
    """Whether the metrics of every stage are those of a run that was not disturbed."""

    def steps(stage: str) -> list[int]:
        lines = (folder / "quickstart" / stage / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    return all(steps(stage) == list(range(1, size + 1)) for stage, size in sizes.items())


def steps_done(folder: Path, stage: str) -> int:
    """Steps that the metrics of a stage tell of."""
    log = folder / "quickstart" / stage / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def unfinished_saves(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(folder.glob("quickstart/*/checkpoints/*.orbax-checkpoint-tmp*"))


def wait(run: subprocess.Popen, until: Callable[[], bool]) -> bool:
    """Whether that came before the run ended."""
    while run.poll() is None:
        if until():
            return True
        time.sleep(0.002)
    return False


def says_so(folder: Path, damaged: list[str | None]) -> bool:
    """Whether the log names every checkpoint of whose contents a file was damaged, as damaged.

    Files of Orbax's beside them (`_CHECKPOINT_METADATA`, `commit_success.txt`) hold nothing that is
    read; without ours (`files.json`), contents are read as they are.
    """
    lines = [line for line in (folder / "log.txt").read_text().splitlines() if "damaged" in line]
    parts = [Path(file).parts for file in damaged if file is not None]
    steps = ["/".join(part[:3]) for part in parts if len(part) > 4]
    return all(any(step in line for line in lines) for step in steps)


def strike(
    kind: str, folder: Path, run: subprocess.Popen, rng: random.Random, sizes: dict[str, int]
) -> dict | None:
    """Wait for a random moment and kill the run; says when, or None if it had ended before."""
    if kind == "starting":
        began = time.monotonic()
        moment = rng.random() * STARTING
        early = lambda: time.monotonic() - began >= moment or steps_done(folder, STAGES[0])
        if not wait(run, early):
            return None
        run.kill()
        run.wait()
        seconds = time.monotonic() - began
        done = steps_done(folder, STAGES[0])
        return {"stage": STAGES[0], "step": done, "when": f"{seconds:.1f} s after the start"}
    done = {stage: steps_done(folder, stage) for stage in STAGES}
    left = [stage for stage in STAGES if done[stage] < sizes[stage]]
    if not left:
        return None
    stage = rng.choice(left)
    step = rng.randint(done[stage], sizes[stage] - 1)
    begun = folder / "quickstart" / stage
    if not wait(run, lambda: begun.exists() and steps_done(folder, stage) >= step):
        return None
    if kind == "saving":
        if not wait(run, lambda: unfinished_saves(folder)):
            return None
        when = "while saving"
    else:
        time.sleep(rng.random() * 0.3)
        when = "after it"
    run.send_signal(signal.SIGTERM if kind == "notice" else signal.SIGKILL)
    began = time.monotonic()
    code = run.wait()
    told = {"stage": stage, "step": step, "when": when}
    if kind == "notice":
        told |= {"seconds": round(time.monotonic() - began, 2), "exit": code}
    return told


def damage(kind: str, folder: Path, rng: random.Random) -> str | None:
    """Shorten or remove a file of the newest checkpoint; says which."""
    found = [path for path in folder.glob("quickstart/*/checkpoints/*") if path.name.isdecimal()]
    if not found:
        return None
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    file = rng.choice(files)
    if kind == "removed":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    return str(file.relative_to(folder / "quickstart"))


def trouble(
    kind: str, folder: Path, rng: random.Random, sizes: dict[str, int], overrides: list[str]
) -> dict:
    """One run with its troubles, started until it ends."""
    folder.mkdir(parents=True)
    told: dict = {"kind": kind, "struck": [], "damaged": [], "starts": 0}
    strikes = 2 if kind == "twice" else 1
    while told["starts"] < MOST_STARTS:
        run = start(folder, overrides)
        told["starts"] += 1
        if len(told["struck"]) < strikes:
            when = strike(kind, folder, run, rng, sizes)
            if when is not None:
                told["struck"].append(when)
                if kind in ("shortened", "removed"):
                    told["damaged"].append(damage(kind, folder, rng))
                continue
        if run.wait() == 0:
            return told
        told["exit"] = run.returncode
        return told
    told["exit"] = f"none after {MOST_STARTS} starts"
    return told


def table_of(runs: list[dict]) -> dict[str, dict[str, int]]:
    """By kind of trouble: runs, what happened in them, and how many ended as they should."""
    return {
        kind: {
            "runs": len(of_kind),
            "struck": sum(len(run["struck"]) for run in of_kind),
            "damaged": sum(file is not None for run in of_kind for file in run["damaged"]),
            "starts": sum(run["starts"] for run in of_kind),
            "same": sum(run["same"] for run in of_kind),
        }
        for kind in KINDS
        if (of_kind := [run for run in runs if run["kind"] == kind])
    }


def main() -> int:
    """The table of all runs; 1 if any of them ended otherwise than the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--folder", help="of the runs; a temporary one by default")
    parser.add_argument("--out", help="JSON file to be written")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of all runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(arguments.folder or temporary)
        overrides = [f"stages.{s}.save_total_limit=2" for s in STAGES] + arguments.overrides
        (root / "undisturbed").mkdir(parents=True)
        if start(root / "undisturbed", overrides).wait() != 0:
            print((root / "undisturbed" / "log.txt").read_text()[-3000:], file=sys.stderr)
            return 1
        expected = bits(root / "undisturbed")
        sizes = {stage: steps_done(root / "undisturbed", stage) for stage in STAGES}
        runs: list[dict] = []

        def one(number: int) -> dict:
            kind = arguments.kinds[number % len(arguments.kinds)]
            rng = random.Random(f"{arguments.seed}|{number}")
            folder = root / f"run_{number}"
            return {"run": number, **trouble(kind, folder, rng, sizes, overrides)}

        with ThreadPoolExecutor(arguments.jobs) as pool:
            for done in as_completed([pool.submit(one, n) for n in range(arguments.runs)]):
                told = done.result()
                folder = root / f"run_{told['run']}"
                ended = "exit" not in told and has_every_step_once(folder, sizes)
                told["said"] = says_so(folder, told["damaged"])
                told["same"] = ended and told["said"] and bits(folder) == expected
                print(json.dumps(told), flush=True)
                runs = sorted([*runs, told], key=lambda run: run["run"])
                if arguments.out:
                    table = {"seed": arguments.seed, "table": table_of(runs), "runs": runs}
                    Path(arguments.out).write_text(json.dumps(table, indent=1) + "\n")
                if told["same"]:
                    shutil.rmtree(folder)
                else:
                    print((folder / "log.txt").read_text()[-3000:], file=sys.stderr)
    for kind, row in table_of(runs).items():
        print(f"{kind:<10} {row}")
    return 0 if all(run["same"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
