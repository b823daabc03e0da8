"""The standard workloads: model shapes, and the same token ids for everybody who is timed.

Imports NumPy and the standard library only, so that the workers of other libraries can read it in
environments of their own. Token 0 is padding and occurs in no prompt or document.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

PAD_ID = 0
MEAN_COMPLETION = 64
"""Tokens in a completion on average, where end-of-sequence tokens are drawn by chance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The architecture of a Qwen3 model with tied embeddings; names as in its configuration."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def num_parameters(self) -> int:
        """Number of parameters, the embedding counted once."""
        d, h = self.hidden_size, self.head_dim
        attention = 2 * d * h * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * d * self.intermediate_size + 2 * d + 2 * h
        return self.num_hidden_layers * layer + d + self.vocab_size * d

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that other libraries' Qwen3 configurations take by the same name."""
        fields = dataclasses.asdict(self)
        return {name: fields[name] for name in fields if name not in ("name", "dtype")}


def _shape(name: str, sizes: str, dtype: Literal["float32", "bfloat16"] = "float32") -> Shape:
    names = [field.name for field in dataclasses.fields(Shape)][1:-1]
    return Shape(name=name, dtype=dtype, **dict(zip(names, map(int, sizes.split()), strict=True)))


SHAPES = {
    shape.name: shape
    for shape in (
        # V, D, F, L, N, K, H
        _shape("nano", "256 32 64 2 2 1 16"),  # to try the machinery; times of it mean nothing
        _shape("tiny", "2048 256 768 4 8 4 32"),
        _shape("small", "32000 512 1536 8 8 4 64"),
        _shape("1b", "151936 1536 4608 28 16 8 128", "bfloat16"),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What one repeat consists of."""

    name: str
    kind: Literal["grpo", "generate", "sft"]
    """A step of GRPO (rollout, rewards, update), the rollout alone, or a step of fine-tuning."""
    num_prompts: int = 8
    num_generations: int = 8
    """Completions of each prompt."""
    prompt_length: tuple[int, int] = (64, 64)
    """Shortest and longest prompt; lengths in between are equally likely."""
    max_new_tokens: int = 128
    stops: bool = False
    """Whether one token id in 64 ends a completion; otherwise none does."""
    num_rows: int = 4
    """Packed rows in a step of fine-tuning."""
    row_length: int = 1024
    mean_document: int = 120
    """Mean tokens of a document, before documents are cut to a row."""

    @property
    def num_completions(self) -> int:
        """Rows that are sampled in one repeat."""
        return self.num_prompts * self.num_generations


_RAGGED = {"prompt_length": (64, 256), "max_new_tokens": 256, "stops": True}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(name="W1", kind="grpo"),
        Workload(name="W2", kind="grpo", **_RAGGED),
        Workload(name="W3", kind="sft"),
        Workload(name="W4", kind="generate", num_prompts=128, num_generations=1, **_RAGGED),
        Workload(name="W1-generate", kind="generate"),
        Workload(name="W2-generate", kind="generate", **_RAGGED),
    )
}


def changed(workload: Workload, changes: Mapping[str, object]) -> Workload:
    """A workload with some fields changed, for trying the machinery; its name says so.

    Raises:
        TypeError: a change names no field.
    """
    if not changes:
        return workload
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    how = " ".join(f"{name}={value}" for name, value in changes.items())
    return dataclasses.replace(workload, **fields, name=f"{workload.name} ({how})")


def stop_ids(workload: Workload, shape: Shape) -> list[int]:
    """Token ids that end a completion: every 64th, or none."""
    return list(range(63, shape.vocab_size, 64)) if workload.stops else []


def prompts(workload: Workload, shape: Shape, repeat: int) -> list[list[int]]:
    """The prompts of one repeat, without padding or stop tokens; every repeat has others."""
    rng = _generator(workload, shape, repeat)
    low, high = workload.prompt_length
    lengths = rng.integers(low, high, size=workload.num_prompts, endpoint=True)
    return [_tokens(rng, shape, n) for n in lengths]


def documents(workload: Workload, shape: Shape, *, steps: int) -> list[list[int]]:
    """Documents for about `steps` steps, their lengths log-normal and at most a row long."""
    rng = _generator(workload, shape, 0)
    count = -(-steps * workload.num_rows * workload.row_length // workload.mean_document)
    lengths = rng.lognormal(np.log(workload.mean_document) - 0.5, 1.0, size=count)
    lengths = np.clip(np.round(lengths), 2, workload.row_length).astype(int)
    return [_tokens(rng, shape, n) for n in lengths]


def reward(tokens: list[int]) -> float:
    """The share of even ids: costs nothing and differs between completions."""
    return sum(token % 2 == 0 for token in tokens) / max(1, len(tokens))


def kept_length(tokens: list[int], stops: frozenset[int]) -> int:
    """Tokens up to and including the first that ends the completion."""
    first = next((i for i, token in enumerate(tokens) if token in stops), None)
    return len(tokens) if first is None else first + 1


def _generator(workload: Workload, shape: Shape, repeat: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(f"{workload.name} {shape.name}".encode()), repeat])


def _tokens(rng: np.random.Generator, shape: Shape, length: int) -> list[int]:
    # 64 k + 1 .. 64 k + 62: neither padding nor a stop token.
    block = rng.integers(0, shape.vocab_size // 64, size=length)
    return (64 * block + rng.integers(1, 63, size=length)).tolist()
