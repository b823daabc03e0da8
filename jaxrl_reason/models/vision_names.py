"""Hugging Face's names and layouts of a vision encoder's configuration and parameters.

Their linear maps are [outputs, inputs] and ours [inputs, outputs]; they keep queries, keys and
values in one tensor and every block by itself, where we split the former and stack the latter. Both
ways only move numbers, so a round trip is the identity bit for bit. Names start with `visual.`, as
in the files of Qwen2.5-VL; those of Qwen3-VL have `model.` before it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxrl_reason.models.vision_config import VisionActivation, VisionConfig

Params = dict[str, Any]

_ACTIVATIONS: dict[str, VisionActivation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_QWEN2_5 = {"norm": "rms", "gated_mlp": True, "patch_bias": False}
_QWEN3 = {"norm": "layer", "gated_mlp": False, "patch_bias": True}
_SIZES = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")
_SIZES += ("in_channels", "patch_size", "temporal_patch_size", "spatial_merge_size")
_FIELDS = {
    "qwen2_5_vl": (*_SIZES, "window_size", "fullatt_block_indexes", "tokens_per_second"),
    "qwen3_vl": (*_SIZES, "num_position_embeddings", "deepstack_visual_indexes"),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """An array of ours: a leaf of `params["vision"]`, or an entry of a stacked one."""

    path: tuple[str, ...]
    index: int | None
    """Position on the leading axis; None where the leaf is not stacked."""
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class VisionTensor:
    """A tensor of Hugging Face and the arrays that it holds, one below the other."""

    name: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]

    def split(self, tensor: np.ndarray) -> tuple[np.ndarray, ...]:
        """The arrays of ours, in the order of `places`; views of the tensor.

        Raises:
            ValueError: the tensor has another shape.
        """
        if tensor.shape != self.shape:
            raise ValueError(f"{self.name} has shape {tensor.shape}; expected {self.shape}")
        parts = tensor.reshape(len(self.places), self.shape[0] // len(self.places), -1)
        turned = (part.T if self._transposed else part for part in parts)
        return tuple(x.reshape(p.shape) for x, p in zip(turned, self.places, strict=True))

    def join(self, arrays: Iterable[np.ndarray]) -> np.ndarray:
        """The inverse of `split`."""
        rows = self.shape[0] // len(self.places)
        if self._transposed:
            parts = [x.reshape(-1, rows).T for x in arrays]
        else:
            parts = [x.reshape(rows, -1) for x in arrays]
        return np.concatenate(parts).reshape(self.shape)

    @property
    def _transposed(self) -> bool:
        return self.places[0].path[-1] == "kernel"


def vision_tensors(config: VisionConfig) -> Iterator[VisionTensor]:
    """Every tensor of Hugging Face's encoder, with its places in ours."""
    c, d = config, config.hidden_size
    pixels = (c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
    patch = Place(("patch_embed", "kernel"), None, (c.patch_dim, d))
    yield VisionTensor("visual.patch_embed.proj.weight", (d, *pixels), (patch,))
    if c.patch_bias:
        yield _same("visual.patch_embed.proj.bias", (d,), ("patch_embed", "bias"), None)
    if c.num_position_embeddings:
        shape = (c.num_position_embeddings, d)
        yield _same("visual.pos_embed.weight", shape, ("position_embedding",), None)
    for i in range(c.depth):
        yield from _block(config, i)
    norm = "ln_q" if c.norm == "rms" else "norm"
    yield from _merger(config, "visual.merger", ("merger",), None, norm)
    for k in range(len(c.deepstack_visual_indexes)):
        yield from _merger(config, f"visual.deepstack_merger_list.{k}", ("deepstack",), k, norm)


def _block(config: VisionConfig, i: int) -> Iterator[VisionTensor]:
    c, d, f = config, config.hidden_size, config.intermediate_size
    name, heads = f"visual.blocks.{i}", (config.num_heads, config.head_dim)
    yield from _norm(config, f"{name}.norm1", ("layers", "attention_norm"), i, d)
    yield from _norm(config, f"{name}.norm2", ("layers", "mlp_norm"), i, d)
    for kind, suffix, inputs in (("kernel", "weight", (d,)), ("bias", "bias", ())):
        places = tuple(Place(("layers", "attention", q, kind), i, (*inputs, *heads)) for q in "qkv")
        yield VisionTensor(f"{name}.attn.qkv.{suffix}", (3 * d, *inputs), places)
    yield from _linear(f"{name}.attn.proj", ("layers", "attention", "o"), i, heads, d)
    if c.gated_mlp:
        theirs = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    else:
        theirs = {"up": "linear_fc1", "down": "linear_fc2"}
    for ours, suffix in theirs.items():
        inputs, outputs = (f, d) if ours == "down" else (d, f)
        path = ("layers", "mlp", ours)
        yield from _linear(f"{name}.mlp.{suffix}", path, i, (inputs,), outputs)


def _merger(
    config: VisionConfig, name: str, path: tuple[str, ...], index: int | None, norm: str
) -> Iterator[VisionTensor]:
    wide = config.hidden_size * config.merge_unit
    size = config.hidden_size if index is None else wide
    up, down = ("mlp.0", "mlp.2") if config.norm == "rms" else ("linear_fc1", "linear_fc2")
    yield from _norm(config, f"{name}.{norm}", (*path, "norm"), index, size)
    yield from _linear(f"{name}.{up}", (*path, "up"), index, (wide,), wide)
    yield from _linear(f"{name}.{down}", (*path, "down"), index, (wide,), config.out_hidden_size)


def _norm(config: VisionConfig, name, path, index, size) -> Iterator[VisionTensor]:
    yield _same(f"{name}.weight", (size,), (*path, "scale"), index)
    if config.norm == "layer":
        yield _same(f"{name}.bias", (size,), (*path, "bias"), index)


def _linear(name, path, index, inputs: tuple[int, ...], outputs: int) -> Iterator[VisionTensor]:
    kernel = Place((*path, "kernel"), index, (*inputs, outputs))
    yield VisionTensor(f"{name}.weight", (outputs, math.prod(inputs)), (kernel,))
    yield _same(f"{name}.bias", (outputs,), (*path, "bias"), index)


def _same(name: str, shape, path, index) -> VisionTensor:
    """A tensor that is laid out as ours."""
    return VisionTensor(name, shape, (Place(path, index, shape),))


def vision_from_hf(config: VisionConfig, read: Callable[[str], np.ndarray]) -> Params:
    """`params["vision"]` in NumPy, from a function that gives a tensor by its name."""
    params: Params = {}
    for tensor in vision_tensors(config):
        value = read(tensor.name)
        for place, part in zip(tensor.places, tensor.split(value), strict=True):
            node = params
            for name in place.path[:-1]:
                node = node.setdefault(name, {})
            leaf = place.path[-1]
            if place.index is None:
                node[leaf] = np.ascontiguousarray(part)
                continue
            if leaf not in node:
                node[leaf] = np.empty((_stack_size(config, place), *place.shape), value.dtype)
            node[leaf][place.index] = part
    return params


def _stack_size(config: VisionConfig, place: Place) -> int:
    return config.depth if place.path[0] == "layers" else len(config.deepstack_visual_indexes)


def vision_to_hf(config: VisionConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of Hugging Face, one at a time, of `params["vision"]`."""
    for tensor in vision_tensors(config):
        yield tensor.name, tensor.join(np.asarray(_at(params, place)) for place in tensor.places)


def _at(params: Params, place: Place):
    leaf: Any = params
    for name in place.path:
        leaf = leaf[name]
    return leaf if place.index is None else leaf[place.index]


def vision_config_from_hf(values: Mapping[str, Any]) -> VisionConfig:
    """From the `vision_config` of a Hugging Face configuration, as a dictionary.

    Raises:
        ValueError: it is of another architecture or activation.
    """
    kind = str(values.get("model_type")).removesuffix("_vision")
    if kind not in _FIELDS:
        raise ValueError(f"vision encoder {kind!r} is unknown; one of {', '.join(_FIELDS)}")
    act = values["hidden_act"]
    if act not in _ACTIVATIONS:
        raise ValueError(
            f"hidden_act={act!r} of the encoder is unknown; one of {', '.join(_ACTIVATIONS)}"
        )
    fields = {name: values[name] for name in _FIELDS[kind]}
    theta = (values.get("rope_parameters") or {}).get("rope_theta")
    return VisionConfig(
        **fields,
        **(_QWEN2_5 if kind == "qwen2_5_vl" else _QWEN3),
        **({} if theta is None else {"rope_theta": theta}),
        hidden_act=_ACTIVATIONS[act],
    )


def vision_config_to_hf(config: VisionConfig) -> dict[str, Any]:
    """The inverse of `vision_config_from_hf`.

    Raises:
        ValueError: Hugging Face has no encoder like this.
    """
    values = dataclasses.asdict(config)
    for kind, traits in (("qwen2_5_vl", _QWEN2_5), ("qwen3_vl", _QWEN3)):
        rebuilt = {name: values[name] for name in (*_FIELDS[kind], "hidden_act", "rope_theta")}
        if VisionConfig(**rebuilt, **traits) == config:
            break
    else:
        raise ValueError(f"Hugging Face has no encoder like {config}")
    listed = {n: list(v) if isinstance(v, tuple) else v for n, v in rebuilt.items()}
    theta = listed.pop("rope_theta")
    act = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.hidden_act)
    rope = {"rope_type": "axial", "rope_theta": theta}
    return {"model_type": f"{kind}_vision", **listed, "hidden_act": act, "rope_parameters": rope}
