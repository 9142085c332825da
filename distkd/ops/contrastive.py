"""Noise contrast of anchors with rows of a memory bank: value and gradient in one pass, in log space.

Bank rows are constants, so the gradient at an anchor is a sum of its rows whose weights are known as soon as the scores
are. Loss and gradient are therefore found together and `ops.injected.inject` hands the gradient over: no graph through
the rows, and they may be written before the backward has run.
"""

# torch leaves the types of some of its results out
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

# Shapes: B anchors of this rank, D embedding, N bank rows, M columns, positives first

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from distkd.ops.rows import scan, weighted_sum

__all__ = ["EPSILON", "Noise", "contrast", "log_normaliser", "noise_contrast"]

EPSILON = 1e-7
"""Added to the denominators by every released version of the loss."""


@dataclass(frozen=True, slots=True)
class Noise:
    """What an anchor's scores are measured against, and how its columns count."""

    log_z: Tensor
    """Log of the frozen normaliser, scalar constant."""
    n_positive: int
    """Positives of an anchor, over which the mean is taken."""
    n_negative: int
    """Negatives of an anchor, whose terms are summed; the noise density is their number over N."""
    n_rows: int
    """N of the whole bank."""

    @property
    def bias(self) -> float:
        """log(c + eps), the noise density on the scale of a score."""
        return math.log(self.n_negative / self.n_rows + EPSILON)

    def margin(self, product_BM: Tensor, temperature: float, offset_BM: Tensor | None = None) -> Tensor:
        """How far scores are above their noise: product / temperature + offset - log Z - log(c + eps), (B, M)."""
        level = -(self.log_z.to(product_BM.dtype) + self.bias)
        shift = level if offset_BM is None else offset_BM.to(product_BM.dtype) + level
        return torch.add(shift, product_BM, alpha=1 / temperature)

    @property
    def constant(self) -> float:
        """What epsilon adds to the loss of an anchor, whatever its scores."""
        return self.n_negative * math.log1p(EPSILON * self.n_rows / self.n_negative) if self.n_negative else 0.0


def _has_kernel(anchor_BD: Tensor) -> bool:
    # float64 is for laws and golden numbers, and the kernel takes its constants in float32
    return anchor_BD.is_cuda and anchor_BD.dtype == torch.float32 and _is_there("triton")


@cache
def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def log_normaliser(log_total: Tensor, count: Tensor, n_rows: int) -> Tensor:
    """log Z of noise contrast: log of (mean of the exponentiated scores x bank rows).

    Args:
        log_total: log of the sum of exp(score) over all ranks, scalar.
        count: how many scores were summed over all ranks, scalar.
        n_rows: N of the bank.
    """
    return log_total - torch.log(count) + math.log(n_rows)


def noise_contrast(margin_BM: Tensor, n_columns: int, n_positive: int) -> tuple[Tensor, Tensor]:
    """Loss of every anchor and its derivative by every score, without the constant of epsilon.

    Args:
        margin_BM: how far the scores are above their noise (`Noise.margin`), natural units. A column that does not
            count has +inf as a positive and -inf as a negative: loss and derivative are 0 there.
        n_columns: how many of the columns, the first ones, are positives.
        n_positive: how many positives the mean is taken over.

    Returns:
        (B,) >= 0, the mean over positives plus the sum over negatives, and (B, M). In the type of the margins, exact
        where exp(score) would overflow. No gradient, no collective.

    Source: card `crd`, sections 2 and 4; card `dc-distill-gk-refine`, section 4.4 (several positives).
    """
    # o / (o + c + eps) is the sigmoid of the margin, hence one softplus for each column
    turned_BP, negative_BK = -margin_BM[:, :n_columns], margin_BM[:, n_columns:]
    positive_B = F.softplus(turned_BP, threshold=50).sum(dim=1) / n_positive
    loss_B = positive_B + F.softplus(negative_BK, threshold=50).sum(dim=1)
    slope_BM = torch.sigmoid(margin_BM)
    slope_BM[:, :n_columns] = torch.sigmoid(turned_BP) / -n_positive  # 1 - sigmoid would lose small ones
    return loss_B, slope_BM


def contrast(
    anchor_BD: Tensor,
    rows_ND: Tensor,
    index_BM: Tensor,
    n_columns: int,
    noise: Noise,
    *,
    temperature: float,
    product_BM: Tensor | None = None,
    offset_BM: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of every anchor and its gradient at the anchor, in one pass over the rows.

    Args:
        anchor_BD: unit embeddings, float32 or float64.
        rows_ND: the bank, of any floating-point type; sums are taken in the type of the anchors.
        index_BM: int64 rows of each anchor, positives first, 0 <= index < N.
        n_columns: how many of the columns are positives.
        noise: normaliser and counts.
        temperature: divisor of the cosines, unitless, > 0.
        product_BM: inner products of anchors and rows, where they are known already.
        offset_BM: added to the scores: log of a weight, or the infinity of a column that does not count.

    Returns:
        (B,) and (B, D), as `noise_contrast` has them for the scores. Nothing of size B x M x D outlives a tile. On CUDA
        one Triton kernel where Triton is installed. No gradient, no collective.
    """
    if product_BM is not None:
        margin_BM = noise.margin(product_BM, temperature, offset_BM)
        loss_B, slope_BM = noise_contrast(margin_BM, n_columns, noise.n_positive)
        return loss_B, weighted_sum(slope_BM, rows_ND, index_BM).div_(temperature)
    if _has_kernel(anchor_BD):
        from distkd.ops.contrastive_triton import contrast_kernel

        return contrast_kernel(anchor_BD, rows_ND, index_BM, n_columns, noise, temperature, offset_BM)
    loss_B = anchor_BD.new_empty(len(anchor_BD))

    def weigh(product_tM: Tensor, part: slice) -> Tensor:
        margin_tM = noise.margin(product_tM, temperature, None if offset_BM is None else offset_BM[part])
        loss_B[part], slope_tM = noise_contrast(margin_tM, n_columns, noise.n_positive)
        return slope_tM

    return loss_B, scan(anchor_BD, rows_ND, index_BM, weigh).div_(temperature)
