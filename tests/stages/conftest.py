"""One small run of four stages, made once and read by many tests."""

import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxrl_reason import stages
from jaxrl_reason.cli import main
from jaxrl_reason.config import Config, validate
from jaxrl_reason.data.vision import VisionProcessorConfig, write_vision_processor
from jaxrl_reason.models import Model, ModelConfig
from jaxrl_reason.models.config import RopeScaling
from jaxrl_reason.models.convert import save_pretrained
from jaxrl_reason.models.vision_config import VisionConfig
from jaxrl_reason.sampling import SamplingConfig
from jaxrl_reason.sharding import MeshConfig
from jaxrl_reason.stages import dpo, pipeline
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.context import Context
from jaxrl_reason.steps import OptimizerConfig

TINY = (Path(__file__).parents[1] / "tiny_run.yaml").read_text(encoding="utf-8")
CONFIG = (
    TINY
    + """
name: four
stages:
  cold:
    kind: sft
    steps: 60
    batch_size: 8
    max_length: 40
    data: {kind: traces, num_examples: 64, styles: {answer: 1.0}}
    optimizer: {learning_rate: 2.0e-2}
    save_steps: 20
  prefer:
    kind: dpo
    parent: cold
    steps: 5
    batch_size: 8
    max_length: 32
    data: {kind: sampled, num_prompts: 16, num_generations: 8}
    optimizer: {learning_rate: 1.0e-3}
    save_steps: 2
  reason:
    kind: grpo
    parent: prefer
    steps: 5
    prompts_per_step: 16
    num_generations: 8
    max_completion_length: 12
    num_iterations: 2
    beta: 0.05
    rewards: [{kind: accuracy}, {kind: format, weight: 0.5}]
    optimizer: {learning_rate: 1.0e-2}
    save_steps: 2
  balance:
    kind: morl
    parent: reason
    steps: 5
    prompts_per_step: 16
    num_generations: 8
    max_completion_length: 12
    aggregator_options: {min_std: 0.01}
    rewards:
      - {kind: accuracy}
      - {kind: format}
      - {kind: length, low: 4, high: 12}
      - {kind: python, name: ones, function: "rewards_of_tests:ones"}
    optimizer: {learning_rate: 1.0e-2}
    save_steps: 2
  ahead:
    kind: grpo
    parent: balance
    steps: 5
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 12
    max_staleness: 1
    reward_workers: 1
    mask_truncated_completions: true
    epsilon: 0.1
    mismatch: {threshold: 1.0e-9}
    rewards:
      - {kind: accuracy}
      - {kind: python, name: ones, function: "rewards_of_tests:ones", scope: group}
      - {kind: python, name: asked, function: "rewards_of_tests:asked", scope: completion}
    optimizer: {learning_rate: 1.0e-2}
    save_steps: 2
  refill:
    kind: grpo
    parent: ahead
    steps: 5
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 12
    dynamic_sampling: {max_batches: 3, metric: accuracy}
    rewards:
      - {kind: accuracy}
      - {kind: overlong, cache: 6, weight: 0.1}
    optimizer: {learning_rate: 1.0e-3}
    save_steps: 2
"""
)

REWARDS = '''
"""Reward functions of a user's."""

import math


def ones(prompts, completions, *, problem, **_):
    """Share of ones in the completion; says nothing about problems of one step."""
    return [
        text.split().count("1") / 8 if p.columns["difficulty"] > 1 else None
        for text, p in zip(completions, problem, strict=True)
    ]


async def asked(prompts, completions, **_):
    return [float(text.endswith("</answer>")) for text in completions]


def variety(prompts, completions, **_):
    """Differs between completions of any model."""
    return [float(len(set(text))) for text in completions]


def short_list(prompts, completions, **_):
    return [1.0] * (len(completions) - 1)


def not_a_number(prompts, completions, **_):
    return [math.nan] * len(completions)
'''


class Run(NamedTuple):
    """A finished run and how it was made."""

    yaml: Path
    config: RunConfig
    directory: Path
    reference_calls: int
    """How often the DPO stage computed its reference log-probs."""
    reads: dict[str, set[str]]
    """For each class of configuration, the fields that the pipeline read once it was valid."""


@contextlib.contextmanager
def watched_reads() -> Iterator[dict[str, set[str]]]:
    """Collects which fields of which configuration the package reads."""
    reads: dict[str, set[str]] = defaultdict(set)
    inside = str(Path(stages.__file__).parents[1])

    def watch(cls, patch):
        plain = cls.__getattribute__

        def read(self, name):
            caller = sys._getframe(1).f_code
            if caller.co_filename.startswith(inside) and caller.co_name != "__post_init__":
                reads[type(self).__name__].add(name)
            return plain(self, name)

        patch.setattr(cls, "__getattribute__", read)

    with pytest.MonkeyPatch.context() as patch:
        for cls in (Config, MeshConfig, ModelConfig, OptimizerConfig, SamplingConfig):
            watch(cls, patch)
        yield reads


@pytest.fixture(scope="session")
def rewards_folder(tmp_path_factory) -> Path:
    """A folder with `rewards_of_tests.py`, importable while the tests run."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "rewards_of_tests.py").write_text(REWARDS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="session")
def tiny() -> dict:
    """The configuration of the run as plain values, to be changed."""
    return yaml.safe_load(CONFIG)


@pytest.fixture(scope="session")
def make_context(tiny, rewards_folder):
    """A context of the configuration with other top-level keys, in a folder of one's own."""

    def make(folder: Path, **changes) -> Context:
        raw = json.loads(json.dumps(tiny)) | {"output_dir": str(folder)} | changes
        return Context.create(validate(RunConfig, raw, "test"))

    return make


@pytest.fixture(scope="session")
def four(tmp_path_factory, rewards_folder) -> Run:
    """The finished run."""
    folder = tmp_path_factory.mktemp("four")
    path = folder / "four.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    calls, reads = [], {}
    reference_logprobs, run = dpo.reference_logprobs, pipeline.run

    def watched_run(*given, **options):
        with watched_reads() as seen:
            rows = run(*given, **options)
        reads.update(seen)
        return rows

    with pytest.MonkeyPatch.context() as patch:
        counted = lambda *given: calls.append(1) or reference_logprobs(*given)
        patch.setattr(dpo, "reference_logprobs", counted)
        patch.setattr(pipeline, "run", watched_run)
        code = main(["run", str(path), f"output_dir={folder}"])
    assert code == 0
    config = RunConfig.load(path, [f"output_dir={folder}"])
    return Run(path, config, folder / "four", len(calls), reads)


# Published models

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


@pytest.fixture(scope="session")
def directories(tmp_path_factory) -> dict[str, Path]:
    """A directory of each family, in Hugging Face's format with random weights."""
    folder = tmp_path_factory.mktemp("published")
    return {family: make_directory(folder / family, family) for family in CONFIGS}
