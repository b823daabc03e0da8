"""Folders of runs made up by hand, and a reader of pages that checks their markup."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

CONFIG = {
    "name": "made",
    "seed": 7,
    "task": {"name": "arithmetic", "options": {"modulus": 10}, "tokenizer": "word"},
    "model": {"preset": "0.7m", "path": None, "changes": {}},
}
VOID = ("img", "meta")


def sample(index: int, correct: bool, **changes) -> dict:
    """A row of samples.jsonl for problem `index`."""
    return {
        "prompt": f"prompt {index}",
        "completion": f"<think> thought {index} </think> <answer> {index} </answer>",
        "answer": str(index),
        "given": str(index),
        "correct": correct,
        "formatted": True,
        "reason": "right" if correct else "expected another",
        "length": 10 + index,
        "finished": True,
        "difficulty": 1 + index % 2,
    } | changes


def evaluation(rows: list[dict], **changes) -> dict:
    """The eval.json of these rows, with an interval that is made up."""
    share = sum(row["correct"] for row in rows) / len(rows)
    by_difficulty = {"1": share, "2": share}
    return {
        "accuracy": share,
        "accuracy_ci95": [share / 2, (1 + share) / 2],
        "format_rate": 1.0,
        "mean_length": sum(row["length"] for row in rows) / len(rows),
        "accuracy_by_difficulty": by_difficulty,
        "problems": len(rows),
    } | changes


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class RunMaker:
    """A run in the making: configure it, then add what each stage has left."""

    def __init__(self, folder: Path, **stages: dict):
        self.folder = folder
        config = CONFIG | {
            "stages": {n: {"kind": "sft", "steps": 9} | s for n, s in stages.items()}
        }
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        self.summary: list[dict] = []

    def add(self, name: str, rows: list[dict], **result) -> None:
        """An evaluated stage."""
        write_rows(self.folder / name / "samples.jsonl", rows)
        result = evaluation(rows, **result)
        (self.folder / name / "eval.json").write_text(json.dumps(result))
        self.summary.append({**result, "stage": name, "kind": "sft", "seconds": 61.0})
        (self.folder / "summary.json").write_text(json.dumps(self.summary))

    def outcomes(self, name: str, outcomes: str) -> None:
        """An evaluated stage; `+` is a right and `-` a wrong completion."""
        self.add(name, [sample(i, mark == "+") for i, mark in enumerate(outcomes)])


@pytest.fixture
def make_run(tmp_path):
    """`make_run(first={"parent": "init"}, ...)` begins the run `made`."""
    return lambda **stages: RunMaker(tmp_path / "made", **stages)


@pytest.fixture
def chain(make_run):
    """A run of three stages that changed what was right, four problems of each kind and more."""
    run = make_run(first={"parent": "init"}, second={"parent": "first", "kind": "grpo"})
    run.outcomes("init", "--------" + "++++++++")
    run.outcomes("first", "----++++" + "++++----")
    run.outcomes("second", "--++-+++" + "++--+---")
    for name in ("first", "second"):
        steps = [{"step": step, "loss": 1 / step} for step in range(1, 10)]
        write_rows(run.folder / name / "metrics.jsonl", steps)
    return run


class Page(HTMLParser):
    """A page that was read: every element closed in order, nothing loaded from elsewhere."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        for tag, attributes in self.tags:
            assert tag not in ("script", "link", "iframe", "object")
            for name in ("src", "href"):
                assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
            assert not any(name.startswith("on") for name in attributes)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        """What is read, pieces apart by bars."""
        return "|".join(self.texts)

    def count(self, tag: str, class_: str | None = None) -> int:
        return sum(
            t == tag and (class_ is None or class_ in (a.get("class") or "").split())
            for t, a in self.tags
        )


@pytest.fixture
def read_page():
    """Reads a file as a `Page`."""
    return lambda path: Page(Path(path).read_text(encoding="utf-8"))


@pytest.fixture
def sample_row():
    """`sample_row(index, correct, **changes)`: a row of samples.jsonl."""
    return sample


@pytest.fixture
def put_rows():
    """`put_rows(path, rows)` writes JSONL."""
    return write_rows
