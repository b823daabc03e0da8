"""Rows of a data set as tokens: which columns a row has says what is made of it.

Besides the columns of `data.records` a row may have `tools`, JSON schemas of functions, and
`chat_template_kwargs`, variables of the chat template, both also as JSON in a string; and `image`,
`images`, `video` or `videos`, for which `{"type": "image"}` and `{"type": "video"}` parts stand in
its messages. Where no part stands for them they come before the text of the user's first turn.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxrl_reason.data.chat import (
    Encoded,
    Message,
    Sides,
    Turns,
    as_messages,
    encode_completion,
    encode_everything,
    encode_prompt,
    split_conversation,
)
from jaxrl_reason.data.records import format_of
from jaxrl_reason.errors import InputError

if TYPE_CHECKING:
    from jaxrl_reason.data.tokenizer import PreTrainedTokenizerFast

_MEDIA = {"image": ("image", "images"), "video": ("video", "videos")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowEncoder:
    """Turns rows into tokens.

    Attributes:
        tokenizer: with a chat template, unless `plain`.
        template_kwargs: variables of the chat template; a row's own come before them.
        plain: prompts and completions are text and stay as they are; no template.
        assistant_only_loss: count only turns of the assistant.
        completion_only_loss: where a row has a prompt, count only what follows it.
    """

    tokenizer: "PreTrainedTokenizerFast"
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    plain: bool = False
    assistant_only_loss: bool = True
    completion_only_loss: bool = True

    def prompt(self, row: Mapping[str, Any]) -> list[int]:
        """Token ids of a row's prompt.

        Raises:
            InputError: as in `data.chat.encode_prompt`.
        """
        turns = with_media(row["prompt"], row)
        return encode_prompt(self.tokenizer, turns, **self._options(row))

    def supervised(self, row: Mapping[str, Any]) -> list[Encoded]:
        """Sequences of a row of `messages`, or of `prompt` and `completion`.

        Several, where the chat template changes earlier turns (`data.chat.split_conversation`).

        Raises:
            InputError: columns of another format, or as in `data.chat`.
        """
        name = format_of(row)
        if name not in ("messages", "prompt_completion"):
            raise InputError(
                f"got columns {', '.join(row)}; needed: messages, or prompt and completion"
            )
        options = self._options(row)
        if name == "messages":
            return self._conversation(with_media(row["messages"], row), 0, options)
        prompt, completion = with_media(row["prompt"], row), row["completion"]
        if self.completion_only_loss and (self.plain or not self.assistant_only_loss):
            begin, rest = encode_completion(self.tokenizer, prompt, completion, **options)
            return [Encoded(begin + rest, [False] * len(begin) + [True] * len(rest))]
        if self.plain:
            begin, rest = encode_completion(self.tokenizer, prompt, completion, **options)
            return [Encoded(begin + rest, [True] * len(begin + rest))]
        before, after = as_messages(prompt, "user"), as_messages(completion, "assistant")
        first = len(before) if self.completion_only_loss else 0
        return self._conversation([*before, *after], first, options)

    def preference(self, row: Mapping[str, Any]) -> tuple[Sides, Sides]:
        """Token ids of (prompt, chosen) and of (prompt, rejected).

        Raises:
            InputError: columns of another format, or as in `data.chat.encode_completion`.
        """
        prompt, chosen, rejected = split_pair(row)
        prompt, options = with_media(prompt, row), self._options(row)
        good, bad = (
            encode_completion(self.tokenizer, prompt, side, **options)
            for side in (chosen, rejected)
        )
        return good, bad

    def _conversation(
        self, messages: Turns, first: int, options: Mapping[str, Any]
    ) -> list[Encoded]:
        if isinstance(messages, str) or self.plain:
            raise InputError("messages need a chat template and must be a list of turns")
        options = {key: value for key, value in options.items() if key != "plain"}
        if self.assistant_only_loss:
            return split_conversation(self.tokenizer, messages, first=first, **options)
        return [encode_everything(self.tokenizer, messages, **options)]

    def _options(self, row: Mapping[str, Any]) -> dict[str, Any]:
        own = _parsed(row, "chat_template_kwargs", Mapping) or {}
        return {
            "tools": _parsed(row, "tools", Sequence),
            "template_kwargs": {**self.template_kwargs, **own},
            "plain": self.plain,
        }


def split_pair(row: Mapping[str, Any]) -> tuple[Turns, Turns, Turns]:
    """The prompt, chosen and rejected of a row, whose prompt may stand in the other two.

    Raises:
        InputError: chosen and rejected are equal, or share no prompt.
    """
    name = format_of(row)
    if name not in ("preference", "implicit_preference"):
        raise InputError(f"got columns {', '.join(row)}; needed: prompt, chosen, rejected")
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        raise InputError("chosen and rejected are equal, so there is nothing to prefer")
    turns = not isinstance(chosen, str) and not isinstance(rejected, str)
    # A prompt of text beside whole conversations says again what they begin with.
    if name == "preference" and not (turns and as_messages(chosen, "")[0]["role"] != "assistant"):
        return row["prompt"], chosen, rejected
    same = zip(chosen, rejected, strict=False)
    size = next((i for i, (a, b) in enumerate(same) if a != b), min(len(chosen), len(rejected)))
    if not turns and size and chosen[size - 1] == " ":
        size -= 1  # completions of text begin with their space
    prompt = chosen[:size]
    if not prompt or len(chosen) == size or len(rejected) == size:
        raise InputError(
            "chosen and rejected must begin with the same prompt and go on differently; give a "
            "column prompt"
        )
    return prompt, chosen[size:], rejected[size:]


def with_media(turns: Turns, row: Mapping[str, Any]) -> Turns:
    """Turns in which a part stands for every image and video of the row's columns.

    Raises:
        InputError: some stand in the turns already, but another number than the columns have.
    """
    for kind, columns in _MEDIA.items():
        given = len(media(row, kind))
        if not given or not any(row.get(column) is not None for column in columns):
            continue
        messages = as_messages(turns, "user")
        found = len(list(_parts(messages, kind)))
        if found and found != given:
            raise InputError(
                f"the row has {given} {kind}s but {found} parts of type {kind!r} in its turns; "
                "write one part for each, or none"
            )
        turns = messages if found else _with_parts(messages, kind, given)
    return turns


def media(row: Mapping[str, Any], kind: str) -> list[Any]:
    """A row's images (`kind="image"`) or videos: of its columns, else of its messages' parts."""
    for column in _MEDIA[kind]:
        value = row.get(column)
        if value is not None:
            return list(value) if column.endswith("s") else [value]
    columns = ("messages",) if "messages" in row else ("prompt", "completion")
    turns = [row[column] for column in columns if isinstance(row.get(column), list | tuple)]
    return [part[kind] for messages in turns for part in _parts(messages, kind) if kind in part]


def _parts(messages: Sequence[Message], kind: str) -> Iterator[Mapping[str, Any]]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            yield from (part for part in content if part.get("type") == kind)


def _with_parts(messages: list[Message], kind: str, count: int) -> list[Message]:
    at = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if at is None:
        raise InputError(f"the row has {kind}s but no turn of the user that they could stand in")
    content = messages[at]["content"]
    rest = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    changed = {**messages[at], "content": [{"type": kind}] * count + rest}
    return [*messages[:at], changed, *messages[at + 1 :]]


def _parsed(row: Mapping[str, Any], column: str, wanted: type) -> Any:
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(f"column {column!r} is text that is no JSON ({error.msg})") from error
    if value is not None and (isinstance(value, str) or not isinstance(value, wanted)):
        raise InputError(f"column {column!r} must be a {wanted.__name__.lower()} of JSON values")
    return value
