"""TRL's advantages and importance ratios, and its log-probabilities and entropies of logits.

The former are computed in the middle of ``GRPOTrainer._generate_and_score_completions``, which runs
here on completions and rewards that are given.
"""

from types import SimpleNamespace

import inputs
import numpy as np
import torch
from recorder import Recorder, leaf, tensor
from stand_in import trainer
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer.utils import selective_log_softmax_and_entropy

LEFT_OUT = {
    "sum_then_normalize with a reward that does not apply": (
        "TRL adds 0 for it, which is a low or a high reward by chance; ours adds its group's mean"
    ),
    "RLOO with normalize_advantages": "no function of ours",
}
BOUNDS = ((2.0, None), (1.5, 0.5))


def generate(trainer_class, rewards, mask, *, old_logprobs=None, sampling=None, **attributes):
    """What the trainer makes of given completions and rewards; rewards are ``[B, M]``."""
    lengths = mask.sum(axis=1)
    completions = [list(range(length)) for length in lengths]
    if sampling is not None:
        rows = zip(sampling, lengths, strict=True)
        sampling = [row[:length].tolist() for row, length in rows]
    prompt_ids, texts = [[0]] * len(lengths), [""] * len(lengths)
    generated = (prompt_ids, completions, None, texts, sampling, {}, None, None)
    if trainer_class is RLOOTrainer:
        generated = (prompt_ids, completions, texts)
    old = None if old_logprobs is None else tensor(old_logprobs)
    names = [f"reward_{i}" for i in range(rewards.shape[1])]
    stand_in = _trainer(
        **{
            "_generate": lambda prompts: generated,
            "_calculate_rewards": lambda *_: tensor(rewards),
            "_get_per_token_logps_and_entropies": lambda *_, **__: (old, None, None),
            "reward_func_names": names,
            "reward_funcs": names,
            "use_vllm": sampling is not None,
            "vllm_importance_sampling_correction": sampling is not None,
            **attributes,
        }
    )
    prompts = [{"prompt": "p"} for _ in lengths]
    return trainer_class._generate_and_score_completions(stand_in, prompts)


def _trainer(*, reward_func_names, **attributes):
    """A trainer without tools, images, a reference model, or iterations."""
    logs = {"prompt": [], "completion": [], "advantages": [], "extra": {}}
    logs["rewards"] = {name: [] for name in reward_func_names}
    settings = {
        "_logs": logs,
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "args": SimpleNamespace(
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            per_device_eval_batch_size=1,
        ),
        "beta": 0.0,
        "environment_factories": None,
        "environments": None,
        "mask_truncated_completions": False,
        "model": SimpleNamespace(training=False, is_gradient_checkpointing=False),
        "num_generations_eval": 4,
        "num_generations": 4,
        "num_iterations": 1,
        "pad_to_multiple_of": None,
        "reward_func_names": reward_func_names,
        "tools": None,
        "vllm_importance_sampling_mode": None,
    }
    return trainer(**{**settings, **attributes})


def record(recorder: Recorder) -> None:
    """Adds the records of this module."""
    _advantages(recorder)
    _objectives(recorder)
    _ratios(recorder)
    _log_probabilities(recorder)


def _advantages(recorder):
    arrays = inputs.rewards(60)
    mask = np.ones((arrays["rewards"].size, 2), bool)
    for scale in ("group", "batch", "none"):
        settings = {
            "multi_objective_aggregation": "sum_then_normalize",
            "reward_weights": torch.ones(1),
            "scale_rewards": scale,
        }
        output = generate(GRPOTrainer, arrays["rewards"][:, None], mask, **settings)
        options = {"num_generations": 4, "scale": scale}
        call = {"arguments": ("rewards",), "options": options}
        name = f"advantages_{scale}"
        recorder.add(name, "group_advantages", arrays, output["advantages"], **call)
    settings = {"normalize_advantages": False, "reward_weights": torch.ones(1)}
    settings |= {"reward_clip_range": None}
    zeros = np.zeros(mask.shape)
    settings |= {"old_logprobs": zeros}
    output = generate(RLOOTrainer, arrays["rewards"][:, None], mask, **settings)
    options = {"num_generations": 4, "baseline": "leave_one_out", "scale": "none"}
    call = {"arguments": ("rewards",), "options": options}
    recorder.add("advantages_rloo", "group_advantages", arrays, output["advantages"], **call)


