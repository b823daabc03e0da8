"""An experiment: its configuration, where it was found, and what identifies its results."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_reason.config import apply_overrides, hash_json, load_yaml, validate
from jaxrl_reason.errors import InputError, nearest
from jaxrl_reason.reproduce.budget import needed
from jaxrl_reason.reproduce.experiment_config import ClaimTest, ExperimentConfig
from jaxrl_reason.reproduce.smoke import shrink, smoke_overrides
from jaxrl_reason.stages.config import RunConfig, TaskChoice

SCALES = ("small", "video", "full")
"""Names of the files of an experiment, in the order of the page."""
_FOLDER = Path("configs") / "papers"
_OWN = ("seed", "output_dir")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment at one scale."""

    config: ExperimentConfig
    scale: str
    path: Path
    """The YAML file."""
    raw_run: Mapping[str, Any]
    """`run` as the file has it, overrides applied and defaults not filled in."""
    overrides: tuple[str, ...] = ()
    is_smoke: bool = False

    @property
    def name(self) -> str:
        """Name of the experiment, which is that of its run."""
        return self.config.run.name

    @property
    def argument(self) -> str:
        """What names it on the command line."""
        found = self.path.parent == self.path.parents[1] / self.name
        return self.name if found and self.path.parents[1].name == "papers" else str(self.path)

    @functools.cached_property
    def hash(self) -> str:
        """Identifies what is computed: results of another hash are never mixed with these.

        Made of what the file says and not of defaults, so that a new option of the library leaves
        results valid.
        """
        arms = {name: arm.stage for name, arm in self.config.arms.items()}
        return hash_json([self.raw_run, arms])

    def label(self, arm: str) -> str:
        """What tables and plots call an arm."""
        return self.config.arms[arm].label or arm

    def stages_for(self, arms: Sequence[str]) -> list[str]:
        """Stages to run for some arms; for all of them and the claims where `arms` is empty.

        Raises:
            InputError: there is no such arm.
        """
        for arm in arms:
            if arm not in self.config.arms:
                raise InputError(f"arm {arm!r} is unknown; {nearest(arm, self.config.arms)}")
        chosen = [self.config.arms[arm].stage for arm in arms or self.config.arms]
        if not arms:
            chosen += [stage for test in self.tests() for stage in stages_of(test)]
            chosen += [stage for m in self.config.metrics.values() for stage in m.stages]
        return needed(self.config.run, chosen)

    def tests(self) -> list[ClaimTest]:
        """The tests of all claims."""
        return [test for claim in self.config.claims.values() for test in claim.tests]

    def series(self) -> set[str]:
        """Training metrics that tests, plots and derived metrics read."""
        metrics = [test.metric for test in self.tests()]
        metrics += [metric for plot in self.config.pareto for metric in (plot.x, plot.y)]
        paths = [metric.partition("@")[0] for metric in metrics]
        read = {path.removeprefix("train.") for path in paths if path.startswith("train.")}
        return read.union(*(metric.train for metric in self.config.metrics.values()))

    def run_of(self, seed: int, stages: Sequence[str], output_dir: Path) -> RunConfig:
        """The run of a seed, of some stages only.

        A seed also has training and held-out problems of its own, wherever the task has a `seed`
        that the file leaves open: what is claimed is not of one draw of problems.
        """
        given, run = self.raw_run["stages"], self.config.run
        own = {
            "task": _seeded(self.raw_run.get("task", {}), run.task, seed),
            "tasks": {
                name: _seeded(raw, run.tasks[name], seed)
                for name, raw in self.raw_run.get("tasks", {}).items()
            },
            "seed": seed,
            "name": f"seed_{seed}",
            "output_dir": str(output_dir / self.name / self.scale),
            "stages": {name: given[name] for name in given if name in stages},
        }
        return validate(RunConfig, {**self.raw_run, **own}, f"{self.path}, run")


