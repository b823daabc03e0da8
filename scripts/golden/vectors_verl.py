"""Writes the records of verl; runs in the environment that ``make.py`` makes.

verl adds 1e-8 to numbers of tokens and to variances, which ``DIVISOR_TOLERANCE`` allows for.
"""

import sys
from pathlib import Path

import torch
import verl_policy
import verl_rollout
from recorder import Recorder

LEFT_OUT = {
    "dppo_tv, dppo_kl, dro, bypass_mode": "not offered",
    "remax, opo, grpo_passk, reinforce_plus_plus_baseline, optimal_token_baseline": "not offered",
    "gae advantages": "verl whitens them over the batch; the returns are compared instead",
    "gdpo": "verl whitens over tokens and has another eps; TRL's form is compared instead",
    "kl_penalty with a plus (k3+)": "the gradient of k2 under another value; not offered",
    "clip_cov with more candidates than are drawn": "random; the records draw all candidates",
    "gpg where a live group has a reward or an advantage of 0": (
        "verl counts rewards other than 0, ours advantages"
    ),
    "rollout_rs (rejection masks), batch-normalised weights": "not offered",
    "token-sum": "not offered",
}
PARTS = (
    verl_policy.clipped,
    verl_policy.other_ratios,
    verl_policy.covariances,
    verl_policy.plain,
    verl_rollout.divergences,
    verl_rollout.advantages,
    verl_rollout.values,
    verl_rollout.corrections,
    verl_rollout.log_probabilities,
)


def main() -> None:
    """Write the file that is named on the command line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    recorder = Recorder("verl", LEFT_OUT)
    for part in PARTS:
        part(recorder)
    recorder.save(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
