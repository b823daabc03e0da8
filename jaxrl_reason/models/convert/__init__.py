"""Hugging Face checkpoints and adapters, in and out. The only door to transformers here."""

from jaxrl_reason.models.convert.load import (
    find_directory,
    from_pretrained,
    load_params,
    read_model_config,
)
from jaxrl_reason.models.convert.peft import load_adapter, save_adapter
from jaxrl_reason.models.convert.save import copy_description, save_pretrained

__all__ = [
    "copy_description",
    "find_directory",
    "from_pretrained",
    "load_adapter",
    "load_params",
    "read_model_config",
    "save_adapter",
    "save_pretrained",
]
