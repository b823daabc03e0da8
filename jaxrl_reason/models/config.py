"""The shape of a decoder, and presets for training from scratch.

A `ModelConfig` is static and hashable: it may be closed over by a jitted function or passed as a
static argument. Field names are those of Hugging Face configurations.
"""

import dataclasses
from typing import Literal, get_args

from jaxrl_reason.models.lora import LoRAConfig
from jaxrl_reason.models.vision_config import VisionConfig

RematPolicy = Literal["none", "dots", "full"]
LayerType = Literal["full_attention", "sliding_attention"]
Activation = Literal["silu", "gelu_tanh"]
AttentionBackend = Literal["auto", "plain", "blockwise", "cudnn", "splash"]
DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining."""

    rope_type: Literal["linear", "llama3"]
    """`linear` divides every frequency; `llama3` the low ones only, with a smooth passage."""
    factor: float
    """What low frequencies are divided by."""
    low_freq_factor: float = 1.0
    """`llama3`: waves longer than `original_max_position_embeddings` / this are divided."""
    high_freq_factor: float = 4.0
    """`llama3`: waves shorter than `original_max_position_embeddings` / this are kept."""
    original_max_position_embeddings: int = 8192
    """`llama3`: longest sequence of pretraining, in tokens."""

    def __post_init__(self):
        if self.rope_type not in ("linear", "llama3"):
            raise ValueError(f"rope_type={self.rope_type!r} is unknown; one of linear, llama3")
        if self.factor <= 0:
            raise ValueError(f"factor={self.factor} must be positive")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be smaller than "
                f"high_freq_factor={self.high_freq_factor}"
            )


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
    qkv_bias: bool = False
    """Add a vector to queries, keys and values (Qwen 2)."""
    sliding_window: int | None = None
    """In sliding layers, a query at position p sees keys at positions above p minus this."""
    layer_types: tuple[LayerType, ...] = ()
    """Kind of attention of each layer; empty: all sliding with a `sliding_window`, else full."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies of full layers."""
    rope_local_theta: float | None = None
    """Base of the rotary frequencies of sliding layers, which are not stretched (Gemma 3); null:
    rotation is the same in all layers."""
    mrope_section: tuple[int, ...] = ()
    """Rotary frequencies that turn with the temporal, the vertical and the horizontal position of a
    token; empty: tokens have one position."""
    mrope_interleaved: bool = False
    """The three kinds of frequencies alternate (Qwen3-VL), instead of lying one after the other."""
    query_pre_attn_scalar: float | None = None
    """Scores are divided by the root of this; `head_dim` when null (Gemma)."""
    hidden_act: Activation = "silu"
    """Of the gate of the MLP."""
    sandwich_norms: bool = False
    """RMSNorm after attention and after the MLP too (Gemma 3)."""
    rms_norm_offset: bool = False
    """Norms multiply by one plus their scale, which starts at 0 (Gemma)."""
    scale_embeddings: bool = False
    """Multiply embeddings by the root of `hidden_size`, rounded to `dtype` (Gemma)."""
    num_experts: int = 0
    """Experts E of every MLP; 0: one dense MLP."""
    num_experts_per_tok: int = 0
    """Experts that a token goes through."""
    moe_intermediate_size: int = 0
    """Width F of an expert."""
    norm_topk_prob: bool = True
    """The weights of a token's experts sum to 1."""
    router_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss in supervised training."""
    vision: VisionConfig | None = None
    """The encoder of images and videos."""
    lora: LoRAConfig | None = None
    """Adapters, which are then all that is trained."""
    freeze: tuple[str, ...] = ()
    """Parts of the parameters that are not trained, for example `vision`."""
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
        for name in ("layer_types", "mrope_section", "freeze"):  # lists of JSON would not hash
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary pairs two channels")
        for name, kinds in (("attention", AttentionBackend), ("hidden_act", Activation)):
            given, allowed = getattr(self, name), get_args(kinds)
            if given not in allowed:
                raise ValueError(f"{name}={given!r} is unknown; one of {', '.join(allowed)}")
        self._check_layers()
        if self.mrope_section and (
            len(self.mrope_section) != 3 or sum(self.mrope_section) != self.head_dim // 2
        ):
            raise ValueError(
                f"mrope_section={self.mrope_section} must be three numbers that sum to half of "
                f"head_dim={self.head_dim}"
            )
        self._check_experts()
        self._check_vision()

    def _check_layers(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1, or null")
        unknown = set(self.layer_types) - set(get_args(LayerType))
        if unknown:
            raise ValueError(
                f"layer_types has {sorted(unknown)}; allowed are {', '.join(get_args(LayerType))}"
            )
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has sliding layers; set sliding_window")

    def _check_experts(self) -> None:
        if not self.num_experts:
            return
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie in "
                f"1..num_experts={self.num_experts}"
            )
        if self.moe_intermediate_size < 1:
            raise ValueError(
                f"moe_intermediate_size={self.moe_intermediate_size} must be at least 1"
            )

    def _check_vision(self) -> None:
        if self.vision is None:
            return
        if self.vision.out_hidden_size != self.hidden_size:
            raise ValueError(
                f"vision.out_hidden_size={self.vision.out_hidden_size} must be hidden_size="
                f"{self.hidden_size}: features stand in the place of embeddings"
            )
        levels = len(self.vision.deepstack_visual_indexes)
        if levels > self.num_hidden_layers:
            raise ValueError(
                f"vision.deepstack_visual_indexes has {levels} entries for "
                f"num_hidden_layers={self.num_hidden_layers}"
            )

    @property
    def sliding_layers(self) -> tuple[bool, ...]:
        """For every layer whether it sees a window only."""
        if self.layer_types:
            return tuple(kind == "sliding_attention" for kind in self.layer_types)
        return (self.sliding_window is not None,) * self.num_hidden_layers

    @property
    def num_parameters(self) -> int:
        """Number of parameters, embedding included and adapters not."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        attention = d * h * 2 * (self.num_attention_heads + self.num_key_value_heads)
        if self.qkv_bias:
            attention += h * (self.num_attention_heads + 2 * self.num_key_value_heads)
        norms = (4 if self.sandwich_norms else 2) * d + (2 * h if self.qk_norm else 0)
        heads = 1 if self.tie_word_embeddings else 2
        mlp = 3 * d * f
        if self.num_experts:
            mlp = self.num_experts * (3 * d * self.moe_intermediate_size + d)
        layer = attention + mlp + norms
        vision = 0 if self.vision is None else self.vision.num_parameters
        return self.num_hidden_layers * layer + d + heads * self.vocab_size * d + vision


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
