"""What `jaxrl-reason reproduce` does: run what is missing, judge the claims, write the page."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrl_reason.errors import InputError
from jaxrl_reason.reproduce.claims import Verdict
from jaxrl_reason.reproduce.experiment import Experiment, at_scale, load_experiment, other_scales
from jaxrl_reason.reproduce.results import Results, read_results
from jaxrl_reason.reproduce.runner import (
    Failure,
    Say,
    compilation_cache,
    run_here,
    run_in_processes,
    run_seed,
)

_CACHE = ".jax_cache"
_SMOKE_FOLDER = ".smoke"
_SMOKE_SEEDS = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    name: str
    """Of an experiment, or a YAML file."""
    scale: str | None = None
    seeds: int = 5
    """Seeds 0 .. seeds - 1; 0 makes the page anew from the results that are there."""
    arms: tuple[str, ...] = ()
    """Only these; all, and what else claims need, when empty."""
    jobs: int = 1
    smoke: bool = False
    output_dir: Path = Path("runs/reproduce")
    results_dir: Path = Path("docs/papers")
    discard: bool = False
    only_seed: int | None = None
    """Run this seed and write no results: a process of `jobs`."""
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        for name, least in (("seeds", 0), ("jobs", 1)):
            if (got := getattr(self, name)) < least:
                raise InputError(f"--{name}={got} must be at least {least}")

    @property
    def runs(self) -> Path:
        """Folder of runs."""
        return self.output_dir / _SMOKE_FOLDER if self.smoke else self.output_dir

    @property
    def results(self) -> Path:
        """Folder of results and pages; a smoke test has its own."""
        return self.runs / "results" if self.smoke else self.results_dir

    def of_a_seed(self) -> list[str]:
        """The arguments of the processes that run single seeds."""
        given = [self.name, *self.overrides, f"--output-dir={self.output_dir}"]
        given += [] if self.scale is None else [f"--scale={self.scale}"]
        given += ["--smoke"] if self.smoke else []
        return [*given, "--arms", *self.arms] if self.arms else given


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of it."""

    experiment: Experiment
    verdicts: list[Verdict]
    written: list[Path]
    failures: list[Failure]

    @property
    def exit_code(self) -> int:
        """0 if all seeds did; 2 if it was the input that all failures refused, else 1."""
        if not self.failures:
            return 0
        return 2 if all(failure.was_refused for failure in self.failures) else 1


def reproduce(options: Options, *, say: Say) -> Outcome:
    """Run an experiment as far as its results lack it, and report on all of them.

    Args:
        options: the command line.
        say: receives lines about what happens.

    Raises:
        InputError: a mistake in the experiment or the options, results of another configuration,
            or a claim about a number that is not there.
    """
    experiment = load_experiment(
        options.name, options.scale, options.overrides, smoke=options.smoke
    )
    stages = experiment.stages_for(options.arms)
    cache = options.output_dir / _CACHE
    if options.only_seed is not None:
        with compilation_cache(cache):
            run_seed(experiment, options.only_seed, stages, options.runs, say)
        return Outcome(experiment=experiment, verdicts=[], written=[], failures=[])
    if options.smoke:
        shutil.rmtree(options.runs / experiment.name / experiment.scale, ignore_errors=True)
        shutil.rmtree(options.results / experiment.name, ignore_errors=True)
    path = options.results / experiment.name / f"{experiment.scale}.json"
    results = Results(path, experiment, discard=options.discard)
    missing = _missing(options, results, stages, say)
    with compilation_cache(cache):
        failures = _run(options, experiment, results, missing, stages, say) if missing else []
    verdicts = results.judge()
    written = [path] if path.exists() else []
    return Outcome(
        experiment=experiment,
        verdicts=verdicts,
        written=written + _page(options, results, verdicts),
        failures=failures,
    )


def _missing(options: Options, results: Results, stages: Sequence[str], say: Say) -> list[int]:
    """The seeds to run."""
    seeds = range(min(options.seeds, _SMOKE_SEEDS) if options.smoke else options.seeds)
    there = [seed for seed in seeds if results.has(seed, stages)]
    experiment = results.experiment
    arms = options.arms or tuple(experiment.config.arms)
    say(f"{experiment.name} ({experiment.scale}), {experiment.path}, hash {experiment.hash}")
    say(f"arms {', '.join(arms)}; stages {', '.join(stages)}")
    if there:
        say(f"seeds {', '.join(map(str, there))} are in {results.path}")
    return [seed for seed in seeds if seed not in there]


def _run(
    options: Options,
    experiment: Experiment,
    results: Results,
    seeds: Sequence[int],
    stages: Sequence[str],
    say: Say,
) -> list[Failure]:
    if options.jobs == 1:
        return run_here(
            experiment, seeds, stages, output_dir=options.runs, say=say, done=results.add
        )
    return run_in_processes(
        experiment,
        seeds,
        jobs=min(options.jobs, len(seeds)),
        arguments=options.of_a_seed(),
        output_dir=options.runs,
        say=say,
        done=results.add,
    )


def _page(options: Options, results: Results, verdicts: list[Verdict]) -> list[Path]:
    # Loads matplotlib, which a process of a single seed has no use for.
    from jaxrl_reason.reproduce.page import Section, write_page

    sections = [Section(experiment=results.experiment, results=results, verdicts=verdicts)]
    if not options.smoke:
        others = other_scales(results.experiment)
        sections += [_other_section(results, scale) for scale in others]
    return write_page(options.results / f"{results.experiment.name}.md", sections)


def _other_section(results: Results, scale: str) -> Any:
    """The section of another scale, with its results where there are some that fit."""
    from jaxrl_reason.reproduce.page import Section

    path = results.path.with_name(f"{scale}.json")
    found = read_results(path)
    overrides = [] if found is None else found["overrides"]
    experiment = at_scale(results.experiment, scale, overrides)
    if found is None or found["hash"] != experiment.hash:
        return Section(experiment=at_scale(results.experiment, scale, ()))
    there = Results(path, experiment)
    return Section(experiment=experiment, results=there, verdicts=there.judge())
