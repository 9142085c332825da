"""A small convolutional network for small images and CPU runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from distkd.models.norm import Norm, linear_before_norm, make_norm

__all__ = ["CNN"]


class CNN(nn.Module):
    """(B, channels, H, W) to (B, feature_dim), non-negative: strided 3x3 convolutions, average pool, linear, ReLU."""

    def __init__(self, channels: int, widths: Sequence[int], feature_dim: int, *, norm: Norm):
        super().__init__()
        sizes = [channels, *widths]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                make_norm(norm, after, 2),
                nn.ReLU(),
            ]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Sequential(
            linear_before_norm(norm, sizes[-1], feature_dim), make_norm(norm, feature_dim, 1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).mean(dim=(2, 3)))
