"""Calls of one object's methods in other processes, while this one drives the device.

Workers are fresh processes (`spawn`): a fork of a process that runs JAX may hang. They never use an
accelerator, and they end with the process that started them, also when that is killed.
"""

import asyncio
import concurrent.futures
import multiprocessing
import operator
import os
import pickle
import signal
import sys
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from jaxrl_reason.errors import InputError


class Workers:
    """Runs methods of an object in `count` processes, or here at once where `count` is 0.

    Coroutines run here in either case, all at the same time, in a thread that only waits.

    Args:
        target: what is called; pickled for the workers, so each of them has its own.
        count: number of processes.
    """

    def __init__(self, target: Any, count: int):
        self._target = target
        self._waiter: _Waiter | None = None
        self._pool = None
        if count > 0:
            spawn = multiprocessing.get_context("spawn")
            lifeline, self._lifeline = spawn.Pipe(duplex=False)
            self._pool = concurrent.futures.ProcessPoolExecutor(
                count,
                mp_context=spawn,
                initializer=_begin,
                initargs=(pickle.dumps(target), lifeline),
            )
            for _ in range(count):  # each starts one process, so that imports are done when needed
                self._pool.submit(int)

    def submit(self, method: str, *arguments: Any) -> Future:
        """Start `target.method(*arguments)`."""
        if self._pool is not None:
            try:
                return self._pool.submit(_call, method, arguments)
            except BrokenProcessPool as error:
                raise _died() from error
        done: Future = Future()
        try:
            done.set_result(operator.methodcaller(method, *arguments)(self._target))
        except Exception as error:
            done.set_exception(error)
        return done

    def submit_async(self, coroutine: Coroutine) -> Future:
        """Start a coroutine beside all others that are under way."""
        if self._waiter is None:
            self._waiter = _Waiter()
        return asyncio.run_coroutine_threadsafe(coroutine, self._waiter.loop)

    def close(self) -> None:
        """End the workers and what they are doing."""
        if self._waiter is not None:
            self._waiter.close()
        if self._pool is not None:
            self._lifeline.close()
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def result(future: Future) -> Any:
    """The result of a call, once it is there.

    Raises:
        InputError: the process that made the call has died.
    """
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _died() from error


def _died() -> InputError:
    return InputError(
        "a process of reward_workers died while it computed rewards: it was killed (too little "
        "memory?), a reward function ended it, or the program that started the run does so outside "
        "`if __name__ == '__main__':`; with reward_workers=0 rewards run in the main process"
    )


class _Waiter:
    """An event loop in a thread of its own."""

    def __init__(self):
        self.loop: asyncio.AbstractEventLoop
        started = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._main(started),))
        self._thread.daemon = True
        self._thread.start()
        started.wait()

    async def _main(self, started: threading.Event) -> None:
        self.loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        started.set()
        await self._ended.wait()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()


# In the workers

_TARGET: list[Any] = []


def _begin(target: bytes, lifeline: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # the main module, which spawned processes import too, may load it
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    _TARGET.append(pickle.loads(target))


def _end_with(lifeline: Connection) -> None:
    try:
        lifeline.recv()
    except EOFError:
        os._exit(0)


def _call(method: str, arguments: tuple[Any, ...]) -> Any:
    return operator.methodcaller(method, *arguments)(_TARGET[0])
