import json

import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.report import make_plots, write_report

NASTY = "<script>alert('1')</script> & \" \u202e \x1b[0m \ud800 </article></body>"
SHOWN = "<script>alert('1')</script> & \" \\u202e \\x1b[0m \\ud800 </article></body>"


def write_page(folder, **options):
    """A page without plots, which take longest to make."""
    return write_report(folder, plots=(), **options)


def test_a_page_has_the_results_the_curves_and_the_examples(chain, read_page):
    path = write_report(chain.folder, examples=4)
    assert path == chain.folder / "report.html"
    page = read_page(path)
    for part in ("made", "arithmetic", '"modulus": 10', "random weights, preset 0.7m", "7"):
        assert part in page.text
    # The table of stages: accuracy, interval, format, tokens, problems, time.
    assert "init|init|50.0 %|25.0 - 75.0 %|100.0 %|17.5|16|1:01" in page.text
    assert "first|second|3|3|5|5|16|+0.0 points" in page.text
    assert [a["alt"].split()[0] for t, a in page.tags if t == "img"] == ["Training", "Accuracy"]
    assert page.count("article", "problem") == 4
    assert page.count("article", "sample") == 4 * 3
    assert page.count("div", "think") == page.count("div", "answer") == 12
    assert "Became right: 1 of 5" in page.text
    assert "Problem 5|difficulty 2|expected answer: |5|prompt 5|init|wrong|" in page.text


def test_the_same_files_make_the_same_bytes_with_plots_just_made_or_drawn_anew(chain, tmp_path):
    plots = make_plots(chain.folder, [("first", "sft"), ("second", "grpo")], None)
    pages = [
        write_report(chain.folder, out=tmp_path / "a.html", plots=plots),
        write_report(chain.folder, out=tmp_path / "b.html"),
    ]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_nothing_a_model_or_a_user_writes_becomes_markup(make_run, sample_row, read_page):
    run = make_run(a={"parent": "init"})
    texts = dict.fromkeys(("prompt", "completion", "answer", "given", "reason"), NASTY)
    row = sample_row(0, False, **texts, rewards={NASTY: 1.0}, measures={NASTY: None})
    layout = {"completion": f"<think>{NASTY}</think>{NASTY}<answer>{NASTY}"}
    long = {"completion": NASTY * 20}
    run.add("init", [row, row | layout, row | long], measures={NASTY: 0.5})
    page = read_page(write_page(run.folder))  # its parser refuses scripts
    assert page.text.count(SHOWN) >= 3 * 6
    assert "\x1b" not in page.text
    assert page.count("details") >= 2
    assert "answer| without </answer>" in page.text


def test_further_sets_and_measures_are_tables(make_run, sample_row, read_page):
    run = make_run(a={"parent": "init"})
    rows = [sample_row(i, True, measures={"skip": 1.0}) for i in range(4)]
    measured = {
        "measures": {"skip": 0.25, "odd": None},
        "measures_by_difficulty": {"skip": {"2": 0.5, "10": 0.125}, "odd": {"2": 1, "10": None}},
    }
    renamed = {
        "accuracy": 0.5,
        "accuracy_ci95": [0.25, 0.75],
        "format_rate": 0.75,
        "mean_length": 8.25,
        "accuracy_by_difficulty": {"1": 0.5},
        "problems": 64,
        "measures": {"skip": 0.75},
        "measures_by_difficulty": {"skip": {"1": 0.75}},
    }
    run.add("init", rows)
    run.add("a", rows, **measured, sets={"renamed": renamed})
    page = read_page(write_page(run.folder))
    for part in (
        "Measures|stage|skip|odd|init|a|0.25|does not apply",
        "skip by difficulty|stage|2|10|init|a|0.5|0.125",
        "Set renamed|stage|accuracy|95% interval|format|tokens|problems"
        "|a|50.0 %|25.0 - 75.0 %|75.0 %|8.2|64|Measures|stage|skip|a|0.75",
    ):
        assert part in page.text
    assert page.text.count("skip by difficulty") == 1  # the set has a single difficulty


