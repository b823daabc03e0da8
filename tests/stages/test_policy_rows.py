"""Completions in the rows of an update: each value at its token, what is dropped, the shapes."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.losses import LOSS_TYPES
from jaxrl_reason.models import Model, ModelConfig
from jaxrl_reason.sharding import MeshConfig, make_mesh
from jaxrl_reason.stages.policy_rows import PolicyRows, may_drop
from jaxrl_reason.steps import PolicyObjective, init_state, make_policy_step

PROMPTS, GROUP, LONGEST = 16, 4, 12
COUNT = PROMPTS * GROUP


@dataclasses.dataclass
class Drawn:
    """Completions of given lengths whose tokens and log-probs are all different."""

    lengths: np.ndarray
    prompts: list = dataclasses.field(init=False)
    num_generations: int = GROUP

    def __post_init__(self):
        count, rng = len(self.lengths), np.random.default_rng(0)
        numbers = np.arange(1, count * LONGEST + 1).reshape(count, LONGEST)
        self.prompts = [[10_000 + i] * (1 + i % 5) for i in range(count // GROUP)]
        self.completion_mask = np.arange(LONGEST) < np.asarray(self.lengths)[:, None]
        self.sampled = rng.random(numbers.shape) < 0.9
        self.tokens = np.where(self.completion_mask, 100 + numbers, 0).astype(np.int32)
        self.sampling_logprobs = np.where(self.completion_mask, -numbers / 256, 0)
        self.kept_logmass = np.where(self.completion_mask, -numbers / 1024, 0)

    @property
    def counted(self):
        return self.completion_mask & self.sampled


def rows_of(devices=1, **changes):
    given = {
        "mesh": make_mesh(MeshConfig(), jax.devices()[:devices]),
        "pad_id": 0,
        "max_prompt_length": 5,
        "max_completion_length": LONGEST,
        "completions": COUNT,
        "num_generations": GROUP,
        "microbatch_tokens": 256,
        "row_length": 64,
        "drop": False,
    }
    return PolicyRows(**given | changes)


def lengths(seed=0, low=1):
    return np.random.default_rng(seed).integers(low, LONGEST + 1, COUNT)


def placed(rows, rollout, advantages, counts=None):
    batch, info = rows.place(rollout, advantages.astype(np.float32), counts)
    batch = {name: np.asarray(x) for name, x in batch.items()}
    assert {x.shape[:2] for x in batch.values()} == {rows.shape}
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}, info


def found_in(batch, rollout, advantages):
    """Numbers of the completions in a batch, every value of which was checked."""
    found = []
    for row in range(len(batch["tokens"])):
        line = {name: x[row] for name, x in batch.items()}
        for sequence in range(1, line["sequence_ids"].max() + 1):
            here = line["sequence_ids"] == sequence
            which = int((line["targets"][here][0] - 101) // LONGEST)  # tokens say whose they are
            found.append(which)
            counted = rollout.counted[which]
            np.testing.assert_array_equal(line["targets"][here], rollout.tokens[which][counted])
            np.testing.assert_array_equal(line["advantages"][here], advantages[which])
            old = (rollout.sampling_logprobs + rollout.kept_logmass)[which][counted]
            np.testing.assert_array_equal(line["old_logprobs"][here], old.astype(np.float32))
            np.testing.assert_array_equal(
                line["sampling_logprobs"][here], line["old_logprobs"][here]
            )
            assert line["importance_weights"][here].all()
            # The path to the last target is the prompt and the completion, forced tokens included.
            last = line["sources"][here][-1]
            branch = line["branch_ids"] == sequence
            segment = line["segment_ids"][branch][0]
            path = (line["segment_ids"] == segment) & (branch | (line["branch_ids"] == 0))
            prompt = rollout.prompts[which // GROUP]
            own = rollout.tokens[which][: rollout.lengths[which]]
            assert line["tokens"][path].tolist() == [*prompt, *own.tolist()]
            assert line["positions"][path].tolist() == list(range(len(prompt) + len(own)))
            assert last < np.flatnonzero(path)[-1]
        outside = ~line["completion_mask"]
        for name in ("advantages", "old_logprobs", "importance_weights", "sequence_ids"):
            assert not line[name][outside].any()
    return sorted(found)


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_every_value_lies_at_its_token(seed, prefix_sharing):
    rollout = Drawn(lengths(seed))
    advantages = np.random.default_rng(seed).normal(size=COUNT).astype(np.float32)
    rows = rows_of(prefix_sharing=prefix_sharing)
    batch, info = placed(rows, rollout, advantages)
    some = [i for i in range(COUNT) if rollout.counted[i].any()]
    assert found_in(batch, rollout, advantages) == some
    used = rows.shape[1] * np.ceil((batch["segment_ids"] > 0).any(axis=1).sum() / rows.shape[1])
    assert info["tokens"] == (batch["segment_ids"] > 0).sum()
    assert info["counted"] == rollout.counted.sum() == batch["completion_mask"].sum()
    assert info["padding_share"] == pytest.approx(1 - info["tokens"] / (used * rows.length))
    assert info["dropped_completions"] == info["dropped_groups"] == 0
    if prefix_sharing:
        assert info["padding_share"] < 0.3
        assert (
            info["tokens"]
            < 0.85 * placed(rows_of(prefix_sharing=False), rollout, advantages)[1]["tokens"]
        )


def test_completions_without_advantage_are_left_out_and_counted():
    rollout = Drawn(lengths())
    advantages = np.random.default_rng(0).normal(size=COUNT)
    advantages[:8] = 0  # two groups, and two members of another
    advantages[[20, 22]] = 0
    batch, info = placed(rows_of(drop=True), rollout, advantages)
    dropped = [*range(8), 20, 22]
    assert found_in(batch, rollout, advantages.astype(np.float32)) == [
        i for i in range(COUNT) if i not in dropped and rollout.counted[i].any()
    ]
    dropped = [i for i in dropped if rollout.counted[i].any()]
    assert batch["dropped_sequences"].sum() == info["dropped_completions"] == len(dropped)
    assert batch["dropped_tokens"].sum() == rollout.counted[dropped].sum()
    assert info["dropped_groups"] == 2
    kept, _ = placed(rows_of(drop=False), rollout, advantages)
    assert kept["dropped_sequences"].sum() == kept["dropped_tokens"].sum() == 0


def test_completions_that_do_not_count_are_neither_there_nor_in_the_divisor():
    rollout = Drawn(lengths())
    advantages = np.random.default_rng(0).normal(size=COUNT).astype(np.float32)
    counts = np.random.default_rng(1).random(COUNT) < 0.5
    advantages[:8] = 0
    batch, info = placed(rows_of(drop=True), rollout, advantages, counts)
    there = [i for i in range(8, COUNT) if counts[i] and rollout.counted[i].any()]
    assert found_in(batch, rollout, advantages) == there
    assert info["dropped_completions"] == sum(
        counts[i] and rollout.counted[i].any() for i in range(8)
    )


def test_a_batch_of_nothing_has_the_same_shape():
    batch, info = placed(rows_of(drop=True), Drawn(lengths()), np.zeros(COUNT))
    assert not batch["segment_ids"].any()
    assert info["tokens"] == info["padding_share"] == 0
    assert info["dropped_groups"] == PROMPTS


def test_an_advantage_that_is_no_number_is_not_dropped():
    _, info = placed(rows_of(drop=True), Drawn(lengths(low=6)), np.full(COUNT, np.nan))
    assert info["dropped_completions"] == 0


def test_the_shape_holds_the_longest_completions_and_short_ones_leave_it_empty():
    rows = rows_of()
    longest = Drawn(np.full(COUNT, LONGEST))
    longest.prompts = [[7] * 5] * PROMPTS
    longest.sampled[:] = True
    full, _ = placed(rows, longest, np.ones(COUNT))
    assert full["completion_mask"].sum() == COUNT * LONGEST
    few, _ = placed(rows, Drawn(np.ones(COUNT, int)), np.ones(COUNT))
    assert full["tokens"].shape == few["tokens"].shape
    used = (few["segment_ids"] > 0).any(axis=1).reshape(rows.shape).any(axis=1)
    assert used.tolist() == [True] + [False] * (len(used) - 1)


@pytest.mark.parametrize(
    ("devices", "changes", "shape", "length"),
    [
        (1, {}, (6, 4), 64),
        (1, {"microbatch_tokens": 10}, (22, 1), 64),
        (8, {}, (3, 8), 64),
        (8, {"microbatch_tokens": 1100}, (2, 16), 64),
        (1, {"prefix_sharing": False}, (16, 4), 64),
        (1, {"prefix_sharing": False, "row_length": None}, (5, 15), 17),
        # A group of 53 tokens, then the devices' share of 16 of them, in tiles of 64.
        (1, {"row_length": None, "microbatch_tokens": 2048}, (1, 32), 64),
        # A group of 64 + 8 x 128 tokens, and one that is too long for a row of its own.
        (1, {"row_length": None, **dict.fromkeys(("max_prompt_length",), 64),
             "max_completion_length": 128, "num_generations": 8}, (13, 1), 1088),
        (1, {"row_length": None, "max_prompt_length": 256, "max_completion_length": 256,
             "num_generations": 8}, (32, 1), 1024),
        (1, {"row_length": None, "max_prompt_length": 512, "max_completion_length": 4096,
             "num_generations": 8}, (64, 1), 4608),
        (8, {"row_length": None, "max_prompt_length": 64, "max_completion_length": 128,
             "num_generations": 8, "completions": 16}, (2, 8), 320),
    ],
)  # fmt: skip
def test_shapes_follow_from_lengths_devices_and_budget(devices, changes, shape, length):
    rows = rows_of(devices, **changes)
    assert (rows.shape, rows.length) == (shape, length)


def test_rows_too_short_for_a_completion_are_refused():
    with pytest.raises(InputError, match=r"row_length=16 is less than .*; raise it to at least 17"):
        rows_of(row_length=16)


def test_what_may_be_dropped():
    assert may_drop("dapo", beta=0.0)
    assert not may_drop("dapo", beta=0.1)
    assert [name for name in LOSS_TYPES if not may_drop(name, beta=0.0)] == ["clip_cov", "kl_cov"]


def test_rows_of_both_layouts_give_one_update():
    """From a rollout to a gradient: shared or padded rows, with completions dropped or not."""
    model = Model(
        ModelConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    rollout = Drawn(lengths())
    rollout.tokens = np.where(rollout.completion_mask, rollout.tokens % 32, 0)
    rollout.prompts = [[i % 32] * len(p) for i, p in enumerate(rollout.prompts)]
    rollout.sampling_logprobs = rollout.sampling_logprobs - 3
    advantages = np.random.default_rng(0).normal(size=COUNT).astype(np.float32)
    advantages[np.random.default_rng(1).random(COUNT) < 0.4] = 0
    keep = optax.trace(decay=0.0)
    objective = PolicyObjective(
        loss_type="grpo",
        options={"epsilon": 0.2},
        beta=0.0,
        temperature=1.0,
        max_completion_length=LONGEST,
    )
    step = jax.jit(make_policy_step(model, keep, objective, logprob_chunk_size=None))
    state = init_state(model.init(jax.random.key(0)), keep)
    gradients, losses = [], []
    for changes in ({"prefix_sharing": False}, {}, {"drop": True}):
        batch, _ = rows_of(**changes).place(rollout, advantages)
        after, metrics = step(state, batch)
        gradients.append(jax.device_get(after.opt_state.trace))
        losses.append(float(metrics["loss"]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for other in gradients[1:]:
        for x, y in zip(jax.tree.leaves(other), jax.tree.leaves(gradients[0]), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())
