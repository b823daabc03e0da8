"""Adapters in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_reason.errors import InputError
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.convert.files import read_header
from jaxrl_reason.models.convert.names import Linear, Weight, decoder_linears
from jaxrl_reason.models.convert.read import as_tree, at_path, check_tensors, load_weights, placed
from jaxrl_reason.models.convert.write import check_params, write_tensors
from jaxrl_reason.models.decoder import Model, Params
from jaxrl_reason.models.lora import ADAPTER, LoRAConfig, has_adapter, without_adapter
from jaxrl_reason.processes import is_first

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_ROOT = "base_model.model."
# Decoders of transformers' models; the first that fits is taken.
_PREFIXES = (f"{_ROOT}model.language_model.", f"{_ROOT}model.")

# Settings of PEFT that make another function of an adapter, where they are set.
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "bias",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "alora_invocation_tokens",
)


def save_adapter(
    model: Model, params: Params, path: str | Path, *, base: str | None = None
) -> Path:
    """Write the adapter of a model alone, and return the directory.

    Args:
        model: the model; its configuration has `lora`.
        params: its parameters, adapter and all.
        path: the directory; it must not exist yet, or be empty.
        base: directory or repository of the model that the adapter belongs to.

    Raises:
        InputError: the model has no adapter, or there is something at `path`.
        OSError: storage refuses it; nothing is left.
    """
    path, lora = Path(path).absolute(), model.config.lora
    if lora is None or not has_adapter(params):
        raise InputError("the model has no adapter; save_pretrained writes it without")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists already; remove it, or give another directory")
    nested = model.config.vision is not None
    every = decoder_linears(model.config, _PREFIXES[0] if nested else _PREFIXES[1])
    linears = [linear for linear in every if lora.targets(linear.path[-1])]
    weights = _weights(linears, lora)
    check_params(weights, _only_adapter(params))
    unfinished = path.with_name(f".{path.name}.unfinished")
    if is_first():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    limit = 1 << 62  # PEFT reads one file
    try:
        write_tensors(unfinished, weights, params, dtype=None, limit=limit, file=ADAPTER_FILE)
        if is_first():
            config = _write_config(model.config, lora, linears, base)
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (unfinished / CONFIG_FILE).write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
    finally:
        if is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
    return path


def load_adapter(model: Model, params: Params, path: str | Path) -> tuple[Model, Params]:
    """The model with an adapter of PEFT's; one that it had is dropped, the rest stays in place.

    Args:
        model: the model that the adapter was trained on.
        params: its parameters.
        path: a directory with adapter_config.json and adapter_model.safetensors.

    Raises:
        InputError: the adapter is no LoRA of linear projections, has settings that are not
            supported, or its tensors are not those of its configuration and this model.
    """
    directory = Path(path)
    for name in (CONFIG_FILE, ADAPTER_FILE):
        if not (directory / name).is_file():
            raise InputError(f"no {name} in {directory}; give a directory that PEFT has saved")
    tensors = read_header(directory / ADAPTER_FILE)
    prefixes = (p for p in _PREFIXES if any(name.startswith(p) for name in tensors))
    prefix = next(prefixes, _PREFIXES[-1])
    found = {name.partition(".lora_")[0].rpartition(".")[2] for name in tensors}
    linears = [x for x in decoder_linears(model.config, prefix) if _last(x) in found]
    lora = _read_config(directory / CONFIG_FILE, tuple(map(_last, linears)))
    weights = _weights(linears, lora)
    check_tensors(weights, tensors, f"{directory} (with r={lora.r})")
    config = dataclasses.replace(model.config, lora=lora)
    params = without_adapter(params)
    places = {weight.path: _place(weight, params) for weight in weights}
    adapter = load_weights(config, weights, tensors, as_tree(places))
    return Model(config), _joined(params, adapter)


def _last(linear: Linear) -> str:
    return linear.module.rpartition(".")[2]


def _weights(linears: list[Linear], lora: LoRAConfig) -> list[Weight]:
    return [weight for linear in linears for weight in linear.adapter(lora.r)]


def _write_config(
    config: ModelConfig, lora: LoRAConfig, linears: list[Linear], base: str | None
) -> dict[str, Any]:
    names: list[str] | str = [_last(linear) for linear in linears]
    if config.vision is not None:  # the encoder has projections of the same names
        names = rf".*language_model.*\.({'|'.join(names)})"
    alpha = lora.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": names,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
    }


def _read_config(file: Path, target_modules: tuple[str, ...]) -> LoRAConfig:
    """Rank and scale; the modules are those of the tensors, which say what a pattern would."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        kind, rank, alpha = values.get("peft_type"), int(values["r"]), float(values["lora_alpha"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no configuration of a LoRA adapter: {error!r}") from error
    if kind != "LORA":
        raise InputError(f"{file} has peft_type={kind!r}; only 'LORA' is supported")
    problems = [
        f"{name}={values[name]!r}"
        for name in _UNSUPPORTED
        if values.get(name) and values[name] != "none"
    ]
    if problems:
        raise InputError(f"{file} has settings that are not supported: {', '.join(problems)}")
    if not target_modules:
        raise InputError(
            f"the adapter in {file.parent} has no tensor of a projection of the decoder; such are "
            f"named {_PREFIXES[-1]}layers.0.self_attn.q_proj.lora_A.weight"
        )
    if values.get("use_rslora"):  # scaled by alpha / sqrt(r)
        alpha *= rank**0.5
    return LoRAConfig(r=rank, lora_alpha=alpha, target_modules=target_modules)


def _place(weight: Weight, params: Params) -> NamedSharding:
    """Cut as the kernel is, along the axes that the adapter shares with it."""
    *path, leaf = weight.path
    place = placed(at_path(params, (*path, "kernel")))
    axes = (*place.spec, *(None,) * 8)
    stack, count = len(weight.stack), len(weight.order) - 1
    if leaf == "lora_a":
        spec = (*axes[: stack + count], None)
    else:
        kernel = at_path(params, (*path, "kernel")).ndim
        spec = (*axes[:stack], None, *axes[kernel - count : kernel])
    return NamedSharding(place.mesh, PartitionSpec(*spec))


def _only_adapter(params: Params) -> Params:
    """The leaves of adapters, in as much of the tree as leads to them."""
    kept = {
        name: _only_adapter(x) if isinstance(x, dict) else x
        for name, x in params.items()
        if isinstance(x, dict) or name in ADAPTER
    }
    return {name: x for name, x in kept.items() if not isinstance(x, dict) or x}


def _joined(params: Params, adapter: Params) -> Params:
    """The leaves of both trees."""
    added = {name: _joined(params[name], x) if name in params else x for name, x in adapter.items()}
    return {**params, **added}
