"""Small trained heads between feature and embedding."""

# Shapes: B samples, F feature width, D embedding width

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Projector"]


class Projector(nn.Module):
    """Feature to unit embedding: a linear layer, then L2 normalisation. (B, F) to (B, D)."""

    def __init__(self, feature_dim: int, embedding_dim: int):
        super().__init__()
        self.linear = nn.Linear(feature_dim, embedding_dim)

    def forward(self, feature_BF: Tensor) -> Tensor:
        # the bound only meets rows of zeros; the source has none and would give NaN there
        return F.normalize(self.linear(feature_BF), dim=1, eps=1e-12)
