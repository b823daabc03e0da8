"""Sampling completions: truncation and drawing, decoding, continuous batching, rollouts."""

from jaxrl_reason.sampling.engine import Engine
from jaxrl_reason.sampling.filters import SamplingConfig
from jaxrl_reason.sampling.requests import Completion, Request, Shown, group_requests
from jaxrl_reason.sampling.rollout import Rollout, sample
from jaxrl_reason.sampling.session import Session
from jaxrl_reason.sampling.shapes import PROGRAM_PREFIX

__all__ = [
    "PROGRAM_PREFIX",
    "Completion",
    "Engine",
    "Request",
    "Rollout",
    "SamplingConfig",
    "Session",
    "Shown",
    "group_requests",
    "sample",
]
