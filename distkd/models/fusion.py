"""From the features of several modalities to one: gated bilinear fusion of two, or concatenation of any number."""

# Shapes: B samples, D width of each modality's feature, O fused width, X pairs of a value of each feature

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distkd.models.dropout import KeyedDropout
from distkd.models.norm import Norm, linear_before_norm, make_norm
from distkd.models.snn import max_init

__all__ = ["ConcatFusion", "GatedBilinearFusion"]


class _Gate(nn.Module):
    """One side of the fusion: its own feature, gated by a bilinear form of both."""

    def __init__(self, dim: int, dim_first: int, dim_second: int, dropout: float):
        super().__init__()
        self.hidden = nn.Linear(dim, dim)
        self.form = nn.Bilinear(dim_first, dim_second, dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = KeyedDropout(dropout)

    def forward(self, own_BD: Tensor, pairs_BX: Tensor) -> Tensor:
        # what `self.form` computes, as one matrix product: its own kernel is many times slower
        gate_BD = torch.sigmoid(F.linear(pairs_BX, self.form.weight.flatten(1), self.form.bias))
        return self.dropout(self.out(gate_BD * self.hidden(own_BD).relu()).relu())


class GatedBilinearFusion(nn.Module):
    """Two features (B, D) to one (B, O), non-negative ("pofusion" of the source).

    Each side is gated by a bilinear form of both; the outer product of the two gated sides, each with a constant 1,
    goes through two linear layers with norm.

    Source: card `dc-distill-gk-refine`, section 2; golden numbers `fusion_eval`.
    """

    def __init__(self, dim_first: int, dim_second: int, out_dim: int, *, norm: Norm, dropout: float):
        super().__init__()
        self.first = _Gate(dim_first, dim_first, dim_second, dropout)
        self.second = _Gate(dim_second, dim_first, dim_second, dropout)
        outer = (dim_first + 1) * (dim_second + 1)
        self.dropout = KeyedDropout(dropout)
        self.mix1 = nn.Sequential(
            linear_before_norm(norm, outer, out_dim), make_norm(norm, out_dim, 1), nn.ReLU(), KeyedDropout(dropout)
        )
        self.mix2 = nn.Sequential(
            linear_before_norm(norm, out_dim, out_dim), make_norm(norm, out_dim, 1), nn.ReLU(), KeyedDropout(dropout)
        )
        max_init(self)  # linear layers only: the bilinear forms keep the framework's initial weights

    def gated(self, first_BD: Tensor, second_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Both gated sides, each with a constant 1 in the last column."""
        first_BD, second_BD = first_BD.relu(), second_BD.relu()
        pairs_BX = _outer(first_BD, second_BD)
        return F.pad(self.first(first_BD, pairs_BX), (0, 1), value=1.0), F.pad(
            self.second(second_BD, pairs_BX), (0, 1), value=1.0
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        first, second = self.gated(*features)
        return self.mix2(self.mix1(self.dropout(_outer(first, second))))


def _outer(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """Every product of a value of the first with a value of the second, (B, D x D), the first's index slow."""
    return (first_BD.unsqueeze(2) * second_BD.unsqueeze(1)).flatten(1)


class ConcatFusion(nn.Module):
    """Any number of features (B, D) to one (B, O), non-negative: side by side, linear, norm, ReLU, dropout."""

    def __init__(self, dims: Sequence[int], out_dim: int, *, norm: Norm, dropout: float):
        super().__init__()
        self.dropout = KeyedDropout(dropout)
        self.mix = nn.Sequential(linear_before_norm(norm, sum(dims), out_dim), make_norm(norm, out_dim, 1), nn.ReLU())

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.mix(self.dropout(torch.cat(list(features), dim=1)))
