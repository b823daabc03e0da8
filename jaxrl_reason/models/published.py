"""Shapes of published models, to plan a run or to train their architecture from scratch.

Facts of the configurations on the hub; `from_pretrained` reads those themselves. Where versions of
a size differ in rms_norm_eps or the longest sequence, these are the instruction-tuned ones.
"""

import dataclasses
import re
from typing import Any

from jaxrl_reason.models.config import ModelConfig, RopeScaling
from jaxrl_reason.models.vision_config import VisionConfig


def published(name: str, **changes: Any) -> ModelConfig:
    """A published model by name (one of `PUBLISHED`) with some fields changed.

    Raises:
        ValueError: the name is unknown, or a field is out of range.
        TypeError: a change names no field of `ModelConfig`.
    """
    if name not in _MODELS:
        raise ValueError(f"published model {name!r} is unknown; one of {', '.join(PUBLISHED)}")
    return dataclasses.replace(_MODELS[name], **changes)


def shape_of(repository: str) -> ModelConfig | None:
    """The model that a repository of the hub holds, if it is one of `PUBLISHED`.

    Args:
        repository: for example `Qwen/Qwen3-4B-Instruct-2507`; the words behind the size say how it
            was trained.
    """
    owner, _, name = repository.partition("/")
    if owner not in _OWNERS:
        return None
    name = re.sub(r"^(meta-)?llama-", "llama", re.sub(r"^gemma-", "gemma", name.lower()))
    name = re.sub(r"(-(base|instruct|thinking|chat|math|coder|it|pt|\d{4}))+$", "", name)
    return _MODELS.get(name.replace("-math-", "-"))


def _shape(letters: str) -> dict[str, Any]:
    """From D, F, L, N, K, H in this order."""
    sizes = map(int, letters.split())
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip((*names, "num_key_value_heads", "head_dim"), sizes, strict=True))


def _qwen2_5(letters: str, **fields: Any) -> ModelConfig:
    return ModelConfig(
        **_shape(letters),
        **{
            "vocab_size": 152_064,
            "max_position_embeddings": 32_768,
            "rope_theta": 1e6,
            "qk_norm": False,
            "qkv_bias": True,
            "tie_word_embeddings": False,
            **fields,
        },
    )


def _qwen3(letters: str, **fields: Any) -> ModelConfig:
    return ModelConfig(
        **_shape(letters),
        **{
            "vocab_size": 151_936,
            "max_position_embeddings": 40_960,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            **fields,
        },
    )


def _llama3(letters: str, *, factor: float, tied: bool) -> ModelConfig:
    return ModelConfig(
        **_shape(letters),
        vocab_size=128_256,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(rope_type="llama3", factor=factor),
        rms_norm_eps=1e-5,
        qk_norm=False,
        tie_word_embeddings=tied,
    )


def _gemma3(letters: str, **fields: Any) -> ModelConfig:
    shape = _shape(letters)
    kinds = ("sliding_attention",) * 5 + ("full_attention",)
    count = shape["num_hidden_layers"]
    return ModelConfig(
        **shape,
        **{
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "rope_theta": 1e6,
            "rope_local_theta": 10_000.0,
            "rope_scaling": RopeScaling(rope_type="linear", factor=8.0),
            "sliding_window": 1024,
            "layer_types": (kinds * count)[:count],
            "hidden_act": "gelu_tanh",
            "sandwich_norms": True,
            "rms_norm_offset": True,
            "scale_embeddings": True,
            **fields,
        },
    )


def _qwen2_5_vl(letters: str, *, vision_width: int = 3420, **fields: Any) -> ModelConfig:
    decoder = _qwen2_5(letters, max_position_embeddings=128_000, mrope_section=(16, 24, 24))
    vision = VisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=vision_width,
        num_heads=16,
        out_hidden_size=decoder.hidden_size,
        window_size=112,
        fullatt_block_indexes=(7, 15, 23, 31),
        tokens_per_second=2,
    )
    return dataclasses.replace(decoder, vision=vision, **fields)


