"""TRL's losses on preferences: DPO, CPO, ORPO, KTO and the reward model."""

import itertools
from types import SimpleNamespace

import inputs
import numpy as np
import torch
from recorder import Recorder, leaf, tensor
from stand_in import trainer
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

LEFT_OUT = {
    "sigmoid with label_smoothing": "TRL 1.16 ignores the option there",
    "ipo and sigmoid_norm with an f-divergence": "not offered",
    "use_weighting (WPO), ld_alpha (LD-DPO), CPO's alpha (AlphaPO)": "not offered",
    "cpo with loss_type hinge or ipo": "hinge and ipo losses without a reference; not offered",
    "bco (unpaired)": "not in TRL 1.16",
}
POLICY = ("chosen", "rejected")
PAIR = (*POLICY, "ref_chosen", "ref_rejected")
DIVERGENCES = {"js": "js_divergence", "alpha": "alpha_divergence", "forward_kl": "forward_kl"}
DPO = {
    "dpo_loss": ("sigmoid", {}),
    "ipo_loss": ("ipo", {}),
    "hinge_dpo_loss": ("hinge", {}),
    "robust_dpo_loss": ("robust", {"label_smoothing": 0.2}),
    "exo_loss": ("exo_pair", {"label_smoothing": 0.1}),
    "nca_loss": ("nca_pair", {}),
    "bco_pair_loss": ("bco_pair", {}),
    "sppo_hard_loss": ("sppo_hard", {}),
    "aot_loss": ("aot", {}),
    "aot_unpaired_loss": ("aot_unpaired", {}),
    "apo_zero_loss": ("apo_zero", {}),
    "apo_down_loss": ("apo_down", {}),
    "discopop_loss": ("discopop", {"discopop_tau": 0.05}),
    "dpo_norm_loss": ("sigmoid_norm", {}),
}
NORMALIZED = ("ipo_loss", "dpo_norm_loss")
"""TRL divides what follows from sums by the number of tokens; ours take means."""
DIVERGING = ("dpo_loss", "hinge_dpo_loss", "robust_dpo_loss", "exo_loss", "discopop_loss")


def record(recorder: Recorder) -> None:
    """Adds the records of this module."""
    _paired(recorder)
    _diverging(recorder)
    _metrics(recorder)
    _supervised(recorder)
    _reference_free(recorder)
    _unpaired(recorder)
    _reward(recorder)


class Forward:
    """A model that returns the log-probabilities it was made with."""

    def __init__(self, logprobs: torch.Tensor):
        zeros = torch.zeros_like(logprobs)
        self.outputs = SimpleNamespace(
            log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0
        )

    def __call__(self, **kwargs):
        """The outputs, whatever the inputs."""
        return self.outputs


def masks(lengths: np.ndarray) -> torch.Tensor:
    """Completions of these lengths after a prompt of one token."""
    tokens = np.arange(inputs.TOKENS + 1)[None, :]
    return torch.tensor((tokens >= 1) & (tokens <= lengths[:, None])).long()


