"""Reading, checking, recognising and hashing rows with `data.records`, and writing them."""

import datetime
import json
import os
import subprocess
import sys

import datasets
import pytest

from jaxrl_reason.data.records import (
    Record,
    content_hash,
    load_records,
    read_jsonl,
    recognise,
)
from jaxrl_reason.errors import InputError, StorageError
from jaxrl_reason.files import write_jsonl

# The first three test problems of GSM8K (Cobbe et al., MIT licence).
GSM8K = [
    {
        "question": "Janet\u2019s ducks lay 16 eggs per day. She eats three for breakfast every "
        "morning and bakes muffins for her friends every day with four. She sells the remainder "
        "at the farmers' market daily for $2 per fresh duck egg. How much in dollars does she "
        "make every day at the farmers' market?",
        "answer": "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = "
        "$<<9*2=18>>18 every day at the farmer\u2019s market.\n#### 18",
    },
    {
        "question": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many "
        "bolts in total does it take?",
        "answer": "It takes 2/2=<<2/2=1>>1 bolt of white fiber\nSo the total amount of fabric is "
        "2+1=<<2+1=3>>3 bolts of fabric\n#### 3",
    },
    {
        "question": "Josh decides to try flipping a house.  He buys a house for $80,000 and then "
        "puts in $50,000 in repairs.  This increased the value of the house by 150%.  How much "
        "profit did he make?",
        "answer": "The cost of the house and repairs came out to 80,000+50,000=$<<80000+50000="
        "130000>>130,000\nHe increased the value of the house by 80,000*1.5=<<80000*1.5=120000>>"
        "120,000\nSo the new value of the house is 120,000+80,000=$<<120000+80000=200000>>200,000\n"
        "So he made a profit of 200,000-130,000=$<<200000-130000=70000>>70,000\n#### 70000",
    },
]
COLUMNS = ("question", "answer")


def write(tmp_path, content: str | bytes, name: str = "rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_rows_come_back_as_written(tmp_path, ascii_only, newline):
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in GSM8K]
    path = write(tmp_path, newline.join(lines) + newline)
    assert read_jsonl(path, COLUMNS) == GSM8K
    records = load_records(str(path), required=COLUMNS)
    assert [record.row for record in records] == GSM8K
    assert [record.where for record in records] == [f"{path}:{line}" for line in (1, 2, 3)]


def test_byte_order_mark_and_trailing_blank_lines_are_ignored(tmp_path):
    assert read_jsonl(write(tmp_path, b'\xef\xbb\xbf{"a": 1}\n\n \n')) == [{"a": 1}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b'{"prompt": "a"}\n{"prompt": "b"\n',
            ':2: got "{\\"prompt\\": \\"b\\"", no valid JSON (Expecting \',\' delimiter at column '
            "15); write one JSON object a line",
        ),
        (b'{"prompt": "a"}\n\n{"prompt": "b"}\n', ":2: got an empty line, no valid JSON"),
        (b'{"prompt": "a"}\n["b"]\n', ':2: got ["b"]; write one JSON object a line'),
        (
            b'{"prompt": "a"}\n{"promt": "b"}\n',
            ":2: no column 'prompt'; did you mean 'promt'?",
        ),
        (b'{"prompt": 3}\n', ":1: column 'prompt' is 3; it must be str"),
        (b'{"prompt": null}\n', ":1: column 'prompt' is null; it must be str"),
        (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}', ":2: byte 16 of the line is not UTF-8"),
        (b"", ": no rows"),
        (b"\n\n", ": no rows"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, content, expected):
    path = write(tmp_path, content)
    assert refused(load_records, path, required=("prompt",)).startswith(f"{path}{expected}")
    assert refused(read_jsonl, path, ("prompt",)).startswith(f"{path}{expected}")


def test_types_are_checked_where_a_column_is_present(tmp_path):
    path = write(tmp_path, '{"n": 1, "m": ["a"]}\n{"n": 1.5}\n{"n": true}\n')
    types = {"n": (int, float), "m": list}
    message = refused(read_jsonl, path, ("n",), types)
    assert message == f"{path}:3: column 'n' is true; it must be int or float"
    assert "column 'n' is 1.5; it must be int" in refused(read_jsonl, path, types={"n": int})
    assert len(read_jsonl(path, types={"n": (int, float, bool)})) == 3


def test_a_missing_file_is_answered_with_its_neighbours(tmp_path):
    write(tmp_path, "{}", "train.jsonl")
    path = tmp_path / "trian.jsonl"
    expected = f"{path}: no such file; in {tmp_path}: did you mean 'train.jsonl'?"
    assert refused(load_records, path) == expected
    folder = tmp_path / "rows.jsonl"
    folder.mkdir()
    assert refused(load_records, folder) == f"{folder} is a directory; give a file"
    text = write(tmp_path, "a", "rows.txt")
    assert refused(load_records, text).startswith(f"{text}: give a .jsonl, .json or .parquet")
    assert "no such file" in refused(load_records, tmp_path / "none" / "rows.parquet")


