"""The file of results of an experiment at one scale, to which each finished seed is added.

hash, overrides   what was run; results of something else are never mixed in
baselines         accuracy without looking at the question, by evaluation set ("" is the task)
budget            of each arm: planned, and used on average over the seeds
claims            the verdicts
seeds             {seed: {version, jax, device, seconds, stages: {stage: record}, examples}}
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrl_reason import __version__, files
from jaxrl_reason.errors import InputError
from jaxrl_reason.reproduce import budget
from jaxrl_reason.reproduce.claims import Verdict, claim_verdicts
from jaxrl_reason.reproduce.experiment import Experiment
from jaxrl_reason.reproduce.records import Record, rounded
from jaxrl_reason.tasks import Task, chance_accuracy, constant_answer_accuracy

_BASELINE_PROBLEMS = 2000
_SMOKE_PROBLEMS = 64


class Results:
    """The results of an experiment, on disk after every change.

    Args:
        path: the file, made by the first `add`.
        experiment: what they are of.
        discard: move a file of another experiment to `<name>.old.json` in place of refusing it.

    Raises:
        InputError: the file has results of another configuration, or is no file of results.
    """

    def __init__(self, path: Path, experiment: Experiment, *, discard: bool = False):
        self.path, self.experiment = path, experiment
        self._data: dict[str, Any] = {
            "experiment": experiment.name,
            "scale": experiment.scale,
            "hash": experiment.hash,
            "overrides": list(experiment.overrides),
            "arms": {name: arm.stage for name, arm in experiment.config.arms.items()},
            "seeds": {},
        }
        if discard and path.exists():
            path.replace(path.with_suffix(".old.json"))
        found = read_results(path)
        if found is None:
            return
        if found["hash"] != experiment.hash:
            changed = f" with {' '.join(found['overrides'])}" if found["overrides"] else ""
            raise InputError(
                f"{path} has results of another configuration{changed} (hash {found['hash']}, not "
                f"{experiment.hash}); keep them and write elsewhere with --results-dir, or move "
                f"them to {path.with_suffix('.old.json').name} with --discard"
            )
        self._data = found

    @property
    def seeds(self) -> dict[str, dict[str, Record]]:
        """The records of each seed, by stage."""
        return {seed: entry["stages"] for seed, entry in self.entries.items()}

    @property
    def entries(self) -> Mapping[str, Mapping[str, Any]]:
        """All that is known of each seed, smallest first."""
        return self._data["seeds"]

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """`constant_answer` and `chance` of each evaluation set."""
        return self._data.get("baselines", {})

    @property
    def budget(self) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
        """`planned` and `used` of each arm."""
        return self._data.get("budget", {})

    def has(self, seed: int, stages: Sequence[str]) -> bool:
        """Whether the seed has a record of every one of these stages."""
        records = self.seeds.get(str(seed))
        return records is not None and set(stages) <= records.keys()

    def add(self, seed: int, entry: Mapping[str, Any]) -> None:
        """Merge what a run of a seed gave, and write the file."""
        before = self.entries.get(str(seed), {})
        merged = {**before, **entry}
        for name in ("stages", "seconds", "examples"):
            merged[name] = {**before.get(name, {}), **entry[name]}
        seeds = {**self.entries, str(seed): merged}
        self._data["seeds"] = {name: seeds[name] for name in sorted(seeds, key=int)}
        if "baselines" not in self._data:
            self._data["baselines"] = baselines(self.experiment)
        self._data["budget"] = _budget(self.experiment, self.entries)
        self.write()

    def judge(self) -> list[Verdict]:
        """The verdicts on the claims; they are written as well.

        Raises:
            InputError: a test's number is missing; in a smoke test it is a note instead.
        """
        config, strict = self.experiment.config, not self.experiment.is_smoke
        verdicts = claim_verdicts(config, self.seeds, strict=strict)
        if self.entries:
            self._data["claims"] = {verdict.name: verdict.to_json() for verdict in verdicts}
            self.write()
        return verdicts

    def write(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            InputError: nothing can be written there.
            StorageError: storage refuses it.
        """
        with files.chosen(self.path, "choose another --results-dir"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.replace(self.path, _lines(rounded(self._data)) + "\n")


def read_results(path: Path) -> dict[str, Any] | None:
    """A file of results as it is; None where there is none.

    Raises:
        InputError: it is something else.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); move it away") from error
    if not isinstance(found, dict) or not {"hash", "overrides", "seeds"} <= found.keys():
        raise InputError(f"{path} is no file of results; move it away")
    return found


def provenance() -> dict[str, str]:
    """What a record says about how it was made."""
    devices = jax.devices()
    return {
        "version": __version__,
        "jax": jax.__version__,
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }


def baselines(experiment: Experiment) -> dict[str, dict[str, float]]:
    """Accuracy without reading the question, on the task ("") and on each evaluation set."""
    run, count = experiment.config.run, _BASELINE_PROBLEMS
    if experiment.is_smoke:
        count = _SMOKE_PROBLEMS
    tasks = run.make_tasks()
    chosen: dict[str, tuple[Task, tuple[int, ...]]] = {"": (tasks.main, ())}
    for name, one in run.evaluation.sets.items():
        chosen[name] = (tasks.named(one.task), one.difficulties)
    return {
        name: {
            "constant_answer": constant_answer_accuracy(task, count, difficulties),
            "chance": chance_accuracy(task, count, difficulties),
        }
        for name, (task, difficulties) in chosen.items()
    }


def _budget(experiment: Experiment, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    run, table = experiment.config.run, {}
    for name, arm in experiment.config.arms.items():
        stages = budget.needed(run, [arm.stage])
        spent = [
            {
                **budget.used(run, arm.stage, entry["stages"]),
                "seconds": sum(entry["seconds"][stage] for stage in stages),
            }
            for entry in entries.values()
            if set(stages) <= entry["stages"].keys()
        ]
        means = {q: statistics.fmean(s[q] for s in spent) for q in spent[0]} if spent else {}
        table[name] = {"planned": budget.planned(run, arm.stage), "used": means}
    return table


def _lines(value: Any, indent: str = "") -> str:
    """JSON with a line for every entry of a mapping, and lists of numbers in one line."""
    inner = f"{indent} "
    if isinstance(value, dict) and value:
        items = (f"{inner}{json.dumps(k)}: {_lines(v, inner)}" for k, v in value.items())
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + _lines(v, inner) for v in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
