"""Rows from every kind of source, columns made of others, and GSM8K as it is published."""

import json
from pathlib import Path
from typing import ClassVar

import datasets
import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxrl_reason.data.chat import decode
from jaxrl_reason.data.examples import RowEncoder
from jaxrl_reason.data.records import content_hash, load_records, recognise
from jaxrl_reason.errors import InputError
from jaxrl_reason.files import write_jsonl

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
ROWS = [{"question": f"What is {n} + é?", "answer": f"It is\n#### {n}"} for n in range(3)]
COLUMNS = {"prompt": "question", "completion": "answer"}


def refused(function, *given, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*given, **options)
    return str(caught.value)


@pytest.fixture
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# Sources


def test_a_json_file_is_a_list_of_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    records = load_records(path)
    assert [record.row for record in records] == ROWS
    assert records[1].where == f"{path} row 2"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"a": 1},\n{"b": }]', ":2: no valid JSON (Expecting value at column 7); write a list"),
        ('{"a": 1}', ': got {"a": 1}; write a list of objects'),
        ('[{"a": 1}, 2]', " row 2: got 2; write a list of objects"),
        ("[]", ": no rows"),
    ],
)
def test_a_broken_json_file_is_refused(tmp_path, content, expected):
    path = tmp_path / "rows.json"
    path.write_text(content, encoding="utf-8")
    assert refused(load_records, path).startswith(f"{path}{expected}")


def test_a_directory_saved_by_datasets_is_read(tmp_path, quiet):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    records = load_records(tmp_path / "one")
    assert [record.row for record in records] == ROWS
    assert records[2].where == f"{tmp_path / 'one'} row 3"
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "two")
    assert len(load_records(tmp_path / "two")) == 3
    (record,) = load_records(tmp_path / "two", split="test")
    assert record.where == f"{tmp_path / 'two' / 'test'} row 1"
    message = refused(load_records, tmp_path / "two", split="tests")
    assert message.endswith("no split 'tests'; did you mean 'test'?")
    assert "a directory that datasets has not saved" in refused(load_records, tmp_path)


