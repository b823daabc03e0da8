"""Models: static, hashable descriptions with pure functions of their parameters."""

from jaxrl_reason.models.config import PRESETS, ModelConfig, preset
from jaxrl_reason.models.decoder import Model, Params
from jaxrl_reason.models.paged import Pages, PageTable, Place, empty_pages, write_contexts

__all__ = [
    "PRESETS",
    "Model",
    "ModelConfig",
    "PageTable",
    "Pages",
    "Params",
    "Place",
    "empty_pages",
    "preset",
    "write_contexts",
]
