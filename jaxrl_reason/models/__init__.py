"""Models: static, hashable descriptions with pure functions of their parameters."""

from jaxrl_reason.models.attention import KVCache, repeat_cache
from jaxrl_reason.models.config import PRESETS, ModelConfig, preset
from jaxrl_reason.models.decoder import Model, Params

__all__ = ["PRESETS", "KVCache", "Model", "ModelConfig", "Params", "preset", "repeat_cache"]
