"""Every loss by name, from a configuration to one compiled update, and what it refuses."""

import jax
import numpy as np
import pytest

from jaxrl_reason.config import validate
from jaxrl_reason.data.batching import Example, microbatches
from jaxrl_reason.data.loading import Examples, Maker
from jaxrl_reason.errors import InputError
from jaxrl_reason.losses import LOSS_TYPES, PREFERENCE_LOSSES
from jaxrl_reason.sampling import Rollout
from jaxrl_reason.sharding import place_batch
from jaxrl_reason.stages import dpo
from jaxrl_reason.stages.dpo import pair_rows, preference_update
from jaxrl_reason.stages.grpo import policy_rows, policy_update
from jaxrl_reason.stages.pipeline import plan
from jaxrl_reason.stages.policy_config import GRPOConfig
from jaxrl_reason.stages.stage_config import DPOConfig
from jaxrl_reason.stages.training import Start, fresh_state, stage_optimizer
from jaxrl_reason.steps import needs_reference

VERL = {"clip_cov_ratio": 0.02, "clip_cov_lb": 0.1, "clip_cov_ub": 5.0}
# Name -> fields, and the options whose value means nothing while the ratio is 1.
POLICY = {
    "grpo": ({"epsilon": 0.2}, {"epsilon"}),
    "bnpo": ({"epsilon_high": 0.3}, {"epsilon_high"}),
    "dr_grpo": ({"delta": 4.0}, {"delta"}),
    "dapo": ({"epsilon": 0.2, "epsilon_high": 0.28}, {"epsilon", "epsilon_high"}),
    "cispo": ({"epsilon_high": 5.0}, {"epsilon_high"}),
    "sapo": (
        {"loss_options": {"temperature_pos": 1.0, "temperature_neg": 1.05}},
        {"temperature_pos", "temperature_neg"},
    ),
    "luspo": ({"epsilon": 3e-4}, {"epsilon"}),
    "vespo": (
        {"loss_options": {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}},
        {"k_pos", "lambda_pos", "k_neg", "lambda_neg"},
    ),
    "reinforce": ({}, set()),
    "gspo": ({"epsilon": 3e-4, "epsilon_high": 4e-4}, {"epsilon", "epsilon_high"}),
    "gspo_token": ({"epsilon": 3e-4, "epsilon_high": 4e-4}, {"epsilon", "epsilon_high"}),
    "gmpo": ({"epsilon": 0.4}, {"epsilon"}),
    "gpg": ({"loss_options": {"alpha": 1.5}}, set()),
    "triplet": (
        {
            "loss_options": {
                "epsilon_neg_low": 0.2,
                "epsilon_neg_high": 5.0,
                "epsilon_pos_high": 0.28,
            }
        },
        {"epsilon_neg_low", "epsilon_neg_high", "epsilon_pos_high"},
    ),
    "clip_cov": ({"epsilon": 0.2, "loss_options": VERL}, {"epsilon"}),
    "kl_cov": (
        {"loss_options": {"kl_cov_ratio": 0.02, "ppo_kl_coef": 1.0}},
        {"kl_cov_ratio", "ppo_kl_coef"},
    ),
}
SMOOTH = {"label_smoothing": 0.1}
PREFERENCE = {name: {} for name in PREFERENCE_LOSSES} | {
    "robust": SMOOTH,
    "exo_pair": SMOOTH,
    "discopop": {"loss_options": {"discopop_tau": 0.1}},
    "hinge": {"loss_options": {"f_divergence": "alpha", "f_alpha": 0.5}},
    "simpo": {"loss_options": {"gamma": 0.5}},
}
# The others take minutes on a small machine.
USUAL = {"cispo", "gspo", "gpg", "clip_cov", "ipo", "simpo", "orpo", "aot"}


def by_name(names):
    return [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in names]


def test_every_loss_is_tested():
    assert POLICY.keys() == LOSS_TYPES.keys()
    assert PREFERENCE.keys() == PREFERENCE_LOSSES.keys()


# From a configuration to an update


@pytest.fixture
def stage(make_context, tiny, tmp_path):
    """A stage of the test's run with other fields."""

    def make(name, **changes):
        raw = tiny["stages"][name] | {"parent": "init"} | changes
        (only,) = plan(make_context(tmp_path, stages={"s": raw}))
        return only

    return make


def updated(stage, update, optimizer, batch):
    """Metrics of one update, and how far it moved the parameters."""
    params = jax.device_get(stage.context.init_params())
    state, metrics = update(fresh_state(stage, optimizer, stage.context.init_params()), batch)
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), jax.device_get(state.params), params
    )
    return jax.device_get(metrics), max(jax.tree.leaves(moved))


