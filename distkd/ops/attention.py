"""Where a network looks, class by class, and losses between two networks' views: AT+, Grad-CAM, CAT and AT.

A head of global average pool and one linear layer gives each place of the last map a known share in each class, so the
maps need no backward pass. Maps of different sizes meet on the larger grid.
"""

# torch leaves the types of some of its results out
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

# Shapes: B samples of this rank, K channels, C classes, H x W places, N = H W of them, h x w places of another grid

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distkd.errors import ShapeError
from distkd.ops.rows import slices

__all__ = [
    "attention_energy",
    "class_activation_maps",
    "class_maps",
    "class_slopes",
    "map_distance",
    "normalised",
    "of_class",
    "on_one_grid",
    "pooled_to",
    "unit_map_distance",
    "upsampled",
]


class _PositiveShares(torch.autograd.Function):
    """Sum over channels of the positive part of weight x activation: two skinny products forward, four backward.

    max(0, w a) = max(0, w) max(0, a) + min(0, w) min(0, a), term by term without cancellation. On a CPU a few images at
    a time, so that their two parts are still in the cache when they are read.
    """

    @staticmethod
    def forward(ctx: Any, map_BKN: Tensor, weight_BCK: Tensor) -> Tensor:
        ctx.save_for_backward(map_BKN, weight_BCK)
        above_BCK, below_BCK = weight_BCK.clamp(min=0), weight_BCK.clamp(max=0)
        made_BCN = map_BKN.new_empty(len(map_BKN), weight_BCK.shape[1], map_BKN.shape[2])
        for at, part in _parts(map_BKN):
            torch.clamp(map_BKN[at], min=0, out=part)
            torch.bmm(above_BCK[at], part, out=made_BCN[at])
            torch.clamp(map_BKN[at], max=0, out=part)
            made_BCN[at].baddbmm_(below_BCK[at], part)
        return made_BCN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCN: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        map_BKN, weight_BCK = ctx.saved_tensors
        above_BCK, below_BCK = weight_BCK.clamp(min=0), weight_BCK.clamp(max=0)
        at_map = torch.empty_like(map_BKN) if ctx.needs_input_grad[0] else None
        at_weight = torch.empty_like(weight_BCK) if ctx.needs_input_grad[1] else None
        for at, part in _parts(map_BKN):
            map_bKN, grad_bCN = map_BKN[at], grad_BCN[at]
            if at_map is not None:
                torch.bmm(above_BCK[at].transpose(1, 2), grad_bCN, out=part)
                _where_positive(part, map_bKN, 0, grad_input=at_map[at])
                torch.bmm(below_BCK[at].transpose(1, 2), grad_bCN, out=part)
                at_map[at] += _where_within(part, map_bKN, -math.inf, 0, grad_input=part)
            if at_weight is not None:
                torch.clamp(map_bKN, min=0, out=part)
                torch.mul(torch.bmm(grad_bCN, part.transpose(1, 2)), weight_BCK[at] > 0, out=at_weight[at])
                torch.clamp(map_bKN, max=0, out=part)
                at_weight[at] += torch.bmm(grad_bCN, part.transpose(1, 2)) * (weight_BCK[at] < 0)
        return at_map, at_weight


# y where low < x (and x < high), else 0, in one pass: what a mask and a product take three for
_where_positive: Any = torch.ops.aten.threshold_backward.grad_input
_where_within: Any = torch.ops.aten.hardtanh_backward.grad_input


_PART_BYTES = 1 << 21
"""Activations that a CPU works on at a time; fewer, and starting operations takes longer than they do."""