class TinyQuestions(tfds.core.GeneratorBasedBuilder):
    """Three questions."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar = {}

    def _info(self):
        features = {
            "question": tfds.features.Text(),
            "answer": tfds.features.Text(),
            "n": tfds.features.Scalar(dtype=np.int64),
            "image": tfds.features.Tensor(shape=(2, 2, 3), dtype=np.uint8),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for n, row in enumerate(ROWS):
            yield n, {**row, "n": n, "image": np.full((2, 2, 3), n, np.uint8)}


@pytest.mark.filterwarnings("ignore")
def test_tfds_is_read_through_its_data_source(tmp_path, monkeypatch):
    builder = TinyQuestions(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    plain = tfds.data_source
    monkeypatch.setattr(
        tfds, "data_source", lambda name, split: plain(name, split=split, data_dir=tmp_path)
    )
    records = load_records("tfds:tiny_questions", columns=COLUMNS)
    assert sorted(record.row["prompt"] for record in records) == [row["question"] for row in ROWS]
    row = records[0].row
    assert type(row["n"]) is int
    assert np.array_equal(row["image"], np.full((2, 2, 3), row["n"]))
    assert records[0].where == "tfds:tiny_questions train row 1"
    message = refused(load_records, "tfds:tiny_questions", split="none")
    assert message.startswith("tfds:tiny_questions: not readable with split none: ")


def test_objects_with_rows_are_sources():
    class Source:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"question": ROWS[index]["question"].encode(), "n": np.int64(index)}

    records = load_records(Source())
    assert records[1].row == {"question": ROWS[1]["question"], "n": 1}
    assert records[1].where == "Source row 2"
    walked = grain.MapDataset.source(ROWS)
    for source in (ROWS, walked, walked.to_iter_dataset(), datasets.Dataset.from_list(ROWS)):
        assert [record.row for record in load_records(source)] == ROWS
    assert refused(load_records, [1]) == "list row 1: got int; rows must be mappings"


def test_what_arrow_fills_in_is_taken_out_again(tmp_path, quiet):
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f", "x": {"y": 1}}]},
        {
            "messages": [
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},
            ],
            "tools": [{"name": "g", "z": "w"}],
        },
    ]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    records = load_records(path)
    assert [record.row for record in records] == rows
    assert recognise(records) == "messages"


def test_images_are_found_beside_the_data(tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "a.png"}]
    row = {"prompt": [{"role": "user", "content": parts}], "images": ["a.png"], "note": "b.png"}
    row |= {"video": "https://there/b.mp4", "image": {"path": "a.png", "bytes": None}}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    (record,) = load_records(tmp_path / "rows.jsonl")
    place = str(tmp_path / "a.png")
    assert record.row["images"] == [place]
    assert record.row["image"]["path"] == place
    assert record.row["prompt"][0]["content"] == [{"type": "image", "image": place}, parts[1]]
    assert (record.row["note"], record.row["video"]) == ("b.png", "https://there/b.mp4")
    write_jsonl(tmp_path / "rows.jsonl", [{"image": "a.png"}, {"image": "b.png"}])
    message = refused(load_records, tmp_path / "rows.jsonl")
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}:2: {tmp_path / 'b.png'}: no such file")


def test_the_hash_of_a_row_knows_every_pixel():
    image = np.zeros((64, 64, 3), np.uint8)
    other = image.copy()
    other[32, 32, 0] = 1
    hashes = {content_hash([{"image": x}]) for x in (image, other, image.reshape(-1), b"a", b"b")}
    assert len(hashes) == 5
    assert content_hash([{"image": image}]) == content_hash([{"image": image.copy()}])


# Columns


def test_columns_are_renamed_or_written_from_others():
    columns = {
        "prompt": "Question: {question}\nPut the answer in \\boxed{{}}.",
        "completion": "answer",
        "answer": "{question} {answer}",
    }
    row = load_records([ROWS[0] | {"answer": "{x}"}], columns=columns)[0].row
    assert row["prompt"] == "Question: What is 0 + é?\nPut the answer in \\boxed{}."
    assert row["completion"] == "{x}"
    assert row["answer"] == "What is 0 + é? {x}"


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (
            "questoin",
            "list row 1: no column 'questoin' to make another of; did you mean",
        ),
        ("{n}", "list row 1: no column 'n' to make another of; "),
        ("{question.__class__}", "list row 1: no column 'question.__class__' to make another of"),
        ("{", "columns.prompt='{': Single '{' encountered in format string; a brace that is text"),
    ],
)
def test_columns_of_nothing_are_refused(origin, expected):
    assert refused(load_records, ROWS, columns={"prompt": origin}).startswith(expected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": "a", "rejected": "b"}, "implicit_preference"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "prompt_only"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "messages"),
    ],
)
def test_more_formats_are_recognised(row, expected):
    assert recognise(load_records([row])) == expected


@pytest.mark.parametrize("content", [None, 3, [3], [{"text": "a"}]])
def test_messages_of_other_content_are_refused(content):
    records = load_records([{"messages": [{"role": "user", "content": content}]}])
    assert "it must be text or a list of" in refused(recognise, records)


# GSM8K


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not there")
def test_gsm8k_becomes_demonstrations(make):
    tokenizer = make("qwen2_5")
    encoder = RowEncoder(tokenizer=tokenizer)
    for split, size in (("train", 7473), ("test", 1319)):
        path = GSM8K / f"{split}.jsonl"
        records = load_records(path, columns=COLUMNS)
        assert len(records) == size
        assert recognise(records) == "prompt_completion"
        for record in records[::40]:
            (encoded,) = record.check(encoder.supervised)
            begin = encoded.mask.index(True)
            assert all(encoded.mask[begin:])
            assert encoded.ids[:begin] == encoder.prompt(record.row)
            assert decode(tokenizer, encoded.ids[begin:]) == record.row["answer"]
            assert encoded.ids[-1] == tokenizer.eos_token_id
