"""Reproductions: an experiment over seeds, its claims with verdicts, and the page about it."""

from jaxrl_reason.reproduce.claims import Verdict, claim_verdicts
from jaxrl_reason.reproduce.command import Options, reproduce
from jaxrl_reason.reproduce.experiment import Experiment, ExperimentConfig, load_experiment
from jaxrl_reason.reproduce.results import Results

__all__ = [
    "Experiment",
    "ExperimentConfig",
    "Options",
    "Results",
    "Verdict",
    "claim_verdicts",
    "load_experiment",
    "reproduce",
]
