"""Tokenizers: built from a task's closed vocabulary, or loaded as published.

In one that is built a conversation is `<user> prompt <assistant> completion <eos>`; the completion
and its end marker stand inside the chat template's generation marks, so they are exactly the tokens
of the loss. At word level a token is a word or a single punctuation mark, white space carries no
meaning, and decoding joins tokens by spaces. At character level white space is kept, except next to
the tags.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from jaxrl_reason.errors import InputError

PAD, EOS, USER, ASSISTANT, UNKNOWN = "<pad>", "<eos>", "<user>", "<assistant>", "<unk>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TAG = re.compile(r"</?\w+>|\[\w+\]")
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
        words: the words and punctuation marks of the grammar, e.g. `task.words()`. An entry such
            as `<facts>`, `</facts>` or `[time]` is one token at either level.
        level: one token per word, or one per character of these words (plus space and newline).

    Raises:
        InputError: when a word would not be one token ("a,b"), or the level is unknown.
    """
    if level not in ("word", "character"):
        raise InputError(f"level={level!r} is unknown; use 'word' or 'character'")
    given = set(words)
    tags = {word for word in given if _TAG.fullmatch(word)}
    entries = given - tags
    if level == "word":
        splitter = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
        )
        for word in entries:
            if [piece for piece, _ in splitter.pre_tokenize_str(word)] != [word]:
                raise InputError(
                    f"vocabulary entry {word!r} is not a single token; give words and punctuation "
                    "marks separately"
                )
    else:
        splitter = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        entries = set("".join(entries)) | {" ", "\n"}
    vocabulary = [*SPECIALS, *sorted((entries | tags) - set(SPECIALS))]
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
    whole = [*TAGS, *sorted(tags - set(SPECIALS))]
    backend.add_tokens([AddedToken(tag, lstrip=True, rstrip=True) for tag in whole])
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


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write a plain Hugging Face tokenizer directory, chat template included."""
    tokenizer.save_pretrained(directory)


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, chat_template_path: str | Path | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer from a directory, without a network, or from the Hugging Face hub.

    Args:
        source: directory with a `tokenizer.json`, or hub id.
        revision: branch, tag or commit on the hub.
        chat_template_path: file with a Jinja template in place of the tokenizer's own.

    Raises:
        InputError: no such directory, file or repository, or a tokenizer without token offsets.
    """
    local = Path(source).is_dir()
    if not (Path(source) / "tokenizer.json").is_file() and (
        local or not _HUB_ID.fullmatch(str(source))
    ):
        raise InputError(f"no tokenizer.json in {source}; give a directory of a saved tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(source), local_files_only=local, revision=revision or "main"
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{source}: no tokenizer could be read: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"{source}: its tokenizer is a {type(tokenizer).__name__} without a tokenizer.json; "
            "convert it with transformers and save it"
        )
    if chat_template_path is not None:
        try:
            tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat_template_path={chat_template_path}: {error}") from error
    return tokenizer


def load_generation_config(source: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """The `generation_config.json` of a directory or of a hub id; empty where there is none."""
    path = cached_file(
        str(source),
        "generation_config.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