def rollout_of(stage, lengths):
    """Random completions whose sampler was another than the untrained model."""
    rng = np.random.default_rng(0)
    shape = (len(lengths), stage.config.max_completion_length)
    mask = np.arange(shape[1]) < np.asarray(lengths)[:, None]
    return Rollout(
        prompts=[[3 + i % 5] * (1 + i % 3) for i in range(len(lengths) // 2)],
        num_generations=2,
        tokens=np.where(mask, rng.integers(3, 30, shape), 0).astype(np.int32),
        completion_mask=mask,
        sampled=mask,
        versions=np.zeros(shape, np.int32),
        sampling_logprobs=np.where(mask, rng.normal(-3.6, 0.3, shape), 0).astype(np.float32),
        kept_logmass=np.zeros(shape, np.float32),
        finished=np.ones(len(lengths), bool),
    )


@pytest.mark.parametrize("name", by_name(POLICY))
def test_a_policy_loss_makes_an_update(stage, name):
    fields, _ = POLICY[name]
    rewards = [{"kind": "accuracy"}]
    made = stage("reason", loss_type=name, num_generations=2, rewards=rewards, beta=0.0, **fields)
    optimizer = stage_optimizer(made)
    lengths = np.random.default_rng(1).integers(2, 13, 32)
    advantages = np.random.default_rng(2).normal(size=32).astype(np.float32)
    batch, _ = policy_rows(made).place(rollout_of(made, lengths), advantages)
    metrics, moved = updated(made, policy_update(made), optimizer, batch)
    assert np.isfinite(metrics["loss"])
    assert metrics["nonfinite_steps"] == 0
    assert metrics["grad_norm"] > 0
    assert 1e-3 < moved < 0.1
    assert 0 < metrics["sampling/importance_sampling_ratio/outside_share"] < 1
    assert ("clip_ratio/region_mean" in metrics) == (LOSS_TYPES[name].clip_metrics is not None)


@pytest.mark.parametrize("name", by_name(PREFERENCE))
def test_a_preference_loss_makes_an_update(stage, name):
    terms = {"loss_type": name} | PREFERENCE[name]
    made = stage("prefer", data={"kind": "file", "path": "none"}, **terms)
    config, optimizer = made.config, stage_optimizer(made)
    rng = np.random.default_rng(0)
    ids = lambda: rng.integers(3, 30, rng.integers(1, 9)).tolist()
    pairs = [((prompt, ids()), (prompt, ids())) for prompt in (ids() for _ in range(8))]
    batch = pair_rows(made, pairs, config.max_length)
    if needs_reference(config.loss_type):
        lengths = batch["completion_mask"].sum(axis=-1)
        batch["ref_logprobs"] = (lengths * rng.normal(-3.6, 0.1, (8, 2))).astype(np.float32)
    batch = place_batch(microbatches(batch, 1), made.context.mesh, batch_axis=1)
    metrics, moved = updated(made, preference_update(made), optimizer, batch)
    assert np.isfinite(metrics["loss"])
    assert metrics["nonfinite_steps"] == 0
    assert metrics["grad_norm"] > 0
    assert 1e-4 < moved < 0.01
    difference = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    assert metrics["rewards/margins"] == pytest.approx(difference, abs=1e-5)


def test_the_preference_losses_without_a_reference_compute_none(stage, monkeypatch):
    """The stage asks `needs_reference`; nothing of the parent is read for them."""
    assert {name for name in PREFERENCE if not needs_reference([name])} == {"simpo", "orpo", "cpo"}
    assert needs_reference(["cpo", "sigmoid", "sft"])
    made = stage("prefer", loss_type=["cpo", "sft"], data={"kind": "file", "path": "none"})
    asked, pair = [], (Example([3], [4]), Example([3], [5]))
    monkeypatch.setattr(
        dpo, "preference_pairs", lambda stage: Examples([Maker(lambda: pair, "")] * 8, 9, option="")
    )
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *given: asked.append(given))
    monkeypatch.setattr(dpo, "resume", lambda *given, **options: Start(None, 0, {}))
    monkeypatch.setattr(dpo, "train", lambda *given, **options: None)
    dpo.run_dpo(made)
    assert asked == []


# Options that cannot act while the ratio is 1


@pytest.fixture
def policy(tiny):
    def of(name, **changes):
        raw = tiny["stages"]["reason"] | {"loss_type": name, "num_iterations": 1} | changes
        return validate(GRPOConfig, raw, "test")

    return of


@pytest.mark.parametrize("name", POLICY)
def test_options_that_cannot_act_at_ratio_one_are_refused_by_name(policy, name):
    fields, inert = POLICY[name]
    policy(name, num_iterations=2, **fields)
    if not inert:
        policy(name, **fields)
        return
    with pytest.raises(InputError, match="cannot act: with num_iterations=1 the ratio is") as error:
        policy(name, **fields)
    named = str(error.value).split(" cannot act")[0].removeprefix("test: ")
    assert set(named.split(" and ")) == inert
    needed = inert & {*LOSS_TYPES[name].required} - {"epsilon"}
    assert ("choose another loss_type" in str(error.value)) == bool(needed)


def test_options_that_act_at_ratio_one_are_not(policy):
    assert policy("clip_cov", loss_options=VERL).options == {"epsilon": 0.2, **VERL}
    rare = {"clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0}
    policy("clip_cov", loss_options=rare)
    policy("gpg", loss_options={"alpha": 0.5})


@pytest.mark.parametrize("name", PREFERENCE)
def test_every_preference_loss_is_accepted(tiny, name):
    raw = tiny["stages"]["prefer"] | {"loss_type": name} | PREFERENCE[name]
    config = validate(DPOConfig, raw, "test")
    assert config.loss_type == (name,)
