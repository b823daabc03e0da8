"""The shape of a decoder, and presets for training from scratch.

A `ModelConfig` is static and hashable: it may be closed over by a jitted function or passed as a
static argument. Field names are those of Hugging Face configurations.
"""

import dataclasses
from typing import Literal, get_args

RematPolicy = Literal["none", "dots", "full"]
AttentionBackend = Literal["auto", "plain", "blockwise", "cudnn", "splash"]
DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder-only transformer."""

    vocab_size: int
    """Number of rows of the embedding; at least the tokenizer's length."""
    hidden_size: int
    """Width D of the residual stream."""
    intermediate_size: int
    """Width F of the gated MLP."""
    num_hidden_layers: int
    """Number of blocks L."""
    num_attention_heads: int
    """Query heads N."""
    num_key_value_heads: int
    """Key and value heads K; N must be a multiple of it."""
    head_dim: int
    """Size H of one head; even, for rotary embedding."""
    max_position_embeddings: int = 1024
    """Longest sequence, prompt and completion together, in tokens."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    qk_norm: bool = True
    """RMSNorm on queries and keys, per head, before rotation."""
    tie_word_embeddings: bool = True
    """Use the embedding as the output head."""
    initializer_range: float = 0.02
    """Standard deviation of the embedding's initial values."""
    dtype: DType = "float32"
    """Compute dtype of projections; norms, softmax and rotation are float32 whatever it is."""
    param_dtype: DType = "float32"
    """Dtype in which parameters are stored and updated."""
    remat: RematPolicy = "dots"
    """What the backward pass computes again in a block: nothing, all but the results of projections
    and attention, everything."""
    attention: AttentionBackend = "auto"
    """How whole rows attend; "auto" takes what suits the device (docs/attention.md)."""

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary pairs two channels")
        if self.attention not in get_args(AttentionBackend):
            raise ValueError(
                f"attention={self.attention!r} is unknown; "
                f"one of {', '.join(get_args(AttentionBackend))}"
            )

    @property
    def num_parameters(self) -> int:
        """Number of parameters, embedding included."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        attention = d * h * 2 * (self.num_attention_heads + self.num_key_value_heads)
        norms = 2 * d + (2 * h if self.qk_norm else 0)
        heads = 1 if self.tie_word_embeddings else 2
        layer = attention + 3 * d * f + norms
        return self.num_hidden_layers * layer + d + heads * self.vocab_size * d


_PRESETS: dict[str, dict[str, int]] = {
    # name: D, F, L, N, K, H. Names count the parameters of the blocks, without the embedding.
    "0.3m": dict(zip("DFLNKH", (96, 256, 3, 4, 2, 24), strict=True)),
    "0.7m": dict(zip("DFLNKH", (128, 352, 4, 4, 2, 32), strict=True)),
    "3m": dict(zip("DFLNKH", (256, 640, 5, 8, 4, 32), strict=True)),
    "10m": dict(zip("DFLNKH", (384, 1024, 6, 6, 3, 64), strict=True)),
    "30m": dict(zip("DFLNKH", (512, 1408, 10, 8, 4, 64), strict=True)),
    "100m": dict(zip("DFLNKH", (768, 2048, 16, 12, 4, 64), strict=True)),
}
PRESETS = tuple(_PRESETS)


def preset(name: str, *, vocab_size: int, **changes) -> ModelConfig:
    """A preset by name (one of `PRESETS`) with some fields changed.

    Raises:
        ValueError: the name is no preset, or a field is out of range.
        TypeError: a change names no field of `ModelConfig`.
    """
    if name not in _PRESETS:
        raise ValueError(f"model preset {name!r} is unknown; the presets are {', '.join(PRESETS)}")
    size = _PRESETS[name]
    shape = {
        "hidden_size": size["D"],
        "intermediate_size": size["F"],
        "num_hidden_layers": size["L"],
        "num_attention_heads": size["N"],
        "num_key_value_heads": size["K"],
        "head_dim": size["H"],
    }
    return ModelConfig(vocab_size=vocab_size, **{**shape, **changes})
