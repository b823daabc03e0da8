"""SIGTERM: when it waits, when it does not, and that nothing swallows it."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys

import pytest

from jaxrl_reason.errors import Preemption
from jaxrl_reason.stages import preemption
from jaxrl_reason.stages.preemption import after_a_step, heeded


def notice() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def steps(*notices: int) -> list[int]:
    """The steps that were begun; notices come in those of these numbers, 0: behind the last."""
    begun = []
    with heeded(), after_a_step() as is_to_end:
        for step in (1, 2, 3):
            begun.append(step)
            for _ in range(notices.count(step)):
                notice()
            if is_to_end():
                raise Preemption(f"{begun} are saved")
        for _ in range(notices.count(0)):
            notice()
    return begun


def test_it_ends_at_once_what_would_lose_nothing():
    def reward():
        with heeded(), contextlib.suppress(Exception):  # as those who call a user's functions do
            notice()

    with pytest.raises(Preemption, match="nothing is lost"):
        reward()


def test_a_step_is_finished_first():
    with pytest.raises(Preemption, match=r"\[1, 2\] are saved"):
        steps(2)


def test_behind_the_last_step_it_is_not_forgotten():
    with pytest.raises(Preemption, match="nothing is lost"):
        steps(0)


def test_the_second_does_not_wait():
    with pytest.raises(Preemption, match="the step that was running is lost"):
        steps(2, 2)


def test_without_a_notice_nothing_changes_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    assert steps() == [1, 2, 3]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_notice_while_a_run_imports_ends_it_well():
    code = """
import os, signal, sys
class Notice:
    def find_spec(self, name, *_):
        if name == "jax":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Notice())
from jaxrl_reason.cli import main
sys.exit(main(["run", "configs/quickstart.yaml"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    wanted = "SIGTERM: nothing is lost; the same command goes on from there\n"
    assert (done.returncode, done.stdout) == (0, wanted), done.stderr


def test_processes_count_the_steps_of_all_stages(monkeypatch):
    """JAX waits for the number behind the last: it would never come where a stage begins again."""
    asked = []
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption, "_steps", itertools.count(1))
    monkeypatch.setattr(
        preemption.multihost_utils,
        "reached_preemption_sync_point",
        lambda step: asked.append(step) or step == 4,
    )
    for _ in range(2):
        with preemption.after_a_step() as is_to_end:
            ends = [is_to_end() for _ in range(2)]
    assert asked == [1, 2, 3, 4]
    assert ends == [False, True]
