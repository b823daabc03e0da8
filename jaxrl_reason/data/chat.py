"""Conversations as tokens, by the tokenizer's own chat template.

A turn of the assistant counts in the loss from the first token behind the generation prompt to its
end of turn token, which is what the model has to write when it is asked. Templates that mark these
tokens with `{% generation %}` say so themselves. For others every such turn is rendered twice, with
what comes before it as a prompt and with itself, and the one must continue the other, token by
token. What a template writes behind an end of turn is never generated and is left out.

Without a template, `plain=True` takes a prompt's text, a completion's text and the end marker.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from jaxrl_reason.errors import InputError

if TYPE_CHECKING:
    from jaxrl_reason.data.tokenizer import PreTrainedTokenizerFast

Message = Mapping[str, Any]
Turns = str | Sequence[Message]
"""Text of one turn, or messages `{"role": ..., "content": text or parts}`."""
Tools = Sequence[Mapping[str, Any]]
Sides = tuple[list[int], list[int]]
"""Token ids of a prompt and of what follows it."""

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE, _ROLES = "probe", ("user", "assistant")


class Encoded(NamedTuple):
    """Token ids of a conversation, and which of them count in the loss."""

    ids: list[int]
    mask: list[bool]


def encode_prompt(
    tokenizer: "PreTrainedTokenizerFast",
    prompt: Turns,
    *,
    tools: Tools | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    plain: bool = False,
) -> list[int]:
    """Token ids after which the model speaks.

    Args:
        tokenizer: with a chat template, unless `plain`.
        prompt: the user's turn, or all turns so far.
        tools: JSON schemas of functions that the model may call.
        template_kwargs: further variables of the template, for example `enable_thinking`.
        plain: the prompt is text and stays as it is; no template.

    Raises:
        InputError: no template, messages that it refuses, or text that forges a special token or
            that the vocabulary cannot express.
    """
    if plain:
        return _encode_plain(tokenizer, _text(prompt))
    messages = as_messages(prompt, "user")
    if messages[-1]["role"] == "assistant":
        raise InputError("the prompt ends with a turn of the assistant; move it to the completion")
    render = _Renderer.create(tokenizer, tools, template_kwargs)
    return render.prompt(render.readable(messages))


def encode_completion(
    tokenizer: "PreTrainedTokenizerFast",
    prompt: Turns,
    completion: Turns,
    *,
    tools: Tools | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    plain: bool = False,
) -> Sides:
    """Token ids of a prompt, as in `encode_prompt`, and of what follows up to the end of turn.

    Together they are the template's rendering of the whole conversation.

    Raises:
        InputError: as in `encode_prompt`, or the prompt is not the beginning of the whole.
    """
    if plain:
        text, more = _text(prompt), _text(completion)
        begin, whole = (_encode_plain(tokenizer, t) for t in (text, text + more))
        return begin, [*_continued(tokenizer, begin, whole), _eos(tokenizer)]
    before, after = as_messages(prompt, "user"), as_messages(completion, "assistant")
    if after[0]["role"] != "assistant":
        raise InputError(
            f"the completion begins with a turn of role {after[0]['role']!r}; the first must be "
            "the assistant's, and what comes before it belongs to the prompt"
        )
    render = _Renderer.create(tokenizer, tools, template_kwargs)
    messages = render.readable([*before, *after])
    begin = render.prompt(messages[: len(before)])
    return begin, render.until_end(_continued(tokenizer, begin, render.whole(messages)))


def encode_begin(
    tokenizer: "PreTrainedTokenizerFast",
    prompt: Turns,
    begin: str,
    *,
    tools: Tools | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    plain: bool = False,
) -> Sides:
    """Token ids of a prompt and of text that the completion is made to begin with; no end of turn.

    Raises:
        InputError: as in `encode_completion`.
    """
    _check_special(tokenizer, [begin])
    if plain:
        text = _text(prompt)
        ids, whole = (_encode_plain(tokenizer, t) for t in (text, text + begin))
    else:
        render = _Renderer.create(tokenizer, tools, template_kwargs)
        messages = render.readable(as_messages(prompt, "user"))
        text = cast(str, render(messages, tokenize=False, add_generation_prompt=True))
        ids, whole = (_encode(tokenizer, t, add_special_tokens=False) for t in (text, text + begin))
    _check_known(tokenizer, whole, [begin])
    return ids, _continued(tokenizer, ids, whole)


def encode_conversation(
    tokenizer: "PreTrainedTokenizerFast",
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    first: int = 0,
) -> Encoded:
    """One sequence of a conversation, all turns of the assistant counted.

    Args:
        tokenizer: with a chat template.
        messages: the turns.
        tools: JSON schemas of functions that the model may call.
        template_kwargs: further variables of the template.
        first: turns before this one do not count.

    Raises:
        InputError: as in `encode_prompt`; no turn of the assistant; or a turn is rendered otherwise
            once others follow it, so that no single sequence has what the model sees at each turn.
    """
    encoded = list(_sequences(tokenizer, messages, tools, template_kwargs, first))
    if len(encoded) > 1:
        (turn, now), (later, then) = encoded[:2]
        shown = _divergence(tokenizer, now.ids, then.ids)
        raise InputError(
            f"the chat template is not prefix-preserving: turn {turn} (assistant) is rendered "
            f"otherwise once turn {later} follows, {shown}; use a template that keeps earlier "
            "turns as they were, leave the turn's thoughts out, or train on each part by itself "
            "(split_conversation)"
        )
    return encoded[0][1]


def split_conversation(
    tokenizer: "PreTrainedTokenizerFast",
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    first: int = 0,
) -> list[Encoded]:
    """The fewest sequences in which every turn of the assistant counts once, as it is generated.

    One, if the template leaves earlier turns as they were. Qwen3's drops the thoughts of earlier
    turns: then each turn that thinks ends a sequence, and the next begins with what the template
    makes of it. Arguments and errors are those of `encode_conversation`.
    """
    return [
        encoded for _, encoded in _sequences(tokenizer, messages, tools, template_kwargs, first)
    ]


def encode_everything(
    tokenizer: "PreTrainedTokenizerFast",
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Encoded:
    """A conversation as it is rendered, every token counted."""
    render = _Renderer.create(tokenizer, tools, template_kwargs)
    ids = render.whole(render.readable(messages))
    return Encoded(ids, [True] * len(ids))


def stop_ids(
    tokenizer: "PreTrainedTokenizerFast", generation_config: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Tokens that end a completion.

    Those are the tokenizer's end marker, the token with which its chat template ends a turn, and
    `eos_token_id` of a generation config.

    Raises:
        InputError: there is none.
    """
    configured = (generation_config or {}).get("eos_token_id")
    found: list[Any] = [tokenizer.eos_token_id]
    found += configured if isinstance(configured, list | tuple) else [configured]
    if tokenizer.chat_template is not None:
        found.append(_facts(tokenizer, tokenizer.get_chat_template()).end_of_turn)
    stops = tuple(dict.fromkeys(int(i) for i in found if i is not None))
    if not stops:
        raise InputError(
            "nothing would end a completion: the tokenizer has no eos_token and its chat template "
            "ends no turn with a special token; set eos_token"
        )
    return stops


