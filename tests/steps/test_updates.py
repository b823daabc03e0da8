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
    if "loss_type" in changes:
        changes = {"options": OPTIONS.get(changes["loss_type"], OBJECTIVE.options)} | changes
    objective = dataclasses.replace(OBJECTIVE, **changes)
    return make_policy_step(MODEL, SGD, objective, logprob_chunk_size=64)


# Of the losses that do not take both clips.
OPTIONS = {
    "cispo": {"epsilon_high": 2.0},
    "sapo": {"temperature_pos": 1.0, "temperature_neg": 1.05},
    "vespo": {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0},
    "triplet": {"epsilon_neg_low": 0.2, "epsilon_neg_high": 5.0, "epsilon_pos_high": 0.28},
    "reinforce": {},
    "gpg": {},
    "kl_cov": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 1.0},
}


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
OTHERS = ["bnpo", "cispo", "sapo", "luspo", "vespo", "reinforce", "gspo_token", "gmpo", "triplet"]
slow = lambda names: [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("kind", ["sft", *LOSS_TYPES, "gspo", *slow([*OTHERS, "gpg", "kl_cov"])])
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


@pytest.mark.parametrize("kind", ["sft", *LOSS_TYPES, "gpg", *slow([*OTHERS, "gspo"])])
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


def test_clip_cov_draws_by_step_and_microbatch(params):
    options = {"epsilon": 0.2, "clip_cov_ratio": 0.3, "clip_cov_lb": -9.0, "clip_cov_ub": 9.0}
    objective = dataclasses.replace(OBJECTIVE, loss_type="clip_cov", options=options)
    frozen = optax.sgd(0.0)
    step = jax.jit(make_policy_step(MODEL, frozen, objective, logprob_chunk_size=64))
    rows = policy_batch([[d] for d in examples(4)])
    twice = jax.tree.map(lambda x: np.stack([x, x]), rows)
    start = init_state(params, frozen)
    state, first = step(start, twice)
    _, again = step(start, twice)
    _, second = step(state, twice)
    assert first["loss"] == again["loss"] != second["loss"]
    assert first["clip_ratio/region_mean"] == second["clip_ratio/region_mean"] > 0.2
    _, alone = step(start, jax.tree.map(lambda x: x[None], rows))
    assert alone["loss"] != first["loss"]  # the second half of `first` is the same rows


def test_the_share_of_tokens_far_from_the_sampler_is_counted(params):
    docs = [[d] for d in examples(4)]
    batch = policy_batch(docs)
    mask = batch["completion_mask"]
    near = np.asarray(_logprobs(params, batch))
    far = np.random.default_rng(0).random(mask.shape) < 0.5
    for shift in (0.8, -0.8):  # the ratio is 0.45 or 2.2
        batch["old_logprobs"] = near + np.where(far, shift, 0.6).astype(np.float32)
        _, metrics = update(step_of("policy", beta=0.0), params, microbatches(batch, 2))
        share = metrics["sampling/importance_sampling_ratio/outside_share"]
        assert share == pytest.approx(far[mask].mean())


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
