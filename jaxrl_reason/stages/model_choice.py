"""The configuration of a run's model."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import pydantic

from jaxrl_reason.config import Config, validate
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import PRESETS, ModelConfig, preset
from jaxrl_reason.models.lora import LoRAConfig, trainable
from jaxrl_reason.models.published import shape_of
from jaxrl_reason.stages.stage_config import Names


class ModelChoice(Config):
    """A model to train from scratch, or a published one to go on with."""

    preset: Literal[PRESETS] | None = None
    """Size by the parameters of its blocks, of a model from random weights; 0.7m when null."""
    path: str | None = None
    """Directory or hub id of a published model in Hugging Face's format, in place of a preset."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    changes: Mapping[str, Any] = {}
    """Fields of `ModelConfig` that differ, for example `num_hidden_layers: 6` or `remat: full`."""
    lora: LoRAConfig | None = None
    """Train adapters of this size, and nothing else."""
    freeze: Names = ()
    """Parts of the parameters that are not trained, for example `vision`."""

    def resolve(self, vocab_size: int) -> ModelConfig:
        """The model's configuration; a published model brings its own vocabulary."""
        return _resolve(self, vocab_size)

    @pydantic.model_validator(mode="after")
    def _resolves(self):
        if self.path is not None and self.preset is not None:
            raise ValueError("preset cannot act beside path; remove one of them")
        if self.path is None and self.revision is not None:
            raise ValueError("revision cannot act without path; remove it")
        if "vocab_size" in self.changes:
            raise ValueError("changes.vocab_size follows from the task's tokenizer; remove it")
        for name in ("lora", "freeze"):
            if name in self.changes:
                raise ValueError(f"changes.{name} has a place of its own; set model.{name}")
        trainable(self.resolve(vocab_size=8))
        return self


class _Changed(Config):
    """Checks the fields of a model that are read from a configuration."""

    changes: ModelConfig


def _resolve(choice: ModelChoice, vocab_size: int) -> ModelConfig:
    if choice.path is None:
        name = choice.preset or _PRESET
        base, where = preset(name, vocab_size=vocab_size), f"preset {name}"
    else:
        base, where = _published(choice.path, choice.revision), choice.path
    base = dataclasses.replace(base, lora=choice.lora, freeze=choice.freeze)
    if not choice.changes:
        return base
    whole = _plain(dataclasses.asdict(base)) | choice.changes
    return validate(_Changed, {"changes": whole}, where).changes


_PRESET = "0.7m"


def _plain(value: Any) -> Any:
    """As a YAML file would have it."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    return list(value) if isinstance(value, tuple) else value


@functools.lru_cache(maxsize=4)
def _published(path: str, revision: str | None) -> ModelConfig:
    """The configuration of a published model, to be computed with as the device likes."""
    # Loads transformers, which a run from random weights needs for its tokenizer only.
    from jaxrl_reason.models.convert import read_model_config

    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    try:
        config = read_model_config(path, revision=revision)
    except InputError:
        # A plan needs no files: the hub may be out of reach. A run then ends at the tokenizer.
        config = shape_of(path)
        if config is None:
            raise
    return dataclasses.replace(config, dtype=dtype)
