"""The documents keep their word: tables, links, code and commands are those of the package."""

import ast
import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxrl_reason import advantages, losses, objectives
from jaxrl_reason.cli import _parser
from jaxrl_reason.config import load_yaml
from jaxrl_reason.conformance.implementation import public_functions
from jaxrl_reason.data.chat import encode_completion, encode_prompt
from jaxrl_reason.data.tokenizer import build_tokenizer
from jaxrl_reason.errors import InputError
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.tasks import TASKS, make_task

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("tpu/*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MODULE = re.compile(r"# (\w+)\.py\n")
OPTIONS = ROOT / "scripts" / "docs" / "options.py"
LOSSES = ROOT / "docs" / "losses.md"
ARXIV = re.compile(r"\d{4}\.\d{5}")

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
    assert {page for page in PAGES if page.parent != ROOT} <= linked


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
    """Blocks continue each other, but one that imports jax begins a program of its own.

    A block that begins with the name of a file is that module, for the blocks after it.
    """
    before = dict(TASKS)
    names: dict = {}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            for code in blocks(page, "python"):
                file = MODULE.match(code)
                if file or not names or "import jax\n" in code:
                    module = type(sys)(file[1] if file else page.stem)
                    names = vars(module)
                    monkeypatch.setitem(sys.modules, module.__name__, module)
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
        # Those of published models fetch them; tests/stages/test_published.py loads them.
        if command[0] == "run" and ROOT / arguments.config in CONFIGS:
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
        prompt = encode_prompt(tokenizer, problem.prompt)
        completion = encode_completion(tokenizer, "", task.trace(problem, "long"))[1]
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


def rows_of(page: Path) -> list[tuple[set[str], str]]:
    """Each row of the page's tables: the names in its first cell, and the whole row."""
    lines = FENCE.sub("", page.read_text()).splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    return [(set(re.findall(r"`(\w+)`", row.split("|")[1])), row) for row in rows]


def test_losses_md_has_every_public_function_and_name():
    told = set(re.findall(r"`(\w+)`", LOSSES.read_text()))
    wanted = {name for module in (losses, objectives) for name in module.__all__}
    wanted |= set(public_functions(advantages))
    wanted |= {*losses.LOSS_TYPES, *losses.PREFERENCE_LOSSES, *objectives.AGGREGATORS}
    assert wanted - told == set()


def test_losses_md_tells_functions_of_names_as_the_code_does():
    rows = rows_of(LOSSES)
    for name, variant in losses.LOSS_TYPES.items():
        parts = (name, variant.loss.__name__, variant.aggregation, variant.scale)
        expected = "| " + " | ".join(f"`{part}`" for part in parts) + " |"
        assert expected in [row for _, row in rows]
    for name, loss in losses.PREFERENCE_LOSSES.items():
        (row,) = [row for names, row in rows if names == {loss.__name__}]
        # The trainers of losses without a reference are named after them.
        assert f"`{name}`" in row or f"`{name.upper()}Trainer`" in row


def test_losses_md_cites_what_the_docstrings_cite():
    sources = [*(ROOT / "jaxrl_reason").glob("*.py"), *(ROOT / "jaxrl_reason").rglob("*/*.py")]
    cited = set(ARXIV.findall("".join(source.read_text() for source in sources)))
    assert set(ARXIV.findall(LOSSES.read_text())) <= cited
    for names, row in rows_of(LOSSES):
        for name in names & {*public_functions(losses), *public_functions(objectives)}:
            module = losses if hasattr(losses, name) else objectives
            source = set(ARXIV.findall(getattr(module, name).__doc__))
            here = set(ARXIV.findall(row))
            assert not source or not here or source & here, f"{name}: {here}, not {source}"


def test_conformance_md_names_the_tests_of_the_suite():
    told = {name for names, _ in rows_of(ROOT / "docs" / "conformance.md") for name in names}
    suite = ROOT / "jaxrl_reason" / "conformance"
    files = [(suite / f"test_{name}.py").read_text() for name in ("cases", "golden")]
    assert told == set(re.findall(r"^def test_(\w+)\(", "".join(files), re.MULTILINE))


def test_the_adapter_of_conformance_md_conforms(tmp_path):
    """As shown it passes, and without what the page calls necessary it fails as the page says."""
    page = ROOT / "docs" / "conformance.md"
    for code in blocks(page, "python"):
        (tmp_path / f"{MODULE.match(code)[1]}.py").write_text(code)
    (command,) = re.findall(r"^pytest .* --impl my_adapter$", page.read_text(), re.MULTILINE)
    words = [*shlex.split(command)[1:], "-k", "sapo_loss", "-q", "-p", "no:cacheprovider"]
    settings = {name: os.environ[name] for name in os.environ if not name.startswith("PYTEST")}

    def run():
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=tmp_path,
            env=settings,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr

    code, output = run()
    assert (code, "1 functions checked, 0 missing" in output) == (0, True), output

    own = tmp_path / "my_losses.py"
    right = own.read_text()
    wrong = right.replace("jnp.clip(new - old, -20, 20)", "new - old")
    wrong = re.sub(".*stop_gradient.*\n", "", wrong)
    assert len(right.splitlines()) == len(wrong.splitlines()) + 1
    own.write_text(wrong)
    code, output = run()
    assert code == 1, output
    assert set(re.findall(r"^FAILED .*::(\w+)", output, re.MULTILINE)) >= {
        "test_masked",
        "test_oracle",
    }
