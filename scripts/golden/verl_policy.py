"""verl's registered policy losses, in its aggregations."""

import inputs
import numpy as np
from recorder import DIVISOR_TOLERANCE, leaf, tensor
from verl.trainer.ppo import core_algos
from verl.workers.config.actor import ActorConfig, PolicyLossConfig

POLICY = ("logprobs", "old_logprobs", "advantages")
SEQUENCE = (*POLICY, "mask")
MAX_LENGTH = 9
AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": {"how": "constant", "max_length": MAX_LENGTH},
}


def config(options, **policy_loss) -> ActorConfig:
    """An actor's configuration in verl's names."""
    settings = {"global_batch_info": {"loss_scale_factor": MAX_LENGTH}}
    if "epsilon" in options:
        settings["clip_ratio"] = settings["clip_ratio_low"] = options["epsilon"]
        settings["clip_ratio_high"] = options.get("epsilon_high", options["epsilon"])
    # Without delta, a bound that no ratio reaches.
    settings["clip_ratio_c"] = options.get("delta", 1e6)
    for sign in ("pos", "neg"):
        if f"temperature_{sign}" in options:
            settings[f"tau_{sign}"] = options[f"temperature_{sign}"]
    policy_loss = PolicyLossConfig(**policy_loss)
    required = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
    return ActorConfig(**required, **settings, policy_loss=policy_loss)


def compute(loss_mode, arrays, agg_mode, config):
    """A registered policy loss of these arrays, and the leaf for the log-probs."""
    logprobs, advantages = leaf(arrays["logprobs"]), tensor(arrays["advantages"])
    if advantages.ndim == 1:
        advantages = advantages.unsqueeze(1).expand(logprobs.shape)
    loss, _ = core_algos.get_policy_loss_fn(loss_mode)(
        old_log_prob=tensor(arrays["old_logprobs"]),
        log_prob=logprobs,
        advantages=advantages,
        response_mask=tensor(arrays["mask"]),
        loss_agg_mode=agg_mode,
        config=config,
    )
    return loss, {"logprobs": logprobs}


def add_policy(recorder, name, mode, function, arrays, options, agg="token-mean", **fields):
    """One record of a policy loss; ``verl_options`` are those that have verl's names."""
    verl_options = fields.pop("verl_options", {})
    loss, leaves = compute(mode, arrays, agg, config(options, **verl_options))
    how = AGGREGATIONS[agg]
    call = {"arguments": POLICY, "reduction": how, "mask": "mask", "leaves": leaves}
    if how == "sequence_mean":
        call["tolerance"] = DIVISOR_TOLERANCE
    options = {**options, **verl_options}
    recorder.add(name, function, arrays, loss, options=options, **{**call, **fields})


def clipped(recorder):
    """PPO with dual clip, in every aggregation, with one advantage per sequence and per token."""
    options = {"epsilon": 0.2, "epsilon_high": 0.28, "delta": 1.5}
    for seed, agg in enumerate(AGGREGATIONS):
        # verl leaves a sequence without tokens out of the mean over sequences, as we do, and also
        # out of the number of sequences that the constant multiplies, which we do not.
        arrays = inputs.policy(201 + seed, empty_row=not agg.endswith("norm"))
        name, function = f"vanilla_{agg}", "clipped_policy_loss"
        add_policy(recorder, name, "vanilla", function, arrays, options, agg)
    plain, arrays = {"epsilon": 0.2}, inputs.policy(205, per_token=True)
    for name, options in (("plain", plain), ("dual", {**plain, "delta": 1.4})):
        function = "clipped_policy_loss"
        add_policy(recorder, f"vanilla_{name}", "vanilla", function, arrays, options)