def spread(sums: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Per-token log-probabilities that have these sums over the completions."""
    counted = mask[:, 1:]
    return (sums / counted.sum(1)).unsqueeze(1) * counted


def dpo(arrays, loss_type, *, means=False, dtype=torch.float64, f_divergence=None, **options):
    """``DPOTrainer._compute_loss``, the leaves, and the logged metrics."""
    leaves = {name: leaf(arrays[name], dtype) for name in POLICY}
    lengths = [arrays[f"{name}_lengths"] for name in POLICY]
    mask = masks(np.concatenate(lengths))
    factors = [tensor(length if means else np.ones_like(length), dtype) for length in lengths]
    sums = [leaves[name] * factor for name, factor in zip(POLICY, factors, strict=True)]
    references = [tensor(arrays[f"ref_{name}"], dtype) for name in POLICY]
    references = [sums * factor for sums, factor in zip(references, factors, strict=True)]
    stand_in = trainer(
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau")),
        beta=options["beta"],
        f_alpha_divergence_coef=options.get("f_alpha"),
        f_divergence_type=DIVERGENCES.get(f_divergence, "reverse_kl"),
        label_smoothing=options.get("label_smoothing", 0.0),
        ld_alpha=None,
        loss_types=[loss_type],
        loss_weights=[1.0],
        precompute_ref_logps=True,
        use_weighting=False,
    )
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), references, strict=True))
    model = Forward(spread(torch.cat(sums), mask))
    loss = DPOTrainer._compute_loss(stand_in, model, batch, return_outputs=False)
    return loss, leaves, stand_in._metrics["eval"]


def _paired(recorder):
    for seed, (function, (loss_type, own)) in enumerate(DPO.items()):
        means = function in NORMALIZED
        arrays = inputs.pairs(100 + seed, per_token=means)
        variants = [{"beta": 0.3, **own}, {"beta": 0.8, **own}]
        if function in ("aot_loss", "aot_unpaired_loss"):
            variants.append({"beta": 0.3, "label_smoothing": 0.1})
        for number, options in enumerate(variants):
            loss, leaves, _ = dpo(arrays, loss_type, means=means, **options)
            call = {"arguments": PAIR, "options": options, "reduction": "mean"}
            recorder.add(f"{loss_type}_{number}", function, arrays, loss, leaves=leaves, **call)


def _diverging(recorder):
    for seed, function in enumerate(DIVERGING):
        arrays = inputs.pairs(120 + seed)
        loss_type, own = DPO[function]
        for name, alpha in (("js", None), ("forward_kl", None), ("alpha", 0.5), ("alpha", 1.0)):
            options = {"beta": 0.3, **own, "f_divergence": name}
            if alpha is not None:
                options["f_alpha"] = alpha
            # TRL bounds exponents by a table that has no entry for float64.
            dtype = torch.float32 if alpha == 0.5 else torch.float64
            loss, leaves, _ = dpo(arrays, loss_type, dtype=dtype, **options)
            recorder.add(
                f"{loss_type}_{name}" + (f"_{alpha}" if alpha else ""),
                function,
                arrays,
                loss,
                arguments=PAIR,
                options=options,
                leaves=leaves,
                reduction="mean",
                dtype=str(dtype).removeprefix("torch."),
            )


def _metrics(recorder):
    arrays = inputs.pairs(130)
    _, _, metrics = dpo(arrays, "sigmoid", beta=0.3)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        name = f"rewards/{name}"
        call = {"arguments": PAIR, "options": {"beta": 0.3}}
        call |= {"output": (name,), "reduction": "mean"}
        recorder.add(name.replace("/", "_"), "preference_metrics", arrays, metrics[name][0], **call)


def _supervised(recorder):
    # DPO's loss_type sft: the mean over the tokens of the chosen completions.
    arrays = inputs.policy(131)
    logprobs = leaf(arrays["logprobs"])
    mask = masks(np.tile(arrays["mask"].sum(1), 2))
    per_token = torch.cat([logprobs, logprobs.detach()]) * mask[:, 1:]
    stand_in = trainer(
        beta=0.3,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        loss_types=["sft"],
        loss_weights=[1.0],
        precompute_ref_logps=True,
        use_weighting=False,
    )
    zeros = torch.zeros(inputs.ROWS)
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    batch |= {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
    loss = DPOTrainer._compute_loss(stand_in, Forward(per_token), batch, return_outputs=False)
    call = {"arguments": ("logprobs",), "reduction": "token_mean", "mask": "mask"}
    recorder.add("sft", "nll_loss", arrays, loss, leaves={"logprobs": logprobs}, **call)


def _pairwise(trainer_class, arrays, leaves, losses, *, nll=None, **attributes):
    """A trainer's ``get_batch_loss_metrics``, with log-probabilities and an NLL term given."""
    zero = torch.zeros(())
    forward = (*arrays, zero, zero, zero if nll is None else nll)
    stand_in = trainer(concatenated_forward=lambda *_: forward, cpo_alpha=1.0, **attributes)
    setattr(stand_in, losses, lambda *args: getattr(trainer_class, losses)(stand_in, *args))
    loss, _ = trainer_class.get_batch_loss_metrics(stand_in, None, None)
    return {"value": loss, "leaves": leaves, "reduction": "mean"}


def _reference_free(recorder):
    sums = inputs.pairs(140)
    for number, (beta, gamma) in enumerate(((2.0, 0.5), (2.5, 1.0))):
        leaves = {name: leaf(sums[name]) for name in POLICY}
        means = [leaves[name] / tensor(sums[f"{name}_lengths"]) for name in POLICY]
        settings = {"alpha": 0.0, "beta": beta, "simpo_gamma": gamma, "label_smoothing": 0.0}
        result = _pairwise(CPOTrainer, means, leaves, "cpo_loss", loss_type="simpo", **settings)
        arguments = (*POLICY, "chosen_lengths", "rejected_lengths")
        call = {"arguments": arguments, "options": {"beta": beta, "gamma": gamma}, **result}
        recorder.add(f"simpo_{number}", "simpo_loss", sums, **call)
    for number, smoothing in enumerate((0.0, 0.1)):
        leaves = {name: leaf(sums[name]) for name in POLICY}
        settings = {"alpha": 0.0, "beta": 0.3, "label_smoothing": smoothing}
        arrays = list(leaves.values())
        result = _pairwise(CPOTrainer, arrays, leaves, "cpo_loss", loss_type="sigmoid", **settings)
        options = {"beta": 0.3, "label_smoothing": smoothing}
        call = {"arguments": POLICY, "options": options, **result}
        recorder.add(f"cpo_{number}", "cpo_loss", sums, **call)

    # ORPO computes in float32 whatever the dtype of the model. Its NLL term is a mean over all
    # tokens of the batch, prompts included; given here is ours, the mean of completions' means.
    means = inputs.pairs(141, per_token=True)
    means = {f"{name}_mean": means[name] for name in POLICY}
    leaves = {name: leaf(array, torch.float32) for name, array in means.items()}
    arrays = list(leaves.values())
    nll = -arrays[0].mean()
    result = _pairwise(ORPOTrainer, arrays, leaves, "odds_ratio_loss", nll=nll, beta=0.3)
    call = {"arguments": tuple(means), "options": {"beta": 0.3}, "dtype": "float32", **result}
    recorder.add("orpo", "orpo_loss", means, **call)


def kto(arrays, loss_type, *, drift, **options):
    """``KTOTrainer._compute_loss`` where ``drift`` is the estimate of the KL, and the leaves."""
    leaves = {"logprobs": leaf(arrays["logprobs"])}
    mask = masks(arrays["chosen_lengths"])
    shift = tensor(arrays["logprobs"]) + drift
    stand_in = trainer(
        _compute_kl_logps=lambda *_: shift,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        precompute_ref_logps=True,
        **options,
    )
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    batch |= {"ref_logps": tensor(arrays["ref_logprobs"]), "label": tensor(arrays["desirable"])}
    batch["ref_KL_logps"] = tensor(arrays["logprobs"])
    model = Forward(spread(leaves["logprobs"], mask))
    loss = KTOTrainer._compute_loss(stand_in, model, batch, return_outputs=False)
    return loss, leaves


def _unpaired(recorder):
    arrays = inputs.pairs(150)
    arrays |= {"logprobs": arrays["chosen"], "ref_logprobs": arrays["ref_chosen"]}
    arrays["desirable"] = np.array([True, False, False, True, True, False, True, True])
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.5}
    # A negative estimate of the KL counts as 0; the last is APO-zero on unpaired data.
    drifts = (("kto", 0.375), ("kto", -0.25), ("apo_zero_unpaired", 0.0))
    for number, ((loss_type, drift), beta) in enumerate(itertools.product(drifts, (0.2, 0.6))):
        options = {"beta": beta, **weights}
        loss, leaves = kto(arrays, loss_type, drift=drift, **options)
        arrays["kl"] = np.array(drift)
        recorder.add(
            f"{loss_type}_{number}",
            "kto_loss",
            arrays,
            loss,
            arguments=("logprobs", "ref_logprobs", "desirable", "kl"),
            options=options,
            leaves=leaves,
            reduction="mean",
        )


def _reward(recorder):
    pairs = inputs.pairs(160)
    arrays = {f"{name}_rewards": pairs[name] for name in POLICY}
    arrays["margin"] = inputs.rounded(np.random.default_rng(161).gamma(2.0, 0.5, inputs.ROWS))
    for margin, center in itertools.product((False, True), (None, 0.01)):
        leaves = {name: leaf(arrays[name]) for name in arrays if name != "margin"}
        logits = torch.cat(list(leaves.values())).unsqueeze(-1)
        stand_in = trainer(args=SimpleNamespace(center_rewards_coefficient=center))
        batch = {"margin": tensor(arrays["margin"])} if margin else {}
        outputs = SimpleNamespace(logits=logits)
        loss = RewardTrainer.compute_loss(stand_in, lambda outputs=outputs, **_: outputs, batch)
        recorder.add(
            "reward" + "_margin" * margin + "_center" * bool(center),
            "bradley_terry_loss",
            arrays,
            loss,
            arguments=tuple(leaves),
            keywords=("margin",) if margin else (),
            options={"center": center} if center else {},
            leaves=leaves,
            reduction="mean",
        )
