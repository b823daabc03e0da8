"""Updates: packing, microbatching and sharding change nothing; a bad gradient changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_reason.data.batching import fill_rows, microbatches
from jaxrl_reason.models import Model, ModelConfig
from jaxrl_reason.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    place_batch,
    replicated,
    tree_shardings,
)
from jaxrl_reason.steps import (
    OptimizerConfig,
    PolicyObjective,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_policy_step,
    make_preference_step,
    make_sft_step,
    model_logprobs,
    pair_logprobs,
    state_shardings,
)

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)
MODEL = Model(CONFIG)
# SGD shows the gradient itself; Adam would turn rounding of tiny entries into whole steps.
SGD = optax.sgd(1.0)
T = 24
OBJECTIVE = PolicyObjective(
    loss_type="dapo",
    options={"epsilon": 0.2, "epsilon_high": 0.3},
    beta=0.05,
    temperature=0.9,
    max_completion_length=16,
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def examples(count, seed=0):
    rng = np.random.default_rng(seed)
    ids = lambda low, high: rng.integers(2, 32, rng.integers(low, high)).tolist()
    return [(ids(2, 6), ids(1, 7)) for _ in range(count)]


def sft_batch(rows):
    return fill_rows(rows, T, pad_id=0)


def policy_batch(rows, seed=0):
    """Advantages and log-probs that belong to the document, wherever it lies in its row."""
    batch = sft_batch(rows)
    for name in ("advantages", "old_logprobs", "ref_logprobs"):
        batch[name] = np.zeros(batch["tokens"].shape, np.float32)
    for r, documents in enumerate(rows):
        at = 0
        for prompt, completion in documents:
            noise = np.random.default_rng([seed, *prompt, *completion]).normal
            here = slice(at + len(prompt), at + len(prompt) + len(completion))
            batch["advantages"][r, here] = noise()
            batch["old_logprobs"][r, here] = -3.4 + 0.3 * noise(size=len(completion))
            batch["ref_logprobs"][r, here] = -3.4 + 0.4 * noise(size=len(completion))
            at += len(prompt) + len(completion)
    return batch


def step_of(kind, **changes):
    if kind == "sft":
        return make_sft_step(MODEL, SGD, logprob_chunk_size=64)
    objective = dataclasses.replace(OBJECTIVE, **changes)
    return make_policy_step(MODEL, SGD, objective, logprob_chunk_size=64)


def update(step, params, batch):
    state, metrics = jax.jit(step)(init_state(params, SGD), batch)
    moved = jax.tree.map(lambda a, b: a - b, state.params, params)
    return moved, jax.device_get(metrics)


def assert_same(a, b, atol=2e-6):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=atol, rtol=2e-4, err_msg=str(path))
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(a)) > 1e-4


LOSS_TYPES = ["grpo", "dapo", "dr_grpo"]


@pytest.mark.parametrize("kind", ["sft", *LOSS_TYPES])
def test_packed_rows_give_the_update_of_separate_rows(params, kind):
    docs = examples(6)
    make = sft_batch if kind == "sft" else policy_batch
    step = step_of("sft") if kind == "sft" else step_of("policy", loss_type=kind)
    separate = microbatches(make([[d] for d in docs]), 1)
    packed = microbatches(make([docs[:2], docs[2:4], docs[4:]]), 1)
    a, metrics_a = update(step, params, separate)
    b, metrics_b = update(step, params, packed)
    if kind == "dr_grpo":
        assert metrics_a["loss"] == pytest.approx(metrics_b["loss"], rel=1e-4)
    assert_same(a, b)
    assert metrics_a["entropy"] == pytest.approx(metrics_b["entropy"], rel=1e-4)


@pytest.mark.parametrize("kind", ["sft", *LOSS_TYPES])
def test_microbatches_of_uneven_masks_give_the_update_of_one_batch(params, kind):
    docs = [[d] for d in examples(8)]
    make = sft_batch if kind == "sft" else policy_batch
    step = step_of("sft") if kind == "sft" else step_of("policy", loss_type=kind)
    whole, metrics = update(step, params, microbatches(make(docs), 1))
    for count in (2, 8):
        cut, cut_metrics = update(step, params, microbatches(make(docs), count))
        assert_same(whole, cut)
        for name in metrics:
            assert cut_metrics[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-6), name


def test_trailing_empty_microbatches_change_nothing(params):
    batch = microbatches(policy_batch([[d] for d in examples(4)]), 2)
    empty = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    assert_same(
        update(step_of("policy"), params, batch)[0], update(step_of("policy"), params, empty)[0]
    )


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("kind", ["sft", "policy"])
def test_eight_devices_give_the_update_of_one(params, kind, mesh):
    docs = [[d] for d in examples(16)]
    batch = microbatches((sft_batch if kind == "sft" else policy_batch)(docs), 2)
    step = step_of(kind)
    one, metrics = update(step, params, batch)
    mesh = make_mesh(MeshConfig(**mesh))
    placement = tree_shardings(mesh, MODEL.axes(), params)
    states = state_shardings(params, SGD, placement, replicated(mesh))
    state = jax.device_put(init_state(params, SGD), states)
    sharded = jax.jit(
        step,
        in_shardings=(states, batch_sharding(mesh, batch_axis=1)),
        out_shardings=(states, replicated(mesh)),
    )
    state, many_metrics = sharded(state, place_batch(batch, mesh, batch_axis=1))
    assert_same(one, jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, params))
    assert float(many_metrics["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-4)
    for x, s in zip(jax.tree.leaves(state.params), jax.tree.leaves(placement), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)


def test_sft_loss_counts_completion_tokens_only(params):
    docs = examples(3)
    batch = microbatches(sft_batch([[d] for d in docs]), 1)
    _, metrics = update(step_of("sft"), params, batch)
    total = 0.0
    for prompt, completion in docs:
        tokens = jnp.asarray([prompt + completion])
        positions = jnp.arange(tokens.shape[1])[None]
        hidden, _ = MODEL.forward(
            params, tokens, positions=positions, segment_ids=jnp.ones_like(tokens)
        )
        logits = np.asarray(MODEL.unembed(params, hidden), np.float64)[0]
        for t in range(len(prompt), tokens.shape[1]):
            row = logits[t - 1]
            total -= row[tokens[0, t]] - np.log(np.exp(row).sum())
    count = sum(len(c) for _, c in docs)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)


def test_an_update_lowers_the_sft_loss_and_dpo_starts_at_log_two(params):
    batch = microbatches(sft_batch([[d] for d in examples(4)]), 1)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 20)
    step = jax.jit(make_sft_step(MODEL, optimizer, logprob_chunk_size=64))
    state, losses = init_state(params, optimizer), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 2
    assert int(state.step) == 20

    pairs = sft_batch([[d] for d in examples(8, 5)])
    pairs = {name: x.reshape(4, 2, T) for name, x in pairs.items()}
    pairs["ref_logprobs"] = np.asarray(
        pair_logprobs(MODEL, params, pairs, logprob_chunk_size=64)[0]
    )
    slow = optax.sgd(0.01)
    settings = {"beta": 0.5, "label_smoothing": 0.0, "logprob_chunk_size": 64}
    step = jax.jit(
        make_preference_step(MODEL, slow, loss_type=("sigmoid",), loss_weights=(1.0,), **settings)
    )
    state, metrics = step(init_state(params, slow), microbatches(pairs, 2))
    assert float(metrics["loss"]) == pytest.approx(np.log(2), rel=1e-6)
    _, after = step(state, microbatches(pairs, 1))
    assert float(after["loss"]) < float(metrics["loss"])
    assert float(after["rewards/margins"]) > 0


def test_policy_gradient_at_ratio_one_is_reinforce(params):
    docs = examples(4)
    batch = policy_batch([[d] for d in docs])
    score = lambda p: _weighted_logprobs(p, batch)
    wanted = jax.grad(score)(params)
    batch["old_logprobs"] = np.asarray(_logprobs(params, batch))
    moved, metrics = update(step_of("policy", beta=0.0), params, microbatches(batch, 1))
    assert_same(moved, wanted)
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-5


def _logprobs(params, batch):
    arrays = {n: jnp.asarray(batch[n]) for n in ("tokens", "positions", "segment_ids")}
    return model_logprobs(MODEL, params, **arrays, temperature=0.9, chunk_size=64)[0]


def _weighted_logprobs(params, batch):
    mask = batch["completion_mask"].astype(np.float32)
    return jnp.sum(_logprobs(params, batch) * batch["advantages"] * mask) / mask.sum()


def test_a_nonfinite_gradient_is_skipped_and_counted(params):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 5)
    step = jax.jit(make_policy_step(MODEL, optimizer, OBJECTIVE, logprob_chunk_size=64))
    batch = microbatches(policy_batch([[d] for d in examples(2)]), 1)
    state, metrics = step(init_state(params, optimizer), batch)
    assert metrics["nonfinite_steps"] == 0
    bad = dict(batch, advantages=np.where(batch["completion_mask"], np.inf, 0).astype(np.float32))
    skipped, metrics = step(state, bad)
    assert metrics["nonfinite_steps"] == 1
    for a, b in zip(jax.tree.leaves(skipped.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(skipped.step) == 2


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"lr_scheduler_type": "constant"}, [1, 1, 1]),
        ({"lr_scheduler_type": "linear"}, [1, 0.5, 0]),
        ({"lr_scheduler_type": "cosine", "min_lr_ratio": 0.2}, [1, 0.6, 0.2]),
        ({"lr_scheduler_type": "linear", "warmup_ratio": 0.5}, [1 / 6, 1, 0]),
    ],
)
def test_learning_rate_schedules(options, values):
    config = OptimizerConfig(learning_rate=0.1, **options)
    schedule = learning_rate_schedule(config, 10)
    got = [float(schedule(step)) / 0.1 for step in (0, 5, 10)]
    np.testing.assert_allclose(got, values, atol=1e-6)


def test_weight_decay_spares_norms(params):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, weight_decay=0.1), 1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert float(jnp.max(jnp.abs(updates["final_norm"]["scale"]))) == 0
    np.testing.assert_allclose(updates["embedding"], -0.1 * params["embedding"], rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0}, {"warmup_ratio": 1.0}, {"min_lr_ratio": 0.1}, {"max_grad_norm": 0}],
)
def test_optimizer_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OptimizerConfig(**{"learning_rate": 1e-3, **options})
