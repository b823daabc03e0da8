"""A run's tables, plots and page."""

from jaxrl_reason.report.page import write_report
from jaxrl_reason.report.plots import (
    accuracy_length_figure,
    curves_figure,
    make_plots,
    pareto_figure,
)
from jaxrl_reason.report.tables import (
    completions_table,
    stage_markdown,
    stage_table,
    stage_text,
)

__all__ = [
    "accuracy_length_figure",
    "completions_table",
    "curves_figure",
    "make_plots",
    "pareto_figure",
    "stage_markdown",
    "stage_table",
    "stage_text",
    "write_report",
]
