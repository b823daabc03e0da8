"""Sampling and training that disagree: when a correction starts, and what it is."""

import logging
import math
import types

import jax
import numpy as np
import pytest

from jaxrl_reason.config import to_json, validate
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Model, ModelConfig
from jaxrl_reason.sharding import MeshConfig, make_mesh
from jaxrl_reason.stages.policy_mismatch import Mismatch, MismatchConfig, make_correction
from jaxrl_reason.stages.policy_rows import PolicyRows
from jaxrl_reason.steps import make_batch_logprobs

MODEL = Model(
    ModelConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
)


@pytest.mark.parametrize(
    ("options", "dtype", "fine", "too_large"),
    [
        ({}, "float32", 9e-4, 1.1e-3),
        ({}, "bfloat16", 0.09, 0.11),
        ({"threshold": 0.5}, "float32", 0.4, 0.6),
    ],
)
def test_a_difference_above_the_threshold_switches_the_correction_on(
    options, dtype, fine, too_large, caplog
):
    mismatch = Mismatch(validate(MismatchConfig, options, "test"), dtype)
    assert mismatch.state() == {"correcting": False}
    with caplog.at_level(logging.WARNING):
        mismatch.look(1, fine)
        mismatch.look(2, math.nan)
        assert not mismatch.correcting
        assert not caplog.records
        mismatch.look(3, too_large)
        mismatch.look(4, too_large)
        mismatch.look(5, 0.0)
    (record,) = caplog.records
    assert "step 3" in record.getMessage()
    assert f"differ by {too_large:g}" in record.getMessage()
    assert mismatch.correcting
    again = Mismatch(MismatchConfig(), dtype, mismatch.state())
    assert again.correcting


def test_a_run_that_shall_stop_is_configured_and_read_back():
    asked = validate(MismatchConfig, {"action": "stop"}, "test")
    assert asked.action == "stop"
    assert validate(MismatchConfig, to_json(asked), "test") == asked
    with pytest.raises(InputError, match="cap cannot act: with action=stop"):
        validate(MismatchConfig, {"action": "stop", "cap": 3.0}, "test")


@pytest.mark.parametrize("difference", [0.2, math.nan, math.inf])
def test_a_run_that_shall_stop_stops(difference):
    mismatch = Mismatch(MismatchConfig(action="stop"), "bfloat16")
    mismatch.look(1, 0.05)
    with pytest.raises(InputError, match=r"step 2: .* mismatch.threshold=0.1; .*action=correct"):
        mismatch.look(2, difference)


@pytest.mark.parametrize(
    "bad", [{"threshold": 0}, {"action": "warn"}, {"level": "row"}, {"cap": 0}, {"floor": 3.0}]
)
def test_wrong_options_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        validate(MismatchConfig, bad, "test")


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_the_correction_is_the_ratio_of_training_to_sampling(level):
    mesh = make_mesh(MeshConfig())
    params = MODEL.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    mask = np.arange(6) < rng.integers(1, 7, 24)[:, None]
    rollout = types.SimpleNamespace(
        prompts=rng.integers(16, size=(8, 3)).tolist(),
        num_generations=3,
        tokens=rng.integers(16, size=(24, 6)).astype(np.int32),
        completion_mask=mask,
        sampled=np.ones_like(mask),
        sampling_logprobs=np.zeros(mask.shape, np.float32),
        kept_logmass=np.zeros(mask.shape, np.float32),
    )
    rows = PolicyRows(
        mesh=mesh,
        pad_id=0,
        max_prompt_length=3,
        max_completion_length=6,
        completions=24,
        num_generations=3,
        microbatch_tokens=8 * 16,
        row_length=16,
        drop=False,
    )
    batch, _ = rows.place(rollout, np.ones(24, np.float32))
    logprobs = make_batch_logprobs(MODEL, temperature=0.7, logprob_chunk_size=None)
    old = np.asarray(jax.jit(logprobs)(params, batch))
    mask = np.asarray(batch["completion_mask"])
    shift = rng.normal(0, 0.4, mask.shape).astype(np.float32)
    sampling = np.where(mask, old - shift, 0)
    batch["sampling_logprobs"] = jax.device_put(sampling, batch["old_logprobs"].sharding)

    config = MismatchConfig(level=level, cap=1.5, floor=0.8)
    correct = make_correction(MODEL, mesh, config, temperature=0.7, logprob_chunk_size=5)
    arrays, metrics = correct(params, batch)
    for name in ("old_logprobs", "importance_weights"):
        assert arrays[name].sharding.is_equivalent_to(batch[name].sharding, 3)
    np.testing.assert_allclose(np.asarray(arrays["old_logprobs"])[mask], old[mask], atol=1e-5)
    wanted = np.zeros(mask.shape)
    ids = np.asarray(batch["sequence_ids"])
    of_each = []
    for k, row, sequence in {(k, r, ids[k, r, t]) for k, r, t in np.argwhere(mask)}:
        here = (k, row, (ids[k, row] == sequence) & mask[k, row])
        x = shift[here]
        of_tokens = {"token": x, "sequence": x.sum(), "geometric": x.mean()}[level]
        wanted[here] = np.clip(np.exp(of_tokens), 0.8, 1.5)
        of_each.append(wanted[here].mean())
    np.testing.assert_allclose(arrays["importance_weights"], wanted, rtol=1e-4, atol=1e-6)
    mean = wanted[mask].mean() if level == "token" else np.mean(of_each)
    got = metrics["sampling/importance_sampling_ratio/mean"]
    assert float(got) == pytest.approx(mean, rel=1e-4)
    assert len(set(np.round(of_each, 4))) > 3
