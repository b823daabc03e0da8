"""Models: static, hashable descriptions with pure functions of their parameters."""

from typing import TYPE_CHECKING, Any

from jaxrl_reason.models.config import PRESETS, ModelConfig, preset
from jaxrl_reason.models.decoder import Model, Params
from jaxrl_reason.models.paged import (
    OpenPages,
    Pages,
    PageTable,
    Place,
    close_pages,
    empty_pages,
    open_pages,
    write_contexts,
)

if TYPE_CHECKING:
    from jaxrl_reason.models.convert import (
        from_pretrained,
        load_adapter,
        save_adapter,
        save_pretrained,
    )

__all__ = [
    "PRESETS",
    "Model",
    "ModelConfig",
    "OpenPages",
    "PageTable",
    "Pages",
    "Params",
    "Place",
    "close_pages",
    "empty_pages",
    "from_pretrained",
    "load_adapter",
    "open_pages",
    "preset",
    "save_adapter",
    "save_pretrained",
    "write_contexts",
]


def __getattr__(name: str) -> Any:
    """Names that load transformers, when they are asked for."""
    if name in ("from_pretrained", "load_adapter", "save_adapter", "save_pretrained"):
        from jaxrl_reason.models import convert

        return getattr(convert, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
