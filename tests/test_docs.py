"""The documents keep their word: tables, links, code and commands are those of the package."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxrl_reason.cli import _parser
from jaxrl_reason.config import load_yaml
from jaxrl_reason.data.tokenizer import build_tokenizer, render_completion, render_prompt
from jaxrl_reason.errors import InputError
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.tasks import TASKS, make_task

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OPTIONS = ROOT / "scripts" / "docs" / "options.py"

of_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@of_page
def test_links(page):
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_linked_from_the_readme():
    readme = ROOT / "README.md"
    linked = {(ROOT / link).resolve() for link in LINK.findall(readme.read_text())}
    assert set((ROOT / "docs").rglob("*.md")) <= linked


def test_tables_of_options_are_up_to_date():
    options = runpy.run_path(str(OPTIONS))
    pages = options["pages"]()
    stale = [
        page.name for page in pages if options["rewrite"](page.read_text()) != page.read_text()
    ]
    assert not stale, "run `python scripts/docs/options.py`"
    used = set(re.findall(r"<!-- options (\S+) -->", "".join(page.read_text() for page in pages)))
    assert used == set(options["TABLES"])


def test_a_stale_table_is_rewritten():
    rewrite = runpy.run_path(str(OPTIONS))["rewrite"]
    stale = "before\n<!-- options morl -->\nold\n<!-- end of options -->\nafter\n"
    made = rewrite(stale)
    assert "old" not in made
    assert "`aggregator_options`" in made
    assert made.startswith("before\n<!-- options morl -->\n| option |")
    assert made.endswith("<!-- end of options -->\nafter\n")


@of_page
def test_python_blocks_run_and_print_what_the_page_shows(page, monkeypatch):
    """The blocks of a page run as one program."""
    before = dict(TASKS)
    names: dict = {"__name__": page.stem}
    monkeypatch.setitem(sys.modules, page.stem, type(sys)(page.stem))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            for code in blocks(page, "python"):
                exec(compile(ast.parse(code), str(page), "exec"), names)
    finally:
        TASKS.clear()
        TASKS.update(before)
    shown = page.read_text().splitlines()
    assert [line for line in printed.getvalue().splitlines() if line not in shown] == []


def test_the_loss_of_the_readme_is_a_number():
    names: dict = {}
    for code in blocks(ROOT / "README.md", "python"):
        exec(code, names)
    logprobs = jnp.full((16, 4), -1.0, jnp.float32)
    rewards = jnp.arange(16, dtype=jnp.float32) % 8
    mask = jnp.ones((16, 4), bool)
    loss = names["grpo_loss"](logprobs, logprobs, logprobs - 0.5, rewards, mask)
    # At ratio 1 the advantages cancel, and what is left is 0.04 (exp(-0.5) - 1 + 0.5).
    assert float(loss) == pytest.approx(0.04 * 0.10653066, rel=1e-4)


@of_page
def test_yaml_blocks_parse(page, tmp_path):
    for number, code in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(code)
        raw = load_yaml(file)
        if "stages" in raw:
            RunConfig.load(file)


@of_page
def test_commands_are_accepted(page):
    """Every `jaxrl-reason` command of a page parses, and its overrides fit its configuration."""
    text = "".join(blocks(page, "bash"))
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "jaxrl-reason" not in words:
            continue
        command = words[words.index("jaxrl-reason") + 1 :]
        if "--help" in command:
            continue
        arguments = _parser().parse_args(command)
        if command[0] == "run" and (ROOT / arguments.config).exists():
            RunConfig.load(ROOT / arguments.config, arguments.overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_fit_their_task(path):
    """They load, and sampled prompts and demonstrations fit the lengths they set."""
    config = RunConfig.load(path)
    assert config.name == path.stem
    task = make_task(config.task.name, config.task.options)
    tokenizer = build_tokenizer(task.words(), level=config.task.tokenizer)
    demonstrations = config.stages["cold_start"]
    for index in range(64):
        problem = task.generate("train", index)
        prompt = render_prompt(tokenizer, problem.prompt)
        completion = render_completion(tokenizer, task.trace(problem, "long"))
        assert len(prompt) <= config.max_prompt_length
        assert len(prompt) + len(completion) <= demonstrations.max_length
        assert len(completion) <= config.evaluation.max_completion_length
    longest = max(
        demonstrations.max_length,
        config.max_prompt_length + config.evaluation.max_completion_length,
    )
    assert longest <= config.model.resolve(8).max_position_embeddings


def test_an_unknown_option_in_a_configuration_is_refused():
    with pytest.raises(InputError, match="max_length"):
        RunConfig.load(CONFIGS[0], ["stages.cold_start.max_lenght=64"])
