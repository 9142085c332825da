"""How much each distillation loss agrees with the others: weights from the Gram matrix of their gradients."""

# Shapes: L distillation losses, then the task loss in the last row and column, so matrices are (L + 1, L + 1)

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cosine_matrix", "pack_symmetric", "row_sum_weights", "unpack_symmetric"]


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Upper triangle with the diagonal, (n (n + 1) / 2,): what needs to be summed over ranks."""
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def unpack_symmetric(packed: Tensor, n: int) -> Tensor:
    """Inverse of `pack_symmetric`."""
    rows, columns = torch.triu_indices(n, n, device=packed.device)
    matrix = packed.new_empty(n, n)
    matrix[rows, columns] = packed
    matrix[columns, rows] = packed
    return matrix


def cosine_matrix(gram: Tensor) -> Tensor:
    """Cosines of all pairs from inner products.

    A gradient of zero norm agrees with nobody: row and column 0, diagonal 1 (the released code gives NaN).
    """
    norm = gram.diagonal().clamp_min(0).sqrt()
    cosines = gram / (norm[:, None] * norm[None, :]).clamp_min(torch.finfo(gram.dtype).tiny)
    alive = norm > 1e-12
    cosines = torch.where(alive[:, None] & alive[None, :], cosines, torch.zeros_like(cosines))
    return cosines.fill_diagonal_(1.0)


def row_sum_weights(cosines: Tensor, *, clamp_min: float | None = None, normalise: bool = False) -> Tensor:
    """Weight of each distillation loss: the sum of its cosines with all losses, task included, times their number.

    Args:
        cosines: (L + 1, L + 1), the task last.
        clamp_min: lower bound of a weight; None as published, where a conflicting loss is pushed up.
        normalise: divide by the mean absolute weight, so that their size does not depend on L.

    Returns:
        (L,), in [-L (L - 1), L (L + 1)] before the options; L for a loss that agrees with nobody.

    Source: card `dc-distill-gk-refine`, section 4.5 (GK-Refine).
    """
    n = cosines.shape[0] - 1
    weights = n * cosines[:n].sum(dim=1)
    if clamp_min is not None:
        weights = weights.clamp_min(clamp_min)
    if normalise:
        weights = weights / weights.abs().mean().clamp_min(1e-12)
    return weights
