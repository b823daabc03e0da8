"""The Markdown page of an experiment, made from its results alone.

A section for each scale: verdicts, findings, arms, fronts, training, budget, tests, completions,
stages.
"""

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_reason import files
from jaxrl_reason.reproduce.experiment import SCALES, Experiment
from jaxrl_reason.reproduce.markdown import block, code
from jaxrl_reason.reproduce.page_tables import (
    arms_table,
    budget_table,
    stages_table,
    tests_table,
    verdicts_table,
)
from jaxrl_reason.reproduce.pareto import pareto_tables, write_pareto
from jaxrl_reason.reproduce.section import Section, write_plots

_COLUMNS = 96
_ANSWER = re.compile(r"(.*?)<answer>(.*?)(?:</answer>(.*))?", re.DOTALL)


def write_page(path: Path, sections: Sequence[Section]) -> list[Path]:
    """Write the page of an experiment and the plots it shows.

    Args:
        path: of the page; plots go into the folder beside it that has its name.
        sections: one of each scale.

    Returns:
        The files written, the page first.

    Raises:
        InputError: nothing can be written there.
        StorageError: storage refuses it.
    """
    folder = path.with_suffix("")
    plots = {}
    sections = sorted(sections, key=lambda section: SCALES.index(section.experiment.scale))
    with files.chosen(path, "choose another --results-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        for section in sections:
            found = write_plots(section, folder) | write_pareto(section, folder)
            plots[section.experiment.scale] = found
        text = page_text(sections, plots, path)
        path.write_text(text, encoding="utf-8")
    return [path, *(plot for found in plots.values() for plot in found.values())]


def page_text(
    sections: Sequence[Section], plots: Mapping[str, Mapping[str, Path]], path: Path
) -> str:
    """The page as Markdown.

    Args:
        sections: of the scales, in order.
        plots: files by scale and by what they show.
        path: where the page will be, for its links.
    """
    first = sections[0].experiment
    paper = first.config.paper
    parts = [
        f"# {paper.title}\n",
        f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}). "
        f"This page is made by the command below from `{first.name}/*.json` beside it; write "
        "`findings` in the configuration and not here.\n",
        _filled(first.config.question),
        block("\n".join(map(_command, sections)), "bash"),
    ]
    for section in sections:
        parts += _section(section, plots[section.experiment.scale], path, first)
    return "\n".join(parts)


def _section(
    section: Section, plots: Mapping[str, Path], path: Path, first: Experiment
) -> list[str]:
    experiment = section.experiment
    parts = [f"## {experiment.scale.capitalize()} scale\n"]
    if experiment.config.question != first.config.question:
        parts.append(_filled(experiment.config.question))
    parts.append(_filled(f"{_configuration(experiment, path)} {_origin(section)}"))
    shown = {name: _image(name, plot, path) for name, plot in plots.items()}
    if section.has_results:
        parts += ["### Verdicts\n", verdicts_table(section), shown.get("claims", "")]
    parts += ["### Findings\n", experiment.config.findings] if experiment.config.findings else []
    if section.has_results:
        parts += ["### Arms\n", _ABOUT_ARMS, arms_table(section), shown.get("arms", "")]
        tables = enumerate(pareto_tables(section), start=1)
        fronts = [part for n, text in tables for part in (text, shown.get(f"pareto_{n}", ""))]
        parts += ["### Pareto fronts\n", _ABOUT_FRONTS, *fronts] if any(fronts) else []
    if "training" in shown:
        parts += ["### Training\n", _ABOUT_TRAINING, shown["training"]]
    parts += ["### Budget\n", _equalities(experiment), budget_table(section)]
    if section.has_results:
        parts += ["### Tests\n", _ABOUT_TESTS, *tests_table(section), *_examples(section)]
    return [part for part in [*parts, "### Stages\n", stages_table(experiment)] if part]


_ABOUT_ARMS = (
    "Mean over seeds with half the width of its 95 % interval (Student's t). `constant answer` is "
    "the\naccuracy of the commonest answer of each difficulty, `chance` that of an answer drawn as "
    "often as it\noccurs; neither reads the question.\n"
)
_ABOUT_FRONTS = (
    "Means over seeds with half the width of their 95 % interval. The hypervolume of an arm is the "
    "area\nbetween the reference point and its own two numbers, seed by seed; an arm is on the "
    "front where no\nother arm's mean is at least as good in both. In the plots dots are seeds.\n"
)
_ABOUT_TRAINING = (
    "The last stage of each arm: running mean, averaged over seeds, and the range of the seeds.\n"
)
_ABOUT_TESTS = (
    "An interval is that of the mean over seeds, and p the two-sided p-value of that mean being on "
    "the\nmargin.\n"
)


