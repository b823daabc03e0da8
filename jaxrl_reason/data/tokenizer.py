"""Tokenizers built from a task's closed vocabulary, and the one way text becomes tokens and back.

A conversation is `<user> prompt <assistant> completion <eos>`; the completion and its end marker
stand inside the chat template's generation marks, so they are exactly the tokens of the loss. At
word level a token is a word or a single punctuation mark, white space carries no meaning, and
decoding joins tokens by spaces. At character level white space is kept, except next to the tags.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxrl_reason.errors import InputError

PAD, EOS, USER, ASSISTANT, UNKNOWN = "<pad>", "<eos>", "<user>", "<assistant>", "<unk>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SPECIALS = (PAD, EOS, USER, ASSISTANT, *TAGS, UNKNOWN)

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user>{{ message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}<assistant>"
    "{% generation %}{{ message['content'] | trim }}<eos>{% endgeneration %}"
    "{% else %}{{ raise_exception('roles are user and assistant, not ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(
    words: Iterable[str], *, level: Literal["word", "character"] = "word"
) -> PreTrainedTokenizerFast:
    """Make a tokenizer for a closed vocabulary; ids are specials first, then sorted entries.

    Args:
        words: the words and punctuation marks of the grammar, e.g. `task.words()`.
        level: one token per word, or one per character of these words (plus space and newline).

    Raises:
        InputError: when a word would not be one token ("a,b"), or the level is unknown.
    """
    if level not in ("word", "character"):
        raise InputError(f"level={level!r} is unknown; use 'word' or 'character'")
    if level == "word":
        splitter = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
        )
        entries = set(words)
        for word in entries:
            if [piece for piece, _ in splitter.pre_tokenize_str(word)] != [word]:
                raise InputError(
                    f"vocabulary entry {word!r} is not a single token; give words and punctuation "
                    "marks separately"
                )
    else:
        splitter = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        entries = set("".join(words)) | {" ", "\n"}
    vocabulary = [*SPECIALS, *sorted(entries - set(SPECIALS))]
    ids = {token: index for index, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = splitter
    if level == "character":
        backend.decoder = decoders.Fuse()
    # Stripping makes `<think> 4 </think>` and `<think>4</think>` the same tokens at either level.
    backend.add_special_tokens(
        [AddedToken(token, lstrip=True, rstrip=True) for token in SPECIALS if token not in TAGS]
    )
    # The tags are not "special": skipping special tokens must not remove the format.
    backend.add_tokens([AddedToken(tag, lstrip=True, rstrip=True) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def render_prompt(tokenizer: PreTrainedTokenizerFast, prompt_text: str) -> list[int]:
    """Tokens of the user's turn and of the marker after which the model speaks."""
    _check_text(tokenizer, prompt_text)
    turn = [{"role": "user", "content": prompt_text}]
    tokens = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    return cast(list[int], tokens)


def render_completion(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Tokens of a completion and its end marker: what follows `render_prompt` in a conversation."""
    return [*_check_text(tokenizer, text), cast(int, tokenizer.eos_token_id)]


def decode_completion(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """Text of sampled tokens up to the first end marker; padding is dropped, all else is kept."""
    kept = []
    for token in ids:
        if token == tokenizer.eos_token_id:
            break
        if token != tokenizer.pad_token_id:
            kept.append(int(token))
    return cast(str, tokenizer.decode(kept, skip_special_tokens=False))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write a plain Hugging Face tokenizer directory, chat template included."""
    tokenizer.save_pretrained(directory)


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """Read what `save_tokenizer` wrote; never looks anything up on a network."""
    if not (Path(directory) / "tokenizer.json").is_file():
        raise InputError(f"no tokenizer.json in {directory}; give a directory of a saved tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)


@functools.lru_cache(maxsize=8)
def _markers(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    return tuple(tokenizer.all_special_tokens)


def _check_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Tokens of a text; refuses one that forges a turn or that the vocabulary cannot express."""
    for marker in _markers(tokenizer):
        if marker in text:
            raise InputError(f"the text contains the marker {marker!r}; remove it: {text[:80]!r}")
    text = text.strip()
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in encoding.ids:
        return encoding.ids
    for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if token == tokenizer.unk_token_id:
            raise InputError(
                f"the word {text[start:end]!r} is not in the tokenizer's vocabulary of "
                f"{len(tokenizer)} entries; use the words of the task, or another tokenizer"
            )
    return encoding.ids
