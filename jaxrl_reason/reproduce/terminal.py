"""Verdicts as lines of the table that the command prints.

Apart from the rest because `report` loads matplotlib, which a process of one seed has no use for.
"""

from collections.abc import Sequence

from jaxrl_reason.report.verdicts import VerdictLine
from jaxrl_reason.reproduce.claims import Verdict
from jaxrl_reason.reproduce.experiment import Experiment
from jaxrl_reason.reproduce.words import bound, outcome_number, what


def verdict_lines(experiment: Experiment, verdicts: Sequence[Verdict]) -> list[VerdictLine]:
    """For every claim its sentence, and a line for each of its tests."""
    lines = []
    for verdict in verdicts:
        lines.append(VerdictLine(verdict.name, verdict.verdict, verdict.claim))
        for outcome in verdict.outcomes:
            test = f"{what(experiment, outcome.test)}  {bound(outcome.test)}"
            given = (outcome_number(outcome), len(outcome.values))
            lines.append(VerdictLine("", outcome.verdict, test, *given))
    return lines
