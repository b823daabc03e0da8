"""One HTML page about a run: its results, its curves, and what the model wrote before and after.

The page holds its style and its pictures, asks for nothing from the network, and is the same to the
byte for the same files.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_reason import files
from jaxrl_reason.errors import InputError
from jaxrl_reason.report.completions import show_sample, show_text
from jaxrl_reason.report.examples import (
    KINDS,
    Shared,
    Transition,
    choose,
    shared_problems,
    transitions,
)
from jaxrl_reason.report.made_data import show_made_data
from jaxrl_reason.report.markup import Html, document, element, image, join, table
from jaxrl_reason.report.plots import draw_plots
from jaxrl_reason.report.results import show_results
from jaxrl_reason.report.run_folder import RunRecord, read_run

_PLOTS = {
    "curves.png": "Training curves, a column a stage.",
    "accuracy_length.png": "Accuracy on held-out problems against mean length of a completion.",
    "pareto.png": "Accuracy and brevity that the multi-objective stage passed through.",
}


def write_report(
    folder: str | Path,
    *,
    examples: int = 12,
    out: str | Path | None = None,
    plots: Sequence[Path] | None = None,
) -> Path:
    """Write the page about a run or about one of its stages.

    Args:
        folder: of the run, or of the stage, which is then shown beside its parent.
        examples: held-out problems to show, at most.
        out: file to be written; `report.html` in the folder if None.
        plots: PNG files that `make_plots` has just written; drawn anew if None.

    Returns:
        The file.

    Raises:
        InputError: no such run, a damaged file in it, or one cannot write to `out`.
        StorageError: storage refuses it.
    """
    if examples < 0:
        raise InputError(f"examples={examples} must be 0 or more")
    out = Path(folder) / "report.html" if out is None else Path(out)
    run = read_run(folder)
    pictures = _pictures(run) if plots is None else {p.name: p.read_bytes() for p in plots}
    page = report_page(run, pictures, examples)
    with files.chosen(out, "choose another file"):
        files.replace(out, page)
    return out


def report_page(run: RunRecord, pictures: Mapping[str, bytes], examples: int) -> str:
    """The page as HTML.

    Args:
        run: what the run has left.
        pictures: PNG images by the file names of `make_plots`.
        examples: held-out problems to show, at most.
    """
    title = run.config["name"] if run.only is None else f"{run.config['name']}: {run.only}"
    sections = {
        "Results": show_results(run.stages),
        "Curves": _show_pictures(pictures),
        "Examples": _show_examples(run, examples),
        "Data made by stages": show_made_data(run.stages),
    }
    sections = {name: body for name, body in sections.items() if body}
    ids = {name: name.partition(" ")[0].lower() for name in sections}
    return document(
        title,
        element("h1", title),
        _heading(run),
        element("nav", [element("a", name, href=f"#{ids[name]}") for name in sections]),
        [
            element("section", element("h2", name), body, id=ids[name])
            for name, body in sections.items()
        ],
    )


def _pictures(run: RunRecord) -> dict[str, bytes]:
    """The plots of these stages; that of the Pareto front only as the run has left it."""
    curves = [(stage.name, stage.kind, stage.metrics) for stage in run.stages]
    measured = [{**s.result, "stage": s.name} for s in run.stages if s.result is not None]
    pictures = draw_plots(curves, measured, None)
    pareto = run.folder / "pareto.png"
    if run.only is None and pareto.exists():
        pictures["pareto.png"] = pareto.read_bytes()
    return pictures


def _heading(run: RunRecord) -> Html:
    config = run.config
    rows = {
        "task": _choice(config["task"], "name"),
        **{f"task {name}": _choice(task, "name") for name, task in config.get("tasks", {}).items()},
        "model": _model(config["model"]),
        "seed": str(config["seed"]),
        "code version": ", ".join(run.versions) or "unknown: there is no checkpoint",
    }
    return element("dl", [[element("dt", key), element("dd", text)] for key, text in rows.items()])


def _model(choice: Mapping[str, Any]) -> str:
    if choice["path"] is not None:
        return _choice(choice, "path")
    text = _choice({key: value for key, value in choice.items() if key != "path"}, "preset")
    return f"random weights, preset {text}"


def _choice(choice: Mapping[str, Any], key: str) -> str:
    """A value of a configuration, and after it what else is set there."""
    others = {name: value for name, value in choice.items() if name != key and value}
    extra = f"  {json.dumps(others, ensure_ascii=False)}" if others else ""
    return f"{choice[key] or 'of the default'}{extra}"


def _show_pictures(pictures: Mapping[str, bytes]) -> Html:
    return join(
        [
            element("figure", image(png, _PLOTS[name]), element("figcaption", _PLOTS[name]))
            for name, png in pictures.items()
        ]
    )


def _show_examples(run: RunRecord, number: int) -> Html:
    shared = shared_problems(run.stages)
    others = [
        element("p", f"{stage.name} answered other problems; evaluate it again.", class_="note")
        for stage in shared.others
    ]
    if not shared.stages:
        text = "No stage has samples yet; they are written when a stage is evaluated."
        return element("p", text, class_="note")
    moved = transitions(shared, run.stages)
    counts = next((m.counts for m in moved if _is_compared(m, shared)), {})
    groups = [
        [
            element("h3", f"{kind.capitalize()}{_shown_of(len(indices), counts.get(kind))}"),
            [_show_problem(shared, index) for index in indices],
        ]
        for kind, indices in choose(shared, number).items()
    ]
    introduction = element("p", _introduction(shared), class_="note")
    return join(others, _show_transitions(moved), introduction, groups)


def _introduction(shared: Shared) -> str:
    names = ", ".join(stage.name for stage in shared.stages)
    text = f"The same {shared.problems} held-out problems, one completion each, after {names}."
    first, last = shared.stages[0].name, shared.stages[-1].name
    if first == last:
        return text
    text += f" Below, before is {shared.before} and after is {last}."
    if shared.before != first:
        text += f" {first} was right too seldom for problems to become wrong."
    return text


def _is_compared(moved: Transition, shared: Shared) -> bool:
    return (moved.before, moved.after) == (shared.before, shared.stages[-1].name)


def _shown_of(shown: int, all_: int | None) -> str:
    return "" if all_ is None else f": {shown} of {all_}"


def _show_transitions(found: Sequence[Transition]) -> Html | None:
    if not found:
        return None
    headers = ["from", "to", *KINDS.values(), "problems", "accuracy"]
    rows = [
        [
            moved.before,
            moved.after,
            *(str(moved.counts[kind]) for kind in KINDS.values()),
            str(moved.problems),
            f"{100 * moved.change:+.1f} points",
        ]
        for moved in found
    ]
    return table(headers, rows, words=2)


def _show_problem(shared: Shared, index: int) -> Html:
    row = shared.stages[0].samples[index]
    difficulty = row.get("difficulty")
    facts = [
        element("b", f"Problem {index}"),
        None if difficulty is None else element("span", f"difficulty {difficulty}"),
        element("span", "expected answer: ", element("b", row["answer"])),
    ]
    stages = [show_sample(stage.name, stage.samples[index]) for stage in shared.stages]
    return element(
        "article",
        element("div", facts, class_="facts"),
        show_text(row["prompt"]),
        element("div", stages, class_="stages"),
        class_="problem",
    )
