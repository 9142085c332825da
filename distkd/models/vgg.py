"""VGG16 (Simonyan and Zisserman 2015) up to its last convolution: the network of inter-resolution distillation."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from distkd.models.trunk import Stage, Trunk, chain

__all__ = ["VGG16"]

_PLAN = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions between two pools."""


class VGG16(Trunk):
    """Thirteen convolutions without norm, four pools; parameter names as in the usual weights files.

    It ends before the last ReLU and the last pool: the map is signed. Sides are divided by 16, rounded down. No dropout
    and no batch statistics, so training and evaluation mode are the same.

    Source: card `inter-resolution-at-plus`, section 3.
    """

    width = 512
    least = 16

    def __init__(self, channels: int = 3):
        super().__init__()
        layers: list[nn.Module] = []
        ends: list[int] = [0]
        before = channels
        for block in _PLAN:
            for after in block:
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True)]
                before = after
            layers.append(nn.MaxPool2d(2))
            ends.append(len(layers))
        ends[-1] -= 2  # the last ReLU and the last pool are not there
        self.features = nn.Sequential(*layers[: ends[-1]])
        self._bounds = list(pairwise(ends))
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def stages(self) -> list[Stage]:
        layers = list(self.features)
        return [chain(layers[first:last]) for first, last in self._bounds]