def test_what_is_missing_is_said(make_run, put_rows, read_page):
    run = make_run(a={"parent": "init"}, b={"parent": "a"}, c={"parent": "b"}, d={"parent": "c"})
    run.outcomes("init", "+-")
    run.outcomes("a", "-+")
    (run.folder / "a" / "samples.jsonl").unlink()
    put_rows(run.folder / "b" / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 4, "loss": 1}])
    (run.folder / "c").mkdir()
    page = read_page(write_page(run.folder))
    for part in (
        "a has no samples.jsonl",
        "b has trained 4 of 9 steps, and has not been evaluated.",
        "c has not been evaluated.",
        "d has not begun.",
        "b|sft|-|-|-|-|-|-",
    ):
        assert part in page.text
    assert page.count("article", "problem") == 2


def test_a_run_that_has_only_begun_has_a_page(make_run, read_page):
    page = read_page(write_page(make_run().folder))
    assert "init has not begun." in page.text
    assert "No stage has samples yet" in page.text
    assert "unknown: there is no checkpoint" in page.text
    assert page.count("img") == 0


def test_of_a_stage_the_page_shows_it_and_its_parent(chain, read_page):
    path = write_page(chain.folder / "second", examples=1)
    assert path == chain.folder / "second" / "report.html"
    page = read_page(path)
    assert "made: second" in page.text
    assert "init" not in page.text
    assert "after first, second." in page.text
    assert page.text.count("first|second|3|3|5|5|16|+0.0 points") == 1
    assert page.count("article", "sample") == 2
    alone = read_page(write_page(chain.folder / "init"))
    assert "Wrong" in alone.text
    assert "became" not in alone.text


def test_a_stage_that_makes_data_shows_counts_and_rows(make_run, put_rows, read_page):
    run = make_run(keep={"kind": "reject", "parent": "init"}, more={"parent": "init"})
    run.outcomes("init", "+-")
    place = {"task": None, "index": 3}
    row = lambda i: {"problem": place, "completion": f"<answer> <{i}> </answer>", "prompt": f"p{i}"}
    rows = [row(i) | {"completion_ids": [123456]} for i in range(7)]
    put_rows(run.folder / "keep" / "rows.jsonl", rows)
    pair = {"problem": place, "prompt": "q", "chosen": "good", "rejected": "bad"}
    put_rows(run.folder / "keep" / "pairs.jsonl", [pair])
    counts = {"rows": 7, "pairs": 1, "accuracy": 0.5}
    (run.folder / "keep" / "data.json").write_text(json.dumps({"counts": counts}))
    summary = {"stage": "keep", "kind": "reject", "accuracy_ci95": None, "seconds": 5.0}
    run.summary.append(
        summary | {"accuracy": 0.5, "format_rate": 1.0, "mean_length": 4.0, "problems": 8}
    )
    run.outcomes("more", "++")
    page = read_page(write_page(run.folder))
    assert "keep|reject|50.0 %|-|100.0 %|4.0|8|0:05" in page.text
    assert "keep: 7 rows, 1 pairs" in page.text
    assert "rows|7|pairs|1|accuracy|0.5" in page.text
    for part in ("p0", "p3", "p6", "<3>", "chosen", "good", "rejected", "bad", "problem.index |3|"):
        assert part in page.text
    assert "p1" not in page.text
    assert "123456" not in page.text
    assert page.count("article", "plain") == 3 + 2
    assert "init|more|1|0|1|0|2|+50.0 points" in page.text


def test_a_damaged_file_is_named(chain):
    (chain.folder / "first" / "samples.jsonl").write_text('{"prompt": \n')
    with pytest.raises(InputError, match=r"first/samples\.jsonl:1: got .*no valid JSON"):
        write_page(chain.folder)


def test_what_is_no_run_is_refused_with_advice(chain, tmp_path):
    with pytest.raises(InputError, match="nothing: no such folder; give the folder of a run"):
        write_page(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"is no run .*; runs in it: made; give the folder"):
        write_page(tmp_path)
    (chain.folder / "first" / "config.json").write_bytes(
        (chain.folder / "config.json").read_bytes()
    )
    (chain.folder / "first" / "checkpoints").mkdir()
    (chain.folder / "first").rename(tmp_path / "first")
    with pytest.raises(InputError, match="first is a stage outside its run"):
        write_page(tmp_path / "first")


def test_a_page_that_cannot_be_written_is_refused(chain, tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*none/page\.html: No such file"):
        write_page(chain.folder, out=tmp_path / "none" / "page.html")
    with pytest.raises(InputError, match="examples=-1 must be 0 or more"):
        write_page(chain.folder, examples=-1)