def _command(section: Section) -> str:
    experiment = section.experiment
    words = ["jaxrl-reason reproduce", experiment.argument, *experiment.overrides]
    words += ["--smoke"] if experiment.is_smoke else []
    words += [f"--scale {experiment.scale}"] if experiment.scale != SCALES[0] else []
    count = len(section.results.entries) if section.results else 0
    return " ".join([*words, f"--seeds {count}"] if count else words)


def _configuration(experiment: Experiment, path: Path) -> str:
    """Task and model in a sentence."""
    run = experiment.raw_run
    model, given = run.get("model", {}), run.get("task", {})
    model = model.get("path") or f"preset {model.get('preset', 'by default')}"
    task = code(given.get("name", "arithmetic"))
    if given.get("options"):
        options = ", ".join(f"{name}={value}" for name, value in given["options"].items())
        task += f" ({code(options)})"
    file = experiment.path
    named = code(file.name)
    # A file of an installed package has no place that a link could name.
    if all(place.resolve().is_relative_to(Path.cwd()) for place in (file, path)):
        named = f"[{file.name}]({Path(os.path.relpath(file, path.parent)).as_posix()})"
    return f"Task {task}, model {code(model)}; {len(run['stages'])} stages, written in {named}."


def _origin(section: Section) -> str:
    """Who made the numbers, and what it took."""
    experiment, results = section.experiment, section.results
    if results is None or not results.entries:
        return f"**Not run.** Configuration hash `{experiment.hash}`."
    entries = results.entries.values()
    versions = ", ".join(sorted({entry["version"] for entry in entries}))
    jax = ", ".join(sorted({entry["jax"] for entry in entries}))
    devices = ", ".join(sorted({entry["device"] for entry in entries}))
    hours = sum(sum(entry["seconds"].values()) for entry in entries) / 3600
    changed = f", overrides {code(' '.join(experiment.overrides))}" if experiment.overrides else ""
    return (
        f"Seeds {', '.join(results.entries)}; {hours:.2f} hours in all; jaxrl-reason {versions}, "
        f"jax {jax}, {devices}; configuration hash `{experiment.hash}`{changed}."
    )


def _equalities(experiment: Experiment) -> str:
    lines = [
        f"- {', '.join(map(code, budget.equal))}: the same for "
        f"{'; '.join(experiment.label(arm) for arm in budget.arms)}\n"
        for budget in experiment.config.budget
    ]
    if not lines:
        return "No equality is enforced between the arms.\n"
    return "Enforced when the configuration is read:\n\n" + "".join(lines)


def _image(name: str, plot: Path, path: Path) -> str:
    words = {
        "arms": "Accuracy of each arm with its seeds",
        "training": "Training curves of each arm",
        "claims": "Interval of each test against its margin",
    }
    about = words.get(name, "Two numbers of each arm against each other, and the front")
    return f"![{about}]({Path(os.path.relpath(plot, path.parent)).as_posix()})\n"


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 100, break_long_words=False) + "\n"


# Completions


def _examples(section: Section) -> list[str]:
    """The first held-out problems with what the first arm wrote with the first seed."""
    assert section.results is not None
    arm = next(iter(section.experiment.config.arms))
    for seed, entry in section.results.entries.items():
        if arm in entry["examples"]:
            intro = (
                f"The first held-out problems, not chosen, by {section.experiment.label(arm)} with "
                f"seed {seed}.\n"
            )
            return ["### Completions\n", intro, *map(_example, entry["examples"][arm])]
    return []


def _example(example: Mapping[str, Any]) -> str:
    lines = _labelled("prompt", example["prompt"])
    lines += _labelled("answer", example["answer"])
    for side in ("before", "after"):
        shown = example[side]
        verdict = "right" if shown["correct"] else "wrong"
        thought, answer = _taken_apart(shown["completion"])
        lines += ["", f"{side}: {example['stages'][side]}, {verdict}, {shown['length']} tokens"]
        lines += [*_labelled("  reasoning", thought), *_labelled("  answer", answer)]
    return block("\n".join(lines))


def _taken_apart(text: str) -> tuple[str, str]:
    """What stands before the answer, and the answer; all of it is reasoning where there is none."""
    match = _ANSWER.fullmatch(text)
    thought, answer, rest = match.groups() if match else (text, "(none)", None)
    thought = thought.strip().removeprefix("<think>").removesuffix("</think>").strip()
    behind = f"   (and then: {rest.strip()})" if rest and rest.strip() else ""
    return thought or "(none)", f"{answer.strip()}{behind}"


def _labelled(label: str, text: str) -> list[str]:
    width = 13
    lines = [
        piece
        for line in text.splitlines() or [""]
        for piece in textwrap.wrap(line, _COLUMNS - width) or [""]
    ]
    return [f"{label if i == 0 else '':<{width}}{line}".rstrip() for i, line in enumerate(lines)]
