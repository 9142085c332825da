"""Normalisation layers: batch statistics over all ranks, on any device, and the batch-free alternatives.

torch's SyncBatchNorm refuses CPU tensors; this one equals it and `nn.BatchNorm` over the concatenated batch.
"""

# Shapes: B samples of this rank, X positions (pixels), C channels

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distkd.base import World
from distkd.comm.world import all_reduce_sum
from distkd.errors import ShapeError

__all__ = ["Norm", "SyncBatchNorm", "make_norm", "set_world"]

Norm = Literal["sync", "group"]

_GROUP_CHANNELS = 16
"""Channels of a group at most; narrower layers are one group."""


class _SyncedNorm(torch.autograd.Function):
    """Normalise by the mean and variance of all ranks' values.

    One all-reduce forward (count, sum, sum of squares about a shared origin) and one backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
        momentum: float, eps: float, world: World,
    ) -> Tensor:  # fmt: skip
        c = x.shape[1]
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, c] + [1] * (x.dim() - 2)
        wide = x if x.dtype == torch.float64 else x.float()
        # the running mean is equal on all ranks: moments about it lose no digits when the mean is far from zero
        origin = running_mean.to(wide.dtype)
        shifted = wide - origin.view(shape)
        count = wide.new_tensor([x.numel() // c])
        sums = all_reduce_sum(torch.cat([shifted.sum(axes), shifted.square().sum(axes), count]), world)
        total = sums[-1]
        mean = sums[:c] / total
        var = (sums[c:-1] / total - mean.square()).clamp_min(0)
        mean = mean + origin
        inv_std = torch.rsqrt(var + eps)
        # one value a channel has no unbiased variance; the clamp only guards that division
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * total / (total - 1).clamp_min(1)).to(running_var.dtype), momentum)
        normal = (wide - mean.view(shape)) * inv_std.view(shape)
        ctx.save_for_backward(normal, weight, inv_std, total)
        ctx.axes, ctx.shape, ctx.world = axes, shape, world
        return (normal * weight.view(shape) + bias.view(shape)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normal, weight, inv_std, total = ctx.saved_tensors
        c = weight.shape[0]
        wide = grad.to(normal.dtype)
        grad_bias, grad_weight = wide.sum(ctx.axes), (wide * normal).sum(ctx.axes)
        sums = all_reduce_sum(torch.cat([grad_bias, grad_weight]), ctx.world) if ctx.world.size > 1 else None
        mean_grad, mean_proj = (grad_bias, grad_weight) if sums is None else (sums[:c], sums[c:])
        shape = ctx.shape
        centred = wide - (mean_grad / total).view(shape) - normal * (mean_proj / total).view(shape)
        grad_x = centred * (inv_std * weight).view(shape)
        return grad_x.to(grad.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), *(None,) * 5


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
    """Batch normalisation over the global batch, for inputs (B, C), (B, C, H, W) or (B, C, D, H, W).

    In a world of one, and in eval mode, exactly `nn.BatchNorm`.

    Collectives in train mode: one all-reduce of 2 C + 1 numbers forward, one of 2 C backward.
    """

    world = World()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ShapeError(f"batch norm of {self.num_features} channels got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if self.world.size == 1 or self.running_mean is None or self.running_var is None:
            if input.numel() == input.shape[1]:
                raise ShapeError(
                    f"batch norm needs more than one value per channel, got shape {tuple(input.shape)}; use a larger "
                    "batch.global_batch or model.norm=group"
                )
            return super().forward(input)
        self._check_input_dim(input)
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        return _SyncedNorm.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps, self.world
        )


def set_world(module: nn.Module, world: World) -> None:
    """Tell every layer that shares batch statistics which ranks it shares them with."""
    for layer in module.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.world = world


def make_norm(kind: Norm, channels: int, dims: int) -> nn.Module:
    """A normalisation layer for (B, C) where `dims` is 1, for images and volumes where it is more."""
    if kind == "sync":
        return SyncBatchNorm(channels)
    if dims == 1:
        return nn.LayerNorm(channels)
    groups = next(n for n in range(max(1, channels // _GROUP_CHANNELS), 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels)
