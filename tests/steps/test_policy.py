"""Policy updates: prompts shared in a row, rows, microbatches and devices change nothing."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_reason.data.groups import Document, fill_groups, pack_groups
from jaxrl_reason.losses import LOSS_TYPES
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
    make_batch_logprobs,
    make_optimizer,
    make_policy_step,
    state_shardings,
    target_logprobs,
)

V = 32
CONFIG = ModelConfig(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
)
MODEL = Model(CONFIG)
# Its state is the gradient itself.
KEEP = optax.trace(decay=0.0)
SHARED, PADDED = 40, 16
OBJECTIVE = PolicyObjective(
    loss_type="dapo",
    options={"epsilon": 0.2, "epsilon_high": 0.3},
    beta=0.05,
    temperature=0.9,
    max_completion_length=16,
)
# Of the losses that do not take both clips.
OPTIONS = {
    "cispo": {"epsilon_high": 2.0},
    "sapo": {"temperature_pos": 1.0, "temperature_neg": 1.05},
    "vespo": {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0},
    "triplet": {"epsilon_neg_low": 0.2, "epsilon_neg_high": 5.0, "epsilon_pos_high": 0.28},
    "reinforce": {},
    "gpg": {},
    "kl_cov": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 1.0},
    "clip_cov": {"epsilon": 0.2, "clip_cov_ratio": 0.3, "clip_cov_lb": -9.0, "clip_cov_ub": 9.0},
}


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class Groups:
    """Prompts with a different number of completions each, and what belongs to their tokens."""

    prompts: list
    members: list  # numbers of the completions of each prompt
    tokens: list
    counted: list
    advantages: np.ndarray
    values: np.ndarray  # [old, ref, weights; completion; token]


def make_groups(sizes, seed=0, *, dead=(), forced=0.2) -> Groups:
    rng = np.random.default_rng(seed)
    count = sum(sizes)
    starts = np.cumsum([0, *sizes])
    tokens = [rng.integers(2, V, rng.integers(1, 10)) for _ in range(count)]
    counted = [rng.random(len(t)) >= forced for t in tokens]
    for row in counted:
        row[-1] = True
    advantages = rng.normal(size=count)
    for i in dead:
        advantages[i] = 0
    scales = np.asarray([0.3, 0.4, 0.2])[:, None, None]
    values = np.asarray([-3.4, -3.4, 1.0])[:, None, None] + scales * rng.normal(size=(3, count, 10))
    return Groups(
        prompts=[rng.integers(2, V, rng.integers(1, 6)).tolist() for _ in sizes],
        members=[list(range(a, b)) for a, b in itertools.pairwise(starts)],
        tokens=tokens,
        counted=counted,
        advantages=advantages,
        values=values,
    )


GROUPS = make_groups([4, 1, 3, 5, 2])


def rows_of(groups: Groups, *, shared=True, kept=None, num_rows=8, dtype=np.float32):
    """The batch [num_rows, ...]: packed with shared prompts, or a row for each completion."""
    keep = lambda members: [i for i in members if kept is None or kept[i]]
    if shared:
        sizes = [{i: len(groups.tokens[i]) for i in keep(m)} for m in groups.members]
        rows = pack_groups([len(p) for p in groups.prompts], sizes, SHARED)
    else:
        rows = [[Document(g, (i,))] for g, m in enumerate(groups.members) for i in keep(m)]
    made = fill_groups(
        rows,
        groups.prompts,
        dict(enumerate(groups.tokens)),
        dict(enumerate(groups.counted)),
        SHARED if shared else PADDED,
        pad_id=0,
        num_rows=num_rows,
    )
    old, ref, weights = groups.values
    spread = lambda values: np.where(
        made.batch["completion_mask"],
        values[made.numbers, made.offsets] if values.ndim > 1 else values[made.numbers],
        0,
    ).astype(dtype)
    dropped = [] if kept is None else [i for i in range(len(groups.tokens)) if not kept[i]]
    first = lambda number: np.asarray([number, *[0] * (num_rows - 1)], np.int32)
    return made.batch | {
        "advantages": spread(groups.advantages),
        "old_logprobs": spread(old),
        "sampling_logprobs": spread(old - 0.1),
        "ref_logprobs": spread(ref),
        "importance_weights": spread(weights),
        "dropped_sequences": first(len(dropped)),
        "dropped_tokens": first(sum(int(groups.counted[i].sum()) for i in dropped)),
    }


def cut(batch, count):
    """Microbatches of neighbouring rows."""
    return {name: x.reshape(count, -1, *x.shape[1:]) for name, x in batch.items()}


def step_of(loss_type="dapo", *, model=MODEL, chunk_size=64, **changes):
    changes = {"options": OPTIONS.get(loss_type, OBJECTIVE.options)} | changes
    objective = dataclasses.replace(OBJECTIVE, loss_type=loss_type, **changes)
    return make_policy_step(model, KEEP, objective, logprob_chunk_size=chunk_size)


def update(step, params, batch):
    """The gradient and the metrics of an update."""
    state, metrics = jax.jit(step)(init_state(params, KEEP), batch)
    return jax.device_get((state.opt_state.trace, metrics))


def assert_same(a, b, tolerance=1e-5):
    """Gradients and losses agree, each leaf to a share of its largest entry."""
    (a, metrics), (b, expected) = a, b
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert np.abs(y).max() > 1e-4
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=path)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=tolerance, abs=tolerance / 10)


def assert_same_metrics(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


USUAL = ["grpo", "dapo", "dr_grpo", "gspo"]
slow = lambda names: [
    name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in names
]
ANY_ROWS = slow(name for name in LOSS_TYPES if name != "clip_cov")  # draws by place


@pytest.mark.parametrize("loss_type", ANY_ROWS)
def test_shared_prompts_give_the_update_of_a_row_for_each_completion(params, loss_type):
    step = step_of(loss_type)
    shared = update(step, params, cut(rows_of(GROUPS), 1))
    padded = update(step, params, cut(rows_of(GROUPS, shared=False, num_rows=16), 1))
    assert_same(shared, padded)
    assert_same_metrics(shared[1], padded[1])


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.0},
        {"chunk_size": 3},
        {"chunk_size": None},
        {"model": Model(dataclasses.replace(CONFIG, remat="full"))},
        {"model": Model(dataclasses.replace(CONFIG, remat="dots")), "chunk_size": 1},
    ],
    ids=["beta=0", "chunks", "whole", "remat", "both"],
)
def test_neither_chunks_nor_remat_change_the_update(params, changes, seed):
    groups = make_groups([3, 6, 1, 2, 4], seed)
    expected = step_of(beta=changes.get("beta", OBJECTIVE.beta))
    shared = update(step_of(**changes), params, cut(rows_of(groups), 2))
    padded = rows_of(groups, shared=False, num_rows=16)
    assert_same(shared, update(expected, params, cut(padded, 1)))


@pytest.mark.parametrize("loss_type", slow(n for n in LOSS_TYPES if "_cov" not in n))
def test_microbatches_of_uneven_masks_give_the_update_of_one_batch(params, loss_type):
    batch = rows_of(GROUPS, num_rows=4)
    assert len(set(batch["completion_mask"].sum(axis=1))) > 2
    step = step_of(loss_type)
    whole = update(step, params, cut(batch, 1))
    for count in (2, 4):
        parts = update(step, params, cut(batch, count))
        assert_same(parts, whole)
        assert_same_metrics(parts[1], whole[1])


def test_trailing_empty_microbatches_change_nothing(params):
    batch = cut(rows_of(GROUPS, num_rows=4), 2)
    empty = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in batch.items()}
    assert_same(update(step_of(), params, empty), update(step_of(), params, batch), 1e-7)


@pytest.mark.parametrize("mesh", [{"fsdp": 8, "data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("chunk_size", [3, 64])
def test_eight_devices_give_the_update_of_one(params, mesh, chunk_size):
    batch = cut(rows_of(GROUPS, num_rows=16), 2)
    step = step_of(chunk_size=chunk_size)
    one = update(step, params, batch)
    mesh = make_mesh(MeshConfig(**mesh))
    placement = tree_shardings(mesh, MODEL.axes(), params)
    states = state_shardings(params, KEEP, placement, replicated(mesh))
    sharded = jax.jit(
        step,
        in_shardings=(states, batch_sharding(mesh, batch_axis=1)),
        out_shardings=(states, replicated(mesh)),
    )
    state = jax.device_put(init_state(params, KEEP), states)
    state, metrics = sharded(state, place_batch(batch, mesh, batch_axis=1))
    assert_same(jax.device_get((state.opt_state.trace, metrics)), one)
    for x, s in zip(jax.tree.leaves(state.params), jax.tree.leaves(placement), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)


class Wide:
    """A decoder in float64 that shares no code with `Model`: two layers of one head."""

    def init(self, key):
        shapes = {"embedding": (V, 16), "places": (32, 16), "qkv": (2, 3, 16, 16), "out": (16, V)}
        keys = jax.random.split(key, len(shapes))
        return {
            name: 0.3 * jax.random.normal(k, shape, jnp.float64)
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def forward(self, params, tokens, *, positions, segment_ids, branch_ids, visual):
        assert visual is None
        x = params["embedding"][tokens] + params["places"][positions]
        slots = jnp.arange(tokens.shape[1])
        before = slots[:, None] >= slots[None, :]
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        branch = branch_ids[:, None, :]
        seen = before[None] & same & ((branch == 0) | (branch == branch_ids[:, :, None]))
        for layer in params["qkv"]:
            q, k, v = (x @ matrix for matrix in layer)
            scores = jnp.where(seen, jnp.einsum("btd,bsd->bts", q, k), -1e9)
            x = x + jnp.tanh(jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores, axis=-1), v))
        return x

    def unembedding(self, params):
        return params["out"]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo", "vespo"])
def test_in_float64_the_updates_agree_to_ten_digits(loss_type):
    with jax.enable_x64(True):
        params = Wide().init(jax.random.key(0))
        step = step_of(loss_type, model=Wide(), chunk_size=5)
        make = functools.partial(rows_of, GROUPS, dtype=np.float64)
        padded = update(step, params, cut(make(shared=False, num_rows=16), 1))
        for count in (1, 4):
            assert_same(update(step, params, cut(make(), count)), padded, 1e-10)


# Completions without advantage: a whole group, and members of groups that go on.
DEAD = (0, 4, 8, 9, 10, 11, 12)
PARTLY = make_groups([4, 1, 3, 5, 2], seed=3, dead=DEAD)


@pytest.mark.parametrize(
    "loss_type", slow(name for name, variant in LOSS_TYPES.items() if variant.separable)
)
def test_completions_without_advantage_can_be_left_out(params, loss_type):
    step = step_of(loss_type, beta=0.0)
    everything = update(step, params, cut(rows_of(PARTLY), 1))
    for count in (1, 2):
        fewer = rows_of(PARTLY, kept=PARTLY.advantages != 0, num_rows=4)
        assert (fewer["segment_ids"] > 0).sum() < (rows_of(PARTLY)["segment_ids"] > 0).sum()
        assert_same(update(step, params, cut(fewer, count)), everything)


def test_in_float64_nothing_is_missing_where_completions_are_left_out():
    with jax.enable_x64(True):
        params = Wide().init(jax.random.key(0))
        for loss_type in ("dapo", "grpo", "dr_grpo", "gpg"):
            step = step_of(loss_type, model=Wide(), beta=0.0)
            make = functools.partial(rows_of, PARTLY, dtype=np.float64)
            fewer = cut(make(kept=PARTLY.advantages != 0, num_rows=4), 2)
            assert_same(update(step, params, fewer), update(step, params, cut(make(), 1)), 1e-12)


@pytest.mark.parametrize("count", [1, 2])
def test_an_update_on_nothing_has_no_gradient(params, count):
    nothing = rows_of(PARTLY, kept=np.zeros(15, bool), num_rows=4)
    gradient, metrics = update(step_of("grpo", beta=0.0), params, cut(nothing, count))
    assert all(not x.any() for x in jax.tree.leaves(gradient))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["nonfinite_steps"] == 0


def path_logprobs(params, groups, i):
    """Log-probs of a completion from the logits of its own sequence, with no packing."""
    (g,) = [g for g, members in enumerate(groups.members) if i in members]
    prompt, completion = groups.prompts[g], groups.tokens[i]
    tokens = jnp.asarray([[*prompt, *completion.tolist()]])
    positions = jnp.arange(tokens.shape[1])[None]
    ones = jnp.ones_like(tokens)
    hidden = MODEL.forward(params, tokens, positions=positions, segment_ids=ones)
    logits = MODEL.unembed(params, hidden)[0, len(prompt) - 1 : -1] / 0.9
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(completion)), completion]


def test_log_probs_of_rows_are_those_of_each_sequence_alone(params):
    batch = rows_of(GROUPS)
    made, entropy = target_logprobs(MODEL, params, batch, temperature=0.9, chunk_size=None)
    made = np.where(batch["completion_mask"], made, 0)
    assert np.all(np.asarray(entropy)[batch["completion_mask"]] > 1)
    of_batch = jax.jit(make_batch_logprobs(MODEL, temperature=0.9, logprob_chunk_size=7))
    whole = of_batch(params, cut(batch, 4))
    mask = batch["completion_mask"]
    np.testing.assert_allclose(np.asarray(whole).reshape(mask.shape)[mask], made[mask], atol=1e-5)
    wanted = {}
    for i in range(len(GROUPS.tokens)):
        found = path_logprobs(params, GROUPS, i)[GROUPS.counted[i]]
        wanted[round(float(GROUPS.advantages[i]), 5)] = found
    found = 0
    for row in range(len(mask)):
        for sequence in range(1, batch["sequence_ids"][row].max() + 1):
            here = batch["sequence_ids"][row] == sequence
            key = round(float(batch["advantages"][row][here][0]), 5)
            np.testing.assert_allclose(made[row][here], wanted[key], atol=1e-5)
            found += 1
    assert found == len(GROUPS.tokens)


def test_tokens_that_were_not_sampled_are_read_and_not_counted(params):
    """The loss of REINFORCE against a loop over the sequences."""
    groups = make_groups([3, 2], seed=5, forced=0.5)
    assert sum(int((~x).sum()) for x in groups.counted) > 3
    _, metrics = update(step_of("reinforce", beta=0.0), params, cut(rows_of(groups), 2))
    total, count = 0.0, 0
    for i, counted in enumerate(groups.counted):
        own = path_logprobs(params, groups, i)[counted]
        weights = groups.values[2, i, : len(counted)][counted]
        total -= float(np.sum(weights * own)) * groups.advantages[i]
        count += counted.sum()
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)


def test_importance_weights_enter_where_the_loss_has_a_place_for_them(params):
    batch = rows_of(GROUPS)
    doubled = batch | {"importance_weights": 2 * batch["importance_weights"]}
    for loss_type, doubles in (("dapo", True), ("gspo", True), ("vespo", False)):
        step = step_of(loss_type, beta=0.0)
        one, two = (update(step, params, cut(b, 2)) for b in (batch, doubled))
        same = np.allclose(2 * one[0]["embedding"], two[0]["embedding"], rtol=1e-5, atol=1e-7)
        assert same == doubles
        assert one[1]["loss"] != two[1]["loss"]
    # The weights of a KL term stay 1.
    gradients = [update(step_of(), params, cut(b, 2))[0]["embedding"] for b in (batch, doubled)]
    assert not np.allclose(2 * gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_the_sampler_is_compared_token_by_token(params):
    batch = rows_of(GROUPS)
    near, _ = target_logprobs(MODEL, params, batch, temperature=0.9, chunk_size=None)
    mask = batch["completion_mask"]
    far = np.random.default_rng(0).random(mask.shape) < 0.5
    for shift in (0.8, -0.8):  # the ratio is 0.45 or 2.2
        distance = np.where(far, shift, 0.6).astype(np.float32)
        distance[0, 3] = 0.9
        assert mask[0, 3]
        batch["sampling_logprobs"] = np.asarray(near) + distance
        for count in (1, 8):
            _, metrics = update(step_of(), params, cut(batch, count))
            share = metrics["sampling/importance_sampling_ratio/outside_share"]
            assert share == pytest.approx((np.abs(distance) > 0.7)[mask].mean())
            difference = "sampling/sampling_logp_difference"
            assert metrics[f"{difference}/max"] == pytest.approx(0.9, rel=1e-4)
            mean = np.abs(distance)[mask].mean()
            assert metrics[f"{difference}/mean"] == pytest.approx(mean, rel=1e-4)


def test_policy_gradient_at_ratio_one_is_reinforce(params):
    batch = rows_of(GROUPS)
    batch["importance_weights"] = np.ones_like(batch["importance_weights"])

    def score(params):
        logprobs, _ = target_logprobs(MODEL, params, batch, temperature=0.9, chunk_size=64)
        mask = batch["completion_mask"].astype(np.float32)
        return -jnp.sum(logprobs * batch["advantages"] * mask) / mask.sum(), logprobs

    wanted, logprobs = jax.grad(score, has_aux=True)(params)
    batch["old_logprobs"] = batch["sampling_logprobs"] = np.asarray(logprobs)
    gradient, metrics = update(step_of(beta=0.0), params, cut(batch, 1))
    assert_same((gradient, {"loss": 0.0}), (wanted, {"loss": 0.0}))
    mean = batch["advantages"][batch["completion_mask"]].mean()
    assert metrics["loss"] == pytest.approx(-mean, rel=1e-4)
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5


def test_clip_cov_draws_by_step_and_microbatch(params):
    objective = dataclasses.replace(OBJECTIVE, loss_type="clip_cov", options=OPTIONS["clip_cov"])
    frozen = optax.sgd(0.0)
    step = jax.jit(make_policy_step(MODEL, frozen, objective, logprob_chunk_size=64))
    rows = rows_of(GROUPS, num_rows=4)
    twice = {name: np.stack([x, x]) for name, x in rows.items()}
    start = init_state(params, frozen)
    state, first = step(start, twice)
    _, again = step(start, twice)
    _, second = step(state, twice)
    assert first["loss"] == again["loss"] != second["loss"]
    assert first["clip_ratio/region_mean"] == second["clip_ratio/region_mean"] > 0.2
    _, alone = step(start, {name: x[None] for name, x in rows.items()})
    assert alone["loss"] != first["loss"]  # the second half of `first` is the same rows


def test_a_nonfinite_gradient_is_skipped_and_counted(params):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 5)
    step = jax.jit(make_policy_step(MODEL, optimizer, OBJECTIVE, logprob_chunk_size=64))
    batch = cut(rows_of(GROUPS), 1)
    state, metrics = step(init_state(params, optimizer), batch)
    assert metrics["nonfinite_steps"] == 0
    bad = dict(batch, advantages=np.where(batch["completion_mask"], np.inf, 0).astype(np.float32))
    skipped, metrics = step(state, bad)
    assert metrics["nonfinite_steps"] == 1
    for a, b in zip(jax.tree.leaves(skipped.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(skipped.step) == 2
