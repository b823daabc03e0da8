"""The tables of an experiment's page."""

from collections.abc import Sequence

from jaxrl_reason.metrics import format_seconds
from jaxrl_reason.reproduce.budget import QUANTITIES, planned
from jaxrl_reason.reproduce.claims import Verdict
from jaxrl_reason.reproduce.experiment import Experiment
from jaxrl_reason.reproduce.markdown import code, table
from jaxrl_reason.reproduce.section import MAIN, Section, part, spread
from jaxrl_reason.reproduce.words import bound, number, outcome_number, what
from jaxrl_reason.stages.config import StageConfig
from jaxrl_reason.stages.policy_config import PolicyConfig
from jaxrl_reason.stages.reject_config import RejectConfig
from jaxrl_reason.stages.reward_config import reward_name

_NONE = "-"


def verdicts_table(section: Section) -> str:
    """A row for every claim; the numbers of its tests one after the other."""
    rows = []
    for verdict in section.verdicts:
        numbers = [outcome_number(outcome) for outcome in verdict.outcomes]
        seeds = {len(outcome.values) for outcome in verdict.outcomes}
        cells = [verdict.name, verdict.claim, f"**{verdict.verdict}**"]
        rows.append([*cells, "; ".join(numbers), ", ".join(map(str, sorted(seeds)))])
    if not rows:
        return "No claim is stated.\n"
    return table(
        ["claim", "what it says", "verdict", "number, 95 % interval", "seeds"], rows, words=3
    )


def arms_table(section: Section) -> str:
    """Accuracy on every set with its baselines, length and format of every arm."""
    sets = section.sets()
    header = ["arm", *("accuracy" if n == MAIN else f"accuracy, {n}" for n in sets)]
    rows = []
    for arm in section.experiment.config.arms:
        records = list(section.records_of(arm).values())
        cells = [section.experiment.label(arm)]
        for name in sets:
            cells.append(_percent([part(record, name)["accuracy"] for record in records]))
        lengths = [record["mean_length"] for record in records]
        formats = [record["format_rate"] for record in records]
        rows.append([*cells, _plus_minus(lengths), _percent(formats), str(len(records))])
    for key in ("constant_answer", "chance"):
        known = [section.baselines(name).get(key) for name in sets]
        cells = [_NONE if value is None else f"{100 * value:.1f} %" for value in known]
        rows.append([f"*{key.replace('_', ' ')}*", *cells, *[_NONE] * 3])
    return table([*header, "mean length", "format", "seeds"], rows)


def budget_table(section: Section) -> str:
    """What the arms may spend at most, and what they did on average."""
    experiment = section.experiment
    arms, run = experiment.config.arms, experiment.config.run
    costs = {name: planned(run, arm.stage) for name, arm in arms.items()}
    columns = [q for q in QUANTITIES if any(cost[q] for cost in costs.values())]
    rows = [
        [experiment.label(arm), *(f"{cost[column]:,}" for column in columns)]
        for arm, cost in costs.items()
    ]
    text = table(["planned", *columns], rows)
    spent = (
        {arm: both["used"] for arm, both in section.results.budget.items()}
        if section.results
        else {}
    )
    spent = {arm: amounts for arm, amounts in spent.items() if amounts}
    if not spent:
        return text
    names = {
        "updates": "updates",
        "sft_tokens": "tokens of SFT in the loss",
        "rl_tokens": "tokens sampled in RL",
    }
    used = [
        [
            experiment.label(arm),
            *(f"{amounts[name]:,.0f}" for name in names),
            format_seconds(amounts["seconds"]),
        ]
        for arm, amounts in spent.items()
    ]
    return f"{text}\n{table(['used, mean of the seeds', *names.values(), 'time'], used)}"


def tests_table(section: Section) -> list[str]:
    """For every claim its sentence, and a row for each of its tests."""
    header = ["test", "claimed", "outcome", "number, 95 % interval", "p", "seeds in turn"]
    parts = []
    for verdict in section.verdicts:
        parts += [
            f"**{verdict.name}, {verdict.verdict}.** {verdict.claim}\n",
            table(header, _test_rows(section.experiment, verdict), words=3),
        ]
    return parts


def _test_rows(experiment: Experiment, verdict: Verdict) -> list[list[str]]:
    rows = []
    for outcome in verdict.outcomes:
        values = ", ".join(number(value) for value in outcome.values.values())
        p = _NONE if outcome.p is None else f"{outcome.p:.2g}" if outcome.p >= 1e-4 else "< 0.0001"
        cells = [what(experiment, outcome.test), bound(outcome.test), outcome.verdict]
        rows.append([*cells, outcome_number(outcome), p, values or _NONE])
    return rows


def stages_table(experiment: Experiment) -> str:
    """The stages with the numbers that cost depends on."""
    header = ["stage", "kind", "from", "steps", "a step", "longest", "learning rate", "rewards"]
    rows = []
    for name, stage in experiment.config.run.stages.items():
        rows.append([code(name), stage.kind, code(stage.parent), *_numbers_of(stage)])
    return table(header, rows, words=3)


def _numbers_of(stage: StageConfig) -> list[str]:
    if isinstance(stage, RejectConfig):
        sampled = f"{stage.num_prompts} x {stage.num_generations} sampled"
        return [_NONE, sampled, str(stage.max_completion_length), _NONE, _NONE]
    rate = f"{stage.optimizer.learning_rate:g}"
    if isinstance(stage, PolicyConfig):
        rewards = ", ".join(
            reward_name(r) if r.weight is None else f"{r.weight:g} {reward_name(r)}"
            for r in stage.rewards
        )
        size = f"{stage.prompts_per_step} x {stage.num_generations}"
        return [str(stage.steps), size, str(stage.max_completion_length), rate, rewards]
    unit = "pairs" if stage.kind == "dpo" else "rows"
    return [str(stage.steps), f"{stage.batch_size} {unit}", str(stage.max_length), rate, _NONE]


def _percent(fractions: Sequence[float]) -> str:
    return _plus_minus([100 * fraction for fraction in fractions], unit=" %")


def _plus_minus(values: Sequence[float], unit: str = "") -> str:
    if not values:
        return "not run"
    mean, interval = spread(values)
    half = "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.1f}"
    return f"{mean:.1f}{half}{unit}"
