"""Tokenizers with the chat templates of published models."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
EOS = {
    "chatml": "<|endoftext|>",
    "chatml_marked": "<|endoftext|>",
    "llama3": "<|eot_id|>",
    **dict.fromkeys(("qwen2_5", "qwen2_5_vl", "qwen3"), "<|im_end|>"),
}
SPECIALS = [
    *("<bos>", "<eos>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>"),
    *("<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
# The splits of Qwen's and Llama's tokenizers, which join line ends.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = "the end\n\n of it.\n\nWhat is 2 + 2?\n\n The answer is the\n\n\n4.\n\n"


@pytest.fixture(scope="session")
def chat_backend() -> str:
    """A byte-level tokenizer with the special tokens of all families, as JSON."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT] * 20, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    backend.add_tokens([AddedToken(token) for token in TAGS])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    return backend.to_str()


@pytest.fixture(scope="session")
def make(chat_backend):
    """A tokenizer with the template of that name, or with a template's text."""

    def make(name=None, template=None, **options):
        specials = {"bos_token": "<bos>", "eos_token": EOS.get(name, "<eos>"), "pad_token": "<pad>"}
        if name is not None:
            template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(chat_backend),
            chat_template=template,
            **specials | options,
        )

    return make
