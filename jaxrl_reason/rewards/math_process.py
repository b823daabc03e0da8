"""The process in which math-verify runs: a line of JSON in, a line of JSON out.

Some expressions take for ever, inside one operation on Python's integers, where no signal handler
and no thread could interrupt. The alarm set here is the kernel's: it ends the process, and whoever
asked starts another.
"""

import contextlib
import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

_MEMORY = 4 * 2**30


def main() -> None:
    """Say that all works, then answer questions until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    logging.disable()  # math-verify warns that it keeps no time itself
    answers, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not answer
    _limit_memory()
    _write(answers, verdict("1/2", "0.5"))
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, question["timeout"])
        try:
            right = verdict(question["answer"], question["gold"])
        except Exception:  # SymPy raises anything; a lack of memory is one of them
            right = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answers, right)


def verdict(answer: str, gold: str) -> bool | None:
    """Whether an answer equals the gold one; None if the gold one cannot be parsed."""
    wanted = _parse(gold)
    if not wanted:
        return None
    return verify(list(wanted), list(_parse(answer)), timeout_seconds=0)


@lru_cache(maxsize=4096)
def _parse(expression: str) -> tuple[Any, ...]:
    # In a box nothing needs to be searched for.
    found = parse(
        rf"\boxed{{{expression}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=0,
    )
    return tuple(found)


def _write(answers: Any, right: bool | None) -> None:
    answers.write(json.dumps(right) + "\n")
    answers.flush()


def _limit_memory() -> None:
    used = Path("/proc/self/statm")
    if used.exists():
        limit = int(used.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + _MEMORY
        with contextlib.suppress(ValueError):  # there is a lower limit already
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
