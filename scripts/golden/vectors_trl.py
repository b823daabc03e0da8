"""Writes the records of TRL; runs in the environment that ``make.py`` makes."""

import sys
from pathlib import Path

import torch
import trl_policy
import trl_preference
import trl_rollout
from recorder import Recorder

MODULES = (trl_policy, trl_rollout, trl_preference)


def main() -> None:
    """Write the file that is named on the command line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # TRL makes constants of Python numbers, which would have the precision of float32.
    torch.set_default_dtype(torch.float64)
    left_out = {}
    for module in MODULES:
        left_out |= module.LEFT_OUT
    recorder = Recorder("trl", left_out)
    for module in MODULES:
        module.record(recorder)
    recorder.save(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
