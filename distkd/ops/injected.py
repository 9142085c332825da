"""A loss whose gradients are already known."""

# torch leaves the types of some of its results out
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["inject"]


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, n: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[n:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = ctx.saved_tensors
        scaled = torch._foreach_mul(gradients, upstream)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return (None, None, *scaled, *(None for _ in gradients))


def inject(value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar equal to `value` whose backward hands `upstream * gradient` to each tensor.

    For losses that find value and gradient in one pass, or whose gradients were combined beforehand: nothing but the
    gradients is kept for the backward, so what they were made from may change before it.

    Args:
        value: scalar; no gradient flows through it.
        tensors: where the gradients go.
        gradients: constants of the same shapes as `tensors`, of their type or a wider one; not differentiable a second
            time.

    Returns:
        Scalar in the dtype of `value`. No collective.
    """
    return cast(Tensor, _Inject.apply(value.detach(), len(tensors), *tensors, *gradients))
