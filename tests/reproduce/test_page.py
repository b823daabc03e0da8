"""The page: what stands on it, that its links lead somewhere, and that text cannot break it."""

import re

import pytest

from jaxrl_reason.reproduce import Results
from jaxrl_reason.reproduce.markdown import block, table
from jaxrl_reason.reproduce.page import _example, write_page
from jaxrl_reason.reproduce.section import Section
from jaxrl_reason.reproduce.words import number

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture
def write(raw, load, tmp_path, fake_entry):
    """Write the page of some seeds' accuracies of `short`, `plain`; returns it and its files."""

    def of(*seeds, **changes):
        raw.update(changes)
        experiment = load(raw)
        results = Results(tmp_path / "papers" / "shorter" / "small.json", experiment)
        for seed, (short, plain) in enumerate(seeds):
            results.add(
                seed, fake_entry({"init": 0.0, "cold": 0.2, "short": short, "plain": plain})
            )
        verdicts = results.judge()
        section = Section(experiment=experiment, results=results, verdicts=verdicts)
        written = write_page(tmp_path / "papers" / "shorter.md", [section])
        return written[0].read_text(), written

    return of


def cells(page, first):
    """The cells of the first row that begins so."""
    row = next(line for line in page.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split(" | ")]


def test_what_stands_on_the_page(write, tmp_path):
    page, written = write((0.5, 0.75), (0.25, 0.75), (0.3, 0.75))
    assert page.startswith(
        "# Short thoughts\n\n[arXiv 2501.01234](https://arxiv.org/abs/2501.01234)"
    )
    assert "Does a reward for short completions make them shorter?" in page
    assert "```bash\njaxrl-reason reproduce" in page
    assert "--seeds 3\n```" in page
    for title in ("Small scale", "Verdicts", "Findings", "Arms", "Training", "Budget", "Tests"):
        assert re.search(rf"^##+ {title}$", page, re.MULTILINE), title
    assert "Nothing can be said of **two** seeds." in page
    # Accuracy 0.5, 0.25, 0.3: mean 0.35, deviation 0.1323, half width 4.303 * 0.1323 / sqrt 3.
    assert cells(page, "rewarded for brevity")[1:] == [
        "35.0 ± 32.9 %",
        "35.0 ± 32.9 %",
        "3.5 ± 3.3",
        "100.0 ± 0.0 %",
        "3",
    ]
    assert cells(page, "plain")[1] == "75.0 ± 0.0 %"
    assert re.fullmatch(r"\d+\.\d %", cells(page, "*constant answer*")[2])
    assert re.fullmatch(r"\d+\.\d %", cells(page, "*chance*")[1])
    assert cells(page, "C2")[2] == "**supported**"
    assert cells(page, "`short`")[1:6] == ["grpo", "`cold`", "3", "8 x 4", "12"]
    assert "| planned | updates | sft_rows | sft_tokens |" in page
    assert [path.name for path in written[1:]] == [
        "small_arms.png",
        "small_training.png",
        "small_claims.png",
    ]
    for path in written[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_links_lead_somewhere(write, tmp_path):
    page, _ = write((0.5, 0.75), (0.25, 0.75))
    links = [link for link in LINK.findall(page) if not link.startswith("https:")]
    assert len(links) == 3
    assert all((tmp_path / "papers" / link).exists() for link in links)


def test_the_configuration_is_linked_where_it_is_below_the_working_directory(
    write, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert "[small.yaml](../small.yaml)" in write((0.5, 0.75))[0]


def test_numbers_are_at_the_right(write):
    page, _ = write((0.5, 0.75))
    rule = page.splitlines()[page.splitlines().index(re.search(r"\| arm \|.*", page)[0]) + 1]
    assert rule == "| --- |" + " ---: |" * 5


def test_one_seed_has_no_intervals(write):
    page, _ = write((0.5, 0.75))
    assert cells(page, "plain")[1] == "75.0 %"
    assert cells(page, "C1")[2] == "**undecided**"


def test_the_same_results_give_the_same_page(write):
    page, written = write((0.5, 0.75), (0.25, 0.75))
    before = [path.read_bytes() for path in written]
    again, written = write((0.5, 0.75), (0.25, 0.75))
    assert again == page
    assert [path.read_bytes() for path in written] == before


def test_without_claims_and_findings_their_places_are_empty(write):
    page, written = write((0.5, 0.75), claims={}, findings="")
    assert "No claim is stated." in page
    assert "Findings" not in page
    assert len(written) == 3


def test_a_scale_that_was_not_run_is_described(raw, load, tmp_path, fake_entry):
    small = load(raw)
    results = Results(tmp_path / "papers" / "shorter" / "small.json", small)
    results.add(0, fake_entry({"init": 0.0, "cold": 0.2, "short": 0.5, "plain": 0.5}))
    full = Section(experiment=load(raw | {"question": "And at full scale?"}, scale="full"))
    sections = [full, Section(experiment=small, results=results, verdicts=results.judge())]
    written = write_page(tmp_path / "papers" / "shorter.md", sections)
    page = written[0].read_text()
    first, second = page.split("## Full scale")
    assert "## Small scale" in first
    assert "And at full scale?" in second
    assert "And at full scale?" not in first
    assert f"**Not run.** Configuration hash `{full.experiment.hash}`." in second
    assert "| planned | updates" in second
    assert "### Stages" in second
    assert "### Verdicts" not in second
    assert not any("full" in path.name for path in written)
    assert "--scale full" in page


# Text of models


EXAMPLE = {
    "prompt": "a = 1 ; a ?",
    "answer": "1",
    "stages": {"before": "cold", "after": "short"},
    "before": {"completion": "<think> so ```\n# no title", "correct": False, "length": 4},
    "after": {
        "completion": "<think> a is 1 </think> <answer> 1 </answer> done",
        "correct": True,
        "length": 9,
    },
}


def test_an_example_is_taken_apart():
    assert _example(EXAMPLE).splitlines() == [
        "```text",
        "prompt       a = 1 ; a ?",
        "answer       1",
        "",
        "before: cold, wrong, 4 tokens",
        "  reasoning  so '''",
        "             # no title",
        "  answer     (none)",
        "",
        "after: short, right, 9 tokens",
        "  reasoning  a is 1",
        "  answer     1   (and then: done)",
        "```",
    ]


def test_long_lines_of_an_example_are_broken():
    long = {**EXAMPLE, "prompt": "word " * 60}
    assert max(map(len, _example(long).splitlines())) <= 96


def test_control_characters_and_pipes_do_no_harm():
    assert block("a\x1b[1m```") == "```text\na\\x1b[1m'''\n```\n"
    assert table(["a", "b"], [["x|y\nz", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y z | 1 |\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.123"), (-0.5, "−0.5"), (123.4, "123"), (1e-17, "0"), (None, "-")],
)
def test_numbers_in_words(value, text):
    assert number(value) == text
    if value == 0.123456:
        assert number(value, signed=True) == "+0.123"
    if text == "0":
        assert number(value, signed=True) == "0"
