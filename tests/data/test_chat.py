"""Conversations as tokens: every template family, prefixes, masks, ends of turn, plain text.

The templates in `templates/` render what those of the published models render.
"""

import json
from itertools import groupby
from pathlib import Path

import pytest

from jaxrl_reason.data.chat import (
    Encoded,
    decode,
    encode_begin,
    encode_completion,
    encode_conversation,
    encode_everything,
    encode_prompt,
    split_conversation,
    stop_ids,
)
from jaxrl_reason.data.tokenizer import (
    build_tokenizer,
    load_generation_config,
    load_tokenizer,
    save_tokenizer,
)
from jaxrl_reason.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"
# The end of turn of each template, and the tokenizer's own end marker.
ENDS = {
    "chatml": ("<|im_end|>", "<|endoftext|>"),
    "chatml_marked": ("<|im_end|>", "<|endoftext|>"),
    "qwen2_5": ("<|im_end|>", "<|im_end|>"),
    "qwen2_5_vl": ("<|im_end|>", "<|im_end|>"),
    "qwen3": ("<|im_end|>", "<|im_end|>"),
    "llama3": ("<|eot_id|>", "<|eot_id|>"),
    "gemma3": ("<end_of_turn>", "<eos>"),
}
PRESERVING = [name for name in ENDS if name != "qwen3"]


def user(text):
    return {"role": "user", "content": text}


def model(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(name="f", text="", **arguments):
    function = {"name": name, "arguments": arguments}
    return model(text, tool_calls=[{"type": "function", "function": function}])


SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
QUESTION = user("What is 2 + 2?")
CHAT = [QUESTION, model("The answer is 4."), user("And 3?"), model("5\n\nthe end")]
FIXED = {"date_string": "26 Jul 2024"}


def rendered(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=False, **FIXED, **options)


def spans(tokenizer, encoded: Encoded):
    """Text of each run of counted tokens."""
    assert len(encoded.ids) == len(encoded.mask)
    pairs = zip(encoded.ids, encoded.mask, strict=True)
    runs = [(counted, [i for i, _ in run]) for counted, run in groupby(pairs, lambda x: x[1])]
    return [tokenizer.decode(ids) for counted, ids in runs if counted]


def refused(function, *given, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*given, **options)
    return str(caught.value)


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
@pytest.mark.parametrize("name", ENDS)
def test_prompt_and_completion_are_the_rendering_of_the_whole(make, name, system):
    tokenizer = make(name)
    before, answer = [*system, *CHAT[:3]], CHAT[3]
    prompt, completion = encode_completion(tokenizer, before, [answer], template_kwargs=FIXED)
    assert prompt == rendered(tokenizer, before, add_generation_prompt=True)
    assert prompt == encode_prompt(tokenizer, before, template_kwargs=FIXED)
    whole = rendered(tokenizer, [*before, answer])
    assert whole[: len(prompt) + len(completion)] == prompt + completion
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    end, _ = ENDS[name]
    assert tokenizer.decode(completion) == f"{thought}{answer['content']}{end}"
    assert tokenizer.decode(whole[len(prompt) + len(completion) :]).strip() == ""
    assert ("Be brief." in tokenizer.decode(prompt)) == bool(system)
    one = [encode_completion(tokenizer, x, y, template_kwargs=FIXED) for x, y in TEXT_AND_TURNS]
    assert one[0] == one[1]


TEXT_AND_TURNS = [("hi", "4"), ([user("hi")], [model("4")])]


@pytest.mark.parametrize("name", PRESERVING)
def test_every_turn_of_the_assistant_counts_to_its_end(make, name):
    tokenizer = make(name)
    end, _ = ENDS[name]
    encoded = encode_conversation(tokenizer, CHAT, template_kwargs=FIXED)
    assert spans(tokenizer, encoded) == [f"The answer is 4.{end}", f"5\n\nthe end{end}"]
    assert encoded.ids == rendered(tokenizer, CHAT)[: len(encoded.ids)]
    assert encoded.mask[-1]
    assert split_conversation(tokenizer, CHAT, template_kwargs=FIXED) == [encoded]
    later = encode_conversation(tokenizer, CHAT, template_kwargs=FIXED, first=2)
    assert spans(tokenizer, later) == [f"5\n\nthe end{end}"]
    assert later.ids == encoded.ids
    # A question that nobody answers is nothing to learn.
    assert encode_conversation(tokenizer, [*CHAT, QUESTION], template_kwargs=FIXED) == encoded


def test_marks_of_a_template_are_used_and_made_to_reach_the_end_of_turn(make):
    marked, plain = make("chatml_marked"), make("chatml")
    assert encode_conversation(marked, CHAT) == encode_conversation(plain, CHAT)
    out = marked.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    encoded = encode_conversation(marked, CHAT)
    lists = zip(encoded.ids, encoded.mask, out["assistant_masks"], strict=False)
    added = [token for token, counted, marked_by_it in lists if counted and not marked_by_it]
    assert marked.decode(added) == "<|im_end|><|im_end|>"
    whole = make(
        template="{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    out = whole.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    encoded = encode_conversation(whole, CHAT)
    assert encoded == (out["input_ids"], [bool(x) for x in out["assistant_masks"]])


def test_marks_of_a_built_tokenizer():
    tokenizer = build_tokenizer(("a", "b"))
    turns = [user("a"), model("b"), user("b"), model("a")]
    encoded = encode_conversation(tokenizer, turns)
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids)
    assert " ".join(tokens) == "<user> a <assistant> b <eos> <user> b <assistant> a <eos>"
    assert [int(x) for x in encoded.mask] == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]


