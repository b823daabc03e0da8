"""Ratios are those of the same repeat, and tables show them."""

import pytest

from jaxrl_reason.bench.results import markdown, memory_ratio, ratios, rollout_rate, summaries


def row(contestant, repeat, seconds, *, tokens=100, peak=500.0, rollout=None, shape="tiny"):
    return {
        "workload": "W1",
        "shape": shape,
        "contestant": contestant,
        "repeat": repeat,
        "seconds": seconds,
        "cpu_seconds": seconds,
        "useful_tokens": tokens,
        "computed_tokens": 2 * tokens,
        "peak_rss_mb": peak,
        "parts": {} if rollout is None else {"rollout": rollout},
        "counts": {},
        "others": 0.01 * repeat,
    }


ROWS = [
    row("ours", 1, 1.0, rollout=0.5, peak=200),
    row("trl", 1, 3.0, rollout=1.0),
    row("ours", 2, 2.0, rollout=0.5, peak=250),
    row("trl", 2, 4.0, rollout=2.0, peak=1000),
    row("ours", 3, 1.0, rollout=0.5),
    row("trl", 3, 5.0, tokens=50, rollout=1.0),
    row("ours", 4, 9.0, rollout=9.0, peak=200),
]


def test_ratios_pair_repeats_and_count_useful_tokens():
    spread = ratios(ROWS, "trl")
    # 3, 2 and (100 / 1) / (50 / 5); repeat 4 has no partner.
    assert (spread.median, spread.low, spread.high, spread.count) == (3.0, 2.0, 10.0, 3)
    assert str(spread) == "3.00 (2.00 to 10.00)"
    assert ratios(ROWS, "trl", rollout_rate).median == 4.0
    assert ratios(ROWS, "tunix") is None


def test_memory_compares_the_highest_of_all_repeats():
    assert memory_ratio(ROWS, "trl") == 0.5
    assert memory_ratio(ROWS, "tunix") is None


def test_summaries_have_a_line_for_each_contestant_and_shape():
    lines = summaries([*ROWS, row("ours", 1, 1.0, shape="small")])
    names = [(line["shape"], line["contestant"]) for line in lines]
    assert names == [("tiny", "ours"), ("tiny", "trl"), ("small", "ours")]
    ours, trl, alone = lines
    assert ours["speed_ratio"] is ours["memory_ratio"] is alone["rollout_ratio"] is None
    assert (trl["seconds"], trl["useful_share"], trl["peak_rss_mb"]) == (4.0, 0.5, 1000)
    assert trl["parts"] == {"rollout": 1.0}
    assert trl["others"] == pytest.approx(0.03)
    assert trl["rollout_ratio"]["median"] == 4.0


def test_markdown_has_as_many_cells_in_every_line():
    table = markdown(summaries(ROWS)).splitlines()
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    assert "| 3.00 (2.00 to 10.00) | 4.00 (2.00 to 4.00) | 0.50 | 3% |" in table[3]
    assert "| ours | 1.50 |" in table[2]
