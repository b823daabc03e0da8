"""verl's divergences, advantages, value loss, rollout correction and log-probabilities."""

import inputs
import numpy as np
import torch
from recorder import DIVISOR_TOLERANCE, leaf, tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits


def divergences(recorder):
    """The estimators of the KL, unreduced, with the gradient of their mean over tokens."""
    arrays = inputs.policy(250)
    arrays["ref_logprobs"] = arrays["old_logprobs"]
    mask = tensor(arrays["mask"])
    for theirs, ours in (("k1", "k1"), ("abs", "k1_abs"), ("k2", "k2"), ("k3", "k3")):
        logprobs = leaf(arrays["logprobs"])
        values = core_algos.kl_penalty(logprobs, tensor(arrays["ref_logprobs"]), theirs)
        call = {"arguments": ("logprobs", "ref_logprobs"), "options": {"estimator": ours}}
        recorder.add(f"kl_{theirs}", "kl_estimate", arrays, values.detach(), **call)
        value = core_algos.agg_loss(values, mask, "token-mean")
        call |= {"leaves": {"logprobs": logprobs}, "reduction": "token_mean", "mask": "mask"}
        recorder.add(f"kl_{theirs}_mean", "kl_estimate", arrays, value, **call)


def advantages(recorder):
    """From rewards, and the returns of generalised advantage estimation."""
    arrays = inputs.rewards(260)
    mask, index = torch.ones(16, 1), np.repeat(np.arange(4), 4)
    options = {"num_generations": 4}
    # A fresh copy each time, because verl writes into it.
    rewards = lambda: tensor(arrays["rewards"]).unsqueeze(1)
    grpo, rloo = (
        core_algos.compute_grpo_outcome_advantage,
        core_algos.compute_rloo_outcome_advantage,
    )
    results = {
        "grpo": (grpo(rewards(), mask, index)[0], {"eps": 1e-6}),
        "dr_grpo": (
            grpo(rewards(), mask, index, norm_adv_by_std_in_grpo=False)[0],
            {"scale": "none"},
        ),
        "rloo": (rloo(rewards(), mask, index)[0], {"baseline": "leave_one_out", "scale": "none"}),
    }
    for name, (value, own) in results.items():
        call = {"arguments": ("rewards",), "options": {**options, **own}}
        recorder.add(name, "group_advantages", arrays, value[:, 0], **call)
    value, _ = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        rewards(), mask, config=AlgoConfig(gamma=1.0)
    )
    call = {"arguments": ("rewards",), "options": {"eps": 0.0}, "tolerance": DIVISOR_TOLERANCE}
    recorder.add("reinforce_plus_plus", "global_advantages", arrays, value[:, 0], **call)

    policy = inputs.policy(261, per_token=True)
    holes = policy["mask"].copy()
    holes[:, 2] = False
    for label, mask in (("", policy["mask"]), ("_holes", holes)):
        arrays = {"rewards": policy["advantages"], "values": policy["logprobs"], "mask": mask}
        for gamma, lam in ((1.0, 1.0), (0.9, 0.8)):
            _, returns = core_algos.compute_gae_advantage_return(
                tensor(arrays["rewards"]), tensor(arrays["values"]), tensor(mask), gamma, lam
            )
            call = {"arguments": tuple(arrays), "options": {"gamma": gamma, "lam": lam}}
            value, name = np.where(mask, returns.numpy(), 0), f"gae{label}_{lam}"
            recorder.add(name, "gae", arrays, value, output=(1,), mask="mask", **call)


def values(recorder):
    """The loss of the value head."""
    policy = inputs.policy(270, per_token=True)
    arrays = {"values": policy["logprobs"], "old_values": policy["old_logprobs"]}
    arrays |= {"returns": policy["old_logprobs"] + policy["advantages"], "mask": policy["mask"]}
    for clip_range in (0.2, 0.6):
        predicted = leaf(arrays["values"])
        returns, old = tensor(arrays["returns"]), tensor(arrays["old_values"])
        loss, _ = core_algos.compute_value_loss(
            predicted, returns, old, tensor(arrays["mask"]), clip_range
        )
        call = {"arguments": ("values", "old_values", "returns")}
        call |= {"options": {"clip_range": clip_range}, "leaves": {"values": predicted}}
        call |= {"reduction": "token_mean", "mask": "mask"}
        recorder.add(f"value_{clip_range}", "clipped_value_loss", arrays, loss, **call)


def corrections(recorder):
    """Weights between sampler and old policy: truncated, or zeroed outside of bounds (IcePop)."""
    policy = inputs.policy(286, spread=0.6)
    arrays = {"old_logprobs": policy["logprobs"], "sampling_logprobs": policy["old_logprobs"]}
    arrays["mask"] = policy["mask"]
    log_ratio = tensor(arrays["old_logprobs"] - arrays["sampling_logprobs"])
    for level in ("token", "sequence"):
        for mode, threshold, floor in (("truncate", 1.5, None), ("mask", "0.6_1.5", 0.6)):
            weights, _ = compute_rollout_correction_weights(
                log_ratio, tensor(arrays["mask"]), level, threshold
            )
            options = {"level": level, "mode": mode, "cap": 1.5, "floor": floor}
            call = {"arguments": tuple(arrays), "options": options, "output": (0,)}
            name, function = f"ratio_{level}_{mode}", "importance_weights"
            recorder.add(name, function, arrays, weights, mask="mask", **call)


def log_probabilities(recorder):
    """Log-probabilities and entropies of logits, shifted as verl's callers do."""
    arrays = inputs.logits(290)
    mask, tokens = tensor(arrays["mask"])[:, 1:], torch.tensor(arrays["tokens"]).long()
    for function in ("token_logprobs", "token_entropy"):
        logits, arguments = leaf(arrays["logits"]), ("logits", "tokens")
        if function == "token_logprobs":
            result = logprobs_from_logits(logits[:, :-1], tokens[:, 1:], inplace_backward=False)
        else:
            result, arguments = entropy_from_logits(logits[:, :-1]), arguments[:1]
        value = core_algos.agg_loss(result, mask, "token-mean")
        call = {"arguments": arguments, "leaves": {"logits": logits}}
        call |= {"reduction": "token_mean", "mask": "mask"}
        recorder.add(function, function, arrays, value, **call)