def decode(
    tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int], stops: Sequence[int] | None = None
) -> str:
    """Text of sampled tokens up to the first stop; padding is dropped, all else is kept.

    Args:
        tokenizer: that made the ids.
        ids: token ids of a completion.
        stops: tokens that end it; those of `stop_ids(tokenizer)` if None.
    """
    ends = frozenset(stop_ids(tokenizer) if stops is None else stops)
    kept = []
    for token in ids:
        if token in ends:
            break
        if token != tokenizer.pad_token_id:
            kept.append(int(token))
    return _decode(tokenizer, kept)


def _decode(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return cast(str, text)


def as_messages(turns: Turns, role: str) -> list[Message]:
    """Messages; a text is one turn of `role`."""
    if isinstance(turns, str):
        return [{"role": role, "content": turns}]
    if not turns:
        raise InputError(f"no messages; give text or at least one turn of the {role}")
    return list(turns)


# Rendering


class _Facts(NamedTuple):
    """What a chat template does, found by trying."""

    marked: bool
    reads_text: bool
    reads_parts: bool
    end_of_turn: int | None


class _Renderer(NamedTuple):
    """A tokenizer's template with what a conversation gives it besides messages."""

    tokenizer: "PreTrainedTokenizerFast"
    tools: list[Mapping[str, Any]] | None
    variables: Mapping[str, Any]
    template: str

    @classmethod
    def create(
        cls,
        tokenizer: "PreTrainedTokenizerFast",
        tools: Tools | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> "_Renderer":
        if tokenizer.chat_template is None:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template; give one "
                "(chat_template_path), or ask for plain text: prompt, completion, end marker"
            )
        listed = list(tools) if tools else None
        _check_special(tokenizer, _strings(listed))
        template = tokenizer.get_chat_template(tools=cast(Any, listed))
        return cls(tokenizer, listed, variables or {}, template)

    @property
    def facts(self) -> _Facts:
        return _facts(self.tokenizer, self.template)

    def __call__(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                cast(Any, list(messages)),
                tools=cast(Any, self.tools),
                chat_template=self.template,
                **options,
                **self.variables,
            )
        except Exception as error:  # the template is a program of its own
            raise InputError(
                f"the chat template refuses the messages: {type(error).__name__}: {error}"
            ) from error

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of some turns and of what makes the model speak."""
        return self._checked(
            self(messages, add_generation_prompt=True, return_dict=False), messages
        )

    def whole(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of some turns."""
        return self._checked(self(messages, return_dict=False), messages)

    def marks(self, messages: Sequence[Message]) -> Encoded:
        """Token ids of some turns, and which the template marks."""
        out = self(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids = self._checked(out["input_ids"], messages)
        return Encoded(ids, [bool(marked) for marked in out["assistant_masks"]])

    def until_end(self, ids: list[int]) -> list[int]:
        """What stands before the last end of turn of some tokens, and that."""
        end = _end(self.tokenizer, ids)
        if end is None:
            text = _decode(self.tokenizer, ids[-20:])
            raise InputError(
                f"the chat template ends the assistant's turn, {text!r}, with no special token, "
                "so a model would not learn to stop; use another template, or make its end of "
                "turn a special token of the tokenizer"
            )
        return ids[: end + 1]

    def readable(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with their content as the template reads it: text, or a list of parts."""
        _check_special(self.tokenizer, _strings(messages))
        return [self._readable(number, message) for number, message in enumerate(messages)]

    def _readable(self, number: int, message: Message) -> Message:
        content = message.get("content")
        if isinstance(content, str):
            if self.facts.reads_text:
                return message
            return {**message, "content": [{"type": "text", "text": content}]}
        if not isinstance(content, list | tuple):
            return message
        parts = [{key: x for key, x in part.items() if x is not None} for part in content]
        if self.facts.reads_parts:
            return {**message, "content": parts}
        other = [part.get("type") for part in parts if part.get("type") != "text"]
        if other:
            raise InputError(
                f"turn {number} ({message['role']}) has a part of type {other[0]!r}, but the chat "
                "template reads text only; use a vision-language model, or leave the part out"
            )
        return {**message, "content": "".join(part["text"] for part in parts)}

    def _checked(self, ids: list[int], messages: Sequence[Message]) -> list[int]:
        _check_known(self.tokenizer, ids, _strings(messages))
        return ids


@functools.lru_cache(maxsize=16)
def _facts(tokenizer: "PreTrainedTokenizerFast", template: str) -> _Facts:
    def tried(*contents: Any, tokenize: bool = False, **options: Any) -> Any:
        turns = [{"role": r, "content": c} for r, c in zip(_ROLES, contents, strict=False)]
        options = {"chat_template": template, "return_dict": False, **options}
        try:
            return tokenizer.apply_chat_template(turns, tokenize=tokenize, **options)
        except Exception:  # a template may refuse what it does not read
            return [] if tokenize else ""

    prompt = tried("", tokenize=True, add_generation_prompt=True)
    whole = tried("", "", tokenize=True)
    answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else []
    end = _end(tokenizer, answer)
    text, parts = tried(_PROBE), tried([{"type": "text", "text": _PROBE}])
    return _Facts(
        marked=bool(_MARK.search(template)),
        reads_text=_PROBE in text or _PROBE not in parts,
        # Templates of text alone show a list of parts as Python writes it, or nothing at all.
        reads_parts=_PROBE in parts and not re.search(r"""['"]type['"]""", parts),
        end_of_turn=None if end is None else answer[end],
    )


def _sequences(
    tokenizer: "PreTrainedTokenizerFast",
    messages: Sequence[Message],
    tools: Tools | None,
    template_kwargs: Mapping[str, Any] | None,
    first: int,
) -> Iterator[tuple[int, Encoded]]:
    """Sequences in which each counted turn is preceded by its prompt, with the last such turn."""
    render = _Renderer.create(tokenizer, tools, template_kwargs)
    messages = render.readable(messages)
    turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    if not turns:
        raise InputError("the conversation has no turn of the assistant, so nothing to learn")
    if turns[0] == 0:
        raise InputError(
            "turn 0 is the assistant's; a conversation begins with a turn of system or user"
        )
    if render.facts.marked:
        yield turns[-1], _marked(render, messages, turns[0] if first else 0)
        return
    last, so_far = turns[0], Encoded([], [])
    for turn in turns:
        prompt = render.prompt(messages[:turn])
        whole = render.whole(messages[: turn + 1])
        try:
            completion = render.until_end(_continued(tokenizer, prompt, whole))
        except InputError as error:
            raise InputError(f"turn {turn} (assistant): {error}") from error
        if prompt[: len(so_far.ids)] != so_far.ids:
            yield last, so_far
            so_far = Encoded([], [])
        before = so_far.mask + [False] * (len(prompt) - len(so_far.ids))
        last, so_far = turn, Encoded(prompt + completion, before + [True] * len(completion))
    yield last, so_far


def _marked(render: _Renderer, messages: Sequence[Message], first: int) -> Encoded:
    """A conversation with the template's own marks, each made to reach its end of turn."""
    ids, mask = render.marks(messages)
    if first:
        begin = render.prompt(messages[:first])
        _continued(render.tokenizer, begin, ids)
        mask = [marked and i >= len(begin) for i, marked in enumerate(mask)]
    ends = [i + 1 for i in range(len(ids)) if mask[i] and not any(mask[i + 1 : i + 2])]
    start = 0
    for end in ends:
        start = mask.index(True, start)
        if _end(render.tokenizer, ids[start:end]) is None:
            render.until_end(ids[start : end + 1])
            mask[end] = True
        start = end
    if not ends:
        raise InputError("the chat template marks no token of the assistant's turns")
    size = max(i for i, marked in enumerate(mask) if marked) + 1
    return Encoded(ids[:size], mask[:size])


def _continued(
    tokenizer: "PreTrainedTokenizerFast", begin: list[int], whole: list[int]
) -> list[int]:
    """What follows the tokens of a prompt in those of the whole."""
    if whole[: len(begin)] != begin:
        raise InputError(
            "the tokens of the prompt are not the beginning of those of the whole, "
            f"{_divergence(tokenizer, begin, whole)}; if white space at the seam differs, let the "
            "completion begin without it (as plain text: let the prompt end without it)"
        )
    return whole[len(begin) :]


def _divergence(tokenizer: "PreTrainedTokenizerFast", one: list[int], other: list[int]) -> str:
    """Where two token lists part, in words."""
    pairs = enumerate(zip(one, other, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    show = lambda ids: repr(_decode(tokenizer, ids[max(0, at - 8) : at + 8]))
    return f"{show(one)} against {show(other)}"


def _end(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int]) -> int | None:
    """The place of the last special token, if nothing but white space follows."""
    special = _special(tokenizer)
    end = next((i for i in reversed(range(len(ids))) if ids[i] in special), None)
    if end is None or _decode(tokenizer, ids[end + 1 :]).strip():
        return None
    return end


# Plain text


def _text(turns: Turns) -> str:
    if not isinstance(turns, str):
        raise InputError("messages need a chat template; as plain text, give prompts as text")
    return turns


def _encode_plain(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    _check_special(tokenizer, [text])
    ids = _encode(tokenizer, text, add_special_tokens=True)
    while ids and ids[-1] == tokenizer.eos_token_id:  # of tokenizers that end every text
        ids.pop()
    _check_known(tokenizer, ids, [text])
    return ids


def _encode(
    tokenizer: "PreTrainedTokenizerFast", text: str, *, add_special_tokens: bool
) -> list[int]:
    return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]


def _eos(tokenizer: "PreTrainedTokenizerFast") -> int:
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos_token, so completions would not end; set it")
    return cast(int, tokenizer.eos_token_id)


# Checks


@functools.lru_cache(maxsize=16)
def _special(tokenizer: "PreTrainedTokenizerFast") -> Mapping[int, str]:
    """The special tokens by id."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {**added, **dict(named)}


@functools.lru_cache(maxsize=16)
def _forged(tokenizer: "PreTrainedTokenizerFast") -> re.Pattern[str]:
    longest_first = sorted(_special(tokenizer).values(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def has_special(tokenizer: "PreTrainedTokenizerFast", text: str) -> bool:
    """Whether a text would become special tokens, such as an end of turn; encoding refuses it."""
    return _forged(tokenizer).search(text) is not None


def _check_special(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> None:
    """Refuse texts that would become special tokens, such as an end of turn."""
    for text in texts:
        found = _forged(tokenizer).search(text)
        if found:
            raise InputError(f"the text contains the marker {found[0]!r}; remove it: {text[:80]!r}")


def _check_known(
    tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int], texts: Sequence[str]
) -> None:
    """Refuse tokens of which one stands for a word that the vocabulary lacks."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in ids:
        return
    for text in texts:
        encoding = tokenizer.backend_tokenizer.encode(text.strip(), add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token == unknown:
                raise InputError(
                    f"the word {text.strip()[start:end]!r} is not in the tokenizer's vocabulary of "
                    f"{len(tokenizer)} entries; use the words of the task, or another tokenizer"
                )
    raise InputError("the chat template writes what the tokenizer's vocabulary lacks")


def _strings(value: Any) -> list[str]:
    """All texts of messages, of their parts and calls."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        kept = [x for key, x in value.items() if key not in ("role", "type")]
        return [text for x in kept for text in _strings(x)]
    if isinstance(value, list | tuple):
        return [text for x in value for text in _strings(x)]
    return []
