"""From the features of several modalities to one: gated bilinear fusion of two, or concatenation of any number."""

# Shapes: B samples, D width of each modality's feature, O fused width

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distkd.models.dropout import KeyedDropout
from distkd.models.norm import Norm, make_norm
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

    def forward(self, own_BD: Tensor, first_BD: Tensor, second_BD: Tensor) -> Tensor:
        gate_BD = torch.sigmoid(self._bilinear(first_BD, second_BD))
        return self.dropout(self.out(gate_BD * self.hidden(own_BD).relu()).relu())

    def _bilinear(self, first_BD: Tensor, second_BD: Tensor) -> Tensor:
        """What `self.form` computes, as one matrix product: its own kernel is several times slower on a CPU."""
        weight = self.form.weight  # (out, first, second)
        out, n_first, n_second = weight.shape
        right = first_BD @ weight.permute(1, 0, 2).reshape(n_first, out * n_second)
        return (right.view(-1, out, n_second) @ second_BD.unsqueeze(2)).squeeze(2) + self.form.bias


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
        self.mix1 = nn.Sequential(nn.Linear(outer, out_dim), make_norm(norm, out_dim, 1), nn.ReLU(), KeyedDropout(dropout))
        self.mix2 = nn.Sequential(nn.Linear(out_dim, out_dim), make_norm(norm, out_dim, 1), nn.ReLU(), KeyedDropout(dropout))
        max_init(self)  # linear layers only: the bilinear forms keep the framework's initial weights

    def gated(self, first_BD: Tensor, second_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Both gated sides, each with a constant 1 in the last column."""
        first_BD, second_BD = first_BD.relu(), second_BD.relu()
        sides = self.first(first_BD, first_BD, second_BD), self.second(second_BD, first_BD, second_BD)
        ones_B1 = first_BD.new_ones(first_BD.shape[0], 1)
        return torch.cat([sides[0], ones_B1], dim=1), torch.cat([sides[1], ones_B1], dim=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        first, second = self.gated(*features)
        outer = torch.einsum("bi,bj->bij", first, second).flatten(1)
        return self.mix2(self.mix1(self.dropout(outer)))


class ConcatFusion(nn.Module):
    """Any number of features (B, D) to one (B, O), non-negative: side by side, linear, norm, ReLU, dropout."""

    def __init__(self, dims: Sequence[int], out_dim: int, *, norm: Norm, dropout: float):
        super().__init__()
        self.dropout = KeyedDropout(dropout)
        self.mix = nn.Sequential(nn.Linear(sum(dims), out_dim), make_norm(norm, out_dim, 1), nn.ReLU())

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.mix(self.dropout(torch.cat(list(features), dim=1)))