def _parts(map_BKN: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Images that are worked on at once, and room for as many; all where a launch costs more than memory."""
    n = len(map_BKN)
    step = max(1, n * _PART_BYTES // map_BKN.nbytes) if map_BKN.device.type == "cpu" else n
    room = torch.empty_like(map_BKN[:step])
    for at in slices(n, step):
        yield at, room[: at.stop - at.start]


def class_maps(map_BKHW: Tensor, weight: Tensor) -> Tensor:
    """AT+ maps: how much each place speaks for each class, sum over channels of max(0, weight x activation) / N.

    Equal to the source's form, which rectifies activation x the class score's mean gradient, for a head of pool and
    linear layer: there that gradient is weight / N at every place. A negative weight on a negative activation counts.

    Args:
        map_BKHW: activations, signed; the gradient flows here, once.
        weight: (C, K) of the linear head, or (B, C, K) where it differs by sample; the gradient flows here, once.

    Returns:
        (B, C, H, W), >= 0. Local: no collective inside.

    Raises:
        ShapeError: the numbers of channels differ.

    Source: card `inter-resolution-at-plus`, section 4.
    """
    flat_BKN, weight_BCK = _checked(map_BKHW, weight)
    made_BCN = cast(Tensor, _PositiveShares.apply(flat_BKN, weight_BCK / flat_BKN.shape[2]))
    return made_BCN.unflatten(2, map_BKHW.shape[2:])


def class_activation_maps(map_BKHW: Tensor, weight: Tensor) -> Tensor:
    """CAM: each place's share in each class's logit, the bias aside. Arguments and errors of `class_maps`.

    Returns:
        (B, C, H, W), signed, whose sum over places is the logit less its bias; Grad-CAM is its positive part.
    """
    flat_BKN, weight_BCK = _checked(map_BKHW, weight)
    return torch.bmm(weight_BCK, flat_BKN).div(flat_BKN.shape[2]).unflatten(2, map_BKHW.shape[2:])


def _checked(map_BKHW: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if map_BKHW.dim() != 4 or weight.dim() not in (2, 3) or weight.shape[-1] != map_BKHW.shape[1]:
        raise ShapeError(
            f"a map of shape {tuple(map_BKHW.shape)} and a head of shape {tuple(weight.shape)} do not fit, expected "
            "(B, K, H, W) and (C, K) or (B, C, K)"
        )
    weight_BCK = weight.expand(len(map_BKHW), -1, -1) if weight.dim() == 2 else weight
    return map_BKHW.flatten(2), weight_BCK


def class_slopes(logits_BC: Tensor, map_BKHW: Tensor, *, create_graph: bool) -> Tensor:
    """How each class score grows with each channel: its gradient, summed over places; (B, C, K).

    The heads of `class_maps` where what follows the map is no pool and linear layer. All classes at once: the part of
    the network between map and logits is traversed backwards, as a batch of C.

    Args:
        logits_BC: computed from the map, each sample's from its own alone.
        map_BKHW: part of the graph of the logits.
        create_graph: whether the slopes can be differentiated again, as a student's have to be.

    Source: card `inter-resolution-at-plus`, section 4; the mean over places there is this sum / N.
    """
    b, c = logits_BC.shape
    one_CBC = torch.eye(c, dtype=logits_BC.dtype, device=logits_BC.device).unsqueeze(1).expand(c, b, c)

    def slope(one_BC: Tensor) -> Tensor:
        return torch.autograd.grad(logits_BC, map_BKHW, one_BC, create_graph=create_graph, retain_graph=create_graph)[0]

    # not is_grads_batched, whose older batching cannot differentiate a group norm twice
    slope_CBKHW = torch.vmap(slope)(one_CBC)
    return slope_CBKHW.sum(dim=(3, 4)).transpose(0, 1)


def of_class(weight: Tensor, class_B: Tensor) -> Tensor:
    """A head's row of one class for each sample, (B, 1, K).

    Args:
        weight: (C, K) or (B, C, K).
        class_B: int64, 0 <= class < C.
    """
    if weight.dim() == 2:
        return weight[class_B].unsqueeze(1)
    return weight[torch.arange(len(class_B), device=weight.device), class_B].unsqueeze(1)


def attention_energy(map_BKHW: Tensor) -> Tensor:
    """AT's spatial map, mean over channels of the squared activation, (B, 1, H, W), >= 0. No classes, no head.

    Source: Zagoruyko and Komodakis, ICLR 2017.
    """
    return map_BKHW.square().mean(dim=1, keepdim=True)


def normalised(map_BCHW: Tensor) -> Tensor:
    """Each image's maps scaled to 0..1 by the least and the largest value over all places and classes together.

    Args:
        map_BCHW: any finite values; the gradient flows here, through least and largest too.

    Returns:
        The same shape. Maps that are constant become 0, with a gradient of 0 (the source divides by zero).
    """
    flat_BX = map_BCHW.flatten(1)
    low_B1, high_B1 = flat_BX.amin(dim=1, keepdim=True), flat_BX.amax(dim=1, keepdim=True)
    return ((flat_BX - low_B1) / _or_infinite(high_B1 - low_B1)).view_as(map_BCHW)


def _or_infinite(divisor: Tensor) -> Tensor:
    """Infinity for 0 and what is too small to divide by: the quotient is 0, and so is its gradient."""
    return torch.where(divisor > torch.finfo(divisor.dtype).tiny, divisor, math.inf)


def map_distance(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Mean over samples of the root of the mean squared difference over places and classes.

    Args:
        student_BCHW: the gradient flows here; where a sample's maps are equal it is 0.
        teacher_BCHW: constants of the same shape.

    Returns:
        Scalar >= 0, at most 1 for values of 0..1. Local: no collective inside.
    """
    difference_BX = (student_BCHW - teacher_BCHW).flatten(1)
    return torch.linalg.vector_norm(difference_BX, dim=1).mean() / math.sqrt(difference_BX.shape[1])


def unit_map_distance(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Mean squared difference of maps that are scaled to unit length, each class's by itself; as AT and CAT compare.

    Args:
        student_BCHW: the gradient flows here; a map of zeros stays zero, with a gradient of 0.
        teacher_BCHW: constants of the same shape.

    Returns:
        Scalar >= 0, mean over samples, classes and places. Local: no collective inside.

    Source: Zagoruyko and Komodakis, ICLR 2017 (AT); Guo et al., CVPR 2023 (CAT-KD).
    """
    student_BCN, teacher_BCN = (_of_unit_length(maps.flatten(2)) for maps in (student_BCHW, teacher_BCHW))
    return (student_BCN - teacher_BCN).square().mean()


def _of_unit_length(map_BCN: Tensor) -> Tensor:
    # not F.normalize: a gradient through a map of zeros would be multiplied by 1e12
    return map_BCN / _or_infinite(torch.linalg.vector_norm(map_BCN, dim=2, keepdim=True))


def upsampled(map_BKhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear to (H, W), no fewer than (h, w), corners onto corners; the map itself where it has that size.

    Two small matrix products, whose backward adds in one order on any device, which `interpolate`'s on CUDA does not.
    """
    if tuple(map_BKhw.shape[2:]) == size:
        return map_BKhw
    like = map_BKhw.dtype, map_BKhw.device
    rows, columns = (_between(was, now, *like) for was, now in zip(map_BKhw.shape[2:], size, strict=True))
    return rows @ map_BKhw @ columns.T


def on_one_grid(one_BKHW: Tensor, other_BKhw: Tensor) -> tuple[Tensor, Tensor]:
    """Both `upsampled` to as many rows and columns as the one that has more of them."""
    rows, columns = (max(sides) for sides in zip(one_BKHW.shape[2:], other_BKhw.shape[2:], strict=True))
    return upsampled(one_BKHW, (rows, columns)), upsampled(other_BKhw, (rows, columns))


def pooled_to(map_BKHW: Tensor, places: int) -> Tensor:
    """Averages over `places` x `places` areas, as even as they can be; a side that has fewer places keeps them."""
    like = map_BKHW.dtype, map_BKHW.device
    rows, columns = (_areas(side, min(side, places), *like) for side in map_BKHW.shape[2:])
    return rows @ map_BKHW @ columns.T


# the weights are kept on the device: to send them there, the host would wait in every step


@lru_cache(maxsize=32)
def _between(was: int, now: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(now, was) weights of linear interpolation, corners onto corners."""
    place = torch.arange(now, dtype=torch.float64) * ((was - 1) / max(1, now - 1))
    below = place.floor().long().clamp(max=was - 1)
    share = (place - below).unsqueeze(1)
    one_hot = torch.eye(was, dtype=torch.float64)
    weight = (1 - share) * one_hot[below] + share * one_hot[(below + 1).clamp(max=was - 1)]
    return weight.to(device, dtype)


@lru_cache(maxsize=32)
def _areas(was: int, now: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(now, was) weights of averages over areas that may share a border, as `adaptive_avg_pool2d` cuts them."""
    weight = torch.zeros(now, was, dtype=torch.float64)
    for row in range(now):
        first, last = row * was // now, -(-(row + 1) * was // now)
        weight[row, first:last] = 1 / (last - first)
    return weight.to(device, dtype)
