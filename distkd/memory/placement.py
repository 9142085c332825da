"""Where the rows of a bank lie, and what that means for whoever is compared with them.

Replicated: every rank scores its own anchors against all rows. Sharded: row n lies on rank n mod W; every rank scores
the anchors of all ranks against its own rows, and losses and gradients, which are sums over rows, come home in one
reduce-scatter. The results are the same up to the order of sums, so a method does not care.
"""

# Shapes: A anchors that this rank scores, B its own, G of all ranks, J columns, M columns with a row on this rank

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distkd.base import World
from distkd.comm.packed import Gathering, start_gather
from distkd.comm.world import all_reduce_sum, reduce_scatter_rows
from distkd.ops.rows import assert_async

__all__ = ["Columns", "Placement", "Replicated", "Sharded", "capacity"]


@dataclass(frozen=True, slots=True)
class Columns:
    """The rows that an anchor is compared with, as far as they are here."""

    place_AM: Tensor
    """int64 places in the bank of this rank."""
    n_columns: int
    """How many of the columns, the first ones, are positives."""
    offset_AM: Tensor | None = None
    """Added to the scores; infinite where a column does not count."""
    column_AM: Tensor | None = None
    """Which of all columns each one is; None where it is all of them in order."""


class Placement(Protocol):
    """One of the two ways to lay out rows."""

    part: int
    parts: int

    def meet(self, own: Mapping[str, Tensor], key_B: Tensor, world: World) -> tuple[Gathering, Mapping[str, Tensor]]:
        """What the banks are written with after the step, on its way, and the anchors that this rank scores.

        Args:
            own: `index` (B,) and embeddings (B, D) by name; no gradient is wanted.
            key_B: int64 key of each anchor's draws.
            world: the ranks.

        Returns:
            The gather of `own`; and by name, `key` included, (A, ...).
        """
        ...

    def columns(self, index_AM: Tensor, n_columns: int, drawn: tuple[int, int]) -> Columns:
        """Those of the rows that are here; `drawn` positives and negatives is what they were chosen from."""
        ...

    def assemble(self, value_AM: Tensor, columns: Columns, index_AJ: Tensor) -> Tensor:
        """(A, J) of values that were found where the rows lie."""
        ...

    def home(self, sum_AX: Tensor) -> Tensor:
        """(B, X): sums over all rows, for this rank's anchors, from the sums over the rows that are here."""
        ...


class Replicated:
    """All rows on every rank. No collective."""

    part, parts = 0, 1

    def meet(self, own: Mapping[str, Tensor], key_B: Tensor, world: World) -> tuple[Gathering, Mapping[str, Tensor]]:
        """Collectives: one all-gather, which nobody waits for before the step is over."""
        own = {name: tensor.detach() for name, tensor in own.items()}
        return start_gather(own, world), {**own, "key": key_B}

    def columns(self, index_AM: Tensor, n_columns: int, drawn: tuple[int, int]) -> Columns:
        return Columns(index_AM, n_columns)

    def assemble(self, value_AM: Tensor, columns: Columns, index_AJ: Tensor) -> Tensor:
        return value_AM

    def home(self, sum_AX: Tensor) -> Tensor:
        return sum_AX


class Sharded:
    """Row n on rank n mod W.

    Args:
        world: the ranks.
        share_positive, share_negative: the largest share of any anchor's pool of positives, or of negatives, that lies
            on one rank: about 1 / W unless rows are numbered by class. They bound how many columns are set aside.
    """

    def __init__(self, world: World, share_positive: float, share_negative: float):
        self.world = world
        self.part, self.parts = world.rank, world.size
        self.shares = (share_positive, share_negative)

    def meet(self, own: Mapping[str, Tensor], key_B: Tensor, world: World) -> tuple[Gathering, Mapping[str, Tensor]]:
        """Collectives: one all-gather, waited for: its anchors are scored here."""
        arriving = start_gather({**own, "key": key_B}, world)
        return arriving, arriving.wait()

    def columns(self, index_AM: Tensor, n_columns: int, drawn: tuple[int, int]) -> Columns:
        rooms = [capacity(share, n) for share, n in zip(self.shares, drawn, strict=True)]
        positive = self._here(index_AM[:, :n_columns], rooms[0], math.inf)
        negative = self._here(index_AM[:, n_columns:], rooms[1], -math.inf)
        place, offset, column = (torch.cat(pair, dim=1) for pair in zip(positive, negative, strict=True))
        width = positive[0].shape[1]
        column[:, width:] += n_columns
        return Columns(place, width, offset, column)

    def _here(self, index_AJ: Tensor, room: int, absent: float) -> tuple[Tensor, Tensor, Tensor]:
        """Places, offsets and column numbers of the rows that lie on this rank, those that do first; no host sync."""
        room = min(room, index_AJ.shape[1])
        place_AJ = index_AJ.div(self.parts, rounding_mode="floor")
        here_AJ = (index_AJ - place_AJ * self.parts) == self.part
        count_A1 = here_AJ.sum(dim=1, keepdim=True)
        assert_async((count_A1 <= room).all(), "more rows of an anchor lie on one rank than were set aside")
        order_AJ = here_AJ.cumsum(dim=1) - 1
        # whoever lies elsewhere meets in one place more, which is cut off
        column_J = torch.arange(index_AJ.shape[1], device=index_AJ.device)
        column_AM = index_AJ.new_zeros(len(index_AJ), room + 1)
        column_AM.scatter_(1, torch.where(here_AJ, order_AJ, room), column_J.expand_as(index_AJ))
        column_AM = column_AM[:, :room]
        counts_AM = torch.arange(room, device=index_AJ.device) < count_A1
        offset_AM = torch.zeros(counts_AM.shape, device=index_AJ.device).masked_fill_(~counts_AM, absent)
        place_AM = torch.where(counts_AM, place_AJ.gather(1, column_AM), 0)
        return place_AM, offset_AM, column_AM

    def assemble(self, value_AM: Tensor, columns: Columns, index_AJ: Tensor) -> Tensor:
        """Collectives: one all-reduce of A x J values."""
        assert columns.column_AM is not None
        assert columns.offset_AM is not None
        found_AM = torch.where(torch.isfinite(columns.offset_AM), value_AM, 0)
        value_AJ = value_AM.new_zeros(index_AJ.shape).scatter_add_(1, columns.column_AM, found_AM)
        return all_reduce_sum(value_AJ, self.world)

    def home(self, sum_AX: Tensor) -> Tensor:
        """Collectives: one reduce-scatter of A x X values."""
        return reduce_scatter_rows(sum_AX, self.world)


def capacity(share: float, n: int) -> int:
    """Columns to set aside for a share of `n` draws: exceeded less often than once in 10^15 anchors."""
    return min(n, math.ceil(share * n + 10 * math.sqrt(share * n) + 16))
