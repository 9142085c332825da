"""Which rows an anchor is compared with: drawn by class, then selected by teacher-student discrepancy.

Every draw is a function of a key, so any rank can make any other's draw.
"""

# Shapes: B anchors of this rank, N rows of the training set, J = P positive + K negative candidates, C classes

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distkd.errors import ConfigError
from distkd.ops.draws import uniform, words

__all__ = ["Mode", "candidate_rows", "kept_ranks", "select_by_discrepancy"]

Mode = Literal["hard", "mid", "random", "curriculum"]

_LAST = 2**31 - 1
"""Behind every draw: rows that are not in the pool."""


def candidate_rows(
    key_B: Tensor, index_B: Tensor, label_B: Tensor, row_label_N: Tensor, *, n_positive: int, n_negative: int
) -> Tensor:
    """Rows of the anchor's class, the anchor itself first, and rows of the other classes.

    Positives are drawn without replacement; column 0 is then overwritten by the anchor, which so can occur twice.
    Negatives are drawn without replacement where enough rows of other classes exist, else with. An anchor without a
    label knows one positive, itself, in all P columns, and takes its negatives from every other row.

    Args:
        key_B: int64, one key per anchor: the draw's only source of randomness.
        index_B: int64 row of the anchor.
        label_B: int64 class of the anchor, negative where there is none.
        row_label_N: int64 class of every row, negative where there is none.
        n_positive: P, at most the size of the smallest class.
        n_negative: K.

    Returns:
        int64 (B, P + K), positives first. No gradient, no collective. Cost and memory O(B x N).

    Source: card `dc-distill-gk-refine`, section 4.1.
    """
    n_rows = row_label_N.shape[0]
    draw_BN = words(key_B, n_rows)
    known_B1 = label_B[:, None] >= 0
    same_BN = (row_label_N == label_B[:, None]) & known_B1
    # another class: known and different for a labelled anchor, anybody else for one without a label
    other_BN = torch.where(known_B1, (row_label_N >= 0) & ~same_BN, _not_self(index_B, n_rows))
    positive_BP = draw_BN.masked_fill(~same_BN, _LAST).topk(n_positive, dim=1, largest=False).indices
    positive_BP = torch.where(known_B1, positive_BP, index_B[:, None])
    positive_BP[:, 0] = index_B
    return torch.cat([positive_BP, _negatives(key_B, draw_BN, other_BN, n_negative)], dim=1)


def _not_self(index_B: Tensor, n_rows: int) -> Tensor:
    return torch.arange(n_rows, device=index_B.device) != index_B[:, None]


def _negatives(key_B: Tensor, draw_BN: Tensor, pool_BN: Tensor, n: int) -> Tensor:
    # the pool comes first in order; where it is smaller than n its places are drawn again, with replacement
    order_BN = draw_BN.masked_fill(~pool_BN, _LAST).topk(min(n, draw_BN.shape[1]), dim=1, largest=False).indices
    pool_B1 = pool_BN.sum(dim=1, keepdim=True)
    rank_BK = torch.arange(n, device=key_B.device).expand(len(key_B), n)
    again_BK = (uniform(key_B ^ 1, n, dtype=torch.float64) * pool_B1).long()
    rank_BK = torch.where(pool_B1 >= n, rank_BK, again_BK)
    return order_BN.gather(1, rank_BK)


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
        kept_BK = negative_BJ.topk(keep_negative, dim=1, largest=False).indices
    return torch.cat([positive_BP, kept_BK + n_positive], dim=1)
