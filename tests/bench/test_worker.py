"""The protocol of workers, over real pipes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxrl_reason.bench.worker import Turns, Work, measure, peak_rss_mb

FAKE = """
from jaxrl_reason.bench.worker import Work, serve

class Fake:
    info = {"library": "fake"}

    def __init__(self, workload, shape):
        self.name = workload.name

    def run(self, repeat):
        print("a library that talks")
        if repeat == 9:
            raise ValueError("nine is too many")
        return Work(useful_tokens=repeat, computed_tokens=2 * repeat, parts={"rollout": 0.5})

serve(Fake)
"""


def talk(*requests: dict) -> list[dict]:
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run(
        [sys.executable, "-c", FAKE], input=lines, capture_output=True, text=True, timeout=60
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


PREPARE = {"do": "prepare", "workload": "W1", "shape": "nano"}


def test_answers_are_one_object_a_line_and_nothing_else():
    info, first, second = talk(PREPARE, {"do": "run", "repeat": 1}, {"do": "run", "repeat": 2})
    assert info == {"library": "fake"}
    assert (first["useful_tokens"], second["computed_tokens"]) == (1, 4)
    assert first["parts"] == {"rollout": 0.5}
    assert 0 <= first["cpu_seconds"] < 1
    assert 0 < first["seconds"] < 1
    assert first["peak_rss_mb"] > 5


def test_an_error_is_answered_and_ends_the_worker():
    answers = talk(PREPARE, {"do": "run", "repeat": 9}, {"do": "run", "repeat": 1})
    assert len(answers) == 2
    assert "nine is too many" in answers[1]["error"]


def test_a_repeat_before_prepare_is_refused():
    (answer,) = talk({"do": "run", "repeat": 1})
    assert "prepare" in answer["error"]


class Hungry:
    info = None

    def run(self, repeat: int) -> Work:
        self.held = len(np.ones(repeat * 125_000).tobytes())
        return Work(useful_tokens=1, computed_tokens=1)


def test_peak_memory_is_that_of_the_repeat():
    contestant = Hungry()
    large = measure(contestant, 300).peak_rss_mb
    small = measure(contestant, 1).peak_rss_mb
    assert large - small > 400  # two copies of 300 MB, of which nothing is left
    assert peak_rss_mb() >= small


def test_turns_let_a_loop_take_one_step_at_a_time():
    seen = []

    def loop(pause):
        pause()
        for step in range(3):
            seen.append(step)
            pause()

    turns = Turns(loop)
    assert seen == []
    turns.step()
    assert seen == [0]
    turns.step()
    turns.step()
    assert seen == [0, 1, 2]
    with pytest.raises(RuntimeError, match="no more steps"):
        turns.step()


def test_turns_raise_what_the_loop_raises():
    def loop(pause):
        pause()
        raise KeyError("lost")

    turns = Turns(loop)
    with pytest.raises(KeyError, match="lost"):
        turns.step()
