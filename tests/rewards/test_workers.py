"""Processes for rewards: they compute elsewhere, take no device, and never outlive the run."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.rewards.workers import Workers, result

TARGET = """
import os, sys, time

class Target:
    def __init__(self, factor):
        self.factor = factor

    def times(self, number):
        return self.factor * number, os.getpid()

    def raises(self, name):
        raise KeyError(name)

    def dies(self):
        os._exit(7)

    def sleeps(self, seconds):
        time.sleep(seconds)

    def loaded(self):
        return "jax" in sys.modules

    def devices(self):
        import jax
        from jax._src import xla_bridge
        before = xla_bridge.backends_are_initialized()
        return before, [device.platform for device in jax.devices()], jax.config.jax_platforms
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    """An object that a fresh process can import."""
    (tmp_path / "target_of_tests.py").write_text(TARGET, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from target_of_tests import Target  # pyright: ignore[reportMissingImports]

    yield Target(3)
    sys.modules.pop("target_of_tests")


@pytest.mark.parametrize("count", [0, 2])
def test_calls_give_results_and_errors(target, count):
    with Workers(target, count) as workers:
        futures = [workers.submit("times", i) for i in range(20)]
        numbers, processes = zip(*map(result, futures), strict=True)
        assert numbers == tuple(range(0, 60, 3))
        assert len(set(processes)) <= max(count, 1)
        assert (os.getpid() in processes) == (count == 0)
        with pytest.raises(KeyError, match="column"):
            result(workers.submit("raises", "column"))
        assert result(workers.submit("times", 2))[0] == 6


def test_workers_take_no_device(target, monkeypatch):
    """JAX is not even loaded; a reward that loads it gets the CPU, whatever the run has."""
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with Workers(target, 1) as workers:
        assert not result(workers.submit("loaded"))
        assert result(workers.submit("devices")) == (False, ["cpu"], "cpu")


def test_a_process_that_dies_is_one_clear_error(target):
    with Workers(target, 1) as workers:
        with pytest.raises(InputError, match=r"reward_workers died while .* reward_workers=0 "):
            result(workers.submit("dies"))
        with pytest.raises(InputError, match="a process of reward_workers died"):
            workers.submit("times", 1)


def test_closing_does_not_wait_for_what_is_being_done(target):
    began = time.monotonic()
    with Workers(target, 1) as workers:
        result(workers.submit("times", 1))
        sleeping = workers.submit("sleeps", 600)
    assert time.monotonic() - began < 60
    assert sleeping.done()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from target_of_tests import Target
from jaxrl_reason.rewards.workers import Workers, result

if __name__ == "__main__":
    workers = Workers(Target(1), 1)
    print(result(workers.submit("times", 1))[1], flush=True)
    workers.submit("sleeps", 600)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_process_that_is_killed(target, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    worker = Path("/proc") / done.stdout.strip()
    if not worker.parent.exists():
        pytest.skip("processes are looked up in /proc")
    for _ in range(200):
        if not worker.exists() or "(zombie)" in (worker / "status").read_text():
            return
        time.sleep(0.05)
    os.kill(int(worker.name), signal.SIGKILL)
    pytest.fail("the worker outlived the process that started it")


@pytest.mark.parametrize("count", [0, 1])
def test_coroutines_are_under_way_together(target, count):
    async def meets(here, there):
        here.set()
        await asyncio.wait_for(there.wait(), timeout=60)
        return threading.current_thread().name

    async def fails():
        raise OSError("no server")

    with Workers(target, count) as workers:
        one, two = asyncio.Event(), asyncio.Event()
        futures = [workers.submit_async(meets(one, two)), workers.submit_async(meets(two, one))]
        assert len(set(map(result, futures))) == 1
        with pytest.raises(OSError, match="no server"):
            result(workers.submit_async(fails()))
        never = workers.submit_async(asyncio.sleep(600))
    assert never.cancelled()
    assert threading.current_thread().name not in map(result, futures)
