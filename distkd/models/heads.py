"""Small trained heads between feature and embedding."""

# Shapes: B samples, F feature width, D embedding width

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Projector", "unit_rows"]


class Projector(nn.Module):
    """Feature to unit embedding: a linear layer, then L2 normalisation. (B, F) to (B, D)."""

    def __init__(self, feature_dim: int, embedding_dim: int):
        super().__init__()
        self.linear = nn.Linear(feature_dim, embedding_dim)

    def forward(self, feature_BF: Tensor) -> Tensor:
        return unit_rows(self.linear(feature_BF))


def unit_rows(x_BD: Tensor) -> Tensor:
    """Rows divided by their L2 norm, without an epsilon; a row of zeros stays zero and its gradient stays finite."""
    norm_B1 = torch.linalg.vector_norm(x_BD, dim=1, keepdim=True)
    return x_BD / torch.where(norm_B1 > 0, norm_B1, 1.0)
