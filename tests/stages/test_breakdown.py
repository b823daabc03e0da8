"""Where the time of a step goes, and what is compiled in it."""

import logging

import jax
import jax.numpy as jnp
import pytest

from jaxrl_reason.sampling.shapes import named
from jaxrl_reason.stages.breakdown import WARM_UP_STEPS, Times, table
from jaxrl_reason.stages.compiles import CompileWatch


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


def interrupted(times, clock):
    with times.phase("update"):
        clock.seconds += 0.5
        raise RuntimeError


def test_a_phase_inside_another_interrupts_it():
    clock = Clock()
    times = Times(clock=clock)
    clock.seconds += 5  # belongs to no phase
    with times.phase("rollout"):
        clock.seconds += 1
        with times.phase("rewards"):
            clock.seconds += 0.25
        clock.seconds += 2
    clock.seconds += 7
    with pytest.raises(RuntimeError):
        interrupted(times, clock)
    with times.phase("rewards"):
        clock.seconds += 0.5
    times.count("rollout", 20)
    times.count("rollout", 40)
    assert times.metrics() == {
        "time/rollout": 3.0,
        "time/rewards": 0.75,
        "time/logprobs": 0.0,
        "time/update": 0.5,
        "time/sync": 0.0,
        "tokens_per_second/rollout": 20.0,
        "tokens_per_second/update": 0.0,
    }


def row(rollout, update, step, *, compiles=0, tokens=1000, **more):
    return {
        "time/rollout": rollout,
        "time/update": update,
        "tokens_per_second/rollout": 600 / rollout,
        "step_time": step,
        "tokens_per_second": tokens / step,
        "compiles": compiles,
        **more,
    }


def test_the_table_leaves_out_steps_that_compile():
    shares = {"padding_share": 0.25, "wasted_share": 0.1}
    warm = [row(100.0, 50.0, 151.0, compiles=4, **shares)] * WARM_UP_STEPS
    steady = [row(1.0, 0.5, 2.0, **shares), row(3.0, 0.5, 4.0, compiles=1, **shares)]
    lines = table("reason", warm + steady).splitlines()
    assert lines == [
        "reason: where the time of a step goes, mean of steps 3 to 4 of this process",
        "  rollout      2.000 s    67%       300 tokens/s",
        "  update       0.500 s    17%",
        "  other        0.500 s    17%",
        "  step         3.000 s   100%       333 tokens/s",
        "  padding of the update 25%, decoded tokens that no completion holds 10%, "
        "programs compiled: 9, of them 1 after step 2",
    ]


def test_a_stage_without_phases_and_with_few_steps_has_a_table_too():
    made = {"step_time": 0.5, "tokens_per_second": 200.0, "compiles": 3, "padding_share": 0.0}
    assert table("cold", [made]).splitlines() == [
        "cold: where the time of a step goes, mean of all steps",
        "  step         0.500 s   100%       200 tokens/s",
        "  padding of the update 0%, programs compiled: 3",
    ]


def test_compilations_are_counted_and_told_after_the_first_steps(caplog):
    @jax.jit
    def doubled_by_the_test(x):
        return 2 * x

    arrays = {n: jnp.ones(n) for n in (3, 4, 5, 6)}
    watch = CompileWatch("reason")
    counts = []
    for step, size in enumerate([3, 4, 3, 5, 5, 6], start=1):
        watch.start()
        doubled_by_the_test(arrays[size]).block_until_ready()
        counts.append(watch.look(step, (2, 16, size)))
    assert counts == [1, 1, 0, 1, 0, 1]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert message.startswith("reason, step 4: compiled jit(doubled_by_the_test) (")
    assert "tokens of shape [2, 16, 5]" in message


def test_programs_of_the_engine_are_counted_and_not_warned_of(caplog):
    watch = CompileWatch("reason")
    program = jax.jit(named("decode", lambda x: x + 23))
    arrays = [jnp.ones(n) for n in range(1, 6)]
    for step, array in enumerate(arrays, start=1):
        watch.start()
        program(array).block_until_ready()
        assert watch.look(step, (2, 16, 8)) == 1
    assert not caplog.records


def test_what_is_compiled_between_steps_is_not_counted():
    watch = CompileWatch("reason")
    watch.start()
    watch.look(1, ())
    jax.jit(lambda x: x + 17)(jnp.ones(3)).block_until_ready()
    watch.start()
    assert watch.look(2, ()) == 0
