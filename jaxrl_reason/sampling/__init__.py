"""Sampling completions: truncation and drawing, prefill and decode, rollouts on the host."""

from jaxrl_reason.sampling.filters import SamplingConfig
from jaxrl_reason.sampling.rollout import Rollout, Sampler

__all__ = ["Rollout", "Sampler", "SamplingConfig"]
