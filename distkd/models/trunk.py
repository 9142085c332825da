"""Networks for images: a trunk in stages, whose last output is a map, and what makes one feature of it."""

# Shapes: B samples, C input channels, H x W pixels, K channels of the map of h x w places, D feature width

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from distkd.models.norm import Norm, linear_before_norm, make_norm

__all__ = ["ImageEncoder", "Trunk", "chain"]

Stage = Callable[[Tensor], Tensor]


class Trunk(nn.Module):
    """(B, C, H, W) to the map of its last stage, (B, width, h, w), and that of an earlier stage where one is asked for.

    A trunk says what its `width` and its `stages` are.
    """

    width: int
    least = 1
    """Pixels a side, below which nothing is left of an image."""
    inner: int | None = None
    """The earlier stage, counted from the end: -2 is the one before the last."""

    def stages(self) -> Sequence[Stage]:
        """What runs one after another."""
        raise NotImplementedError

    def called(self) -> list[nn.Module]:
        """Modules that the stages call; containers around them do not run, and their hooks neither."""
        found: list[nn.Module] = []
        for stage in self.stages():
            if isinstance(stage, nn.Module):
                found.append(stage)
            elif isinstance(stage, partial):
                found += stage.args[0]
        return found

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        stages = self.stages()
        kept: Tensor | None = None
        for number, stage in enumerate(stages, start=-len(stages)):
            x = stage(x)
            if number == self.inner:
                if torch.is_grad_enabled() and not x.requires_grad:
                    x.requires_grad_()  # of a frozen network: a graph from here on, and not of what is below
                kept = x
        return x, kept

    def map_size(self, shape: Sequence[int]) -> tuple[int, int]:
        """(h, w) of the inner map, or else of the last, for images of `shape` (C, H, W); nothing is computed."""
        shapes = deepcopy(self).to("meta").eval()
        dtype = next((p.dtype for p in self.parameters()), None)
        with torch.no_grad():
            last, inner = shapes(torch.empty(1, *shape, dtype=dtype, device="meta"))
        height, width = (last if inner is None else inner).shape[2:]
        return height, width


def chain(layers: Iterable[nn.Module]) -> Stage:
    """Layers one after another as one stage, without another module around them."""
    return partial(_through, tuple(layers))


def _through(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class ImageEncoder(nn.Module):
    """A trunk and its pool: (B, C, H, W) to feature (B, feature_dim), map and inner map.

    Pooled: the feature is the map's mean over places. Projected: linear, norm, ReLU follow, the feature is
    non-negative, and no map is handed out, since the logits are no linear function of it.
    """

    def __init__(self, trunk: Trunk, feature_dim: int | None, *, norm: Norm):
        """`feature_dim` of a projected feature; None for a pooled one."""
        super().__init__()
        self.trunk: Trunk = trunk
        self.head: nn.Module | None = None
        self.feature_dim = trunk.width
        if feature_dim is not None:
            self.feature_dim = feature_dim
            self.head = nn.Sequential(
                linear_before_norm(norm, trunk.width, feature_dim), make_norm(norm, feature_dim, 1), nn.ReLU()
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        map_BKhw, inner = self.trunk(x)
        pooled_BK = map_BKhw.mean(dim=(2, 3))
        if self.head is None:
            return pooled_BK, map_BKhw, inner
        return self.head(pooled_BK), None, inner
