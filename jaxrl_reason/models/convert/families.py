"""Hugging Face configurations and `ModelConfig`, both ways, for every family that is supported.

A family is a `model_type` of transformers. Reading refuses what the decoder does not do, naming the
field. Writing picks the family that has the features of a model, reads its own result back, and
refuses where that is another model.
"""

import dataclasses
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from jaxrl_reason.errors import InputError
from jaxrl_reason.models.config import ModelConfig, RopeScaling
from jaxrl_reason.models.vision_names import vision_config_from_hf, vision_config_to_hf

TEXT_FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "gemma3_text")
VISION_FAMILIES = ("qwen2_5_vl", "qwen3_vl")
FAMILIES = (*TEXT_FAMILIES, "gemma3", *VISION_FAMILIES)
"""Values of `model_type` that can be read; of `gemma3` the decoder alone, without its images."""

_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
)
"""Fields that mean the same on both sides."""
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_EXPERTS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "router_aux_loss_coef",
)
_FIELDS = dataclasses.fields(ModelConfig)
_RUNNING = ("dtype", "param_dtype", "remat", "attention", "lora", "freeze")
"""Fields of `ModelConfig` that are no part of a published model."""


# In


def read_config(hf: PretrainedConfig) -> ModelConfig:
    """The model of a Hugging Face configuration, to compute and store in float32.

    Raises:
        InputError: the family is not supported, or a setting of it is not.
    """
    family = hf.model_type
    if family not in FAMILIES:
        raise InputError(f"model_type={family!r} is not supported; one of {', '.join(FAMILIES)}")
    try:
        return _canonical(_read(hf))
    except InputError:
        raise
    except ValueError as error:  # of our own configurations
        raise InputError(f"this {family} model is not supported: {error}") from error


def _read(hf: PretrainedConfig) -> ModelConfig:
    family, text = hf.model_type, hf.get_text_config()
    _refuse_unsupported(text)
    heads = text.num_attention_heads
    fields = {name: getattr(text, name) for name in _SAME}
    fields["head_dim"] = getattr(text, "head_dim", None) or text.hidden_size // heads
    fields["tie_word_embeddings"] = bool(hf.tie_word_embeddings)
    gemma = family.startswith("gemma3")
    activation = text.hidden_activation if gemma else text.hidden_act
    fields["hidden_act"] = _ACTIVATIONS[activation]
    fields["qk_norm"] = gemma or family.startswith("qwen3")
    fields["qkv_bias"] = family.startswith("qwen2")
    fields |= _read_windows(text)
    fields |= _read_rope(text)
    if gemma:
        fields |= {"sandwich_norms": True, "rms_norm_offset": True, "scale_embeddings": True}
        fields["query_pre_attn_scalar"] = float(text.query_pre_attn_scalar)
    if family == "qwen3_moe":
        fields |= {name: getattr(text, name) for name in _EXPERTS}
    if family in VISION_FAMILIES:
        fields["vision"] = vision_config_from_hf(hf.vision_config.to_dict())
    return ModelConfig(**fields)


def _refuse_unsupported(text: PretrainedConfig) -> None:
    """Raises InputError with every setting that the decoder does not do."""
    expected = {
        "attention_bias": False,
        "mlp_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    problems = [
        f"{name}={getattr(text, name)!r} (only {value!r} is supported)"
        for name, value in expected.items()
        if (getattr(text, name, value) or value) != value
    ]
    name = "hidden_activation" if hasattr(text, "hidden_activation") else "hidden_act"
    if getattr(text, name) not in _ACTIVATIONS:
        problems.append(f"{name}={getattr(text, name)!r} (one of {', '.join(_ACTIVATIONS)})")
    if problems:
        raise InputError(f"this {text.model_type} model is not supported: {'; '.join(problems)}")


def _read_windows(text: PretrainedConfig) -> dict[str, Any]:
    size = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if text.model_type in ("mistral", "qwen3_moe"):
        kinds = None  # transformers gives these one mask for all layers
    return {"sliding_window": size, "layer_types": tuple(kinds or ())}


def _read_rope(text: PretrainedConfig) -> dict[str, Any]:
    rope = text.rope_parameters
    full = rope.get("full_attention") or rope
    scaling = _read_scaling(full)
    fields = {"rope_theta": float(full["rope_theta"]), "rope_scaling": scaling}
    sliding = rope.get("sliding_attention")
    if sliding is not None and sliding != full:
        if _read_scaling(sliding) is not None:
            raise InputError(
                f"rope_parameters of sliding_attention are {sliding}; there only rope_type "
                "'default' is supported, or the same as in full_attention"
            )
        fields["rope_local_theta"] = float(sliding["rope_theta"])
    if full.get("mrope_section"):
        fields["mrope_section"] = tuple(full["mrope_section"])
        # transformers interleaves the sections of every Qwen3-VL, whatever this entry says.
        fields["mrope_interleaved"] = text.model_type == "qwen3_vl_text"
    return fields


def _read_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"partial_rotary_factor={rope['partial_rotary_factor']} in rope_parameters is not "
            "supported; only 1.0 is"
        )
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(rope_type="linear", factor=float(rope["factor"]))
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return RopeScaling(
            rope_type="llama3",
            original_max_position_embeddings=rope["original_max_position_embeddings"],
            **{name: float(rope[name]) for name in names},
        )
    raise InputError(
        f"rope_type={kind!r} in rope_parameters is not supported; one of default, linear, llama3"
    )


