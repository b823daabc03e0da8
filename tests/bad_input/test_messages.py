"""Every row of `docs/messages.md`: what is given is refused with what the page says.

A row has what is wrong, what is given (fields of `base.yaml` here, or a whole command, perhaps with
variables of the environment before it), and a part of the one message. Before a run has done
anything that takes time it must have looked at its input: it then leaves no checkpoint.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from jaxrl_reason import checkpoint
from jaxrl_reason.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "messages.md"
BASE = Path(__file__).parent / "base.yaml"
ROW = re.compile(r"^\| (?P<wrong>.+?) \| `(?P<given>.+?)` \| (?P<message>.+?) \|$", re.MULTILINE)
LATER = "while it runs"
FILES = {
    "broken.yaml": "name: [a\n",
    "twice.yaml": "name: a\nname: b\n",
    "list.yaml": "- a\n",
    "empty.yaml": "",
    "broken.jsonl": '{"prompt": "a", "completion": \n',
    "columns.jsonl": '{"question": "1"}\n',
    "empty.jsonl": "",
    "number.jsonl": '{"prompt": 3, "completion": "b"}\n',
    "zebra.jsonl": '{"prompt": "zebra ?", "completion": "zebra"}\n',
    "long.jsonl": json.dumps({"prompt": "a = 1 ; b ?", "completion": "1 " * 60}) + "\n",
    "functions_of_mine.py": """
value = 3


def short(prompts, completions, **_):
    return [1.0]


def nan(prompts, completions, **_):
    return [float("nan")] * len(completions)


def fails(prompts, completions, **_):
    return 1 / 0


def far(task, problems, rng):
    yield {"problem": 99, "completion": "1"}


def nothing(task, problems, rng):
    return []
""",
}


def rows() -> list[tuple[str, str, str, str]]:
    """Section, what is wrong, what is given and the message."""
    found = []
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        for row in ROW.finditer(text):
            plain = [part.replace("\\|", "|") for part in row.group("wrong", "given", "message")]
            found.append((title, *plain))
    return found


ROWS = rows()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a configuration, a run of its first stage, and files with mistakes in them."""
    folder = tmp_path_factory.mktemp("messages")
    shutil.copy(BASE, folder / "base.yaml")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    one = BASE.read_text().partition("  prefer:")[0].replace("name: base", "name: done")
    (folder / "done.yaml").write_text(one, encoding="utf-8")
    assert main(["run", str(folder / "done.yaml"), f"output_dir={folder / 'runs'}"]) == 0
    runs = folder / "runs"
    for name in ("shortened", "damaged"):
        shutil.copytree(runs / "done", runs / name)
        config = runs / name / "config.json"
        config.write_text(config.read_text().replace('"name": "done"', f'"name": "{name}"'))
    for path in (runs / "damaged" / "cold" / "checkpoints").iterdir():
        shutil.rmtree(path / "params")
    file = runs / "shortened" / "cold" / "checkpoints" / "2" / "params" / "_METADATA"
    file.write_bytes(file.read_bytes()[:10])
    (folder / "model").mkdir()
    return folder


def command(given: str) -> tuple[dict[str, str], list[str]]:
    """Variables of the environment, and the words of a command line."""
    words = shlex.split(given)
    if "jaxrl-reason" not in words:
        return {}, ["run", "base.yaml", *words]
    at = words.index("jaxrl-reason")
    return dict(word.split("=", 1) for word in words[:at]), words[at + 1 :]


def test_the_page_has_at_least_sixty_rows_and_each_once():
    assert len(ROWS) >= 60
    assert len({given for _, _, given, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("section", "wrong", "given", "message"), ROWS, ids=[r[2] for r in ROWS])
def test_it_is_refused_with_that_message(
    made, tmp_path, monkeypatch, capsys, section, wrong, given, message
):
    variables, words = command(given)
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(made)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    own = words[0] == "run" and not any(word.startswith("output_dir=") for word in words)
    if own:
        words.append(f"output_dir={tmp_path}")
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said.replace(f"{tmp_path}/", "").replace(f"{made}/", "")
    if own and LATER not in section:
        assert checkpoint.latest(tmp_path / "base" / "init" / "checkpoints") is None