def other_ratios(recorder):
    """CISPO, SAPO, and the losses on sequences."""
    # verl's upper clip is relative to 1, and ours is the largest weight itself.
    arrays, options = inputs.policy(210, per_token=True), {"epsilon": 0.2, "epsilon_high": 0.28}
    loss, leaves = compute("cispo", arrays, "token-mean", config(options))
    options = {"epsilon": 0.2, "epsilon_high": 1.28}
    call = {"arguments": POLICY, "options": options, "leaves": leaves}
    call |= {"reduction": "token_mean", "mask": "mask"}
    recorder.add("cispo", "cispo_loss", arrays, loss, **call)

    # It aggregates over sequences whatever it is told.
    agg = "seq-mean-token-mean"
    options = {"temperature_pos": 1.0, "temperature_neg": 1.05}
    add_policy(recorder, "sapo", "sapo", "sapo_loss", inputs.policy(211), options, agg)

    options = {"epsilon": 0.04, "epsilon_high": 0.06}
    call = {"arguments": SEQUENCE}
    for seed, agg in enumerate(AGGREGATIONS):
        arrays = inputs.policy(212 + seed, per_token=seed == 0)
        name = f"gspo_{agg}"
        add_policy(recorder, name, "gspo", "gspo_token_loss", arrays, options, agg, **call)
    for label, options in (
        ("", {"epsilon": 0.4}),
        ("_high", {"epsilon": 0.3, "epsilon_high": 0.45}),
    ):
        name, agg, arrays = f"geo_mean{label}", "seq-mean-token-mean", inputs.policy(220)
        add_policy(recorder, name, "geo_mean", "gmpo_loss", arrays, options, agg, **call)


def covariances(recorder):
    """Clip-Cov where all candidates are drawn, and KL-Cov."""
    call = {"arguments": SEQUENCE}
    clips = {"epsilon": 0.2, "epsilon_high": 0.28}
    arrays = inputs.policy(230, per_token=True)
    arrays["key"] = np.array([0, 7], np.uint32)
    for number, bounds in enumerate(((0.6, 1.5), (-1.3, 0.12))):
        settings = dict(zip(("clip_cov_lb", "clip_cov_ub"), bounds, strict=True))
        call["verl_options"] = {"clip_cov_ratio": 1.0, **settings}
        call["keywords"], call["tolerance"] = ("key",), DIVISOR_TOLERANCE
        name, function = f"clip_cov_{number}", "clip_cov_loss"
        add_policy(recorder, name, "clip_cov", function, arrays, clips, **call)
    call = {"arguments": SEQUENCE}
    for share, coefficient in ((0.02, 1.0), (0.3, 0.5)):
        call["verl_options"] = {"kl_cov_ratio": share, "ppo_kl_coef": coefficient}
        name = f"kl_cov_{share}"
        add_policy(recorder, name, "kl_cov", "kl_cov_loss", inputs.policy(231), {}, **call)


def plain(recorder):
    """REINFORCE, and GPG with the advantages that verl pairs it with."""
    for seed, agg in enumerate(AGGREGATIONS):
        arrays = inputs.policy(240 + seed, per_token=True)
        logprobs = leaf(arrays["logprobs"])
        loss, _ = core_algos.compute_policy_loss_reinforce(
            rollout_log_prob=tensor(arrays["old_logprobs"]),
            log_prob=logprobs,
            advantages=tensor(arrays["advantages"]),
            response_mask=tensor(arrays["mask"]),
            loss_agg_mode=agg,
            config=config({}),
        )
        call = {"arguments": ("logprobs", "advantages"), "leaves": {"logprobs": logprobs}}
        call |= {"reduction": AGGREGATIONS[agg], "mask": "mask"}
        if agg == "seq-mean-token-mean":
            call["tolerance"] = DIVISOR_TOLERANCE
        recorder.add(f"reinforce_{agg}", "reinforce_loss", arrays, loss, **call)

    call = {"arguments": ("logprobs", "advantages", "mask")}
    arrays = inputs.policy(245)
    add_policy(recorder, "gpg_constant", "gpg", "gpg_loss", arrays, {"alpha": 1.0}, **call)
    # verl puts alpha = sequences / sequences with a reward into the advantages, ours into the loss.
    # Rewards are 0 in the dead group and nowhere else, and no other advantage is 0, so that both
    # count the same sequences.
    rewards = np.array([0, 0, 0, 0, 1, 2, 5, -3], np.float64)
    centered = rewards - np.repeat(rewards.reshape(2, 4).mean(1), 4)
    mask, index = tensor(arrays["mask"]), np.repeat([0, 1], 4)
    at_the_end = tensor(np.eye(inputs.TOKENS)[-1] * rewards[:, None])
    scaled, _ = core_algos.compute_gpg_outcome_advantage(at_the_end, mask, index)
    given = {**arrays, "advantages": scaled.numpy()}
    loss, leaves = compute("gpg", given, "token-mean", config({}))
    call |= {"reduction": "token_mean", "mask": "mask", "leaves": leaves}
    recorder.add("gpg", "gpg_loss", {**arrays, "advantages": centered}, loss, **call)