def _seeded(raw: Mapping[str, Any], choice: TaskChoice, seed: int) -> dict[str, Any]:
    """A task as the file has it, with a seed where it may have one and none is given."""
    names = {field.name for field in dataclasses.fields(choice.make())}
    if "seed" not in names or "seed" in choice.options:
        return dict(raw)
    return {**raw, "options": {**raw.get("options", {}), "seed": seed}}


def stages_of(test: ClaimTest) -> list[str]:
    """The stages that a test reads."""
    return [test.arm] if test.against is None else [test.arm, test.against]


def load_experiment(
    name: str,
    scale: str | None = None,
    overrides: Sequence[str] = (),
    *,
    smoke: bool = False,
    offline: bool = False,
) -> Experiment:
    """Find and read an experiment.

    Args:
        name: of an experiment under `configs/papers/`, or the path of a YAML file.
        scale: one of `SCALES`; when None, that of the file's name, or small.
        overrides: `key=value` for fields of `run`.
        smoke: make everything as short as possible.
        offline: look up neither model nor task, for which files may be missing here; what comes
            back can be described and not be run.

    Raises:
        InputError: a mistake in the file, an unknown name, or budgets that differ.
    """
    path = _find(name, scale)
    raw = load_yaml(path)
    given = raw.get("run")
    if not isinstance(given, dict):
        raise InputError(f"{path}: run: got {given!r}; needs the fields of a run")
    given = apply_overrides(RunConfig, given, overrides)
    for field in _OWN:
        if field in given:
            raise InputError(
                f"{path}: run.{field} cannot act: --seeds and --output-dir say it; remove it"
            )
    source = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    looked_up = {**given, **_stand_ins(given)} if offline else given
    config = validate(ExperimentConfig, {**raw, "run": looked_up}, source)
    if smoke:
        given = apply_overrides(RunConfig, shrink(given, config.run), smoke_overrides(config))
        run = validate(RunConfig, given, f"{source} and --smoke")
        # Budgets were compared before; the shrunk ones may differ.
        config = config.model_copy(update={"run": run})
    experiment = Experiment(
        config=config,
        scale=scale or (path.stem if path.stem in SCALES else SCALES[0]),
        path=path,
        raw_run=given,
        overrides=tuple(overrides),
        is_smoke=smoke,
    )
    if path != Path(name) and experiment.name != name:
        raise InputError(f"{path}: run.name is {experiment.name!r}; it must be {name!r}")
    return experiment


def other_scales(experiment: Experiment) -> list[str]:
    """The scales for which a file lies beside that of an experiment."""
    if experiment.path.stem not in SCALES:
        return []
    others = [scale for scale in SCALES if scale != experiment.scale]
    return [scale for scale in others if experiment.path.with_name(f"{scale}.yaml").exists()]


def at_scale(experiment: Experiment, scale: str, overrides: Sequence[str]) -> Experiment:
    """The same experiment at another scale, to be described."""
    path = experiment.path.with_name(f"{scale}.yaml")
    return load_experiment(str(path), scale, overrides, offline=True)


def _stand_ins(given: Mapping[str, Any]) -> dict[str, Any]:
    """A model and tasks that need no files, in place of those of a run."""
    model = {"changes": {"max_position_embeddings": 1 << 30}}
    tasks = {name: {} for name in given.get("tasks", {})}
    return {"model": model, "task": {}, "tasks": tasks, "chat": {}}


def _find(name: str, scale: str | None) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    package = Path(__file__).parents[1]
    # In a clone the configurations lie beside the package, in a wheel inside it.
    folders = [Path.cwd() / _FOLDER, package.parent / _FOLDER, package / _FOLDER]
    for folder in folders:
        path = folder / name / f"{scale or SCALES[0]}.yaml"
        if path.exists():
            return path
    for folder in folders:
        if (folder / name).is_dir():
            raise InputError(
                f"{name} has no scale {scale!r}; there is no {folder / name}/{scale}.yaml"
            )
    known = {path.parent.name for folder in folders for path in folder.glob("*/*.yaml")}
    raise InputError(
        f"experiment {name!r} is unknown; {nearest(name, known)} (the path of a YAML file will do, "
        "too)"
    )
