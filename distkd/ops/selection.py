"""Which of its candidates an anchor is compared with: selected by teacher-student discrepancy."""

# Shapes: B anchors, J candidates of each, the P positives first

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distkd.errors import ConfigError
from distkd.ops.draws import uniform

__all__ = ["Mode", "kept_ranks", "select_by_discrepancy"]

Mode = Literal["hard", "mid", "random", "curriculum"]


def kept_ranks(mode: Mode, key: Tensor, *, n_positive: int, keep: int, progress: float = 0.0) -> Tensor:
    """Which places in the order of discrepancy are kept as positives; one draw, shared by the batch.

    The released code states windows for P = 300 (`mid`: places 30 to 99); here they are the same shares of any P.

    Args:
        mode: `hard` the first; `mid` distinct places from 0.10 P to 0.33 P; `random` any, with replacement;
            `curriculum` with replacement, from the middle of the order to its head as training goes on.
        key: int64 scalar tensor; a function of (seed, step, criterion).
        n_positive: P.
        keep: how many places, 1 <= keep <= P.
        progress: share of the run that is done, 0 <= progress < 1.

    Returns:
        int64 (keep,), 0 <= place < P. No collective.

    Raises:
        ConfigError: keep > P.

    Source: card `dc-distill-gk-refine`, section 4.3 and quirk 2.
    """
    if not 1 <= keep <= n_positive:
        raise ConfigError(f"cannot keep {keep} of {n_positive} positive candidates; lower keep_positive")
    if mode == "hard":
        return torch.arange(keep, device=key.device)
    if mode == "mid":
        first = min(n_positive // 10, n_positive - keep)
        width = max(n_positive // 3 - first, keep)
        return first + uniform(key, width).argsort()[:keep]
    first, width = (0, n_positive) if mode == "random" else _curriculum_window(n_positive, progress)
    return first + (uniform(key, keep, dtype=torch.float64) * width).long()


def _curriculum_window(n_positive: int, progress: float) -> tuple[int, int]:
    """Thirds of the run take places P/3..P/2, P/6..P/3, 0..P/6."""
    bounds = (0, n_positive // 6, n_positive // 3, n_positive // 2)
    third = min(2, int(3 * progress))
    first, last = bounds[2 - third], bounds[3 - third]
    return first, max(1, last - first)


def select_by_discrepancy(
    discrepancy_BJ: Tensor, *, n_positive: int, ranks_P: Tensor, keep_negative: int | None
) -> Tensor:
    """Columns of the candidates that are worth comparing with.

    Positives are ordered by falling discrepancy and those at `ranks_P` are kept, the first of them replaced by column
    0 (the anchor's own row) in every mode. Of the negatives the `keep_negative` of lowest discrepancy are kept.

    Args:
        discrepancy_BJ: (teacher - student) similarity of each candidate; the sign is turned for the released reading.
        n_positive: P, the first columns.
        ranks_P: int64 places in the order of the positives.
        keep_negative: how many negatives; None keeps all.

    Returns:
        int64 (B, kept positives + kept negatives), column numbers into J. No gradient, no collective.
    """
    positive_BJ, negative_BJ = discrepancy_BJ[:, :n_positive], discrepancy_BJ[:, n_positive:]
    order_BJ = positive_BJ.argsort(dim=1, descending=True, stable=True)
    positive_BP = order_BJ[:, ranks_P]
    positive_BP = torch.cat([torch.zeros_like(positive_BP[:, :1]), positive_BP[:, 1:]], dim=1)
    if keep_negative is None:
        kept_BK = torch.arange(negative_BJ.shape[1], device=negative_BJ.device).expand_as(negative_BJ)
    else:
        kept_BK = negative_BJ.topk(keep_negative, dim=1, largest=False, sorted=False).indices
    return torch.cat([positive_BP, kept_BK + n_positive], dim=1)
