"""Tokenizers over the vocabularies of all tasks: nothing unknown, nothing lost."""

import re

import pytest
from transformers import AutoTokenizer

from jaxrl_reason.data.chat import decode, encode_completion, encode_prompt
from jaxrl_reason.data.tokenizer import (
    SPECIALS,
    build_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from jaxrl_reason.errors import InputError
from jaxrl_reason.tasks import TASKS, make_task

STYLES = ("long", "short", "answer")
LEVELS = ("word", "character")


def completion_of(tokenizer, text):
    return encode_completion(tokenizer, "", text)[1]


@pytest.fixture(scope="module", params=LEVELS)
def level(request):
    return request.param


@pytest.fixture(scope="module", params=sorted(TASKS))
def task(request):
    return make_task(request.param, {})


@pytest.fixture(scope="module")
def tokenizer(task, level):
    return build_tokenizer(task.words(), level=level)


def conversation(prompt, completion):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def without_spaces(text):
    return re.sub(r"\s", "", text)


def test_ids_are_stable_and_specials_come_first(task, level):
    words = task.words()
    tokenizer = build_tokenizer(words, level=level)
    again = build_tokenizer(reversed(words), level=level)
    assert tokenizer.get_vocab() == again.get_vocab()
    assert tokenizer.convert_ids_to_tokens(range(len(SPECIALS))) == list(SPECIALS)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    if level == "word":
        assert len(tokenizer) == len(words) + len(SPECIALS)


def test_round_trip_of_every_text(task, tokenizer):
    for index in range(120):
        problem = task.generate("train", index)
        prompt = encode_prompt(tokenizer, problem.prompt)
        assert without_spaces(tokenizer.decode(prompt)) == without_spaces(
            f"<user>{problem.prompt}<assistant>"
        )
        for style in STYLES:
            text = task.trace(problem, style)
            tokens = completion_of(tokenizer, text)
            assert tokenizer.unk_token_id not in tokens
            assert tokens[-1] == tokenizer.eos_token_id
            decoded = decode(tokenizer, tokens)
            assert without_spaces(decoded) == without_spaces(text)
            assert task.verify(problem, decoded).correct
            assert completion_of(tokenizer, decoded) == tokens


def test_perturbed_puzzles_need_no_new_words():
    task = make_task("knights_knaves", {})
    tokenizer = build_tokenizer(task.words())
    for index in range(20):
        for kind in ("statement", "uncommon_names", "roles", "order", "swapped_roles"):
            problem = task.perturb(task.generate("test", index), kind)
            encode_prompt(tokenizer, problem.prompt)
            completion_of(tokenizer, task.trace(problem, "long"))


def test_the_generation_mask_is_the_completion(task, tokenizer):
    for index in range(10):
        problem = task.generate("train", index)
        text = task.trace(problem, "long")
        prompt = encode_prompt(tokenizer, problem.prompt)
        completion = completion_of(tokenizer, text)
        out = tokenizer.apply_chat_template(
            conversation(problem.prompt, text), return_assistant_tokens_mask=True
        )
        assert out["input_ids"] == prompt + completion
        assert out["assistant_masks"] == [0] * len(prompt) + [1] * len(completion)


def test_two_turns_are_masked_separately(level):
    tokenizer = build_tokenizer(("a", "b"), level=level)
    turns = conversation("a", "b") + conversation("b", "a")
    out = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True)
    tokens = tokenizer.convert_ids_to_tokens(out["input_ids"])
    assert " ".join(tokens) == "<user> a <assistant> b <eos> <user> b <assistant> a <eos>"
    assert out["assistant_masks"] == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]


def test_a_saved_tokenizer_is_the_same(task, tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    problem = task.generate("train", 0)
    text = task.trace(problem, "long")
    tokens = completion_of(tokenizer, text)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded.padding_side == "left"
        assert encode_prompt(loaded, problem.prompt) == encode_prompt(tokenizer, problem.prompt)
        assert completion_of(loaded, text) == tokens
        assert decode(loaded, tokens) == decode(tokenizer, tokens)
        with pytest.raises(InputError, match="'Ω'"):
            encode_prompt(loaded, "Ω")


def test_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer\.json in"):
        load_tokenizer(tmp_path / "nowhere")


def test_tokens_are_words_or_characters():
    text = "<think> b = 12 ; </think> <answer> 12 </answer>"
    word = build_tokenizer(("b", "=", "12", ";"))
    assert word.convert_ids_to_tokens(completion_of(word, text)) == [*text.split(), "<eos>"]
    character = build_tokenizer(("b", "=", "12", ";"), level="character")
    assert character.convert_ids_to_tokens(completion_of(character, text)) == [
        *("<think>", *"b = 12 ;", "</think>", "<answer>", *"12", "</answer>", "<eos>")
    ]


def test_white_space_around_tags_makes_no_tokens(level):
    tokenizer = build_tokenizer(("b", "4"), level=level)
    spaced = completion_of(tokenizer, " <think>  b\n</think> \n <answer> 4 </answer> ")
    assert spaced == completion_of(tokenizer, "<think>b</think><answer>4</answer>")


def test_decoding_stops_at_the_end_marker_and_drops_padding_only():
    tokenizer = build_tokenizer(("a", "b"))
    text = "<pad> <think> a <user> <unk> </think> <eos> b <eos> <pad>"
    sampled = tokenizer.convert_tokens_to_ids(text.split())
    assert decode(tokenizer, sampled) == "<think> a <user> <unk> </think>"
    assert decode(tokenizer, sampled[:4]) == "<think> a <user>"
    assert decode(tokenizer, []) == ""


@pytest.mark.parametrize(
    ("text", "named"),
    [("a = zebra", "'zebra'"), ("a=z", "'z'"), ("a <user> b", "'<user>'"), ("a <eos>", "'<eos>'")],
)
@pytest.mark.parametrize("render", [encode_prompt, completion_of])
def test_refused_texts_are_named(render, text, named):
    tokenizer = build_tokenizer(("a", "=", "b"))
    with pytest.raises(InputError, match=named):
        render(tokenizer, text)


def test_bad_vocabularies_are_errors():
    for word in ("a,b", "a b", "", "x "):
        with pytest.raises(InputError, match="not a single token"):
            build_tokenizer(("a", word))
    with pytest.raises(InputError, match="level='byte'"):
        build_tokenizer(("a",), level="byte")
    with pytest.raises(Exception, match="roles are user and assistant"):
        build_tokenizer(("a",)).apply_chat_template([{"role": "system", "content": "a"}])