# Templates that change earlier turns

THOUGHT = "<think>\n2 and 2\n</think>\n\n4"
THINKING = [QUESTION, model(THOUGHT), user("And 3?"), model("<think>\nmore\n</think>\n\n5")]


def test_a_template_that_drops_thoughts_gives_a_sequence_for_each_question(make):
    tokenizer = make("qwen3")
    message = refused(encode_conversation, tokenizer, THINKING)
    assert message.startswith(
        "the chat template is not prefix-preserving: turn 1 (assistant) is rendered otherwise once "
        "turn 3 follows"
    )
    assert "split_conversation" in message
    first, second = split_conversation(tokenizer, THINKING)
    assert spans(tokenizer, first) == [f"{THOUGHT}<|im_end|>"]
    assert spans(tokenizer, second) == ["<think>\nmore\n</think>\n\n5<|im_end|>"]
    # Each is what the model sees when it is asked.
    for encoded, turns in ((first, THINKING[:1]), (second, THINKING[:3])):
        prompt = rendered(tokenizer, turns, add_generation_prompt=True)
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.mask == [False] * len(prompt) + [True] * (len(encoded.ids) - len(prompt))
    assert "2 and 2" not in tokenizer.decode(second.ids)
    assert [s.ids for s in split_conversation(tokenizer, THINKING, first=2)] == [second.ids]


def test_thoughts_between_calls_stay_in_one_sequence(make):
    tokenizer = make("qwen3")
    turns = [QUESTION, call(text=THOUGHT.removesuffix("4"), x=2), TOOL, model(THOUGHT)]
    encoded = encode_conversation(tokenizer, turns, tools=TOOLS)
    calling = '<think>\n2 and 2\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 2}}\n'
    assert spans(tokenizer, encoded) == [
        f"{calling}</tool_call><|im_end|>",
        f"{THOUGHT}<|im_end|>",
    ]
    assert "<tool_response>\n4\n</tool_response>" in tokenizer.decode(encoded.ids)
    assert "# Tools" in tokenizer.decode(encoded.ids)
    thoughtless = [QUESTION, call(x=2), TOOL, model("4")]
    first, second = split_conversation(tokenizer, thoughtless)
    assert spans(tokenizer, first)[0].startswith("<think>\n\n</think>\n\n<tool_call>")
    assert spans(tokenizer, second) == ["<think>\n\n</think>\n\n4<|im_end|>"]


def test_an_empty_thought_belongs_to_the_prompt_when_thinking_is_off(make):
    tokenizer = make("qwen3")
    on = encode_conversation(tokenizer, CHAT[:2])
    off = encode_conversation(tokenizer, CHAT[:2], template_kwargs={"enable_thinking": False})
    assert on.ids == off.ids
    assert spans(tokenizer, on) == ["<think>\n\n</think>\n\nThe answer is 4.<|im_end|>"]
    assert spans(tokenizer, off) == ["The answer is 4.<|im_end|>"]


def test_a_template_that_changes_the_prompt_is_refused_by_turn(make):
    turns = "{% for m in messages %}{{ m.content + '<eos>' }}{% endfor %}"
    tokenizer = make(template="{{ messages | length }}" + turns)
    message = refused(split_conversation, tokenizer, CHAT)
    assert message.startswith("turn 1 (assistant): the tokens of the prompt are not the beginning")
    assert "'1What is 2 + 2" in message
    assert "'2What is 2 + 2" in message
    assert "beginning of those of the whole" in refused(encode_completion, tokenizer, "a", "b")


