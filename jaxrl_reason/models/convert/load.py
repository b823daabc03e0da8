"""`from_pretrained`: a model from a Hugging Face directory or repository."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import AutoConfig, PretrainedConfig

from jaxrl_reason.errors import InputError, nearest
from jaxrl_reason.models.config import DType, ModelConfig
from jaxrl_reason.models.convert.families import FAMILIES, read_config
from jaxrl_reason.models.convert.files import Tensor, read_headers
from jaxrl_reason.models.convert.names import (
    Weight,
    decoder_weights,
    vision_weights,
)
from jaxrl_reason.models.convert.read import check_tensors, load_weights
from jaxrl_reason.models.decoder import Model, Params
from jaxrl_reason.sharding import DEFAULT_RULES, AxisRules, tree_shardings


@dataclasses.dataclass(frozen=True)
class Layout:
    """Prefixes of the names in a checkpoint."""

    text: str
    head: str
    vision: str = ""
    ignored: tuple[str, ...] = ()
    """Beginnings of names that are known and not read."""


TEXT_LAYOUT = Layout("model.", "lm_head.weight")
_NESTED = Layout("model.language_model.", "lm_head.weight", "model.visual.")
# The first is the published one, and what is written.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "gemma3": (
        Layout(
            "language_model.model.",
            "language_model.lm_head.weight",
            ignored=("vision_tower.", "multi_modal_projector."),
        ),
        Layout(
            "model.language_model.",
            "lm_head.weight",
            ignored=("model.vision_tower.", "model.multi_modal_projector."),
        ),
    ),
    "qwen2_5_vl": (Layout("model.", "lm_head.weight", "visual."), _NESTED),
    "qwen3_vl": (_NESTED,),
}
# Old checkpoints hold the rotary frequencies, which follow from the configuration.
_FREQUENCIES = re.compile(r"\.rotary_emb\.inv_freq$")


def from_pretrained(
    path_or_id: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: AxisRules = DEFAULT_RULES,
    dtype: DType | None = None,
    param_dtype: DType = "float32",
    revision: str | None = None,
    **changes: Any,
) -> tuple[Model, Params]:
    """A model and its parameters from a Hugging Face directory or repository.

    Args:
        path_or_id: a directory in Hugging Face's format, or a repository of the hub.
        mesh: where the parameters go, cut by `rules`; the default device if none is given.
        rules: mesh axes of the parameters' logical axes.
        dtype: of computation; by default float32 on CPU and bfloat16 elsewhere.
        param_dtype: of the parameters.
        revision: branch, tag or commit of a repository.
        changes: other fields of `ModelConfig` that are to differ, such as `remat` or `freeze`.

    Raises:
        InputError: the model is of no supported family, or files, tensors or settings are wrong;
            all missing, unexpected and misshapen tensors are listed before anything is read.
    """
    _check_fields(changes)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    config = dataclasses.replace(
        read_model_config(path_or_id, revision=revision),
        dtype=dtype or ("float32" if platform == "cpu" else "bfloat16"),
        param_dtype=param_dtype,
        **changes,
    )
    model = Model(config)
    return model, load_params(model, path_or_id, mesh=mesh, rules=rules, revision=revision)


def read_model_config(path_or_id: str | Path, *, revision: str | None = None) -> ModelConfig:
    """The configuration of a Hugging Face directory or repository.

    Raises:
        InputError: there is none, or one of its settings is not supported.
    """
    return read_config(load_hf_config(find_directory(path_or_id, revision)))


def load_params(
    model: Model,
    path_or_id: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: AxisRules = DEFAULT_RULES,
    revision: str | None = None,
) -> Params:
    """The parameters of a model from a directory or repository; see `from_pretrained`.

    Raises:
        InputError: the tensors there are not those of the model.
    """
    directory = find_directory(path_or_id, revision)
    tensors = read_headers(directory)
    layout = find_layout(load_hf_config(directory).model_type, model.config, tensors)
    weights = model_weights(model.config, layout)
    check_tensors(weights, tensors, str(directory), _ignorable(model.config, layout))
    return load_weights(model.config, weights, tensors, shardings(model, mesh, rules))


def find_directory(path_or_id: str | Path, revision: str | None) -> Path:
    """The directory itself, or that of a repository of the hub, fetched where it is not yet.

    Raises:
        InputError: there is no such directory, and no such repository can be had.
    """
    directory = Path(path_or_id)
    if directory.is_dir():
        return directory
    if directory.is_absolute() or str(path_or_id).startswith(".") or len(directory.parts) != 2:
        raise InputError(
            f"there is no directory {str(path_or_id)!r}; give one in Hugging Face's format, or a "
            "repository of the hub such as Qwen/Qwen3-0.6B"
        )
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise InputError(
            f"{str(path_or_id)!r} is no directory here, and the hub did not give it: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def load_hf_config(directory: Path) -> PretrainedConfig:
    """The configuration of a directory.

    Raises:
        InputError: there is none, transformers refuses it, or its family is not supported.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise InputError(f"no config.json in {directory}; give a directory of a model")
    try:
        family = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file} is no JSON object: {error}") from error
    if family not in FAMILIES:
        raise InputError(
            f"{file} has model_type={family!r}, which is not supported; "
            f"{nearest(str(family), FAMILIES)}"
        )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises what its validators happen to raise
        raise InputError(f"transformers refuses {file}: {error}") from error


def _check_fields(changes: Iterable[str]) -> None:
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no field of ModelConfig; {nearest(unknown[0], known)}")


def find_layout(family: str, config: ModelConfig, tensors: dict[str, Tensor]) -> Layout:
    """The layout whose embedding is among the tensors; the published one if none is."""
    layouts = LAYOUTS.get(family, (TEXT_LAYOUT,))
    fits = (x for x in layouts if f"{x.text}embed_tokens.weight" in tensors)
    return next(fits, layouts[0])


def model_weights(config: ModelConfig, layout: Layout) -> list[Weight]:
    """The parameters of a model and their names in a checkpoint."""
    weights = decoder_weights(config, layout.text, layout.head)
    if config.vision is not None:
        weights += vision_weights(config.vision, layout.vision)
    return weights


def _ignorable(config: ModelConfig, layout: Layout) -> Callable[[str], bool]:
    """Of names that are known and not read: another tower, frequencies, a tied head."""
    return lambda name: (
        name.startswith(layout.ignored)
        or bool(_FREQUENCIES.search(name))
        or (config.tie_word_embeddings and name == layout.head)
    )


def shardings(model: Model, mesh: Mesh | None, rules: AxisRules) -> Params:
    """Where the parameters go: cut over the mesh, or whole on the default device."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if mesh is None:
        mesh = Mesh(np.asarray([*jnp.zeros(()).devices()]), ("data",))
        return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec()), shapes)
    return tree_shardings(mesh, model.axes(), shapes, rules)
