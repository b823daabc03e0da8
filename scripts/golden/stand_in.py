"""What TRL's trainers read from themselves besides the arrays of a loss."""

import collections
from types import SimpleNamespace

import torch


class Accelerator:
    """One process: nothing to gather."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0
    sync_gradients = True

    def gather(self, values):
        """The values."""
        return values

    gather_for_metrics = gather

    def reduce(self, values, reduction):
        """The values."""
        return values

    def unwrap_model(self, model):
        """The model."""
        return model


def trainer(**attributes) -> SimpleNamespace:
    """A stand-in for a trainer in evaluation, where no loss is divided by accumulation steps."""
    return SimpleNamespace(
        **{
            "accelerator": Accelerator(),
            "model": SimpleNamespace(training=False),
            "aux_loss_enabled": False,
            "_metrics": collections.defaultdict(lambda: collections.defaultdict(list)),
            "_total_train_tokens": 0,
            "_tp_size": 1,
            **attributes,
        }
    )
