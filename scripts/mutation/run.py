"""Breaks the library in one place after the other and asks whether the conformance suite notices.

python scripts/mutation/run.py [--module losses.policy ...] [--sample N] [--jobs N] [--list]

Each mutant is a copy of the package with one edit, checked in a process of its own by the tests of
all functions that use what was edited. It is caught when one of them fails, and then that test must
pass on an unchanged copy. The exit status is 1 when a mutant survives that equivalent.txt does not
list as one that cannot change a result, and 2 when the suite fails without any mutant.
"""

import argparse
import collections
import dataclasses
import difflib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from mutants import PACKAGE, ROOT, Mutant, modules, mutants_of, path_of
from reach import reached

EQUIVALENT = Path(__file__).with_name("equivalent.txt")
SUITE = "jaxrl_reason/conformance"
TABLES = {"AGGREGATORS": "tests/objectives/test_aggregators.py"}
"""Tests of what is public and no function, so that the suite cannot have cases of it."""
ALONE = ["--noconftest", f"--rootdir={ROOT}", "-c", os.devnull]
"""Without the settings of our own tests, which want to come before anything of jax."""
LIMIT = 900
"""Seconds for the tests of one mutant; one that takes longer counts as caught."""


@dataclasses.dataclass
class Outcome:
    """What the tests said of a mutant."""

    mutant: Mutant
    status: str
    """`caught`, `survived` or `equivalent`."""
    test: str = ""
    """The test that failed."""
    seconds: float = 0.0


class Oracles:
    """A plugin of pytest: oracles first, because most mutants fail there."""

    def __init__(self, note: Path):
        self.note = note

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        """Leaves the order as it is otherwise."""
        items.sort(key=lambda item: not item.name.startswith("test_oracle"))

    def pytest_runtest_logreport(self, report):
        """Notes the first test that fails."""
        if report.failed and not self.note.exists():
            self.note.write_text(report.nodeid)


def equivalents() -> dict[str, str]:
    """Names of the mutants that cannot change a result, and why."""
    lines = EQUIVALENT.read_text().splitlines()
    entries = [line.rsplit(" | ", 1) for line in lines if line and not line.startswith("#")]
    return {name.strip(): reason.strip() for name, reason in entries}


def sample(mutants: Sequence[Mutant], count: int) -> list[Mutant]:
    """So many mutants, taken in turn from the modules; always the same ones."""
    ranked = sorted(mutants, key=lambda mutant: mutant.rank)
    by_module = collections.defaultdict(list)
    for mutant in ranked:
        by_module[mutant.module].append(mutant)
    rounds = itertools.chain(*itertools.zip_longest(*by_module.values()))
    return [mutant for mutant in rounds if mutant is not None][:count]