# Out


def family_of(config: ModelConfig) -> str:
    """The `model_type` whose features the model has."""
    if config.vision is not None:
        return "qwen3_vl" if config.mrope_interleaved else "qwen2_5_vl"
    if config.sandwich_norms:
        return "gemma3_text"
    if config.num_experts:
        return "qwen3_moe"
    if config.qkv_bias:
        return "qwen2"
    if config.qk_norm:
        return "qwen3"
    return "mistral" if any(config.sliding_layers) else "llama"


def write_config(config: ModelConfig, like: PretrainedConfig | None = None) -> PretrainedConfig:
    """The Hugging Face configuration of a model.

    Args:
        config: of the model.
        like: a configuration of the same family whose other entries, such as token ids, are kept.

    Raises:
        InputError: no published family is this model, or `like` is of another one.
    """
    family = family_of(config)
    config = _canonical(config)
    text = _write_text(config, family)
    if like is not None and like.model_type == "gemma3":
        like = like.get_text_config()
    if like is not None and like.model_type != family:
        raise InputError(
            f"the model is of family {family} and cannot be written like one of {like.model_type}"
        )
    entries = {} if like is None else like.to_dict()
    entries.pop("model_type", None)
    if config.vision is None:
        entries |= text
    else:
        vision = vision_config_to_hf(config.vision)
        entries["text_config"] = entries.get("text_config", {}) | text
        entries["vision_config"] = entries.get("vision_config", {}) | vision
        entries["tie_word_embeddings"] = config.tie_word_embeddings
    entries["architectures"] = [_ARCHITECTURES[family]]
    written = AutoConfig.for_model(family, **entries)
    _check_same(config, read_config(written), family)
    return written


def _write_text(config: ModelConfig, family: str) -> dict[str, Any]:
    c = config
    text = {name: getattr(c, name) for name in _SAME}
    text["tie_word_embeddings"] = c.tie_word_embeddings
    act = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[c.hidden_act]
    text["hidden_activation" if family == "gemma3_text" else "hidden_act"] = act
    if not family.startswith("qwen2") or c.head_dim * c.num_attention_heads != c.hidden_size:
        text["head_dim"] = c.head_dim
    text["rope_parameters"] = _write_rope(c, family)
    if family in ("qwen2", "qwen3", "qwen2_5_vl"):
        slides = any(c.sliding_layers)
        text["use_sliding_window"] = slides
        text["max_window_layers"] = (*c.sliding_layers, True).index(True)
        text["sliding_window"] = c.sliding_window
        text["layer_types"] = _layer_types(c)
    if family in ("qwen3_moe", "mistral"):
        text["sliding_window"] = c.sliding_window
    if family == "gemma3_text":
        text["sliding_window"] = c.sliding_window
        text["layer_types"] = _layer_types(c)
        scalar = c.query_pre_attn_scalar or c.head_dim
        text["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
    if family == "qwen3_moe":
        text["use_sliding_window"] = c.sliding_window is not None
        text |= {name: getattr(c, name) for name in _EXPERTS}
    return text


def _layer_types(config: ModelConfig) -> list[str]:
    return [f"{'sliding' if slides else 'full'}_attention" for slides in config.sliding_layers]


def _write_rope(config: ModelConfig, family: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling is not None and scaling.rope_type == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {name: getattr(scaling, name) for name in names}
    if config.mrope_section:
        rope["mrope_section"] = list(config.mrope_section)
    if config.mrope_interleaved:
        rope["mrope_interleaved"] = True
    if family != "gemma3_text":
        return rope
    local = {"rope_type": "default", "rope_theta": config.rope_local_theta}
    sliding = dict(rope) if config.rope_local_theta is None else local
    return {"full_attention": rope, "sliding_attention": sliding}


def _canonical(config: ModelConfig) -> ModelConfig:
    """The same model with one way to say it."""
    slides = config.sliding_layers
    changes: dict[str, Any] = {}
    if not any(slides):
        changes |= {"sliding_window": None, "layer_types": (), "rope_local_theta": None}
    elif all(slides):
        changes |= {"layer_types": ()}
    if config.query_pre_attn_scalar == config.head_dim:
        changes["query_pre_attn_scalar"] = None
    if config.rope_local_theta == config.rope_theta and config.rope_scaling is None:
        changes["rope_local_theta"] = None
    if not config.num_experts:
        changes |= {field.name: field.default for field in _FIELDS if field.name in _EXPERTS}
    return dataclasses.replace(config, **changes)


def _check_same(config: ModelConfig, read: ModelConfig, family: str) -> None:
    """Raises InputError where what was written is another model."""
    ours, theirs = dataclasses.asdict(config), dataclasses.asdict(read)
    different = [
        f"{name}={ours[name]!r} (there {theirs[name]!r})"
        for name in ours
        if name not in _RUNNING and ours[name] != theirs[name]
    ]
    if different:
        raise InputError(
            f"no published family has this model; the nearest is {family}, which differs in "
            + ", ".join(different)
        )
