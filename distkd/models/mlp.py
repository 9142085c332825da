"""A plain network for vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from distkd.models.dropout import KeyedDropout
from distkd.models.norm import Norm, linear_before_norm, make_norm

__all__ = ["MLP"]


class MLP(nn.Module):
    """(B, n_inputs) to (B, feature_dim), non-negative: linear, norm, ReLU, dropout, for each width."""

    def __init__(self, n_inputs: int, widths: Sequence[int], feature_dim: int, *, norm: Norm, dropout: float):
        super().__init__()
        sizes = [n_inputs, *widths, feature_dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [
                linear_before_norm(norm, before, after),
                make_norm(norm, after, 1),
                nn.ReLU(),
                KeyedDropout(dropout),
            ]
        self.layers = nn.Sequential(*layers[:-1])  # the feature itself is not dropped

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