def copy_package(scratch: Path, mutant: Mutant | None = None) -> Path:
    """A new folder with the package as it was at the start, with the edit of a mutant."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    shutil.copytree(scratch / PACKAGE.name, folder / PACKAGE.name)
    if mutant is not None:
        file = folder / PACKAGE.name / path_of(mutant.module)
        file.write_text(mutant.apply(file.read_text()))
    return folder


def arguments_for(mutant: Mutant) -> list[list[str]]:
    """Arguments of the runs of pytest that check a mutant."""
    names = reached(mutant.module, mutant.function)
    functions = sorted(name for name in names if not name.startswith("_") and name.islower())
    runs = [[SUITE, "-k", " or ".join(functions)]] if functions else []
    return runs + [[*ALONE, str(ROOT / file)] for table, file in TABLES.items() if table in names]


def start(folder: Path, runs: Sequence[Sequence[str]]) -> int:
    """Runs pytest in a copy in a new process, until the first run that fails; its process id."""
    with warnings.catch_warnings():
        # No backend has started, so there are no threads yet that a fork would lose.
        warnings.simplefilter("ignore", RuntimeWarning)
        child = os.fork()
    if child:
        return child
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    good, status = {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}, 1
    try:
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=short"]
        plugins = [Oracles(folder / "failed")]
        status = int(
            any(pytest.main([*options, *run], plugins=plugins) not in good for run in runs)
        )
        sys.stdout.flush()
    finally:
        os._exit(status)


def prepare(cache: Path) -> None:
    """Settings of the tests, and the imports that all mutants share. No backend starts here."""
    os.environ |= {
        "NPROC": "16",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0",
        # Programs are found by what they compute, so that one mutant cannot get another's.
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    for name in ("jax.numpy", "jaxtyping", "numpy", "pytest"):
        __import__(name)
    if "jaxrl_reason" in sys.modules:
        raise RuntimeError("jaxrl_reason is imported already; mutants would not be")


def check(mutants: Sequence[Mutant], jobs: int, scratch: Path) -> Iterator[Outcome]:
    """Runs the tests of every mutant, some at a time."""
    waiting, running = collections.deque(mutants), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.popleft()
            folder = copy_package(scratch, mutant)
            child = start(folder, arguments_for(mutant))
            running[child] = mutant, folder, time.monotonic()
        child, status = os.waitpid(-1, os.WNOHANG)
        for late, (*_, begun) in running.items():
            if time.monotonic() - begun > LIMIT:
                os.kill(late, 9)
        if child == 0:
            time.sleep(0.05)
            continue
        mutant, folder, begun = running.pop(child)
        note = folder / "failed"
        test = note.read_text() if note.exists() else ""
        caught = "caught" if status else "survived"
        yield Outcome(mutant, caught, test, round(time.monotonic() - begun, 1))
        shutil.rmtree(folder)


def passes_unchanged(outcomes: Sequence[Outcome], scratch: Path) -> bool:
    """Whether tests that caught mutants pass where there is none; prints what fails."""
    tests = {outcome.test for outcome in outcomes}
    cases = sorted(test for test in tests if test.startswith(SUITE))
    units = sorted(str(ROOT / test) for test in tests - {"", *cases})
    runs = [cases] if cases else []
    runs += [[*ALONE, *units]] if units else []
    # A mutant that cannot be imported fails before any test.
    runs += [[SUITE, "--collect-only"]] if "" in tests else []
    folder = copy_package(scratch)
    _, status = os.waitpid(start(folder, runs), 0)
    if status:
        print((folder / "log").read_text())
    return status == 0


def difference(mutant: Mutant) -> str:
    """The edit as a diff."""
    source = (PACKAGE / path_of(mutant.module)).read_text()
    name = f"{PACKAGE.name}/{path_of(mutant.module)}"
    lines = (text.splitlines(keepends=True) for text in (source, mutant.apply(source)))
    return "".join(difflib.unified_diff(*lines, name, f"{name}, {mutant.kind}", n=1))


def report(outcomes: Sequence[Outcome]) -> None:
    """A table by module, and a diff of every survivor."""
    table = collections.defaultdict(collections.Counter)
    for outcome in outcomes:
        table[outcome.mutant.module][outcome.status] += 1
    table["all"] = sum(table.values(), collections.Counter())
    print("| module | mutants | caught | survived | equivalent |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for module, counts in table.items():
        cells = [counts[status] for status in ("caught", "survived", "equivalent")]
        print(f"| {module} | {counts.total()} | {' | '.join(map(str, cells))} |")
    for outcome in outcomes:
        if outcome.status == "survived":
            print(f"\n{outcome.mutant.name}\n{difference(outcome.mutant)}", end="")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", nargs="+", choices=modules(), default=modules())
    parser.add_argument("--function", nargs="+", help="only mutants of these functions")
    parser.add_argument("--all", action="store_true", help="every place, not a handful a function")
    parser.add_argument("--sample", type=int, help="only so many, spread over the modules")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    return parser.parse_args()


def main() -> int:
    """Mutate, test and report; the exit status."""
    options = parsed()
    mutants = [one for module in options.module for one in mutants_of(module, every=options.all)]
    if options.function:
        mutants = [one for one in mutants if one.function in options.function]
    known = equivalents()
    outcomes = [Outcome(one, "equivalent") for one in mutants if one.name in known]
    mutants = [one for one in mutants if one.name not in known]
    if options.sample is not None:
        mutants, outcomes = sample(mutants, options.sample), []
    if options.list:
        print(*(f"{one.line:4} {one.name}" for one in mutants), sep="\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        scratch = Path(scratch)
        # A compiled file would be taken for that of any source of the same size and second.
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, scratch / PACKAGE.name, ignore=ignore)
        prepare(scratch / "cache")
        for outcome in check(mutants, options.jobs, scratch):
            outcomes.append(outcome)
            progress = f"{outcome.status:8} {outcome.seconds:5.1f} s  {outcome.mutant.name}"
            print(progress, file=sys.stderr, flush=True)
        sound = passes_unchanged([x for x in outcomes if x.status == "caught"], scratch)
    outcomes.sort(key=lambda outcome: options.module.index(outcome.mutant.module))
    report(outcomes)
    if options.json:
        rows = [{**dataclasses.asdict(x), "diff": difference(x.mutant)} for x in outcomes]
        options.json.write_text(json.dumps(rows, indent=1))
    if not sound:
        print("\nthe suite fails on the package as it is; see above")
        return 2
    return int(any(outcome.status == "survived" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