def test_a_seam_that_merges_is_refused(make):
    tokenizer = make("chatml")
    turns = [QUESTION, model("\n\n4")]
    message = refused(encode_conversation, tokenizer, turns)
    assert message.startswith("turn 1 (assistant): the tokens of the prompt are not the beginning")
    assert "white space at the seam" in message
    assert "white space" in refused(encode_completion, tokenizer, "hi", "\n\n4")


@pytest.mark.parametrize("mark", [("", ""), ("{% generation %}", "{% endgeneration %}")])
def test_a_turn_without_an_end_is_refused(make, mark):
    body = f"{mark[0]}{{{{ m.content }}}}{mark[1]}" + "{{ '\n' }}"
    other = "{% else %}{{ '<bos>' + m.content }}{% endif %}{% endfor %}"
    begin = "{% for m in messages %}{% if m.role == 'assistant' %}"
    tokenizer = make(template=begin + body + other)
    for turns in (CHAT, CHAT[:2]):
        message = refused(encode_conversation, tokenizer, turns)
        assert "with no special token, so a model would not learn to stop" in message
    assert stop_ids(tokenizer) == (tokenizer.eos_token_id,)


# Messages


def test_tools_calls_and_answers_are_rendered(make):
    turns = [SYSTEM, QUESTION, call(x=2), TOOL, model("4")]
    for name in ("qwen2_5", "llama3"):
        tokenizer = make(name)
        encoded = encode_conversation(tokenizer, turns, tools=TOOLS, template_kwargs=FIXED)
        whole = rendered(tokenizer, turns, tools=TOOLS)
        assert whole[: len(encoded.ids)] == encoded.ids
        called, said = spans(tokenizer, encoded)
        assert '"name": "f"' in called
        assert '{"x": 2}' in called
        assert called.endswith(ENDS[name][0])
        assert said == f"4{ENDS[name][0]}"
        after = encode_completion(
            tokenizer, turns[:2], turns[2:], tools=TOOLS, template_kwargs=FIXED
        )
        assert after[0] + after[1] == encoded.ids


def test_parts_are_given_to_templates_that_read_them(make):
    shown = [{"type": "image", "text": None}, {"type": "text", "text": "hi", "image": None}]
    tokenizer = make("qwen2_5_vl")
    text = tokenizer.decode(encode_prompt(tokenizer, [user(shown)]))
    assert "user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>" in text
    assert tokenizer.decode(encode_prompt(make("gemma3"), [user(shown)])) == (
        "<bos><start_of_turn>user\n<start_of_image>hi<end_of_turn>\n<start_of_turn>model\n"
    )
    for name in ("qwen2_5", "qwen3", "llama3", "chatml"):
        tokenizer = make(name)
        two = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
        prompts = [encode_prompt(tokenizer, [user(x)], template_kwargs=FIXED) for x in (two, "hi")]
        assert prompts[0] == prompts[1]
        message = refused(encode_prompt, tokenizer, [SYSTEM, user(shown)])
        assert message.startswith("turn 1 (user) has a part of type 'image', but the chat template")
    only_parts = make(
        template="{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{{ '<eos>' }}{% endfor %}"
    )
    assert only_parts.decode(encode_prompt(only_parts, "hi")) == "hi<eos>"


@pytest.mark.parametrize(
    "turns",
    [
        [user("a <|im_end|> b")],
        [{"role": "system", "content": "<|im_end|>"}, user("a")],
        [user([{"type": "text", "text": "<|im_end|>"}])],
        [user("a"), call(x="<|im_end|>"), TOOL],
    ],
)
def test_text_that_forges_an_end_of_turn_is_refused(make, turns):
    message = refused(encode_prompt, make("qwen2_5"), turns)
    assert message.startswith("the text contains the marker '<|im_end|>'; remove it")


def test_forged_tools_and_beginnings_are_refused(make):
    tools = [{"type": "function", "function": {"name": "<|im_start|>"}}]
    assert "'<|im_start|>'" in refused(encode_prompt, make("qwen2_5"), "a", tools=tools)
    assert "'<eos>'" in refused(encode_begin, make("qwen2_5"), "a", "<eos>")
    assert "'<eos>'" in refused(encode_prompt, make(), "a <eos>", plain=True)


def test_conversations_without_a_place_for_the_model_are_refused(make):
    tokenizer = make("chatml")
    assert "no turn of the assistant" in refused(encode_conversation, tokenizer, [QUESTION])
    assert "turn 0 is the assistant's" in refused(encode_conversation, tokenizer, [model("a")])
    assert "ends with a turn of the assistant" in refused(encode_prompt, tokenizer, CHAT)
    assert "role 'user'" in refused(encode_completion, tokenizer, "a", [QUESTION])
    assert "no messages" in refused(encode_prompt, tokenizer, [])
    message = refused(encode_prompt, make("gemma3"), [QUESTION, QUESTION])
    assert message.startswith("the chat template refuses the messages: TemplateError: Conversation")


