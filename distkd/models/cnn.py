"""A small convolutional network for small images and CPU runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from distkd.models.norm import Norm, make_norm
from distkd.models.trunk import Stage, Trunk, chain

__all__ = ["CNN"]


class CNN(Trunk):
    """Strided 3x3 convolutions with norm and ReLU, one a stage; each halves the sides, rounded up.

    Signed, the last one has no ReLU, as in the network of inter-resolution distillation.
    """

    def __init__(self, channels: int, widths: Sequence[int], *, norm: Norm, signed: bool = False):
        super().__init__()
        sizes = [channels, *widths]
        self.width = sizes[-1]
        self.n_stages = len(widths)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                make_norm(norm, after, 2),
                nn.ReLU(),
            ]
        for number, layer in enumerate(layers[:-1] if signed else layers):
            self.add_module(str(number), layer)

    def stages(self) -> list[Stage]:
        layers = list(self.children())
        return [chain(layers[3 * number : 3 * number + 3]) for number in range(self.n_stages)]
