"""The self-normalising genomic network of DC-Distill's teacher (card `dc-distill-gk-refine`, section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from distkd.models.dropout import KeyedAlphaDropout

__all__ = ["SNN", "max_init"]


def max_init(module: nn.Module) -> None:
    """Weights of linear layers from a normal of variance 1 / inputs, biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)


class SNN(nn.Module):
    """(B, n_inputs) to (B, feature_dim), non-negative: linear, ELU, alpha dropout, for each width, then a ReLU."""

    def __init__(self, n_inputs: int, widths: Sequence[int], feature_dim: int, *, dropout: float):
        super().__init__()
        sizes = [n_inputs, *widths, feature_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ELU(), KeyedAlphaDropout(dropout)]
        self.layers = nn.Sequential(*layers)
        max_init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).relu()
