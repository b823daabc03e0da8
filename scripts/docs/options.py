"""Rewrites the tables of options in README.md and docs/ from the code that reads the options.

    python scripts/docs/options.py            rewrite
    python scripts/docs/options.py --check    change nothing; exit code 1 if a table is out of date

A table stands between `<!-- options NAME -->` and `<!-- end of options -->`; `TABLES` lists the
names. An option that several kinds of stages share stands in one table only.
"""

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from jaxrl_reason.config import Config, FieldLine, describe
from jaxrl_reason.models import ModelConfig
from jaxrl_reason.objectives import AGGREGATORS
from jaxrl_reason.sampling import SamplingConfig
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.policy_config import GRPOConfig, MORLConfig
from jaxrl_reason.stages.reject_config import RejectConfig
from jaxrl_reason.stages.reward_config import JudgeReward
from jaxrl_reason.stages.sample import SampleConfig
from jaxrl_reason.stages.stage_config import DPOConfig, SFTConfig
from jaxrl_reason.tasks import Countdown, KnightsKnaves, ModularArithmetic, MovingShapes, Shapes

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(<!-- options (\S+) -->\n).*?(<!-- end of options -->)", re.DOTALL)
_STAGES = (SFTConfig, DPOConfig, GRPOConfig, MORLConfig)


class _Dataclasses(Config):
    """Holds dataclasses of options, so that `describe` reads them like any configuration."""

    model: ModelConfig
    sampling: SamplingConfig
    arithmetic: ModularArithmetic
    countdown: Countdown
    knights_knaves: KnightsKnaves
    shapes: Shapes
    moving_shapes: MovingShapes


def pages() -> list[Path]:
    """The Markdown files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rewrite(text: str) -> str:
    """`text` with each table made anew; raises KeyError for a name that is not in `TABLES`."""
    return _BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", text)


# Choosing fields


def _paths(cls: type[Config]) -> set[str]:
    return {line.path for line in describe(cls) if line.path != "kind"}


def _of_every_stage() -> set[str]:
    return set.intersection(*map(_paths, _STAGES))


def _only(cls: type[Config], paths: set[str]) -> list[FieldLine]:
    return [line for line in describe(cls) if line.path in paths]


def _own(cls: type[Config], *, elsewhere: Iterable[str]) -> list[FieldLine]:
    """The fields of a stage without those in `elsewhere` and without what has its own table."""
    elsewhere = set(elsewhere)
    return [
        line
        for line in describe(cls)
        if line.path not in elsewhere
        and "sampling." not in line.path
        and "rewards.<index>" not in line.path
    ]


def _below(cls: type[Config], prefix: str) -> list[FieldLine]:
    """The fields under a key, by their names under it."""
    return [
        dataclasses.replace(line, path=line.path.removeprefix(prefix))
        for line in describe(cls)
        if line.path.startswith(prefix)
    ]


# Writing tables


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _code(text: str) -> str:
    return f"`{_escaped(text)}`" if text else ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _fields(lines: Iterable[FieldLine]) -> str:
    """One row an option; one that several kinds have in the same form is named once."""
    kinds: dict[FieldLine, list[str]] = {}
    for line in lines:
        kinds.setdefault(dataclasses.replace(line, kind=""), []).append(line.kind)
    every = {kind for names in kinds.values() for kind in names}
    some = every != {""}
    rows = []
    for line, names in kinds.items():
        default = "below" if line.default == "(below)" else line.default
        words = default in ("required", "below")
        row = [_code(line.path), _code(line.type), default if words else _code(default)]
        shown = "all" if set(names) == every else ", ".join(_code(name) for name in names)
        only = [shown] if some else []
        rows.append([*row[:1], *only, *row[1:], _escaped(line.help)])
    return _table(("option", *(["kind"] if some else []), "type", "default", "meaning"), rows)


def _aggregators() -> str:
    rows = []
    given = ("rewards", "mask", "num_generations", "weights")
    for name, function in AGGREGATORS.items():
        parameters = inspect.signature(function).parameters
        options = [
            _code(option if p.default is p.empty else f"{option}={p.default!r}")
            for option, p in parameters.items()
            if option not in given
        ]
        weights = "given" if "weights" in parameters else "found"
        rows.append([_code(name), weights, ", ".join(options) or "none"])
    return _table(("aggregator", "weights", "options; required where no default is shown"), rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "run": lambda: _fields(
        line
        for line in describe(RunConfig)
        if "<name>" not in line.path and "sampling." not in line.path
    ),
    "stage": lambda: _fields(
        line for line in describe(SFTConfig) if line.path in _of_every_stage()
    ),
    "sft": lambda: _fields(_own(SFTConfig, elsewhere=_of_every_stage())),
    "dpo": lambda: _fields(_own(DPOConfig, elsewhere=_of_every_stage())),
    "grpo": lambda: _fields(_own(GRPOConfig, elsewhere=_of_every_stage())),
    "morl": lambda: _fields(_own(MORLConfig, elsewhere=_paths(GRPOConfig))),
    "reject": lambda: _fields(_own(RejectConfig, elsewhere=())),
    "reward": lambda: _fields(
        line
        for line in _below(GRPOConfig, "rewards.<index>.")
        if not line.path.startswith("backend.")
    ),
    "judge": lambda: _fields(_below(JudgeReward, "backend.")),
    "sample": lambda: _fields(
        line for line in describe(SampleConfig) if "sampling." not in line.path
    ),
    "aggregators": _aggregators,
    **{
        name: lambda name=name: _fields(_below(_Dataclasses, f"{name}."))
        for name in _Dataclasses.model_fields
    },
}


def main() -> int:
    """Rewrite or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        made = rewrite(text)
        if made != text:
            stale.append(page)
            if not check:
                page.write_text(made, encoding="utf-8")
    for page in stale:
        print(f"{'out of date' if check else 'rewritten'}: {page.relative_to(ROOT)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
