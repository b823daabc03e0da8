"""Where the time of a stage goes: seconds and tokens of each phase, in the metrics and in a table.

    rollout   sampling completions
    rewards   waiting for rewards while nothing is sampled, and computing those of this process
    logprobs  forward passes beside the update: reference, and sampler against trainer
    update    packing rows, gradients and the optimiser
    sync      bringing the parameters to where they sample

A step whose phases add up to less than `step_time` spent the rest on logging and checkpoints.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

PHASES = ("rollout", "rewards", "logprobs", "update", "sync")
WARM_UP_STEPS = 2
"""Steps of a process that may compile; they count in no average."""


class Times:
    """Seconds and tokens of the phases of one step; a phase inside another interrupts it.

    JAX returns before the device has finished: end a phase by reading its result, or its seconds
    are counted in the phase that first does so.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._tokens: dict[str, int] = dict.fromkeys(PHASES, 0)
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a `with` block, also when it raises."""
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def count(self, name: str, tokens: int) -> None:
        """Add tokens to a phase."""
        self._tokens[name] += tokens

    def metrics(self) -> dict[str, float]:
        """`time/<phase>` of all phases, `tokens_per_second/<phase>` of those that count tokens."""
        metrics = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        for name in ("rollout", "update"):
            seconds = self._seconds[name]
            rate = self._tokens[name] / seconds if seconds > 0 else 0.0
            metrics[f"tokens_per_second/{name}"] = rate
        return metrics

    def _count(self) -> None:
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now


def table(stage: str, rows: Sequence[Mapping[str, float]]) -> str:
    """The breakdown of a stage as text, from the metrics of the steps that this process made."""
    skipped = WARM_UP_STEPS if len(rows) > WARM_UP_STEPS else 0
    steady = rows[skipped:]
    mean = lambda name: sum(row[name] for row in steady) / len(steady)
    tokens = lambda rate, seconds: sum(row[rate] * row[seconds] for row in steady) / len(steady)
    step_time = mean("step_time")
    which = f"steps {skipped + 1} to {len(rows)} of this process" if skipped else "all steps"
    lines = [f"{stage}: where the time of a step goes, mean of {which}"]
    phases = [name for name in PHASES if f"time/{name}" in steady[0]]
    for name in phases:
        rate, seconds = f"tokens_per_second/{name}", f"time/{name}"
        count = tokens(rate, seconds) if rate in steady[0] else 0
        lines.append(_line(name, mean(seconds), step_time, count))
    if phases:
        rest = step_time - sum(mean(f"time/{name}") for name in phases)
        lines.append(_line("other", max(rest, 0.0), step_time, 0))
    lines.append(_line("step", step_time, step_time, tokens("tokens_per_second", "step_time")))
    notes = [f"{what} {mean(name):.0%}" for name, what in _SHARES.items() if name in steady[0]]
    notes.append(f"programs compiled: {sum(row['compiles'] for row in rows):.0f}")
    if skipped:
        late = sum(row["compiles"] for row in steady)
        notes.append(f"of them {late:.0f} after step {skipped}")
    return "\n".join([*lines, f"  {', '.join(notes)}"])


_SHARES = {
    "padding_share": "padding of the update",
    "wasted_share": "decoded tokens that no completion holds",
}


def _line(name: str, seconds: float, of: float, tokens: float) -> str:
    line = f"  {name:<9}{seconds:>9.3f} s {seconds / of if of else 0:>6.0%}"
    return f"{line} {tokens / seconds:>9.0f} tokens/s" if tokens and seconds else line