def _objectives(recorder):
    arrays = inputs.rewards(61, objectives=3)
    applies = np.ones(arrays["rewards"].shape, bool)
    arrays |= {"applies": applies, "weights": np.array([1.0, 0.5, 2.0])}
    partial = applies.copy()
    partial[:3, 1] = False
    partial[8:12, 2] = False
    for function, aggregation, scales in (
        ("weighted_sum_advantages", "sum_then_normalize", ("group", "batch", "none")),
        ("gdpo_advantages", "normalize_then_sum", (None,)),
        ("gdpo_advantages", "normalize_then_sum", ("missing",)),
    ):
        for scale in scales:
            arrays["applies"] = partial if scale == "missing" else applies
            rewards = np.where(arrays["applies"], arrays["rewards"], np.nan)
            output = generate(
                GRPOTrainer,
                rewards,
                np.ones((len(rewards), 2), bool),
                multi_objective_aggregation=aggregation,
                reward_weights=tensor(arrays["weights"]),
                scale_rewards=scale,
            )
            options = {"num_generations": 4}
            if aggregation == "sum_then_normalize":
                options["scale"] = scale
            name = f"{function}_{scale}" if scale else function
            call = {"arguments": ("rewards", "applies"), "keywords": ("weights",)}
            value = output["advantages"]
            recorder.add(name, function, arrays, value, options=options, **call)


def _ratios(recorder):
    arrays = inputs.policy(96, spread=0.6)
    arrays = {
        "old_logprobs": arrays["logprobs"],
        "sampling_logprobs": arrays["old_logprobs"],
        "mask": arrays["mask"],
    }
    rewards = inputs.rewards(71, groups=2)["rewards"][:, None]
    for level in ("token", "sequence"):
        for mode in ("truncate", "mask"):
            for cap, floor in BOUNDS:
                output = generate(
                    GRPOTrainer,
                    rewards,
                    arrays["mask"],
                    old_logprobs=arrays["old_logprobs"],
                    sampling=arrays["sampling_logprobs"],
                    multi_objective_aggregation="sum_then_normalize",
                    reward_weights=torch.ones(1),
                    scale_rewards="group",
                    vllm_importance_sampling_mode=f"{level}_{mode}",
                    vllm_importance_sampling_clip_max=cap,
                    vllm_importance_sampling_clip_min=floor,
                )
                ratio = output["importance_sampling_ratio"].numpy()
                recorder.add(
                    f"ratio_{level}_{mode}_{cap}",
                    "importance_weights",
                    arrays,
                    np.where(arrays["mask"], ratio, 0),
                    arguments=("old_logprobs", "sampling_logprobs", "mask"),
                    options={"level": level, "mode": mode, "cap": cap, "floor": floor},
                    output=(0,),
                    mask="mask",
                )


def _log_probabilities(recorder):
    arrays = inputs.logits(80)
    mask = tensor(arrays["mask"])[:, 1:]
    tokens = torch.tensor(arrays["tokens"], dtype=torch.long)
    for temperature in (1.0, 0.7):
        for index, function in enumerate(("token_logprobs", "token_entropy")):
            logits = leaf(arrays["logits"])
            # Shifted as TRL's callers do: column t predicts token t + 1.
            results = selective_log_softmax_and_entropy(
                logits[:, :-1], tokens[:, 1:], temperature=temperature
            )
            value = (results[index] * mask).sum() / mask.sum()
            recorder.add(
                f"{function}_{temperature}",
                function,
                arrays,
                value,
                arguments=("logits", "tokens")[: 2 - index],
                options={"temperature": temperature},
                leaves={"logits": logits},
                reduction="token_mean",
                mask="mask",
            )
