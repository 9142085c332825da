"""Gradient agreement at the student's feature with one backward pass through the trunk.

The losses are computed on a detached leaf of the feature. Each is differentiated once, down to the leaf and the heads;
a `Rule` decides from the leaf's gradients what each loss contributes; and one injected gradient takes the combined sums
to the feature and to the heads. Nothing is differentiated twice and the wrapped model sees a single backward
(`docs/decisions/0001-agreement.md` compares the ways).
"""

# torch leaves the types of some of its results out
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

# Shapes: B samples of this rank, L distillation losses, M = L + 1 losses with the task last,
# X numbers of a sample's feature, Y = B X

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import cast

import torch
from torch import Tensor, nn

from distkd.base import World
from distkd.comm.world import all_reduce_sum
from distkd.ops.agreement import cosine_matrix, pack_symmetric, running_mean, sample_cosines, unpack_symmetric
from distkd.ops.injected import inject

__all__ = [
    "Agreement",
    "Decision",
    "LossRule",
    "Rule",
    "RunningLossRule",
    "SampleGate",
    "TrunkRule",
    "agree",
    "leaf_of",
]


@dataclass(frozen=True, slots=True)
class Decision:
    """What each loss contributes, the task last; float32 or float64 like the gradients it was made from."""

    trunk: Tensor
    """(M,) or (M, B): factors of the losses' gradients at the feature."""
    heads: Tensor | None
    """(M,): factors of the losses themselves, what the heads learn from; None is the plain sum."""
    cosines: Tensor | None = None
    """(M, M), where the rule has compared all with all over the global batch."""
    gauges: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """(M,) or (L,) values by what they are."""


class Rule(nn.Module, ABC):
    """How several losses share one trunk. What it remembers is in buffers, so in checkpoints."""

    @abstractmethod
    def decide(self, gradients_MBX: Tensor, world: World) -> Decision:
        """From the gradients at the feature, of this rank's samples, to what each loss contributes on every rank.

        Changes nothing in the rule: the step may yet be left out.
        """

    def after_step(self, gauges: Mapping[str, Tensor]) -> None:
        """Take in a step that was applied; `gauges` are those of its passes' agreements, averaged over them."""


class LossRule(Rule):
    """Weighs losses: the gradients of trunk and heads are those of task + sum of weight x loss, weights constant.

    Args:
        weigh: cosines (M, M), task last, to weights (L,); see `ops.agreement`.

    Collectives: one all-reduce of M (M + 1) / 2 numbers per pass.
    """

    def __init__(self, weigh: Callable[[Tensor], Tensor]):
        super().__init__()
        self.weigh = weigh

    def decide(self, gradients_MBX: Tensor, world: World) -> Decision:
        cosines = cosine_matrix(_global_gram(gradients_MBX, world))
        weights = self._smooth(self.weigh(cosines))
        scale = torch.cat([weights, weights.new_ones(1)])
        return Decision(scale, scale, cosines, {"weight": weights})

    def _smooth(self, weights: Tensor) -> Tensor:
        return weights


class RunningLossRule(LossRule):
    """A `LossRule` whose weights are a running mean over steps, that of the first step being its own.

    Args:
        names: of the distillation losses, in their order.
        weigh: as `LossRule` has it.
        momentum: share of the weights so far, 0 <= momentum < 1.

    Source: card `m3lr-dscd-gkm`, section 4.3 and quirk 6.
    """

    running_L: Tensor

    def __init__(self, names: Sequence[str], weigh: Callable[[Tensor], Tensor], *, momentum: float):
        super().__init__(weigh)
        self.names = list(names)
        self.momentum = momentum
        self.register_buffer("running_L", torch.full((len(self.names),), math.nan, dtype=torch.float64))

    def _smooth(self, weights: Tensor) -> Tensor:
        return running_mean(self.running_L.to(weights.dtype), weights, self.momentum)

    @torch.no_grad()
    def after_step(self, gauges: Mapping[str, Tensor]) -> None:
        # every pass has blended the same old mean with its own weights: the mean of the blends is the blend of the mean
        self.running_L.copy_(torch.stack([gauges[f"weight/{name}"] for name in self.names]))


