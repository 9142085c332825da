"""Gradient agreement at the student's feature with one backward pass through the trunk.

The losses are computed on a detached leaf of the feature. Each is differentiated once, down to the leaf and the heads;
the Gram matrix of the leaf's gradients is summed over ranks; and one custom Function hands the weighted sum to the
feature and to the heads. Nothing is differentiated twice and the wrapped model sees a single backward
(`docs/decisions/0001-agreement.md` compares the ways).
"""

# torch leaves the types of some of its results out
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

# Shapes: B samples of this rank, D feature width, L distillation losses; the task loss comes last

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distkd.base import World
from distkd.comm.world import all_reduce_sum
from distkd.ops.agreement import cosine_matrix, pack_symmetric, unpack_symmetric

__all__ = ["Agreement", "agree", "leaf_of"]


@dataclass(frozen=True, slots=True)
class Agreement:
    """The weighted loss, ready for one backward, and what decided the weights."""

    loss: Tensor
    weights: dict[str, Tensor]
    cosines: Tensor
    """(L + 1, L + 1), rows in the order of `weights`, the task last."""

    def gauges(self, task: str = "task") -> dict[str, Tensor]:
        """Weights and cosines as named scalars for the metrics."""
        names = [*self.weights, task]
        pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
        cosine = {f"cosine/{names[i]}|{names[j]}": self.cosines[i, j] for i, j in pairs}
        return {f"weight/{name}": weight for name, weight in self.weights.items()} | cosine


class _Inject(torch.autograd.Function):
    """A scalar whose backward hands precomputed gradients to the tensors they belong to."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, n: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[n:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = ctx.saved_tensors
        return (None, None, *(upstream * g for g in gradients), *(None for _ in gradients))


def leaf_of(feature_BD: Tensor) -> Tensor:
    """The feature cut off from its trunk: losses are computed on it and differentiated down to it."""
    return feature_BD.detach().requires_grad_()


def agree(
    task: Tensor,
    distillation: Mapping[str, Tensor],
    *,
    feature_BD: Tensor,
    leaf_BD: Tensor,
    heads: Sequence[Tensor],
    weigh: Callable[[Tensor], Tensor],
    world: World,
) -> Agreement:
    """Weight distillation losses by how their gradients agree over the global batch.

    Args:
        task: scalar loss on `leaf_BD`; its weight is 1.
        distillation: name to scalar loss on `leaf_BD`; means over this rank's samples.
        feature_BD: the trunk's output, where the weighted gradient enters the trunk.
        leaf_BD: `leaf_of(feature_BD)`.
        heads: every parameter that the losses use beyond the leaf.
        weigh: cosines (L + 1, L + 1), task last, to weights (L,); see `ops.agreement`.
        world: ranks whose Gram matrices are summed.

    Returns:
        A scalar equal to task + sum of weight x loss whose backward gives feature and heads the gradient of that sum
        with the weights held constant. Equal weights on all ranks.

    Collectives: one all-reduce of (L + 1)(L + 2) / 2 numbers.

    Source: card `dc-distill-gk-refine`, sections 4.5 and 8.
    """
    losses = [*distillation.values(), task]
    at_leaf, at_heads = _head_gradients(losses, leaf_BD, heads)
    flat_LX = torch.stack([gradient.flatten() for gradient in at_leaf])
    gram = all_reduce_sum(pack_symmetric(flat_LX @ flat_LX.T), world)
    cosines = cosine_matrix(unpack_symmetric(gram, len(losses)))
    weights = weigh(cosines)
    scale = torch.cat([weights, weights.new_ones(1)])
    total = torch.stack([loss.detach() for loss in losses]) @ scale.to(task.dtype)
    combined = [(scale @ flat_LX).view_as(leaf_BD), *(_weighted(gradients, scale) for gradients in at_heads)]
    used = [(x, g.to(x.dtype)) for x, g in zip([feature_BD, *heads], combined, strict=True) if g is not None]
    loss = cast(Tensor, _Inject.apply(total, len(used), *(x for x, _ in used), *(g for _, g in used)))
    return Agreement(loss, dict(zip(distillation, weights.unbind(), strict=True)), cosines)


def _head_gradients(
    losses: Sequence[Tensor], leaf: Tensor, heads: Sequence[Tensor]
) -> tuple[list[Tensor], list[tuple[Tensor | None, ...]]]:
    """Each loss differentiated once: gradients at the leaf, and per head those of all losses, None where unused."""
    at_leaf: list[Tensor] = []
    per_loss: list[tuple[Tensor | None, ...]] = []
    for number, loss in enumerate(losses):
        last = number == len(losses) - 1
        found = torch.autograd.grad(
            loss, [leaf, *heads], retain_graph=not last, allow_unused=True, materialize_grads=False
        )
        first = cast("Tensor | None", found[0])
        at_leaf.append(torch.zeros_like(leaf) if first is None else first)
        per_loss.append(found[1:])
    return at_leaf, list(zip(*per_loss, strict=True))


def _weighted(gradients: Sequence[Tensor | None], scale: Tensor) -> Tensor | None:
    terms = [w * g for g, w in zip(gradients, scale, strict=True) if g is not None]
    return torch.stack(terms).sum(dim=0) if len(terms) > 1 else (terms[0] if terms else None)
