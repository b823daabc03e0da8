"""The driver: turns, resumption, contestants that fail, and the table in a page."""

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "scripts" / "bench" / "compare.py"

FAKE = """
import os, sys, time
from jaxrl_reason.bench.worker import Work, serve

name, log = sys.argv[1:3]

class Fake:
    def __init__(self, workload, shape):
        self.info = {"name": name, "workload": workload.name}
        if name == "stillborn":
            raise MemoryError("no room")

    def run(self, repeat):
        if name == "frail" and repeat == 2:
            print("last words", file=sys.stderr)
            os._exit(3)
        with open(log, "a") as file:
            file.write(f"{name} {repeat}\\n")
        time.sleep(0.02)
        return Work(useful_tokens=10, computed_tokens=10)

serve(Fake)
"""


@pytest.fixture
def compare(monkeypatch):
    spec = importlib.util.spec_from_file_location("compare", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def race(compare, monkeypatch, tmp_path):
    """Runs W1 nano among fakes; returns (who ran, in order; the results file's content)."""
    script, log, out = tmp_path / "fake.py", tmp_path / "log", tmp_path / "out.json"
    script.write_text(FAKE)

    class Fake(compare.Contestant):
        def command(self, environments, kind):
            return [sys.executable, str(script), self.script, str(log)]

    def run(*names: str, repeats: int):
        fakes = {name: Fake(None, name, {"grpo": ()}) for name in names}
        monkeypatch.setattr(compare, "CONTESTANTS", fakes)
        log.write_text("")
        options = argparse.Namespace(environments=tmp_path, repeats=repeats, changes={})
        compare.run_workload("W1", "nano", names, options, compare.Book(out))
        return log.read_text().splitlines(), json.loads(out.read_text())

    return run


def test_contestants_take_turns_after_a_warm_up(race):
    ran, content = race("ours", "peer", repeats=2)
    warm = ["ours 0", "peer 0"]
    assert ran == [*warm, "ours 1", "peer 1", "peer 2", "ours 2"]
    assert [(row["contestant"], row["repeat"]) for row in content["rows"]] == [
        ("ours", 1),
        ("peer", 1),
        ("peer", 2),
        ("ours", 2),
    ]
    row = content["rows"][0]
    assert row["others"] >= 0
    assert row["seconds"] >= 0.02
    assert row["commit"]
    assert content["contestants"]["W1 nano peer"]["name"] == "peer"
    assert content["summary"][1]["speed_ratio"]["count"] == 2


def test_a_second_run_does_only_what_is_missing(race):
    race("ours", "peer", repeats=1)
    ran, _ = race("ours", "peer", repeats=1)
    assert ran == []
    # A repeat without one of its contestants is run again by all of them.
    ran, content = race("ours", "peer", "third", repeats=1)
    assert ran[3:] == ["ours 1", "peer 1", "third 1"]
    assert len(content["rows"]) == 3


@pytest.mark.parametrize(("peer", "count"), [("frail", 1), ("stillborn", 0)])
def test_a_contestant_that_fails_is_left_out(race, capfd, peer, count):
    _, content = race("ours", peer, repeats=3)
    rows = [row["contestant"] for row in content["rows"]]
    assert (rows.count("ours"), rows.count(peer)) == (3, count)
    told = capfd.readouterr().err
    assert f"left out: {peer}" in told
    assert ("last words" if peer == "frail" else "no room") in told


def test_a_worker_is_stopped_while_it_is_not_asked(compare, tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    worker = compare.Worker("fake", [sys.executable, str(script), "fake", os.devnull])
    try:
        worker.ask(do="prepare", workload="W1", shape="nano")
        stat = Path(f"/proc/{worker._process.pid}/stat")
        deadline = time.monotonic() + 10
        state = lambda: stat.read_text().rpartition(")")[2].split()[0]
        while state() != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state() == "T"
        assert worker.ask(do="run", repeat=1)["useful_tokens"] == 10
    finally:
        worker.close()


def test_every_contestant_has_a_script_and_each_workload_a_peer(compare):
    for contestant in compare.CONTESTANTS.values():
        if contestant.environment is not None:
            assert (compare.PEERS / contestant.script).exists()
    for kind in ("grpo", "generate", "sft"):
        able = [name for name, c in compare.CONTESTANTS.items() if kind in c.options]
        assert able[0] == "ours"
        assert len(able) > 1


def test_the_table_replaces_what_stands_between_the_marks(compare, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{compare.MARKS[0]}\nold\n{compare.MARKS[1]}\nafter\n")
    compare.write_into(page, "| new |")
    assert page.read_text() == (f"before\n{compare.MARKS[0]}\n| new |\n{compare.MARKS[1]}\nafter\n")
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks"):
        compare.write_into(page, "| new |")


def test_pins_are_exact(compare):
    for name in ("torch.txt", "jax.txt"):
        lines = (compare.PEERS / name).read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert len(pins) > 30
        assert [line for line in pins if "==" not in line or "+" in line or "@" in line] == []
