"""TRL's policy losses: ``GRPOTrainer._compute_loss`` and ``GMPOTrainer._compute_loss``."""

from types import SimpleNamespace

import inputs
import numpy as np
import torch
from recorder import Recorder, leaf, tensor
from stand_in import trainer
from trl import GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer

LEFT_OUT = {
    "grpo with cispo or sapo at importance_sampling_level=sequence": "not offered",
    "grpo with delta at importance_sampling_level=sequence": "gspo_loss has no delta",
    "use_bias_correction_kl": "no function of ours: a product of two that are compared",
    "off_policy_mask_threshold, top_entropy_quantile": "masks, which are the caller's here",
    "a sequence without a token": "TRL counts it as a zero in the mean over sequences",
}
MAX_LENGTH = 9
"""``max_completion_length``, other than the width of the inputs."""
POLICY = ("logprobs", "old_logprobs", "advantages")
SEQUENCE = (*POLICY, "mask")
AGGREGATIONS = {
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "vespo": "token_mean",
    "luspo": "sequence_sum",
    "dr_grpo": {"how": "constant", "max_length": MAX_LENGTH},
}
VESPO = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}


def compute(trainer_class, arrays, **settings):
    """The trainer's loss of these arrays, the leaf for the log-probs, and the logged metrics."""
    logprobs, mask = leaf(arrays["logprobs"]), tensor(arrays["mask"])
    ids = torch.zeros(mask.shape, dtype=torch.long)
    batch = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": tensor(arrays["advantages"]),
        "old_per_token_logps": tensor(arrays["old_logprobs"]),
        "num_items_in_batch": mask.sum(),
    }
    optional = {
        "ref_per_token_logps": "ref_logprobs",
        "importance_sampling_ratio": "importance_weights",
    }
    batch |= {key: tensor(arrays[name]) for key, name in optional.items() if name in arrays}
    stand_in = _trainer(logprobs, corrected="importance_weights" in arrays, **settings)
    loss = trainer_class._compute_loss(stand_in, None, batch)
    return loss, logprobs, stand_in._metrics["eval"]


def _trainer(logprobs, *, corrected, loss_type="grpo", level="token", beta=0.0, **settings):
    """A trainer that computes these log-probs, with our settings under TRL's names."""
    sapo = {f"sapo_{key}": settings.get(key) for key in ("temperature_pos", "temperature_neg")}
    vespo = {f"vespo_{key}": settings.get(key) for key in VESPO}
    delta = settings.get("delta")
    entropy = torch.zeros_like(logprobs)
    return trainer(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=delta, **sapo, **vespo),
        beta=beta,
        epsilon_low=settings.get("epsilon"),
        epsilon_high=settings.get("epsilon_high", settings.get("epsilon")),
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        _entropy_bonus_enabled=False,
    )


def record(recorder: Recorder) -> None:
    """Adds the records of this module."""
    _clipped(recorder)
    _sequences(recorder)
    _soft(recorder)
    _divergence(recorder)
    _metrics(recorder)


def _add(recorder, name, function, arrays, options, *, arguments=POLICY, loss_type, **settings):
    keywords = settings.pop("keywords", ())
    how = settings.pop("reduction", AGGREGATIONS[loss_type])
    trainer_class = settings.pop("trainer_class", GRPOTrainer)
    loss, logprobs, _ = compute(trainer_class, arrays, loss_type=loss_type, **options, **settings)
    call = {"arguments": arguments, "keywords": keywords, "options": options}
    call |= {"leaves": {"logprobs": logprobs}, "reduction": how, "mask": "mask"}
    recorder.add(name, function, arrays, loss, **call)


def _clipped(recorder):
    plain, wide = {"epsilon": 0.2}, {"epsilon": 0.2, "epsilon_high": 0.28}
    two_sided = {**wide, "delta": 1.5}
    for seed, loss_type in enumerate(("grpo", "bnpo", "dr_grpo", "dapo", "luspo")):
        arrays = inputs.policy(seed)
        for label, options in (("", plain), ("_high", wide), ("_delta", two_sided)):
            name = f"{loss_type}{label}"
            _add(recorder, name, "clipped_policy_loss", arrays, options, loss_type=loss_type)
    arrays = inputs.policy(10, per_token=True)
    _add(recorder, "dapo_token", "clipped_policy_loss", arrays, two_sided, loss_type="dapo")


