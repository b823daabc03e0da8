import io

import pytest
from rich.console import Console

from jaxrl_reason.errors import InputError
from jaxrl_reason.report import completions_table, stage_markdown, stage_table, stage_text

ROWS = [
    {
        "stage": "init",
        "kind": "init",
        "accuracy": 0.004,
        "accuracy_ci95": [0.001, 0.014],
        "format_rate": 0.0,
        "mean_length": 95.98,
        "problems": 500,
        "seconds": 0.0,
    },
    {
        "stage": "sft",
        "kind": "sft",
        "accuracy": 0.512,
        "accuracy_ci95": [0.468, 0.5555],
        "format_rate": 0.996,
        "mean_length": 41.2,
        "problems": 500,
        "seconds": 134.4,
    },
]
UNMEASURED = {"accuracy": None, "accuracy_ci95": None, "format_rate": None, "mean_length": None}


def show(table, width=120):
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(table)
    return stream.getvalue()


def squeeze(text):
    return " ".join(text.split())


def test_stage_table_shows_fractions_as_percent_and_seconds_as_minutes():
    text = squeeze(show(stage_table(ROWS)))
    assert "stage kind accuracy 95% interval format tokens problems time" in text
    assert "init init 0.4 % 0.1 - 1.4 % 0.0 % 96.0 500 0:00" in text
    assert "sft sft 51.2 % 46.8 - 55.5 % 99.6 % 41.2 500 2:14" in text


def test_stage_table_fits_eighty_columns():
    rows = [*ROWS, {**ROWS[1], "stage": "cold_start"}]
    lines = show(stage_table(rows), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("cold_start" in line for line in lines)
    assert any("46.8 - 55.5 %" in line and "2:14" in line for line in lines)


def test_stage_text_is_ascii_without_escapes():
    text = stage_text([*ROWS, {**ROWS[1], "stage": "grpo"}])
    assert text.isascii()
    assert "\x1b" not in text
    assert text.index("init") < text.index("sft ") < text.index("grpo ")
    assert all(line == line.rstrip() for line in text.splitlines())


def test_stage_markdown_is_one_table_whatever_the_names():
    row = {**ROWS[1], "stage": "a|b\nc", "kind": "back\\slash", **UNMEASURED, "seconds": None}
    lines = stage_markdown([ROWS[0], row]).splitlines()
    assert lines[0] == (
        "| stage | kind | accuracy | 95% interval | format | tokens | problems | time |"
    )
    assert lines[1] == "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[3] == "| a\\|b c | back\\\\slash | - | - | - | - | 500 | - |"
    assert len(lines) == 4


def test_markup_in_a_stage_name_is_text():
    text = show(stage_table([{**ROWS[0], "stage": "[/b] [red]x[/red] :smile:"}]))
    assert "[/b] [red]x[/red] :smile:" in text


def test_a_row_that_lacks_keys_names_them_all():
    row = {key: value for key, value in ROWS[1].items() if key not in ("kind", "problems")}
    for render in (stage_table, stage_text, stage_markdown):
        with pytest.raises(InputError, match="summary row 1 lacks kind, problems"):
            render([ROWS[0], row])


SAMPLES = [
    {
        "step": 40,
        "prompt": "Use [3, 4] to make 12. [/red]",
        "completion": "<think> [bold] 3 * 4 </think>\n<answer> 3*4 </answer>",
        "rewards": {"accuracy": 1.0, "length": None},
        "advantage": -0.5,
        "correct": True,
    },
    {"step": 40, "prompt": "second", "completion": "", "rewards": {"accuracy": 0.0}},
    {"step": 40, "prompt": "third", "completion": "x"},
]


def test_completions_table_shows_texts_literally_and_every_number():
    text = show(completions_table(SAMPLES, 2))
    assert "step 40" in text
    for part in ("[3, 4]", "[/red]", "<think> [bold] 3 * 4 </think>", "<answer> 3*4 </answer>"):
        assert part in text
    for line in ("accuracy    1.00", "length         -", "advantage  -0.50", "correct      yes"):
        assert line in text
    assert "second" in text
    assert "third" not in text
    assert "third" in show(completions_table(SAMPLES, 9))
    assert "completion" in show(completions_table([], 3))


def test_completions_table_makes_control_characters_visible():
    sample = {"prompt": "a\x1b[31mred\x07\r\u202eback", "completion": "\ttab \u00e9\u4e2d \ud800"}
    text = show(completions_table([sample], 1))
    for raw in ("\x1b", "\x07", "\r", "\u202e", "\t", "\ud800"):
        assert raw not in text
    for shown in ("a\\x1b[31mred\\x07\\r\\u202eback", "\\ttab \u00e9\u4e2d \\ud800"):
        assert shown in text


def test_completions_table_keeps_rewards_on_a_narrow_terminal():
    long = {**SAMPLES[0], "completion": "word " * 40}
    text = show(completions_table([long], 1), width=60)
    assert max(map(len, text.splitlines())) <= 60
    assert "advantage  -0.50" in text
    assert text.count("word") == 40


def test_steps_that_differ_are_no_title():
    text = show(completions_table([SAMPLES[0], {**SAMPLES[1], "step": 41}], 2))
    assert "step" not in text


def test_a_sample_without_text_is_refused():
    with pytest.raises(InputError, match="sample 1 has no text under 'completion'"):
        completions_table([SAMPLES[0], {"prompt": "p", "completion": None}], 5)
