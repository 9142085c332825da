"""The `agreement` section of a method: which rule settles a conflict of its losses' gradients, and the rule's options.

Two kinds of rules. `gk_refine` and `gkm` weigh *losses*: trunk and heads learn from task + sum of weight x loss.
`gate`, `pcgrad`, `mgda` and `cagrad` act on what *enters the trunk*: the heads, of which some see one loss only, learn
from the plain sum. `ops.agreement` has the formulas, `comm.agreement` applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from distkd.base import StrictConfig
from distkd.comm.agreement import LossRule, Rule, RunningLossRule, SampleGate, TrunkRule
from distkd.ops.agreement import (
    agreement_counts,
    conflict_averse_weights,
    minimum_norm_weights,
    projected_weights,
    row_sum_weights,
)

__all__ = ["GKM", "MGDA", "AgreementConfig", "CAGrad", "GKRefine", "Gate", "PCGrad", "PlainSum", "make_rule"]

Cosine = Annotated[float, Field(ge=-1, lt=1)]


class GKRefine(StrictConfig):
    """Each distillation loss times the sum of its gradient's cosines with all losses, times their number."""

    rule: Literal["gk_refine"] = "gk_refine"
    """Sums of cosines (DC-Distill + GK-Refine, MICCAI 2022)."""
    clamp_min: float | None = None
    """Lower bound of a weight; unset as published, where a conflicting loss is pushed up."""
    normalise: bool = False
    """Divide the weights by their mean absolute value."""


class GKM(StrictConfig):
    """Each distillation loss times the number of losses that its gradient agrees with, averaged over steps."""

    rule: Literal["gkm"] = "gkm"
    """Counts of agreeing losses with a running mean (M3LR + DSCD + GKM, MedIA 2023)."""
    weigh: Literal["counts", "cosines"] = "counts"
    """`cosines` is the published form without a threshold: sums of cosines times the number of losses."""
    threshold: Cosine = 0.1
    """Cosine above which two losses agree; of `counts`."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Share of the weights so far; the first step has its own."""
    count_self: bool = True
    """Whether a loss agrees with itself, as published, so that none is ever left out; of `counts`."""
    drop_alone: bool = False
    """Count 0 for a loss that agrees with no other, as the paper's figure has it; of `counts`."""


class Gate(StrictConfig):
    """A distillation gradient enters the trunk for the samples where it agrees with the task's; no communication."""

    rule: Literal["gate"] = "gate"
    """Sample by sample."""
    threshold: Cosine = 0.0
    """Cosine with the task's gradient above which a sample's gradient enters; samples without a label always enter."""


class PCGrad(StrictConfig):
    """What of the distillation undoes the task is projected away; the task's own gradient is never touched."""

    rule: Literal["pcgrad"] = "pcgrad"
    """One-sided projection, task first."""
    of: Literal["sum", "each"] = "sum"
    """Whether the sum of the distillation gradients is projected, or each by itself."""


class MGDA(StrictConfig):
    """The shortest mixture of the task's gradient and the sum of the distillation gradients."""

    rule: Literal["mgda"] = "mgda"
    """Undoes neither; its length shrinks where the two oppose each other."""


class CAGrad(StrictConfig):
    """Mean of the task's gradient and the distillation's, moved towards what helps the worse off of the two."""

    rule: Literal["cagrad"] = "cagrad"
    """Conflict-averse descent of two terms."""
    c: NonNegativeFloat = 0.5
    """How far from the mean, in units of its length; 0 is the mean itself."""


class PlainSum(StrictConfig):
    """The losses as they are."""

    rule: Literal["none"] = "none"
    """No gradient is compared, nothing is communicated."""


AgreementConfig = Annotated[
    GKRefine | GKM | Gate | PCGrad | MGDA | CAGrad | PlainSum,
    Field(discriminator="rule"),
]
"""One of the rules with its own options, told apart by `rule`."""


def make_rule(config: AgreementConfig, names: Sequence[str]) -> Rule | None:
    """The rule of a config for distillation losses of these names, in their order; None for the plain sum.

    The rule belongs into the method's `state`, and `rule.after_step(out.gauges)` into its `after_step`.
    """
    match config:
        case GKRefine():
            return LossRule(partial(row_sum_weights, clamp_min=config.clamp_min, normalise=config.normalise))
        case GKM():
            counts = partial(
                agreement_counts,
                threshold=config.threshold,
                count_self=config.count_self,
                drop_alone=config.drop_alone,
            )
            weigh = counts if config.weigh == "counts" else row_sum_weights
            return RunningLossRule(names, weigh, momentum=config.momentum)
        case Gate():
            return SampleGate(config.threshold)
        case PCGrad():
            return TrunkRule(partial(projected_weights, of=config.of))
        case MGDA():
            return TrunkRule(minimum_norm_weights)
        case CAGrad():
            return TrunkRule(partial(conflict_averse_weights, c=config.c))
        case PlainSum():
            return None
