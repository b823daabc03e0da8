"""What the contestants built on transformers share: a random Qwen3 and a tokenizer of numbers."""

import os
from importlib.metadata import version

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from jaxrl_reason.bench.workloads import PAD_ID, Shape


def on_gpu() -> bool:
    """Whether there is an accelerator for the trainers to use."""
    return torch.cuda.is_available()


def model(shape: Shape) -> Qwen3ForCausalLM:
    """A model with random weights, initialised as transformers does."""
    if not on_gpu():
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    set_seed(0)
    config = Qwen3Config(
        **shape.fields,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    made = Qwen3ForCausalLM(config).to(getattr(torch, shape.dtype))
    return made.to("cuda") if on_gpu() else made


def tokenizer(shape: Shape, stops: list[int]) -> PreTrainedTokenizerFast:
    """Token ids as decimal numbers between spaces; without stop tokens, one that none can draw."""
    words = {str(i): i for i in range(shape.vocab_size)}
    if not stops:
        words["<stop>"] = shape.vocab_size
    inner = Tokenizer(models.WordLevel(words, unk_token=str(PAD_ID)))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=str(PAD_ID),
        eos_token=str(stops[0]) if stops else "<stop>",
        padding_side="left",
    )


def versions() -> dict:
    """What is being timed."""
    packages = ("torch", "transformers", "trl")
    return {name: version(name) for name in packages} | {"threads": torch.get_num_threads()}
