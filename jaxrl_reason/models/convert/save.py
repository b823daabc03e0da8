"""Writing a Hugging Face directory that transformers loads unchanged.

Everything is written beside the goal, read again and compared, and gets its name by one rename: a
directory of that name is always a whole and checked model. In a run of many processes all call, and
the first writes.
"""

import dataclasses
import functools
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from jaxrl_reason.errors import InputError
from jaxrl_reason.models.config import DType
from jaxrl_reason.models.convert.families import read_config, write_config
from jaxrl_reason.models.convert.files import read_headers
from jaxrl_reason.models.convert.load import (
    LAYOUTS,
    TEXT_LAYOUT,
    find_directory,
    load_hf_config,
    model_weights,
)
from jaxrl_reason.models.convert.read import check_tensors, load_weights, placed
from jaxrl_reason.models.convert.write import check_params, write_json, write_tensors
from jaxrl_reason.models.decoder import Model, Params
from jaxrl_reason.models.lora import has_adapter, merge_lora
from jaxrl_reason.processes import is_first, wait

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_VISUAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_CHECKED_TOKENS = 16
_TOLERANCE = 1e-4
"""Of logits, relative to the largest. The weights are the same bit for bit, and usually so is the
program; where the compiler orders sums otherwise, float32 differs by less than this."""

_KEPT_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""What `like` gives to the new directory, beside entries of its config.json."""


def save_pretrained(
    model: Model,
    params: Params,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    like: str | Path | None = None,
    dtype: DType | None = None,
    max_shard_size: int | str = "5GB",
    check: bool = True,
) -> Path:
    """Write a directory that transformers loads, and return its path.

    An adapter is merged into the weights; `save_adapter` writes it alone.

    Args:
        model: the model.
        params: its parameters; they stay as they are.
        path: the directory; it must not exist yet, or be empty.
        tokenizer: saved with the model, and gives the ids of special tokens.
        like: directory or repository of the model that this one comes from: its other settings,
            generation defaults, preprocessor and, without a `tokenizer`, its tokenizer are kept.
        dtype: of the tensors; by default that of the parameters.
        max_shard_size: of a file, in bytes or as "5GB"; a larger tensor has a file of its own.
        check: read the directory again, and compare weights and logits before it gets its name.

    Raises:
        InputError: there is something at `path`, no family of transformers is this model, or the
            logits are not finite.
        RuntimeError: what was written is not the model.
        OSError: storage refuses it; nothing is left.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists already; remove it, or give another directory")
    limit = _bytes(max_shard_size)
    config, lora = dataclasses.replace(model.config, lora=None), model.config.lora
    if lora is not None and has_adapter(params):
        params = merge_lora(params, lora)
    model = Model(config)
    source = None if like is None else find_directory(like, None)
    hf = write_config(config, None if source is None else load_hf_config(source))
    _set_tokens(hf, tokenizer, keep=source is not None)
    hf.dtype = dtype or config.param_dtype
    weights = model_weights(config, LAYOUTS.get(hf.model_type, (TEXT_LAYOUT,))[0])
    check_params(weights, params)

    unfinished = path.with_name(f".{path.name}.unfinished")
    first = is_first()
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    try:
        write_tensors(unfinished, weights, params, dtype=dtype, limit=limit)
        if first:
            _write_rest(unfinished, hf, tokenizer, source)
        wait("save_pretrained: written")
        if check:
            check_directory(model, params, unfinished, dtype)
        wait("save_pretrained: checked")
        if first:
            os.replace(unfinished, path)
        wait("save_pretrained: named")
    finally:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
    return path


def copy_description(path_or_id: str | Path, directory: Path, revision: str | None = None) -> None:
    """Copy what a model's directory says besides its weights: settings, preprocessor, tokenizer."""
    source = find_directory(path_or_id, revision)
    directory.mkdir(parents=True, exist_ok=True)
    _copy(("config.json", *_KEPT_FILES), source, directory)


def _copy(names: tuple[str, ...], source: Path, directory: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", size.upper())
    if match is None or match[2] not in _UNITS:
        raise InputError(f"max_shard_size={size!r} is no size; write it as '5GB' or '200MB'")
    return int(float(match[1]) * _UNITS[match[2]])


def _set_tokens(hf: PretrainedConfig, tokenizer, *, keep: bool) -> None:
    """Ids of special tokens: the tokenizer's, or those that are there, or none."""
    text = hf.get_text_config()
    for name in _TOKENS:
        known = None if tokenizer is None else getattr(tokenizer, name)
        if known is not None or not keep:
            setattr(text, name, known)
    if tokenizer is not None and hasattr(hf, "vision_config"):
        vocabulary = tokenizer.get_vocab()
        for name, token in _VISUAL_TOKENS.items():
            if token in vocabulary:
                setattr(hf, name, vocabulary[token])


def _write_rest(directory: Path, hf: PretrainedConfig, tokenizer, source: Path | None) -> None:
    """Configuration, generation defaults, tokenizer and preprocessor."""
    if source is not None:
        _copy(_KEPT_FILES, source, directory)
    hf.save_pretrained(directory)
    generation = directory / "generation_config.json"
    if not generation.is_file():
        text = hf.get_text_config()
        tokens = {name: getattr(text, name, None) for name in _TOKENS}
        write_json(generation, {k: v for k, v in tokens.items() if v is not None})
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def check_directory(model: Model, params: Params, directory: Path, dtype: DType | None) -> None:
    """Raises where the directory is not the model."""
    config = model.config
    hf = load_hf_config(directory)
    running = {n: getattr(config, n) for n in ("dtype", "param_dtype", "remat", "attention")}
    written = Model(dataclasses.replace(read_config(hf), **running))
    layout = LAYOUTS.get(hf.model_type, (TEXT_LAYOUT,))[0]
    weights, tensors = model_weights(written.config, layout), read_headers(directory)
    check_tensors(weights, tensors, str(directory))
    loaded = load_weights(written.config, weights, tensors, jax.tree.map(placed, params))
    expected = _rounded(params, dtype) if dtype else params
    different = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, same in jax.tree_util.tree_leaves_with_path(_same(expected, loaded))
        if not same
    ]
    wanted, got = (_logits(m, p) for m, p in ((model, expected), (written, loaded)))
    if not np.isfinite(wanted).all():
        raise InputError(
            "the logits of the model are not finite, so nothing was saved; check=False saves it "
            "as it is"
        )
    distance = float(np.max(np.abs(wanted - got)))
    if different or not distance <= _TOLERANCE * np.max(np.abs(wanted)):
        raise RuntimeError(
            "what was written is not the model, and was removed: logits differ by "
            f"{distance:.3g}; parameters that differ: {', '.join(different) or 'none'}"
        )


@functools.partial(jax.jit, static_argnums=1)
def _rounded(params: Params, dtype: DType) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(x.dtype), params)


@jax.jit
def _same(params: Params, others: Params) -> Params:
    return jax.tree.map(lambda x, y: jnp.all(x == y), params, others)


def _logits(model: Model, params: Params) -> np.ndarray:
    """Of a few tokens, the same ones every time."""
    length = min(_CHECKED_TOKENS, model.config.max_position_embeddings)
    tokens = np.linspace(0, model.config.vocab_size - 1, length).astype(np.int32)[None]
    whole = _forward(model, params, tokens)
    if not whole.is_fully_addressable:
        whole = multihost_utils.process_allgather(whole, tiled=True)
    return np.asarray(whole)


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Model, params: Params, tokens):
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = model.forward(
        params, tokens, positions=positions, segment_ids=jnp.ones_like(positions)
    )
    return model.unembed(params, hidden)
