"""Groups in rows: every completion once, prompts shared, each value at its token."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_reason.data.groups import Document, fill_groups, pack_groups
from jaxrl_reason.errors import InputError

LONGEST_PROMPT, LONGEST = 6, 10
GROUPS = st.lists(
    st.tuples(
        st.integers(1, LONGEST_PROMPT), st.lists(st.integers(1, LONGEST), min_size=0, max_size=7)
    ),
    max_size=12,
)


def numbered(groups):
    """Prompt lengths, and lengths of completions by numbers that run through all groups."""
    found, at = [], 0
    for _, lengths in groups:
        found.append({at + i: n for i, n in enumerate(lengths)})
        at += len(lengths)
    return [prompt for prompt, _ in groups], found


def size(document, prompts, groups):
    return prompts[document.prompt] + sum(groups[document.prompt][i] for i in document.completions)


@given(GROUPS, st.integers(LONGEST_PROMPT + LONGEST, 60), st.integers(1, 3))
def test_packing_places_every_completion_once_behind_its_prompt(given_groups, length, multiple):
    prompts, groups = numbered(given_groups)
    rows = pack_groups(prompts, groups, length, multiple=multiple)
    placed = [i for row in rows for document in row for i in document.completions]
    assert sorted(placed) == [i for lengths in groups for i in lengths]
    for row in rows:
        assert row
        assert sum(size(document, prompts, groups) for document in row) <= length
        assert len({document.prompt for document in row}) == len(row)
        for document in row:
            assert document.completions
            assert set(document.completions) <= set(groups[document.prompt])
    # The bound that the number of microbatches relies on.
    together = length // (LONGEST_PROMPT + LONGEST)
    assert len(rows) <= multiple * math.ceil(math.ceil(len(placed) / together) / multiple)
    assert rows == pack_groups(prompts, groups, length, multiple=multiple)


def test_groups_that_fit_stay_whole_and_fill_up_rows():
    rows = pack_groups([10, 10, 5], [{0: 10, 1: 20}, {2: 30, 3: 20}, {4: 40, 5: 10}], 60)
    assert [{d.prompt for d in row} for row in rows] == [{1}, {2}, {0}]
    rows = pack_groups([10, 10, 5], [{0: 10, 1: 20}, {2: 30, 3: 20}, {4: 40, 5: 10}], 100)
    assert [{d.prompt for d in row} for row in rows] == [{1, 0}, {2}]


def test_a_group_longer_than_a_row_is_split_and_its_prompt_repeated():
    rows = pack_groups([4], [dict.fromkeys(range(5), 8)], 20)
    assert [[len(d.completions) for d in row] for row in rows] == [[2], [2], [1]]
    assert {d.prompt for row in rows for d in row} == {0}


def test_a_group_is_split_where_that_saves_a_row():
    """Two groups of 13 would leave 7 of 20 slots of each row empty, and a third needs them."""
    groups = [{0: 5, 1: 5}, {2: 5, 3: 5}, {4: 5, 5: 5}]
    assert len(pack_groups([2, 2, 2], groups, 20)) == 2
    # Where rows come in threes anyway, nothing is split.
    rows = pack_groups([2, 2, 2], groups, 20, multiple=3)
    assert [len(row) for row in rows] == [1, 1, 1]


def test_what_fits_no_row_is_named():
    with pytest.raises(InputError, match="prompt 1 and its longest completion have 11 tokens"):
        pack_groups([3, 5], [{0: 2}, {1: 4, 2: 6}], 10)


def test_rows_hold_prompts_once_and_targets_point_at_what_predicts_them():
    rows = [[Document(1, (2, 0)), Document(0, (3,))], [Document(1, (4,))]]
    tokens = {0: [11, 12, 13], 2: [21], 3: [31, 32], 4: [41, 42, 43]}
    counted = {0: [True, False, True], 2: [True], 3: [False, True], 4: [True] * 3}
    made = fill_groups(
        rows,
        [[5, 6, 7], [8, 9]],
        {i: np.asarray(t) for i, t in tokens.items()},
        {i: np.asarray(c) for i, c in counted.items()},
        12,
        pad_id=1,
        num_rows=3,
    )
    expected = {
        "tokens": [8, 9, 21, 11, 12, 13, 5, 6, 7, 31, 32, 1],
        "segment_ids": [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0],
        "branch_ids": [0, 0, 1, 2, 2, 2, 0, 0, 0, 3, 3, 0],
        "positions": [0, 1, 2, 2, 3, 4, 0, 1, 2, 3, 4, 0],
        "targets": [21, 11, 13, 32, *[1] * 8],
        "sources": [1, 1, 4, 9, *[0] * 8],
        "sequence_ids": [1, 2, 2, 3, *[0] * 8],
        "completion_mask": [*[True] * 4, *[False] * 8],
    }
    assert made.batch.keys() == expected.keys()
    assert {name: made.batch[name][0].tolist() for name in expected} == expected
    assert made.numbers[0, :4].tolist() == [2, 0, 0, 3]
    assert made.offsets[0, :4].tolist() == [0, 0, 2, 1]
    assert made.batch["sources"][1, :3].tolist() == [1, 2, 3]
    assert not made.batch["segment_ids"][2].any()
    assert made.batch["tokens"][2].tolist() == [1] * 12
    assert all(x.dtype == np.int32 for n, x in made.batch.items() if n != "completion_mask")

    of_each = np.asarray([0.5, 0, 1.5, 2.5, 3.5])
    assert made.spread(of_each)[0].tolist() == [1.5, 0.5, 0.5, 2.5, *[0] * 8]
    of_tokens = np.arange(15.0).reshape(5, 3)
    assert made.spread(of_tokens)[0, :5].tolist() == [6, 0, 2, 10, 0]
    assert made.spread(of_tokens).dtype == np.float32


def test_a_row_that_is_too_full_is_refused():
    with pytest.raises(ValueError, match="row 0 needs 5 tokens but holds 4"):
        fill_groups(
            [[Document(0, (0,))]],
            [[1, 2]],
            {0: np.ones(3, int)},
            {0: np.ones(3, bool)},
            4,
            pad_id=0,
            num_rows=1,
        )