class TrunkRule(Rule):
    """Recombines what enters the trunk; the heads, and what is reported, are those of the plain sum of the losses.

    Projections do not commute with averages over ranks, so the factors come from the global batch.

    Args:
        combine: Gram matrix (M, M), task last, to factors (M,) of the gradients; see `ops.agreement`.

    Collectives: one all-reduce of M (M + 1) / 2 numbers per pass.
    """

    def __init__(self, combine: Callable[[Tensor], Tensor]):
        super().__init__()
        self.combine = combine

    def decide(self, gradients_MBX: Tensor, world: World) -> Decision:
        gram = _global_gram(gradients_MBX, world)
        factors = self.combine(gram)
        return Decision(factors, None, cosine_matrix(gram), {"trunk_weight": factors})


class SampleGate(Rule):
    """Lets a distillation gradient into the trunk only for the samples where it agrees with the task's.

    The heads learn from the plain sum. A sample without a task gradient, one without a label, has nothing that
    distillation could undo: all of its gradients enter.

    Args:
        threshold: cosine with the task's gradient above which a sample's gradient enters, -1 <= threshold < 1.

    Collectives: none. The gauges are those of this rank's samples; `gated` is the share that was kept out.

    Source: card `beyond`, section 2, feature-level version; card `dc-distill-gk-refine`, section 4.5, last paragraph.
    """

    def __init__(self, threshold: float = 0.0):
        super().__init__()
        self.threshold = threshold

    def decide(self, gradients_MBX: Tensor, world: World) -> Decision:
        cosines_LB, has_task_B = sample_cosines(gradients_MBX[:-1], gradients_MBX[-1])
        enters_LB = ((cosines_LB > self.threshold) | ~has_task_B).to(cosines_LB.dtype)
        factors_MB = torch.cat([enters_LB, enters_LB.new_ones(1, enters_LB.shape[1])])
        gauges = {"gated": 1 - enters_LB.mean(dim=1), "cosine_with_task": cosines_LB.mean(dim=1)}
        return Decision(factors_MB, None, gauges=gauges)


def _global_gram(gradients_MBX: Tensor, world: World) -> Tensor:
    """Inner products of all pairs over the samples of all ranks, (M, M)."""
    flat_MY = gradients_MBX.flatten(1)
    gram = flat_MY @ flat_MY.T
    if world.size == 1:
        return gram
    return unpack_symmetric(all_reduce_sum(pack_symmetric(gram), world), len(gram))


@dataclass(frozen=True, slots=True)
class Agreement:
    """One scalar, ready for one backward, and what decided its gradients."""

    loss: Tensor
    names: list[str]
    """Of the distillation losses."""
    decision: Decision

    def gauges(self, task: str = "task") -> dict[str, Tensor]:
        """What was decided and the cosines of all pairs, as named scalars for the metrics."""
        names = [*self.names, task]
        found = {
            f"{what}/{name}": value
            for what, values in self.decision.gauges.items()
            for name, value in zip(names, values.unbind(), strict=False)  # the task has no value of some
        }
        if self.decision.cosines is not None:
            flat = self.decision.cosines.flatten().unbind()
            pairs = combinations(range(len(names)), 2)
            found |= {f"cosine/{names[i]}|{names[j]}": flat[i * len(names) + j] for i, j in pairs}
        return found


def leaf_of(feature: Tensor) -> Tensor:
    """The feature cut off from its trunk: losses are computed on it and differentiated down to it.

    At least float32, since gradients of half precision would vanish before a loss scale reaches them.
    """
    dtype = torch.promote_types(feature.dtype, torch.float32)
    return feature.detach().to(dtype).requires_grad_()