def _sequences(recorder):
    options = {"epsilon": 0.04, "epsilon_high": 0.06}
    # Seeds with sequences beyond both clips.
    for seed, loss_type in ((27, "grpo"), (29, "bnpo"), (33, "dr_grpo"), (34, "luspo")):
        arrays = inputs.policy(seed)
        call = {"arguments": SEQUENCE, "loss_type": loss_type, "level": "sequence"}
        _add(recorder, f"gspo_{loss_type}", "gspo_loss", arrays, options, **call)
    for label, options in (
        ("", {"epsilon": 0.4}),
        ("_high", {"epsilon": 0.3, "epsilon_high": 0.45}),
    ):
        call = {"arguments": SEQUENCE, "loss_type": "grpo", "trainer_class": GMPOTrainer}
        _add(recorder, f"gmpo{label}", "gmpo_loss", inputs.policy(25), options, **call)


def _soft(recorder):
    arrays = inputs.policy(30)
    for bound in (1.2, 2.0):
        options, name = {"epsilon_high": bound}, f"cispo_{bound}"
        _add(recorder, name, "cispo_loss", arrays, options, loss_type="cispo")
    options = {"temperature_pos": 1.0, "temperature_neg": 1.05}
    _add(recorder, "sapo", "sapo_loss", inputs.policy(31), options, loss_type="sapo")
    options = {"temperature_pos": 2.5, "temperature_neg": 0.5}
    _add(recorder, "sapo_asymmetric", "sapo_loss", inputs.policy(31), options, loss_type="sapo")

    # The product over a sequence is far from 1 quickly; a small spread keeps the kernel above 0.
    arrays = inputs.policy(32, spread=0.2)
    call = {"arguments": SEQUENCE, "loss_type": "vespo"}
    _add(recorder, "vespo", "vespo_loss", arrays, VESPO, **call)
    # TRL's token ratios are 1 outside of the mask, because it multiplies log ratios with it.
    rng = np.random.default_rng(33)
    ratios = inputs.rounded(rng.uniform(0.5, 1.5, arrays["mask"].shape))
    arrays["importance_weights"] = ratios * arrays["mask"] + ~arrays["mask"]
    call["keywords"] = ("importance_weights",)
    _add(recorder, "vespo_corrected", "vespo_loss", arrays, VESPO, **call)


def _divergence(recorder):
    # With advantages of 0 and beta = 1 the loss is the penalty alone.
    for seed, loss_type in enumerate(("grpo", "bnpo", "dr_grpo")):
        arrays = inputs.policy(40 + seed)
        arrays["ref_logprobs"] = arrays["old_logprobs"]
        arrays["advantages"] = 0 * arrays["advantages"]
        loss, logprobs, _ = compute(GRPOTrainer, arrays, loss_type=loss_type, beta=1.0, epsilon=0.2)
        recorder.add(
            f"kl_{loss_type}",
            "kl_estimate",
            arrays,
            loss,
            arguments=("logprobs", "ref_logprobs"),
            options={"estimator": "k3"},
            leaves={"logprobs": logprobs},
            reduction=AGGREGATIONS[loss_type],
            mask="mask",
        )


def _metrics(recorder):
    clips = {"epsilon": 0.2, "epsilon_high": 0.28}
    log_clips = {"epsilon": 0.3, "epsilon_high": 0.45}
    sides = ("low", "high", "region")
    for function, arguments, trainer_class, options in (
        ("clip_metrics", POLICY, GRPOTrainer, clips),
        ("gmpo_clip_metrics", SEQUENCE, GMPOTrainer, log_clips),
    ):
        arrays = inputs.policy(56)
        _, _, metrics = compute(trainer_class, arrays, **options)
        call = {"arguments": arguments, "options": options}
        for side in sides:
            value = metrics[f"clip_ratio/{side}_mean"][0]
            call |= {"output": (side,), "reduction": "token_mean", "mask": "mask"}
            recorder.add(f"{function}_{side}", function, arrays, value, **call)
    # At the level of sequences TRL's metric is a mean over sequences.
    options = {"epsilon": 0.04, "epsilon_high": 0.06}
    arrays = inputs.policy(51)
    _, _, metrics = compute(GRPOTrainer, arrays, level="sequence", **options)
    for side in sides:
        value = metrics[f"clip_ratio/{side}_mean"][0]
        call = {"arguments": SEQUENCE, "options": options, "output": (side,)}
        call |= {"reduction": "sequence_mean", "mask": "mask"}
        recorder.add(f"gspo_clip_metrics_{side}", "gspo_clip_metrics", arrays, value, **call)
    options = {"epsilon_high": 1.2}
    _, _, metrics = compute(GRPOTrainer, arrays, loss_type="cispo", **options)
    value = metrics["cispo_clip_ratio"][0]
    call = {"arguments": POLICY, "options": options, "output": ("high",)}
    call |= {"reduction": "token_mean", "mask": "mask"}
    recorder.add("cispo_clip_metrics", "cispo_clip_metrics", arrays, value, **call)
