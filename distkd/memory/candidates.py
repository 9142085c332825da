"""Which rows of a memory bank an anchor is compared with: its positives, the anchor itself first, and its negatives.

The training rows are put in order of their classes once; a draw is then a few numbers of a pool whose size the host
knows, at a cost that depends neither on the rows nor on the classes. Candidates are drawn anew for every anchor and
step, as a function of its key and row alone, so any rank can make any other's draw.
"""

# Shapes: B anchors of this rank, N training rows, C classes (and one more: no label), P positives, K negatives

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from distkd.errors import ConfigError
from distkd.memory.memory import Memory
from distkd.ops.draws import below, fold_in
from distkd.ops.permutation import Pools, distinct, distinct_of

__all__ = ["Candidates", "Negatives", "Positive"]

Negatives = Literal["other_class", "others"]
Positive = Literal["own", "class"]

_POSITIVES = 1
"""What is folded into an anchor's key for its positives; its negatives are drawn from the key as it is."""


class Candidates(Memory):
    """Candidates by class of a fixed set of training rows; nothing of it is learned or saved."""

    row_N: Tensor
    """The rows in order of their classes, those without a label last; int32 where that is enough."""
    place_N: Tensor
    """Where each row is in that order."""
    start_C: Tensor
    count_C: Tensor
    positive_C3: Tensor
    negative_C3: Tensor

    def __init__(
        self,
        row_label_N: Tensor,
        *,
        n_positive: int,
        n_negative: int,
        negatives: Negatives = "other_class",
        positive: Positive = "own",
    ):
        """Put the rows in order and check that every anchor finds what it asks for.

        Args:
            row_label_N: int64 class of each training row, 0 <= class, negative where there is none.
            n_positive: P, at most the size of the smallest class that has rows.
            n_negative: K.
            negatives: `other_class`, rows of other known classes; `others`, every row but the anchor's own.
            positive: `own`, column 0 is the anchor; `class`, it is drawn like the rest (CRD's `relax` has P = 1).

        Raises:
            ConfigError: P or K is below 1, a class has fewer rows than P, or there is nothing to tell an anchor from.
        """
        super().__init__()
        label_N = row_label_N.cpu()
        n_classes = int(label_N.max().clamp_min(-1)) + 1 if len(label_N) else 0
        label_N = torch.where(label_N < 0, n_classes, label_N)
        count_C = torch.bincount(label_N, minlength=n_classes + 1)
        counts: list[int] = count_C.tolist()
        self.n_positive, self.n_negative, self.n_rows, self.n_classes = n_positive, n_negative, len(label_N), n_classes
        self.n_known = sum(counts[:n_classes])
        _check(counts[:n_classes], self.n_rows, n_positive, n_negative, negatives)
        self.by_class, self.own = negatives == "other_class", positive == "own"
        self.draws_positives = n_positive > 1 or not self.own
        if self.by_class or self.draws_positives:
            self._keep_order(label_N, count_C)
        # the last entry is an anchor without a label, which any batch may hold: every row but its own
        sizes = [self.n_known - count for count in counts[:n_classes]] + [self.n_rows - 1]
        occurring = [size for size, count in zip(sizes, counts[:n_classes], strict=False) if count] + sizes[-1:]
        self.some_without, self.some_with = max(occurring) >= n_negative, min(occurring) < n_negative
        if self.by_class:
            # too small a pool is drawn from with replacement; its size is raised only so that the table has none
            self.negative_pools = Pools.of([max(size, n_negative) for size in sizes])
            self.register_buffer("negative_C3", self.negative_pools.cut_C3, persistent=False)
        if self.draws_positives:
            self.positive_pools = Pools.of([max(count, n_positive) for count in counts])
            self.register_buffer("positive_C3", self.positive_pools.cut_C3, persistent=False)

    def _keep_order(self, label_N: Tensor, count_C: Tensor) -> None:
        integer = torch.int32 if self.n_rows < 1 << 31 else torch.int64
        row_N = label_N.argsort(stable=True)
        place_N = torch.empty_like(row_N).scatter_(0, row_N, torch.arange(self.n_rows))
        self.register_buffer("row_N", row_N.to(integer), persistent=False)
        self.register_buffer("place_N", place_N.to(integer), persistent=False)
        self.register_buffer("start_C", count_C.cumsum(0) - count_C, persistent=False)
        self.register_buffer("count_C", count_C, persistent=False)

    def forward(self, key_B: Tensor, index_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        """Rows of the anchor's class, the anchor itself first, and rows that it should be told from.

        Positives are drawn without replacement; column 0 is then overwritten by the anchor, which so can occur twice.
        Negatives are drawn without replacement where the pool has K rows, else with. An anchor without a label has one
        positive, its own row, in all P columns, and takes its negatives from every other row.

        Args:
            key_B: int64, one key per anchor: the draw's only source of randomness.
            index_B: int64 row of the anchor.
            label_B: int64 class of the anchor, one that has rows, or negative where it is not known; by default the
                class of its row.

        Returns:
            int64 (B, P + K), positives first. No gradient, no collective, no host sync. Time and memory O(B (P + K)).

        Source: cards `dc-distill-gk-refine`, section 4.1, and `crd`, "Sampling of idx".
        """
        if not (self.by_class or self.draws_positives):
            return torch.cat([index_B[:, None], self._others(key_B, index_B)], dim=1)
        place_B = self.place_N[index_B].long()
        class_B = self._class_of(place_B, label_B)
        positive_BP = self._positives(key_B, index_B, place_B, class_B)
        negative_BK = self._other_class(key_B, place_B, class_B) if self.by_class else self._others(key_B, index_B)
        return torch.cat([positive_BP, negative_BK], dim=1)

    def _class_of(self, place_B: Tensor, label_B: Tensor | None) -> Tensor:
        if label_B is None:
            return torch.searchsorted(self.start_C, place_B, right=True) - 1
        return torch.where(label_B < 0, self.n_classes, label_B)

    def _positives(self, key_B: Tensor, index_B: Tensor, place_B: Tensor, class_B: Tensor) -> Tensor:
        if not self.draws_positives:
            return index_B[:, None]
        pools = self.positive_pools.on(self.positive_C3)
        number_BP = distinct_of(fold_in(key_B, _POSITIVES), self.n_positive, pools, class_B)
        place_BP = number_BP.add_(self.start_C[class_B][:, None])
        row_BP = self._rows(torch.where((class_B == self.n_classes)[:, None], place_B[:, None], place_BP))
        if self.own:
            row_BP[:, 0] = index_B
        return row_BP

    def _other_class(self, key_B: Tensor, place_B: Tensor, class_B: Tensor) -> Tensor:
        # in order of classes what is left out is one stretch: a class, or the own row of an anchor without one
        unknown_B = class_B == self.n_classes
        start_B = torch.where(unknown_B, place_B, self.start_C[class_B])
        length_B = torch.where(unknown_B, 1, self.count_C[class_B])
        pool_B = torch.where(unknown_B, self.n_rows, self.n_known) - length_B
        return self._rows(_step_over(self._numbers(key_B, pool_B, class_B), start_B, length_B))

    def _numbers(self, key_B: Tensor, pool_B: Tensor, class_B: Tensor) -> Tensor:
        n, pools = self.n_negative, self.negative_pools
        if not self.some_without:
            return below(key_B, n, pool_B)
        without_BK = distinct_of(key_B, n, pools.on(self.negative_C3), class_B)
        return torch.where(pool_B[:, None] >= n, without_BK, below(key_B, n, pool_B)) if self.some_with else without_BK

    def _others(self, key_B: Tensor, index_B: Tensor) -> Tensor:
        pool, n = self.n_rows - 1, self.n_negative
        number_BK = distinct(key_B, n, pool) if n <= pool else below(key_B, n, pool)
        return _step_over(number_BK, index_B, torch.ones_like(index_B))

    def _rows(self, place: Tensor) -> Tensor:
        return self.row_N.index_select(0, place.flatten()).view(place.shape).long()


def _step_over(number_BK: Tensor, start_B: Tensor, length_B: Tensor) -> Tensor:
    """Numbers from `start` on raised by `length`, in place."""
    # the sign as -1 or 0: a comparison and a choice would take several times as long
    below_start_BK = (number_BK - start_B[:, None]).bitwise_right_shift_(63)
    return number_BK.add_(length_B[:, None]).addcmul_(below_start_BK, length_B[:, None])


def _check(counts: Sequence[int], n_rows: int, n_positive: int, n_negative: int, negatives: Negatives) -> None:
    """`counts` are those of the classes, 0 where no row has it."""
    if n_positive < 1 or n_negative < 1:
        raise ConfigError(
            f"candidates are {n_positive} positives and {n_negative} negatives; both must be at least 1: raise them"
        )
    if n_rows < 2:
        raise ConfigError(
            f"the training set has {n_rows} rows, and an anchor needs another to be told from; add samples"
        )
    sizes = {label: count for label, count in enumerate(counts) if count}
    smallest = min(sizes, key=sizes.__getitem__, default=0)
    if sizes and sizes[smallest] < n_positive:
        raise ConfigError(
            f"class {smallest} has {sizes[smallest]} labelled training rows, fewer than the {n_positive} positives "
            f"to draw; ask for at most {sizes[smallest]}"
        )
    if negatives == "other_class" and len(sizes) == 1:
        raise ConfigError(
            f"all {sizes[smallest]} labelled training rows are of class {smallest}, so there are no negatives of "
            "another class; draw them from all others (negatives 'others'), or add a class"
        )
