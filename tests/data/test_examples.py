"""Rows in TRL's formats as tokens and masks."""

import json

import numpy as np
import pytest

from jaxrl_reason.data.chat import encode_completion, encode_prompt
from jaxrl_reason.data.examples import RowEncoder, media, split_pair
from jaxrl_reason.errors import InputError

USER = {"role": "user", "content": "What is 2 + 2?"}
MORE = {"role": "user", "content": "And 3?"}
FOUR = {"role": "assistant", "content": "The answer is 4."}
FIVE = {"role": "assistant", "content": "5"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
END = "<|im_end|>"


def counted(tokenizer, encoded):
    (one,) = encoded
    return tokenizer.decode([i for i, kept in zip(one.ids, one.mask, strict=True) if kept])


def refused(function, *given, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*given, **options)
    return str(caught.value)


def test_all_turns_or_only_those_of_the_assistant_count(make):
    tokenizer = make("chatml")
    row = {"messages": [USER, FOUR, MORE, FIVE]}
    encoded = RowEncoder(tokenizer=tokenizer).supervised(row)
    assert counted(tokenizer, encoded) == f"The answer is 4.{END}5{END}"
    (everything,) = RowEncoder(tokenizer=tokenizer, assistant_only_loss=False).supervised(row)
    assert all(everything.mask)
    assert everything.ids[: len(encoded[0].ids)] == encoded[0].ids


@pytest.mark.parametrize(
    ("assistant_only", "completion_only", "expected"),
    [
        (True, True, f"The answer is 4.{END}5{END}"),
        (True, False, f"5{END}The answer is 4.{END}5{END}"),
        (False, True, f"The answer is 4.{END}\n<|im_start|>user\nAnd 3?{END}\n"),
        (False, False, f"<|im_start|>user\nAnd 3?{END}\n<|im_start|>assistant\n5{END}\n"),
    ],
)
def test_what_counts_of_a_prompt_and_a_completion(make, assistant_only, completion_only, expected):
    tokenizer = make("chatml")
    encoder = RowEncoder(
        tokenizer=tokenizer,
        assistant_only_loss=assistant_only,
        completion_only_loss=completion_only,
    )
    row = {"prompt": [MORE, FIVE, USER], "completion": [FOUR, MORE, FIVE]}
    text = counted(tokenizer, encoder.supervised(row))
    assert text == expected if assistant_only else text.startswith(expected)
    assert text.rstrip().endswith(f"5{END}")


def test_text_is_a_turn_or_stays_plain(make):
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    tokenizer = make("chatml")
    (encoded,) = RowEncoder(tokenizer=tokenizer).supervised(row)
    prompt, completion = encode_completion(tokenizer, "2 + 2 =", " 4")
    assert encoded == (prompt + completion, [False] * len(prompt) + [True] * len(completion))
    plain = make()
    encoder = RowEncoder(tokenizer=plain, plain=True)
    assert counted(plain, encoder.supervised(row)) == " 4<eos>"
    assert plain.decode(encoder.prompt(row)) == "<bos>2 + 2 ="
    everything = RowEncoder(tokenizer=plain, plain=True, completion_only_loss=False)
    assert counted(plain, everything.supervised(row)) == "<bos>2 + 2 = 4<eos>"
    message = refused(encoder.supervised, {"messages": [USER, FOUR]})
    assert message.startswith("messages need a chat template")


def test_a_conversation_may_need_several_sequences(make):
    tokenizer = make("qwen3")
    row = {"messages": [USER, FOUR, MORE, FIVE]}
    assert len(RowEncoder(tokenizer=tokenizer).supervised(row)) == 2
    last = {"prompt": [USER, FOUR, MORE], "completion": [FIVE]}
    assert len(RowEncoder(tokenizer=tokenizer).supervised(last)) == 1


@pytest.mark.parametrize("stored", [lambda value: value, json.dumps])
def test_tools_and_variables_of_a_row_reach_the_template(make, stored):
    tokenizer = make("qwen3")
    row = {"prompt": [USER], "tools": stored(TOOLS)}
    row["chat_template_kwargs"] = stored({"enable_thinking": False})
    text = tokenizer.decode(RowEncoder(tokenizer=tokenizer).prompt(row))
    assert '"name": "f"' in text
    assert text.endswith("</think>\n\n")
    on = RowEncoder(tokenizer=tokenizer, template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(on.prompt({"prompt": [USER]})).endswith("</think>\n\n")
    row["chat_template_kwargs"] = {"enable_thinking": True}
    assert tokenizer.decode(on.prompt(row)).endswith("assistant\n")


def test_broken_columns_are_named(make):
    encode = RowEncoder(tokenizer=make("qwen3")).prompt
    assert "column 'tools' is text that is no JSON" in refused(
        encode, {"prompt": "a", "tools": "["}
    )
    message = refused(encode, {"prompt": "a", "chat_template_kwargs": [1]})
    assert message == "column 'chat_template_kwargs' must be a mapping of JSON values"
    supervised = RowEncoder(tokenizer=make("qwen3")).supervised
    assert "needed: messages, or prompt and completion" in refused(supervised, {"prompt": "a"})


# Pairs

GOOD, BAD = [USER, FOUR], [USER, FIVE]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
        {"chosen": GOOD, "rejected": BAD},
        {"prompt": "What is 2 + 2?", "chosen": GOOD, "rejected": BAD},
        {"prompt": "What is 2 + 2?", "chosen": FOUR["content"], "rejected": "5"},
        {"prompt": "What is 2 + 2?", "chosen": [FOUR], "rejected": [FIVE]},
    ],
)
def test_pairs_share_their_prompt(make, row):
    tokenizer = make("chatml")
    chosen, rejected = RowEncoder(tokenizer=tokenizer).preference(row)
    assert chosen[0] == rejected[0] == encode_prompt(tokenizer, "What is 2 + 2?")
    assert tokenizer.decode(chosen[1]) == f"The answer is 4.{END}"
    assert tokenizer.decode(rejected[1]) == f"5{END}"


