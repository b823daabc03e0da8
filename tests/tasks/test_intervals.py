"""Temporal IoU and intervals in texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_reason.errors import InputError
from jaxrl_reason.tasks import temporal_iou
from jaxrl_reason.tasks.intervals import read_interval, write_interval

quarters = st.integers(0, 400)
intervals = st.tuples(quarters, quarters).filter(lambda pair: pair[0] != pair[1]).map(sorted)
intervals = intervals.map(lambda pair: (pair[0] / 4, pair[1] / 4))


def test_values():
    assert temporal_iou((3, 7), (3, 7)) == 1.0
    assert temporal_iou((3, 7), (5, 9)) == pytest.approx(2 / 6)
    assert temporal_iou((0, 10), (4, 5)) == pytest.approx(0.1)
    assert temporal_iou((0, 1), (1, 2)) == 0.0
    # With a gap the union is 2, not the 10 from first to last.
    assert temporal_iou((0, 1), (9, 10)) == 0.0
    assert temporal_iou((0.5, 1.5), (1.0, 2.0)) == pytest.approx(1 / 3)


@given(intervals, intervals)
def test_it_is_the_share_of_common_quarter_seconds(first, second):
    covered = [
        {quarter for quarter in range(400) if start <= quarter / 4 < end}
        for start, end in (first, second)
    ]
    share = len(covered[0] & covered[1]) / len(covered[0] | covered[1])
    assert temporal_iou(first, second) == pytest.approx(share, abs=1e-12)


@given(intervals, intervals, st.integers(-50, 50), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_properties(first, second, shift, scale):
    value = temporal_iou(first, second)
    assert 0.0 <= value <= 1.0
    assert value == temporal_iou(second, first)
    assert (value == 1.0) == (first == second)
    assert (value == 0.0) == (first[1] <= second[0] or second[1] <= first[0])
    moved = [tuple(scale * (time + shift) for time in pair) for pair in (first, second)]
    assert temporal_iou(*moved) == pytest.approx(value, abs=1e-12)


@given(intervals)
def test_reading_what_was_written(interval):
    text = write_interval(interval)
    assert read_interval(text) == interval
    # What a word-level tokenizer makes of it.
    assert read_interval(text.replace(".", " . ")) == interval


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("3 7", (3, 7)),
        (" 3  7.5 ", (3, 7.5)),
        ("3-7", (3, 7)),
        ("3 - 7", (3, 7)),
        ("3, 7", (3, 7)),
        ("3 to 7", (3, 7)),
        ("0.25 10", (0.25, 10)),
        ("1 . 5 3", (1.5, 3)),
        ("03 7", (3, 7)),
    ],
)
def test_what_is_an_interval(text, interval):
    assert read_interval(text) == interval


@pytest.mark.parametrize(
    "text",
    ["", "3", "37", "7 3", "3 3", "3 7 9", "-3 7", "3 -- 7", "three 7", "3 s 7", "3 7.", "3 1e3"],
)
def test_what_is_none(text):
    assert read_interval(text) is None


@pytest.mark.parametrize("bad", [(3.0, 3.0), (4.0, 3.0), (float("nan"), 3.0)])
def test_an_empty_interval_is_an_error(bad):
    for pair in ((bad, (0.0, 1.0)), ((0.0, 1.0), bad)):
        with pytest.raises(InputError, match="must end after its start"):
            temporal_iou(*pair)
