"""Packing, filling, order of examples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_reason.data.batching import (
    fill_rows,
    microbatches,
    pack,
    step_indices,
)
from jaxrl_reason.errors import InputError


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_places_every_example_once_and_overfills_no_row(lengths):
    rows = pack(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    # Two rows at most half full would have been joined.
    assert sum(sum(lengths[i] for i in row) <= 10 for row in rows) <= 1


def test_too_long_an_example_is_named():
    with pytest.raises(InputError, match="example 1 has 9 tokens but a row holds max_length=8"):
        pack([3, 9, 4], 8)


def test_rows_hold_their_documents():
    batch = fill_rows([[([5, 6], [7]), ([8], [9, 9])], [([4], [3])]], 7, pad_id=0, num_rows=3)
    assert batch["tokens"].tolist() == [
        [5, 6, 7, 8, 9, 9, 0],
        [4, 3, 0, 0, 0, 0, 0],
        [0] * 7,
    ]
    assert batch["positions"].tolist()[0] == [0, 1, 2, 0, 1, 2, 0]
    assert batch["segment_ids"].tolist()[:2] == [[1, 1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0]]
    assert batch["completion_mask"].astype(int).tolist() == [
        [0, 0, 1, 0, 1, 1, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [0] * 7,
    ]
    with pytest.raises(ValueError, match="row 0 needs 8 tokens but holds 7"):
        fill_rows([[([1] * 8, [])]], 7, pad_id=0)


def test_every_epoch_visits_every_example_once_in_a_new_order():
    size, batch = 10, 4
    flat = np.concatenate(
        [step_indices(7, step, size=size, batch_size=batch) for step in range(10)]
    )
    epochs = flat.reshape(4, size)
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (flat[:4] != step_indices(8, 0, size=size, batch_size=batch)).any()


def test_a_step_may_be_larger_than_an_epoch():
    chosen = step_indices(0, 1, size=3, batch_size=8)
    assert np.bincount(chosen).tolist() == [3, 3, 2] or np.bincount(chosen).min() >= 2


def test_microbatches_cut_without_loss_and_refuse_a_remainder():
    batch = {"x": np.arange(12).reshape(6, 2)}
    cut = microbatches(batch, 3)["x"]
    assert cut.shape == (3, 2, 2)
    assert sorted(cut.reshape(-1).tolist()) == list(range(12))
    with pytest.raises(InputError, match="gradient_accumulation_steps=4"):
        microbatches(batch, 4)
