"""Facts as text and back."""

import dataclasses
import json

import pytest

from jaxrl_reason.data.chat import decode, encode_completion
from jaxrl_reason.data.tokenizer import build_tokenizer
from jaxrl_reason.tasks import Fact, MovingShapes, read_facts, write_facts
from jaxrl_reason.tasks.facts import opening

FACTS = (
    Fact(time=(3, 7), object="red square", action="moves right", scene="top left", cause="none"),
    Fact(
        time=(7, 8.5),
        object="blue circle",
        action="turns green",
        scene="top left",
        cause="hit by red square",
    ),
)
TEXT = """<facts>
[time] 3-7 [object] red square [action] moves right [scene] top left [cause] none
[time] 7-8.5 [object] blue circle [action] turns green [scene] top left [cause] hit by red square
</facts>"""


def test_the_layout():
    assert write_facts(FACTS) == TEXT
    assert read_facts(TEXT) == FACTS
    assert [fact.verb for fact in FACTS] == ["moves", "turns"]
    assert read_facts(write_facts(())) == ()


def test_facts_survive_json():
    for fact in FACTS:
        assert Fact.from_json(json.loads(json.dumps(fact.to_json()))) == fact


@pytest.mark.parametrize("fps", [1, 4])
def test_facts_survive_a_word_level_tokenizer(fps):
    task = MovingShapes(fps=fps)
    tokenizer = build_tokenizer(task.words())
    for index in range(20):
        facts = task.facts(task.generate("train", index))
        assert read_facts(write_facts(facts)) == facts
        decoded = decode(tokenizer, encode_completion(tokenizer, "", write_facts(facts))[1])
        assert decoded.startswith("<facts> [time] 0 -")
        assert read_facts(decoded) == facts


@pytest.mark.parametrize(
    "broken",
    [
        "",
        TEXT + TEXT,
        TEXT + " so",
        "so " + TEXT,
        TEXT.replace("</facts>", ""),
        TEXT.replace("<facts>\n", "<facts>\nred square\n"),
        TEXT.replace("[cause] none\n", "\n"),
        TEXT.replace("[cause] none", "[cause]"),
        TEXT.replace("3-7", "7-3"),
        TEXT.replace("3-7", "soon"),
        TEXT.replace("[scene]", "[place]"),
        TEXT.replace("[object] red square [action] moves right", "[action] moves right [object] r"),
        TEXT.replace("none", "<facts>"),
    ],
)
def test_broken_blocks_are_not_read(broken):
    assert read_facts(broken) is None


def test_the_opening_is_where_each_shape_is_first_seen():
    rests = dataclasses.replace(FACTS[0], time=(0, 3), action="rests")
    appears = dataclasses.replace(FACTS[1], time=(1, 2), action="appears", scene="bottom left")
    assert opening((rests, appears, *FACTS)) == "blue circle bottom left ; red square top left"
    assert opening((appears, *FACTS[::-1], rests)) == opening((rests, appears))