def test_everything_counts_when_asked_for(make):
    tokenizer = make("qwen3")
    encoded = encode_everything(tokenizer, THINKING)
    assert encoded == (rendered(tokenizer, THINKING), [True] * len(encoded.ids))


def test_a_forced_beginning_follows_the_prompt(make):
    tokenizer = make("qwen3")
    prompt, begin = encode_begin(tokenizer, "hi", "<think>\nthe")
    assert prompt == encode_prompt(tokenizer, "hi")
    assert tokenizer.decode(begin) == "<think>\nthe"
    assert encode_begin(tokenizer, "hi", "") == (prompt, [])
    assert "white space" in refused(encode_begin, make("chatml"), "hi", "\n\nthe")
    word = build_tokenizer(("a", "b"))
    assert word.convert_ids_to_tokens(encode_begin(word, "a", "<think> b")[1]) == ["<think>", "b"]
    assert "the word 'c'" in refused(encode_begin, word, "a", "c")


# Ends


@pytest.mark.parametrize("name", ENDS)
def test_generation_stops_at_every_end(make, name):
    tokenizer = make(name)
    end, eos = (tokenizer.convert_tokens_to_ids(token) for token in ENDS[name])
    assert stop_ids(tokenizer) == tuple(dict.fromkeys((eos, end)))
    assert stop_ids(tokenizer, {"eos_token_id": 7}) == tuple(dict.fromkeys((eos, 7, end)))
    assert stop_ids(tokenizer, {"eos_token_id": [end, 7]}) == tuple(dict.fromkeys((eos, end, 7)))
    _, completion = encode_completion(tokenizer, "hi", "the answer", template_kwargs=FIXED)
    assert completion[-1] in stop_ids(tokenizer)
    assert not set(completion[:-1]) & set(stop_ids(tokenizer))
    assert decode(tokenizer, [*completion, *completion]).endswith("the answer")


def test_decoding_drops_padding_and_keeps_the_text_as_it_is(make):
    tokenizer = make("gemma3", clean_up_tokenization_spaces=True)
    ids = tokenizer("the , end .\n", add_special_tokens=False)["input_ids"]
    pad, end = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert decode(tokenizer, [pad, *ids, end, *ids]) == "the , end .\n"
    assert decode(tokenizer, [*ids, end], stops=[tokenizer.eos_token_id]) == (
        "the , end .\n<end_of_turn>"
    )


def test_nothing_to_stop_at_is_refused(make):
    assert "nothing would end a completion" in refused(stop_ids, make(eos_token=None))
    assert stop_ids(make(eos_token=None), {"eos_token_id": 3}) == (3,)


# Plain text


def test_plain_text_is_prompt_completion_and_end_marker(make):
    tokenizer = make()
    prompt, completion = encode_completion(tokenizer, "2 + 2 =", " 4", plain=True)
    assert tokenizer.decode(prompt) == "<bos>2 + 2 ="
    assert tokenizer.decode(completion) == " 4<eos>"
    assert prompt == encode_prompt(tokenizer, "2 + 2 =", plain=True)
    assert encode_begin(tokenizer, "2 + 2 =", " 4", plain=True) == (prompt, completion[:-1])
    assert "white space" in refused(encode_completion, tokenizer, "the\n", "\nend", plain=True)
    assert "messages need a chat template" in refused(encode_prompt, tokenizer, CHAT, plain=True)
    message = refused(encode_prompt, tokenizer, "hi")
    assert "has no chat template; give one (chat_template_path), or ask for plain text" in message
    no_end = make(eos_token=None)
    assert "no eos_token" in refused(encode_completion, no_end, "a", " b", plain=True)


# Loading


def test_a_saved_tokenizer_is_read_with_its_template_or_another(make, tmp_path):
    tokenizer = make("qwen3")
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert encode_prompt(loaded, CHAT[:3]) == encode_prompt(tokenizer, CHAT[:3])
    assert stop_ids(loaded) == stop_ids(tokenizer)
    other = load_tokenizer(tmp_path, chat_template_path=TEMPLATES / "gemma3.jinja")
    assert other.decode(encode_prompt(other, "hi")).startswith("<bos><start_of_turn>user")
    assert "chat_template_path=" in refused(load_tokenizer, tmp_path, chat_template_path="none")
    assert load_generation_config(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert stop_ids(loaded, load_generation_config(tmp_path))[1:] == (1, 2)
    assert refused(load_tokenizer, "nobody/nothing").startswith("nobody/nothing: no tokenizer")
