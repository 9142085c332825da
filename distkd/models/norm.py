"""Normalisation layers: batch statistics over all ranks, on any device, and the batch-free alternatives.

torch's SyncBatchNorm refuses CPU tensors; this one equals it and `nn.BatchNorm` over the concatenated batch.
"""

# Shapes: B samples of this rank, X positions (pixels), C channels

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distkd.base import World
from distkd.comm.world import all_reduce_sum
from distkd.errors import ShapeError

__all__ = ["Norm", "SyncBatchNorm", "linear_before_norm", "make_norm", "set_world"]

Norm = Literal["sync", "group"]

_GROUP_CHANNELS = 16
"""Channels of a group at least; narrower layers are one group."""


class _SyncedNorm(torch.autograd.Function):
    """Normalise by the mean and variance of all ranks' values; the passes over the values are torch's own kernels.

    One all-reduce forward (sum, sum of squares, count) and one backward. The ranks may hold different numbers of
    values.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
        momentum: float, eps: float, world: World,
    ) -> Tensor:  # fmt: skip
        c, n = x.shape[1], x.numel() // x.shape[1]
        wide = x if x.dtype == torch.float64 else x.float()
        local_mean, local_var = torch.batch_norm_update_stats(wide, None, None, 0.0)
        # the running mean is equal on all ranks: moments about it lose no digits when the mean is far from zero
        origin = running_mean.double()
        offset = local_mean.double() - origin
        moments = [n * offset, n * (local_var.double() + offset.square()), offset.new_full((1,), n)]
        sums = all_reduce_sum(torch.cat(moments), world)
        total = sums[-1]
        shift = sums[:c] / total
        var = (sums[c:-1] / total - shift.square()).clamp_min(0)
        mean = origin + shift
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (total / (total - 1))).to(running_var.dtype), momentum)
        mean, var = mean.to(wide.dtype), var.to(wide.dtype)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), total)
        ctx.eps, ctx.world = eps, world
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, inv_std, total = ctx.saved_tensors
        c, shape = x.shape[1], [1, -1] + [1] * (x.dim() - 2)
        # with the global mean and deviation in the place of the local ones: sums of grad and of grad x normalised value
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inv_std, True, ctx.eps, [False, True, True]
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = all_reduce_sum(torch.cat([grad_bias, grad_weight]), ctx.world) / total
            scale = weight * inv_std
            slope = scale * inv_std * sums[c:]
            constant = slope * mean - scale * sums[:c]
            # a bfloat16 `x` is widened by `constant`: rounded, it would be a bias of the whole channel's gradient
            grad_x = torch.addcmul(constant.view(shape), x, slope.view(shape), value=-1)
            grad_x = grad_x.addcmul_(grad, scale.view(shape)).to(x.dtype)
        return grad_x, grad_weight, grad_bias, *(None,) * 5


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
    """Batch normalisation over the global batch, for inputs (B, C), (B, C, H, W) or (B, C, D, H, W).

    In a world of one, and in eval mode, exactly `nn.BatchNorm`. Tell it its ranks with `set_world`.

    Collectives in train mode: one all-reduce of 2 C + 1 float64 forward, one of 2 C numbers backward.
    """

    world = World()

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(num_features, eps, momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ShapeError(f"batch norm of {self.num_features} channels got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        # every rank has at least one value, so only a world of one can lack a second
        least = 2 if self.world.size == 1 else 1
        if input.numel() < least * self.num_features:
            raise ShapeError(
                f"rank {self.world.rank}: batch norm of {self.num_features} channels needs at least {least} values per "
                f"channel to train on, got shape {tuple(input.shape)}; use a larger micro batch or model.norm=group"
            )
        if self.world.size == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
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


class _LinearBeforeBatchNorm(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        # not detached alone: a gradient of zeros, which DDP waits for; no hook: a copy of the layer would lose it
        return F.linear(input, self.weight, self.bias.detach() + 0 * self.bias)


def linear_before_norm(kind: Norm, inputs: int, outputs: int) -> nn.Linear:
    """A linear layer whose outputs go straight into `make_norm(kind, outputs, 1)`.

    Batch statistics take any constant away again, so the gradient of the bias is zero, and what arrives is the rounding
    of a sum. Adam divides by that rounding's size and weight decay feeds on the result: the bias walks at random, and
    differently at each world size. The exact zero is put in its place, in train mode.
    """
    return (_LinearBeforeBatchNorm if kind == "sync" else nn.Linear)(inputs, outputs)