def test_parquet_rows_equal_jsonl_rows(tmp_path, capfd):
    datasets.disable_progress_bars()
    rows = [{**row, "turns": [{"role": "user", "content": "x"}], "n": 2} for row in GSM8K]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    datasets.enable_progress_bars()
    capfd.readouterr()
    records = load_records(path, required=COLUMNS, types={"n": int})
    assert [record.row for record in records] == rows
    assert records[2].where == f"{path} row 3"
    assert capfd.readouterr() == ("", ""), "reading a small file draws no progress bar"
    assert content_hash(record.row for record in records) == content_hash(rows)
    message = refused(load_records, path, required=("prompt",))
    assert message.startswith(f"{path} row 1: no column 'prompt'; ")


def test_a_broken_parquet_file_is_refused(tmp_path):
    path = write(tmp_path, "hello", "rows.parquet")
    message = refused(load_records, path)
    assert message.startswith(f"{path}: not a readable Parquet file: ")
    assert "\n" not in message


def test_hub_ids_are_split_into_name_and_subset(monkeypatch):
    calls = []

    def load_dataset(name, subset, *, split):
        calls.append((name, subset, split))
        return datasets.Dataset.from_list(GSM8K)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = load_records("openai/gsm8k:main", required=COLUMNS, split="test")
    assert [record.row for record in records] == GSM8K
    assert records[0].where == "openai/gsm8k test row 1"
    load_records("someone/some-thing.v2")
    assert calls == [("openai/gsm8k", "main", "test"), ("someone/some-thing.v2", None, "train")]


def test_an_unreachable_data_set_is_an_input_error(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refused(load_records, "nobody/nothing") == (
        "nobody/nothing: neither a file nor readable on the Hugging Face hub with subset None and "
        "split train: ConnectionError: Couldn't reach the hub"
    )


CHAT = [{"role": "user", "content": "2+2"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": CHAT, "completion": CHAT, "extra": 1}, "prompt_completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "answer": 4}, "prompt_only"),
        ({"messages": CHAT}, "messages"),
    ],
)
def test_trl_formats_are_recognised(row, expected):
    assert recognise([Record(row, "x:1"), Record(row, "x:2")]) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GSM8K[0], "x:1: got columns question, answer; needed: prompt, chosen, rejected; prompt, "),
        ({"prompt": 3}, "x:1: column 'prompt' is 3; it must be str or list"),
        ({"prompt": ""}, "x:1: column 'prompt' is \"\"; it must be text or a list of"),
        ({"prompt": [{"role": "user"}]}, 'x:1: column \'prompt\' is [{"role": "user"}]; it must'),
        ({"messages": []}, "x:1: column 'messages' is []; it must be text or a list of"),
        ({"messages": "hi"}, "x:1: column 'messages' is \"hi\"; it must be list"),
    ],
)
def test_other_rows_are_refused(row, expected):
    assert refused(recognise, [Record(row, "x:1")]).startswith(expected)


def test_one_format_must_hold_for_all_rows():
    rows = [Record({"prompt": "a", "completion": "b"}, "x:1"), Record({"prompt": "a"}, "x:2")]
    assert refused(recognise, rows).startswith("x:2: no column 'completion'; ")


def test_check_puts_the_place_before_the_reason():
    def fails(row):
        raise InputError(f"unknown word {row['prompt']!r}")

    record = Record({"prompt": "zebra"}, "x.jsonl:7")
    assert refused(record.check, fails) == "x.jsonl:7: unknown word 'zebra'"
    assert record.check(len) == 1


def test_written_rows_are_whole_and_read_back(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    write_jsonl(path, GSM8K)
    assert read_jsonl(path) == GSM8K
    assert "\u2019" in path.read_text(encoding="utf-8")

    def stops_halfway():
        yield {"a": 1}
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_jsonl(path, stops_halfway())
    assert read_jsonl(path) == GSM8K
    with pytest.raises(RuntimeError, match="killed"):
        write_jsonl(tmp_path / "other.jsonl", stops_halfway())
    assert not (tmp_path / "other.jsonl").exists()
    with pytest.raises(StorageError, match=r"below.jsonl could not be written: "):
        write_jsonl(path / "below.jsonl", GSM8K)


def test_the_content_hash_knows_values_and_order_only():
    shuffled_keys = [dict(reversed(row.items())) for row in GSM8K]
    assert content_hash(shuffled_keys) == content_hash(GSM8K)
    assert content_hash(GSM8K[::-1]) != content_hash(GSM8K)
    assert content_hash([{**GSM8K[0], "answer": "18"}, *GSM8K[1:]]) != content_hash(GSM8K)
    assert content_hash([{"a": "b"}, {}]) != content_hash([{}, {"a": "b"}])
    first, second = ({"day": datetime.date(2024, 1, day)} for day in (1, 2))
    assert content_hash([first]) != content_hash([second])


def test_importing_the_module_loads_no_data_library():
    code = "import sys, jaxrl_reason.data.records; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0