def test_the_prompt_is_what_both_sides_begin_with():
    row = {"chosen": [USER, FIVE, MORE, FOUR], "rejected": [USER, FIVE, MORE, FIVE]}
    assert split_pair(row) == ([USER, FIVE, MORE], [FOUR], [FIVE])
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert split_pair(row) == ("The sky is", " blue.", " green.")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": GOOD, "rejected": GOOD}, "chosen and rejected are equal"),
        ({"chosen": GOOD, "rejected": [*GOOD, MORE, FIVE]}, "chosen and rejected must begin with"),
        ({"chosen": "blue", "rejected": "green"}, "chosen and rejected must begin with"),
        ({"prompt": "a"}, "got columns prompt; needed: prompt, chosen, rejected"),
    ],
)
def test_pairs_without_a_choice_are_refused(row, expected):
    assert refused(split_pair, row).startswith(expected)


# Images and videos

IMAGE = np.zeros((2, 2, 3), np.uint8)
PLACE, CLIP = (
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|video_pad|><|vision_end|>",
)
ASKED = [{"type": "text", "text": "Left or "}, {"type": "image"}, {"type": "text", "text": "?"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "How many?", "image": IMAGE}, f"{PLACE}How many?"),
        ({"prompt": [USER], "images": [IMAGE] * 2}, f"{PLACE}{PLACE}What is 2 + 2?"),
        ({"prompt": "When?", "videos": [[IMAGE] * 4]}, f"{CLIP}When?"),
        ({"prompt": [{"role": "user", "content": ASKED}], "image": IMAGE}, f"Left or {PLACE}?"),
        ({"prompt": "Why?", "images": []}, "Why?"),
        ({"prompt": "Why?", "images": None}, "Why?"),
    ],
)
def test_a_place_is_made_for_every_image_and_video(make, row, expected):
    tokenizer = make("qwen2_5_vl")
    text = tokenizer.decode(RowEncoder(tokenizer=tokenizer).prompt(row))
    assert f"<|im_start|>user\n{expected}<|im_end|>" in text


def test_images_stand_in_the_conversation_and_in_pairs(make):
    tokenizer = make("qwen2_5_vl")
    encoder = RowEncoder(tokenizer=tokenizer)
    encoded = encoder.supervised({"messages": [USER, FOUR], "images": [IMAGE]})
    assert PLACE in tokenizer.decode(encoded[0].ids)
    assert counted(tokenizer, encoded) == f"The answer is 4.{END}"
    chosen, _ = encoder.preference({"chosen": GOOD, "rejected": BAD, "image": IMAGE})
    assert PLACE in tokenizer.decode(chosen[0])


def test_places_and_images_must_be_as_many(make):
    encode = RowEncoder(tokenizer=make("qwen2_5_vl")).prompt
    row = {"prompt": [{"role": "user", "content": ASKED}], "images": [IMAGE] * 2}
    assert refused(encode, row).startswith("the row has 2 images but 1 parts of type 'image'")
    row = {"prompt": [{"role": "system", "content": "a"}], "image": IMAGE}
    assert "no turn of the user" in refused(encode, row)
    text_only = RowEncoder(tokenizer=make("qwen2_5")).prompt
    assert "reads text only" in refused(text_only, {"prompt": "a", "image": IMAGE})


def test_images_are_read_from_columns_or_from_parts():
    own = [{"type": "image", "image": "a.png"}, {"type": "video", "video": "b.mp4"}]
    row = {"messages": [{"role": "user", "content": own}, FOUR]}
    assert media(row, "image") == ["a.png"]
    assert media(row, "video") == ["b.mp4"]
    assert media({"prompt": [{"role": "user", "content": own}]}, "image") == ["a.png"]
    assert media({**row, "images": ["c.png"]}, "image") == ["c.png"]
    assert media({"prompt": "a", "image": "c.png"}, "image") == ["c.png"]
