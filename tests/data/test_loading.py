"""Examples that are made when they are needed, and batches that are read ahead."""

import threading
import time

import numpy as np
import pytest

from jaxrl_reason.data import loading
from jaxrl_reason.data.batching import Example
from jaxrl_reason.data.loading import Examples, Maker, read_batches
from jaxrl_reason.data.vision import VisionRow
from jaxrl_reason.errors import InputError


def shown(patches: int, value: float = 1.0) -> VisionRow:
    arrays = {name: np.zeros((patches, 2), np.int32) for name in VisionRow._fields}
    return VisionRow(**arrays | {"patches": np.full((patches, 4), value), "next_position": 0})


def makers_of(groups, made):
    def maker(number, group):
        def make():
            made.append(number)
            return group

        return Maker(make, f"row {number}")

    return [maker(number, group) for number, group in enumerate(groups)]


TEXT = [(Example([1, 2], [3]), Example([1], [4, 5, 6])), (Example([7], [8]),), ()]


def test_facts_are_known_before_examples_are_read_and_text_is_kept():
    made = []
    examples = Examples(makers_of(TEXT, made), 4, option="max_length")
    assert [[fact.size for fact in facts] for facts in examples.facts] == [[3, 4], [2], []]
    assert made == [0, 1, 2]
    assert list(examples) == TEXT
    assert examples[1:] == TEXT[1:]
    assert made == [0, 1, 2]
    assert len(examples) == 3


def test_what_shows_something_or_has_no_room_is_made_again(monkeypatch):
    monkeypatch.setattr(loading, "_KEPT_TOKENS", 4)
    groups = [(Example([1], [2]),), (Example([1], [2], shown=shown(3)),), (Example([1], [2, 3]),)]
    made = []
    examples = Examples(makers_of(groups, made), 9, option="max_length")
    assert [facts[0].num_patches for facts in examples.facts] == [0, 3, 0]
    assert [examples[i] for i in (0, 2, 2)] == [groups[i] for i in (0, 2, 2)]
    assert examples[1] is not None
    assert made == [0, 1, 2, 2, 2, 1]


def test_the_hash_is_that_of_contents_and_their_order():
    def of(*groups):
        return Examples(makers_of(groups, []), 9, option="max_length").hash

    one, two = Example([1], [2]), Example([1], [3])
    others = [
        of((one, two)),
        of((two, one)),
        of((one,), (two,)),
        of((Example([1, 2], []), two)),
        of((one._replace(counted=[False]), two)),
        of((one._replace(shown=shown(2)), two)),
        of((one._replace(shown=shown(2, 0.5)), two)),
    ]
    assert len(set(others)) == len(others)
    assert of((one, two)) == others[0]


def test_the_first_mistake_is_named_by_its_place():
    def refuse():
        raise InputError("row 1: no column")

    makers = makers_of(TEXT, [])
    makers[1] = Maker(refuse, "row 1")
    with pytest.raises(InputError, match=r"^row 1: no column$"):
        Examples(makers, 4, option="max_length")
    with pytest.raises(InputError, match=r"^row 0: .* have 4 tokens; stages.a.max_length=3 is"):
        Examples(makers_of(TEXT, []), 3, option="stages.a.max_length")


def test_batches_come_in_order_and_the_next_is_made_meanwhile():
    made, threads = [], set()

    def row(step, number):
        time.sleep(0.01 * (number % 3))  # so that later rows are ready before earlier ones
        threads.add(threading.current_thread())
        made.append((step, number))
        return step, number

    numbers = [4, 0, 9]
    batches = read_batches(row, list, steps=range(3, 8), numbers=numbers)
    assert made == []
    assert next(batches) == [(3, n) for n in numbers]
    deadline = time.monotonic() + 60
    while len(made) < 2 * len(numbers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {(4, n) for n in numbers} <= set(made)
    assert not any(step > 5 for step, _ in made)
    assert list(batches) == [[(step, n) for n in numbers] for step in range(4, 8)]
    assert threading.current_thread() not in threads
    assert list(read_batches(row, list, steps=range(5, 5), numbers=numbers)) == []


def test_a_row_that_is_lost_is_missed_by_its_own_step():
    def row(step, number):
        if (step, number) == (2, 1):
            raise InputError("image.png: no such file")
        return step

    batches = read_batches(row, list, steps=range(4), numbers=[0, 1])
    assert [next(batches), next(batches)] == [[0, 0], [1, 1]]
    with pytest.raises(InputError, match="no such file"):
        next(batches)
