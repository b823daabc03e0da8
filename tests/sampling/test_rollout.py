"""Rollouts: log-probs equal the trainer's, draws depend on (params, prompts, key) only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.data.batching import fill_rows
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Model, ModelConfig
from jaxrl_reason.sampling import Sampler, SamplingConfig
from jaxrl_reason.sharding import MeshConfig, make_mesh, replicated
from jaxrl_reason.steps import model_logprobs

CONFIG = ModelConfig(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=40,
)
PROMPTS = [[3, 5, 7], [4, 4, 9, 11, 2], [8], [6, 12, 13, 1]]
STOP, PAD = 1, 0


@pytest.fixture(scope="module")
def model_and_params():
    model = Model(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    # Larger embeddings make a distribution that is far from uniform.
    return model, params | {"embedding": 8 * params["embedding"]}


def sampler_of(model, *, devices=1, steps=5, length=12, **options):
    return Sampler(
        model=model,
        mesh=make_mesh(MeshConfig(), jax.devices()[:devices]),
        sampling=SamplingConfig(**options),
        stop_ids=(STOP,),
        pad_id=PAD,
        max_prompt_length=6,
        max_completion_length=length,
        steps_per_dispatch=steps,
    )


def same(a, b, **tolerance):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.completion_mask, b.completion_mask)
    np.testing.assert_allclose(a.sampling_logprobs, b.sampling_logprobs, **tolerance)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_p": 0.8, "top_k": 9}, {"min_p": 0.2}, {"temperature": 0}],
)
def test_sampling_logprobs_and_kept_mass_are_the_trainers(model_and_params, options):
    model, params = model_and_params
    rollout = sampler_of(model, **options).sample(
        params, PROMPTS, jax.random.key(1), num_generations=3
    )
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    rows = [[pair] for pair in zip(prompts, rollout.completions(), strict=True)]
    batch = fill_rows(rows, 20, pad_id=PAD)
    logprobs, _ = model_logprobs(
        model,
        params,
        jnp.asarray(batch["tokens"]),
        positions=jnp.asarray(batch["positions"]),
        segment_ids=jnp.asarray(batch["segment_ids"]),
        temperature=options.get("temperature", 1.0) or 1.0,
        chunk_size=64,
    )
    recorded = rollout.sampling_logprobs + rollout.kept_logmass
    # Both masks run over the rows and then over the tokens of their completions.
    recorded = recorded[rollout.completion_mask]
    trained = np.asarray(logprobs)[batch["completion_mask"]]
    np.testing.assert_allclose(recorded, trained, atol=1e-5)
    assert np.ptp(rollout.lengths) > 0 or options.get("temperature") == 0


def test_draws_depend_on_prompt_index_and_key_only(model_and_params):
    model, params = model_and_params
    whole = sampler_of(model).sample(params, PROMPTS, jax.random.key(2), num_generations=2)
    again = sampler_of(model).sample(params, PROMPTS, jax.random.key(2), num_generations=2)
    same(whole, again, rtol=0)
    padded = sampler_of(model).sample(
        params, PROMPTS[:3], jax.random.key(2), num_generations=2, batch_prompts=4
    )
    np.testing.assert_array_equal(padded.tokens, whole.tokens[:6])
    for steps in (1, 3, 12, 50):
        other = sampler_of(model, steps=steps).sample(
            params, PROMPTS, jax.random.key(2), num_generations=2
        )
        same(whole, other, atol=1e-6)
    different = sampler_of(model).sample(params, PROMPTS, jax.random.key(3), num_generations=2)
    assert (different.tokens != whole.tokens).any()


def test_completions_of_a_group_differ_and_share_their_prompt(model_and_params):
    model, params = model_and_params
    rollout = sampler_of(model).sample(params, PROMPTS[:2], jax.random.key(4), num_generations=8)
    for group in rollout.tokens.reshape(2, 8, -1):
        assert len({tuple(row) for row in group.tolist()}) > 4
    alone = sampler_of(model).sample(
        params, [p for p in PROMPTS[:2] for _ in range(8)], jax.random.key(4), num_generations=1
    )
    same(rollout, alone, atol=1e-5)


def test_masks_lengths_and_stops_agree(model_and_params):
    model, params = model_and_params
    rollout = sampler_of(model).sample(params, PROMPTS, jax.random.key(5), num_generations=16)
    assert 0 < rollout.finished.sum() < len(rollout.finished)
    for tokens, mask, finished, n in zip(
        rollout.tokens, rollout.completion_mask, rollout.finished, rollout.lengths, strict=True
    ):
        assert mask[:n].all()
        assert not mask[n:].any()
        assert (STOP in tokens[:n].tolist()) == finished
        assert STOP not in tokens[: n - 1].tolist()
        assert (tokens[n:] == PAD).all()
        assert finished or n == 12


def test_eight_devices_draw_what_one_draws(model_and_params):
    model, params = model_and_params
    prompts = PROMPTS * 4
    one = sampler_of(model).sample(params, prompts, jax.random.key(6), num_generations=2)
    many = sampler_of(model, devices=8)
    spread = jax.device_put(params, replicated(many.mesh))
    eight = many.sample(spread, prompts, jax.random.key(6), num_generations=2)
    same(one, eight, atol=1e-5)


def test_prompts_that_do_not_fit_are_refused(model_and_params):
    model, params = model_and_params
    sampler = sampler_of(model)
    with pytest.raises(InputError, match="prompt 1 has 7 tokens"):
        sampler.sample(params, [[1], [2] * 7], jax.random.key(0), num_generations=1)
    with pytest.raises(InputError, match="prompt 0 has 0 tokens"):
        sampler.sample(params, [[]], jax.random.key(0), num_generations=1)
    with pytest.raises(InputError, match="max_position_embeddings=40"):
        dataclasses.replace(sampler, max_completion_length=60)
