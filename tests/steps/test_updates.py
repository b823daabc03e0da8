"""Updates: packing, microbatching and sharding change nothing; a bad gradient changes nothing."""

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
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_preference_step,
    make_sft_step,
    pair_logprobs,
    state_shardings,
)
from jaxrl_reason.steps.forward import _chunk_size

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
SFT = make_sft_step(MODEL, SGD, logprob_chunk_size=64)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


def examples(count, seed=0):
    rng = np.random.default_rng(seed)
    ids = lambda low, high: rng.integers(2, 32, rng.integers(low, high)).tolist()
    return [(ids(2, 6), ids(1, 7)) for _ in range(count)]


def sft_batch(rows):
    return fill_rows(rows, T, pad_id=0)


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


def test_packed_rows_give_the_update_of_separate_rows(params):
    docs = examples(6)
    separate = microbatches(sft_batch([[d] for d in docs]), 1)
    packed = microbatches(sft_batch([docs[:2], docs[2:4], docs[4:]]), 1)
    a, metrics_a = update(SFT, params, separate)
    b, metrics_b = update(SFT, params, packed)
    assert_same(a, b)
    assert metrics_a["entropy"] == pytest.approx(metrics_b["entropy"], rel=1e-4)


def test_microbatches_of_uneven_masks_give_the_update_of_one_batch(params):
    docs = [[d] for d in examples(8)]
    whole, metrics = update(SFT, params, microbatches(sft_batch(docs), 1))
    for count in (2, 8):
        cut, cut_metrics = update(SFT, params, microbatches(sft_batch(docs), count))
        assert_same(whole, cut)
        for name in metrics:
            assert cut_metrics[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-6), name


def test_trailing_empty_microbatches_change_nothing(params):
    batch = microbatches(sft_batch([[d] for d in examples(4)]), 2)
    empty = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    assert_same(update(SFT, params, batch)[0], update(SFT, params, empty)[0])


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_give_the_update_of_one(params, mesh):
    batch = microbatches(sft_batch([[d] for d in examples(16)]), 2)
    one, metrics = update(SFT, params, batch)
    mesh = make_mesh(MeshConfig(**mesh))
    placement = tree_shardings(mesh, MODEL.axes(), params)
    states = state_shardings(params, SGD, placement, replicated(mesh))
    state = jax.device_put(init_state(params, SGD), states)
    sharded = jax.jit(
        SFT,
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
    _, metrics = update(SFT, params, batch)
    total = 0.0
    for prompt, completion in docs:
        tokens = jnp.asarray([prompt + completion])
        positions = jnp.arange(tokens.shape[1])[None]
        hidden = MODEL.forward(
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

    pairs = pair_batch()
    pairs["ref_logprobs"], _ = sums_of(params, pairs)
    slow = optax.sgd(0.01)
    step = jax.jit(preference_step(slow, "sigmoid", label_smoothing=0.0))
    state, metrics = step(init_state(params, slow), microbatches(pairs, 2))
    assert float(metrics["loss"]) == pytest.approx(np.log(2), rel=1e-6)
    _, after = step(state, microbatches(pairs, 1))
    assert float(after["loss"]) < float(metrics["loss"])
    assert float(after["rewards/margins"]) > 0


def pair_batch():
    pairs = sft_batch([[d] for d in examples(8, 5)])
    return {name: x.reshape(4, 2, T) for name, x in pairs.items()}


def sums_of(params, pairs):
    """Sequence log-probs and lengths, each [B, 2]."""
    sums, lengths = pair_logprobs(MODEL, params, pairs, logprob_chunk_size=64)
    return np.asarray(sums), np.asarray(lengths)


def preference_step(optimizer, *loss_type, weights=None, beta=0.5, **options):
    return make_preference_step(
        MODEL,
        optimizer,
        loss_type=loss_type,
        loss_weights=weights or (1.0,) * len(loss_type),
        beta=beta,
        options=options,
        logprob_chunk_size=64,
    )


def test_a_preference_loss_reads_sums_or_means_as_it_should(params):
    """Every term at once, with weights that tell them apart, against NumPy."""
    pairs = pair_batch()
    sums, lengths = sums_of(params, pairs)
    ref = sums + np.random.default_rng(0).normal(0, 0.5, sums.shape).astype(np.float32)
    means, ref_means = sums / lengths, ref / lengths
    assert len(np.unique(lengths)) > 2
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))
    margin = lambda x: x[:, 0] - x[:, 1]
    odds = lambda x: np.log(np.exp(x) / (1 - np.exp(x)))
    expected = {
        "sigmoid": -log_sigmoid(0.5 * margin(sums - ref)),
        "sigmoid_norm": -log_sigmoid(0.5 * margin(means - ref_means)),
        "ipo": (margin(means - ref_means) - 1) ** 2,
        "simpo": -log_sigmoid(0.5 * margin(means) - 0.3),
        "orpo": -means[:, 0] - 0.5 * log_sigmoid(margin(odds(means))),
        "cpo": -log_sigmoid(0.5 * margin(sums)),
        "sft": -means[:, 0],
    }
    weights = tuple(1.0 + i for i in range(len(expected)))
    step = preference_step(SGD, *expected, weights=weights, gamma=0.3, label_smoothing=0.0)
    batch = microbatches(pairs | {"ref_logprobs": ref}, 1)
    _, metrics = update(step, params, batch)
    total = sum(w * x.mean() for w, x in zip(weights, expected.values(), strict=True))
    assert metrics["loss"] == pytest.approx(total, rel=1e-4)
    assert metrics["rewards/chosen"] == pytest.approx(0.5 * (sums - ref)[:, 0].mean(), abs=1e-4)
    assert metrics["logps/chosen"] == pytest.approx(sums[:, 0].mean(), rel=1e-5)


@pytest.mark.parametrize(("name", "options"), [("simpo", {"gamma": 0.3}), ("cpo", {})])
def test_without_a_reference_the_reward_is_the_log_prob_that_the_loss_reads(params, name, options):
    pairs = pair_batch()
    sums, lengths = sums_of(params, pairs)
    _, metrics = update(preference_step(SGD, name, **options), params, microbatches(pairs, 2))
    read = sums / lengths if name == "simpo" else sums
    assert metrics["rewards/chosen"] == pytest.approx(0.5 * read[:, 0].mean(), rel=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(0.5 * read[:, 1].mean(), rel=1e-5)
    assert metrics["rewards/accuracies"] == np.mean(read[:, 0] > read[:, 1])


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


def test_chunks_are_those_of_a_device():
    tokens, head = np.zeros((8, 16), np.int32), jax.ShapeDtypeStruct((4, 2**20), jnp.float32)
    wide = jax.ShapeDtypeStruct((4, 2**21), jnp.float32)
    devices = np.asarray(jax.devices()).reshape(2, 4)
    mesh = jax.sharding.Mesh(
        devices, ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    assert _chunk_size(3, tokens, head) == 3
    assert _chunk_size(None, tokens, head) == 128
    assert _chunk_size(None, tokens, wide) == 16
    with jax.set_mesh(mesh):
        assert _chunk_size(3, tokens, head) == 24
        assert _chunk_size(None, tokens, wide) == 128
        # Rows that do not divide over all axes are cut over those that they divide over.
        assert _chunk_size(3, tokens[:2], head) == 6