def _qwen3_vl(letters: str, *, deepstack: tuple[int, ...], vision: str, **fields: Any):
    """`vision` is the depth, the width and the MLP width of the encoder."""
    decoder = _qwen3(
        letters,
        max_position_embeddings=262_144,
        rope_theta=5e6,
        mrope_section=(24, 20, 20),
        mrope_interleaved=True,
        **fields,
    )
    depth, width, wide = map(int, vision.split())
    encoder = VisionConfig(
        depth=depth,
        hidden_size=width,
        intermediate_size=wide,
        num_heads=16,
        out_hidden_size=decoder.hidden_size,
        patch_size=16,
        hidden_act="gelu_tanh",
        norm="layer",
        gated_mlp=False,
        patch_bias=True,
        num_position_embeddings=2304,
        deepstack_visual_indexes=deepstack,
    )
    return dataclasses.replace(decoder, vision=encoder)


_SMALL_QWEN: dict[str, Any] = {"vocab_size": 151_936, "tie_word_embeddings": True}

_MODELS: dict[str, ModelConfig] = {
    #                                   D    F  L  N  K  H
    "qwen2.5-0.5b": _qwen2_5("        896 4864 24 14 2  64", **_SMALL_QWEN),
    "qwen2.5-1.5b": _qwen2_5("       1536 8960 28 12 2 128", **_SMALL_QWEN),
    "qwen2.5-3b": _qwen2_5("        2048 11008 36 16 2 128", **_SMALL_QWEN),
    "qwen2.5-7b": _qwen2_5("        3584 18944 28 28 4 128"),
    "qwen2.5-14b": _qwen2_5("       5120 13824 48 40 8 128"),
    "qwen2.5-32b": _qwen2_5("       5120 27648 64 40 8 128"),
    "qwen2.5-72b": _qwen2_5("       8192 29568 80 64 8 128"),
    "qwen3-0.6b": _qwen3("           1024 3072 28 16 8 128", tie_word_embeddings=True),
    "qwen3-1.7b": _qwen3("           2048 6144 28 16 8 128", tie_word_embeddings=True),
    "qwen3-4b": _qwen3("             2560 9728 36 32 8 128", tie_word_embeddings=True),
    "qwen3-8b": _qwen3("            4096 12288 36 32 8 128"),
    "qwen3-14b": _qwen3("           5120 17408 40 40 8 128"),
    "qwen3-32b": _qwen3("           5120 25600 64 64 8 128"),
    "qwen3-30b-a3b": _qwen3(
        "                            2048 6144 48 32 4 128",
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        router_aux_loss_coef=0.001,
    ),
    "llama3.2-1b": _llama3("         2048 8192 16 32 8  64", factor=32.0, tied=True),
    "llama3.2-3b": _llama3("         3072 8192 28 24 8 128", factor=32.0, tied=True),
    "llama3.1-8b": _llama3("        4096 14336 32 32 8 128", factor=8.0, tied=False),
    "llama3.1-70b": _llama3("       8192 28672 80 64 8 128", factor=8.0, tied=False),
    "gemma3-1b": _gemma3(
        "                            1152 6912 26  4 1 256",
        vocab_size=262_144,
        max_position_embeddings=32_768,
        rope_scaling=None,
        sliding_window=512,
    ),
    "gemma3-4b": _gemma3("          2560 10240 34  8 4 256"),
    "gemma3-12b": _gemma3("         3840 15360 48 16 8 256"),
    "gemma3-27b": _gemma3("        5376 21504 62 32 16 128", query_pre_attn_scalar=168.0),
    "qwen2.5-vl-3b": _qwen2_5_vl("  2048 11008 36 16 2 128", **_SMALL_QWEN),
    "qwen2.5-vl-7b": _qwen2_5_vl("  3584 18944 28 28 4 128"),
    "qwen2.5-vl-72b": _qwen2_5_vl(" 8192 29568 80 64 8 128", vision_width=3456),
    "qwen3-vl-4b": _qwen3_vl(
        "                            2560 9728 36 32 8 128",
        vision="24 1024 4096",
        deepstack=(5, 11, 17),
        tie_word_embeddings=True,
    ),
    "qwen3-vl-8b": _qwen3_vl(
        "                           4096 12288 36 32 8 128",
        vision="27 1152 4304",
        deepstack=(8, 16, 24),
    ),
}
PUBLISHED = tuple(_MODELS)
_OWNERS = ("Qwen", "google", "meta-llama")
