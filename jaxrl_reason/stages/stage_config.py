"""The configuration of supervised stages, and what every stage that trains has in common."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from jaxrl_reason.config import Config
from jaxrl_reason.losses import PREFERENCE_LOSSES, SMOOTHED_LOSSES
from jaxrl_reason.stages.data_config import (
    FileData,
    Positive,
    PythonData,
    SampledPairs,
    StageData,
    TraceData,
)
from jaxrl_reason.stages.loss_options import (
    PREFERENCE_OPTIONS,
    check_loss_options,
    check_preference_loss,
)
from jaxrl_reason.steps import OptimizerConfig

Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _listed(given: Any) -> Any:
    if isinstance(given, str):
        return (given,)
    # Past this validator a list is no JSON array any more, and pydantic would want a tuple.
    return tuple(given) if isinstance(given, list) else given


Names = Annotated[
    tuple[str, ...],
    pydantic.BeforeValidator(_listed, json_schema_input_type=str | tuple[str, ...]),
]
"""A list of names; a single one need not be in a list."""


class FromParent(Config):
    """What all stages have in common."""

    parent: str = "init"
    """Stage to start from: an earlier one of this run, or `init` for the untrained model."""


class Training(FromParent):
    """What all stages that train have in common."""

    steps: Positive
    """Updates; for reinforcement learning, batches of completions."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    save_steps: Positive = 50
    """A checkpoint is written every so many steps, and after the last."""
    save_total_limit: Positive = 2
    """Checkpoints kept; older ones are deleted."""
    logprob_chunk_size: Positive | None = None
    """Tokens whose logits may exist at once on a device; null: as many as have 512 MiB of them."""

    @property
    def updates(self) -> int:
        """Updates of the optimiser in the whole stage."""
        return self.steps


class SFTConfig(Training):
    """Supervised fine-tuning on demonstrations, on the completion's tokens only."""

    kind: Literal["sft"]
    """`sft`"""
    data: Annotated[TraceData | PythonData | StageData | FileData, Field(discriminator="kind")] = (
        TraceData()
    )
    """Demonstrations."""
    batch_size: Positive
    """Rows of an update."""
    gradient_accumulation_steps: Positive = 1
    """Microbatches of one update."""
    max_length: Positive
    """Tokens of a row."""
    packing: bool = True
    """Several demonstrations share a row, each seeing only itself."""
    completion_only_loss: bool = True
    """Of rows with a prompt, only what follows it counts."""
    assistant_only_loss: bool = True
    """Only turns of the assistant count."""

    @pydantic.model_validator(mode="after")
    def _masks_act(self):
        for name in ("completion_only_loss", "assistant_only_loss"):
            if not isinstance(self.data, FileData) and not getattr(self, name):
                raise ValueError(
                    f"{name}=false cannot act with data.kind={self.data.kind}, of which the "
                    "completion counts; remove it or use data.kind=file"
                )
        return self


class DPOConfig(Training):
    """Preference optimisation on pairs: DPO, arXiv 2305.18290, and its relatives."""

    kind: Literal["dpo"]
    """`dpo`"""
    data: Annotated[
        SampledPairs | PythonData | StageData | FileData, Field(discriminator="kind")
    ] = SampledPairs()
    """Pairs of a chosen and a rejected completion."""
    batch_size: Positive
    """Pairs of an update."""
    gradient_accumulation_steps: Positive = 1
    """Microbatches of one update."""
    max_length: Positive
    """Longest prompt and completion together, in tokens."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Inverse temperature of the implied reward; larger stays closer to the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of pairs whose labels are swapped."""
    loss_type: Names = ("sigmoid",)
    """Terms of the loss by TRL's names; `sft` is the chosen completion's likelihood."""
    loss_weights: tuple[float, ...] | None = None
    """Weight of each term; 1 each when null."""
    loss_options: Mapping[str, float | str] = {}
    """Other arguments of the terms by name, for example `discopop_tau: 0.05`."""

    @property
    def options(self) -> dict[str, Any]:
        """What the terms take besides `beta`."""
        return {"label_smoothing": self.label_smoothing, **self.loss_options}

    @pydantic.model_validator(mode="after")
    def _terms(self):
        allowed = [*PREFERENCE_LOSSES, "sft"]
        unknown = [name for name in self.loss_type if name not in allowed]
        if unknown or not self.loss_type:
            raise ValueError(f"loss_type={list(self.loss_type)}; allowed are {allowed}")
        if set(self.loss_type) == {"sft"}:
            raise ValueError("loss_type needs a preference term; for `sft` alone use an sft stage")
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        if len(weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(weights)} entries for {len(self.loss_type)} terms in "
                "loss_type"
            )
        for name, weight in zip(self.loss_type, weights, strict=True):
            if weight == 0 or not math.isfinite(weight):
                raise ValueError(
                    f"loss_weights gives {name} the weight {weight:g}; use a finite one other than "
                    "0, or remove the term"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _term_options(self):
        if self.label_smoothing and not SMOOTHED_LOSSES & set(self.loss_type):
            raise ValueError(
                f"label_smoothing cannot act with loss_type={list(self.loss_type)}; "
                f"it acts with {sorted(SMOOTHED_LOSSES)}"
            )
        reasons = {
            "robust": "corrects for label_smoothing",
            "exo_pair": "takes the logarithm of label_smoothing",
        }
        for name in reasons.keys() & set(self.loss_type):
            if not self.label_smoothing:
                raise ValueError(f"loss_type={name} {reasons[name]}, which is 0; set it")
        check_loss_options(
            self.loss_options,
            self.loss_type,
            fields=("beta", "label_smoothing"),
            table=PREFERENCE_OPTIONS,
        )
        for name in self.loss_type:
            if name != "sft":
                check_preference_loss(name, {"beta": self.beta, **self.options})
        return self
