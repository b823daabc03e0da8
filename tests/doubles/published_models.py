"""Directories of published models in Hugging Face's format: tiny ones with random weights."""

from pathlib import Path

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxrl_reason.data.vision import VisionProcessorConfig, write_vision_processor
from jaxrl_reason.models import Model, ModelConfig
from jaxrl_reason.models.config import RopeScaling
from jaxrl_reason.models.convert import save_pretrained
from jaxrl_reason.models.vision_config import VisionConfig

VISUAL_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif p['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}
TOWER = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 32,
}
CONFIGS = {
    "qwen3": ModelConfig(**TEXT),
    "qwen2": ModelConfig(**TEXT, qk_norm=False, qkv_bias=True),
    "qwen3_moe": ModelConfig(
        **TEXT,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=False,
    ),
    "llama": ModelConfig(
        **TEXT,
        qk_norm=False,
        rope_scaling=RopeScaling(
            rope_type="llama3", factor=8.0, original_max_position_embeddings=64
        ),
    ),
    "mistral": ModelConfig(**TEXT, qk_norm=False, tie_word_embeddings=False, sliding_window=16),
    "gemma3": ModelConfig(
        **TEXT,
        sliding_window=16,
        layer_types=("sliding_attention", "full_attention"),
        rope_theta=1_000_000.0,
        rope_local_theta=10_000.0,
        query_pre_attn_scalar=8.0,
        sandwich_norms=True,
        rms_norm_offset=True,
        scale_embeddings=True,
        hidden_act="gelu_tanh",
    ),
    "qwen2_5_vl": ModelConfig(
        **TEXT,
        qk_norm=False,
        qkv_bias=True,
        tie_word_embeddings=False,
        mrope_section=(2, 1, 1),
        vision=VisionConfig(
            **TOWER, window_size=56, fullatt_block_indexes=(1,), tokens_per_second=2
        ),
    ),
    "qwen3_vl": ModelConfig(
        **TEXT,
        mrope_section=(2, 1, 1),
        mrope_interleaved=True,
        vision=VisionConfig(
            **TOWER,
            patch_size=16,
            norm="layer",
            gated_mlp=False,
            patch_bias=True,
            hidden_act="gelu_tanh",
            num_position_embeddings=16,
            deepstack_visual_indexes=(0, 1),
        ),
    ),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and Qwen's special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([*ends, *VISUAL_TOKENS.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def make_directory(directory: Path, family: str) -> Path:
    """A directory of a model of a family."""
    model, tokenizer = Model(CONFIGS[family]), byte_tokenizer()
    params = jax.jit(model.init)(jax.random.key(0))
    save_pretrained(model, params, directory, tokenizer=tokenizer, check=False)
    if model.config.vision is not None:
        ids = {name: tokenizer.convert_tokens_to_ids(x) for name, x in VISUAL_TOKENS.items()}
        write_vision_processor(_processor(family, model.config.vision, ids), directory)
    return directory


def _processor(family: str, vision: VisionConfig, ids: dict[str, int]) -> VisionProcessorConfig:
    return VisionProcessorConfig(
        family=family,
        patch_size=vision.patch_size,
        temporal_patch_size=2,
        merge_size=2,
        min_pixels=28 * 28,
        max_pixels=64 * 64,
        video_min_pixels=28 * 28,
        video_max_pixels=64 * 64 if family == "qwen2_5_vl" else 64 * 64 * 8,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        do_sample_frames=True,
        fps=2.0,
        num_frames=None,
        min_frames=4,
        max_frames=8,
        cap_pixels_per_frame=False,
        max_video_tokens=16384,
        window_size=vision.window_size,
        tokens_per_second=vision.tokens_per_second,
        **ids,
    )
