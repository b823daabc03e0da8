"""A small model from random weights that sees films: its directory, for `model.path`.

    python -m jaxrl_reason.papers.factum_film runs/film_model

The encoder is that of Qwen2.5-VL, whose positions say when a frame is, so that times need no text.
A film of 12 frames of 32 x 32 pixels becomes 96 tokens: 6 pairs of frames of 4 x 4.
"""

import dataclasses
import sys
from pathlib import Path

import jax

from jaxrl_reason.data.tokenizer import PreTrainedTokenizerFast, build_tokenizer
from jaxrl_reason.data.vision import VisionProcessorConfig, write_vision_processor
from jaxrl_reason.models import Model, preset
from jaxrl_reason.models.convert import save_pretrained
from jaxrl_reason.models.vision_config import VisionConfig
from jaxrl_reason.papers.factum import FactsFirst

PATCH, MERGE = 4, 2
SIZE = 32
"""Height and width of a frame in pixels."""
_FRAMES = 128  # most of a film
_PADS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_TEXT = "{{ message['content'] | trim }}"
_PARTS = (
    "{% if message['content'] is string %}" + _TEXT + "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
)


def make_film_model(directory: Path, *, size: str = "0.7m", seed: int = 0) -> Path:
    """Write the directory of an untrained model that knows the words of `FactsFirst`.

    Args:
        directory: must not exist yet, or be empty.
        size: preset of the decoder.
        seed: of the weights.
    """
    tokenizer = _tokenizer()
    base = preset(size, vocab_size=-(-len(tokenizer) // 8) * 8, max_position_embeddings=512)
    quarter = base.head_dim // 8
    config = dataclasses.replace(
        base,
        qk_norm=False,
        qkv_bias=True,
        tie_word_embeddings=False,
        mrope_section=(2 * quarter, quarter, quarter),
        vision=VisionConfig(
            depth=2,
            hidden_size=64,
            intermediate_size=176,
            num_heads=4,
            out_hidden_size=base.hidden_size,
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            window_size=SIZE,
            fullatt_block_indexes=(0, 1),
            tokens_per_second=2,
        ),
    )
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(seed))
    save_pretrained(model, params, directory, tokenizer=tokenizer, check=False)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _PADS.items()}
    write_vision_processor(_processor(ids), directory)
    return directory


def _tokenizer() -> PreTrainedTokenizerFast:
    """That of the task, with a template that puts a film before the question."""
    tokenizer = build_tokenizer(FactsFirst().words())
    tokenizer.add_tokens(list(_PADS.values()), special_tokens=True)
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = template.replace(f"<user>{_TEXT}", f"<user>{_PARTS}")
    return tokenizer


def _processor(ids: dict[str, int]) -> VisionProcessorConfig:
    return VisionProcessorConfig(
        family="qwen2_5_vl",
        patch_size=PATCH,
        temporal_patch_size=2,
        merge_size=MERGE,
        min_pixels=SIZE**2,
        max_pixels=SIZE**2,
        video_min_pixels=SIZE**2,
        video_max_pixels=SIZE**2,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        do_sample_frames=False,
        fps=None,
        num_frames=None,
        min_frames=2,
        max_frames=_FRAMES,
        cap_pixels_per_frame=False,
        max_video_tokens=_FRAMES * (SIZE // PATCH) ** 2,
        window_size=SIZE,
        tokens_per_second=2,
        **ids,
    )


if __name__ == "__main__":
    make_film_model(Path(sys.argv[1]))