def agree(
    task: Tensor,
    distillation: Mapping[str, Tensor],
    *,
    feature_BD: Tensor,
    leaf_BD: Tensor,
    heads: Sequence[Tensor],
    weigh: Rule | Callable[[Tensor], Tensor],
    world: World,
) -> Agreement:
    """Combine losses by how their gradients agree, with each loss differentiated once.

    Args:
        task: scalar loss on `leaf_BD`.
        distillation: name to scalar loss on `leaf_BD`; means over this rank's samples. One that depends on nothing
            that learns is allowed, and agrees with nobody.
        feature_BD: (B, ...) the trunk's output, where the combined gradient enters the trunk; any floating type.
        leaf_BD: `leaf_of(feature_BD)`.
        heads: every parameter that the losses use beyond the leaf.
        weigh: the rule; a function of the cosines stands for its `LossRule`.
        world: ranks that decide together.

    Returns:
        A scalar whose one backward gives feature and heads what the rule decided; its value is the weighted sum of the
        losses for a `LossRule` and the plain sum for the others. Equal decisions on all ranks.

    Collectives: those of the rule, at most one all-reduce of M (M + 1) / 2 numbers.

    Source: cards `dc-distill-gk-refine`, sections 4.5 and 8, and `beyond`, section 2.
    """
    rule = weigh if isinstance(weigh, Rule) else LossRule(weigh)
    losses = [*distillation.values(), task]
    gradients_MBX, at_heads = _differentiate(losses, leaf_BD, heads)
    with torch.no_grad(), torch.autocast(leaf_BD.device.type, enabled=False):
        decision = rule.decide(gradients_MBX, world)
        entering = _mixed(gradients_MBX, decision.trunk).view_as(leaf_BD)
        values = torch.stack([loss.detach() for loss in losses])
        if decision.heads is None:
            total, factors = values.sum(), [None] * len(losses)
        else:
            total, factors = values @ decision.heads.to(values.dtype), decision.heads.unbind()
        learned = _summed(at_heads, factors)
    loss = inject(total, [feature_BD, *(heads[i] for i in learned)], [entering, *learned.values()])
    return Agreement(loss, list(distillation), decision)


def _differentiate(
    losses: Sequence[Tensor], leaf: Tensor, heads: Sequence[Tensor]
) -> tuple[Tensor, list[dict[int, Tensor]]]:
    """Each loss differentiated once: its gradient at the leaf, (M, B, X), and by number at the heads that it uses."""
    at_leaf: list[Tensor] = []
    at_heads: list[dict[int, Tensor]] = []
    one = torch.ones_like(losses[-1])
    for number, loss in enumerate(losses):
        found: Sequence[Tensor | None] = [None] * (len(heads) + 1)
        if loss.requires_grad:
            last = number == len(losses) - 1
            found = cast(
                "Sequence[Tensor | None]",
                torch.autograd.grad(loss, [leaf, *heads], one.to(loss.dtype), retain_graph=not last, allow_unused=True),
            )
        at_leaf.append(torch.zeros_like(leaf) if found[0] is None else found[0])
        at_heads.append({i: gradient for i, gradient in enumerate(found[1:]) if gradient is not None})
    return torch.stack(at_leaf).flatten(2), at_heads


def _mixed(gradients_MBX: Tensor, factors: Tensor) -> Tensor:
    """Sum over losses of factor x gradient, (B, X); the factors are (M,) or differ by sample, (M, B)."""
    if factors.dim() == 1:
        return (factors @ gradients_MBX.flatten(1)).view_as(gradients_MBX[0])
    return torch.einsum("mb,mbx->bx", factors, gradients_MBX)


def _summed(at_heads: Sequence[Mapping[int, Tensor]], factors: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """Sum over losses of factor x gradient for each head; a factor of None is 1.

    A list of tensors at a time: one kernel on devices that have it, and nothing is concatenated.
    """
    total: dict[int, Tensor] = {}
    for gradients, factor in zip(at_heads, factors, strict=True):
        if not gradients:
            continue
        values = list(gradients.values())
        if factor is not None:
            values = torch._foreach_mul(values, factor)
        shared = [i for i in gradients if i in total]
        scaled = dict(zip(gradients, values, strict=True))
        if shared:
            sums = torch._foreach_add([total[i] for i in shared], [scaled[i] for i in shared])
            scaled |= dict(zip(shared, sums, strict=True))
        total |= scaled
    return total
