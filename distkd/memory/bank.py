"""Memory banks: one row per training sample, read while the losses are computed, written once after the step.

A bank is whole on every rank, the same everywhere at every step, or sharded: row n on rank n mod W. Either way
it belongs to a method's `state`, never to the wrapped module, so no engine broadcasts it.
"""

# Shapes: G samples of all ranks and passes of a step, D embedding, N rows of the bank, L rows that are here

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distkd.base import World
from distkd.comm.world import all_reduce_sum
from distkd.errors import ShapeError
from distkd.memory.memory import Memory
from distkd.ops.contrastive import log_normaliser
from distkd.ops.draws import fold_in, integer_key, mix
from distkd.ops.rows import check_index, slices

__all__ = ["MemoryBank", "Normaliser", "initial_rows", "last_of_equals", "row_digests"]

_CHUNK = 1 << 13
"""Rows at a time, where all of a bank is gone through."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class MemoryBank(Memory):
    """One embedding per training sample, addressed by its row.

    Args:
        n_rows: N.
        dim: D.
        seed: of the rows before their first update; a row's start does not depend on where it lies.
        dtype: of the rows; None follows the module, as any buffer does. Sums are never taken in half precision.
        part, parts: this holds the rows n with n mod parts = part.
    """

    rows_ND: Tensor
    norm_N: Tensor
    """Norms of the rows: not 1 before their first update, and rounded where rows are half-precision."""
    written_N: Tensor
    """int32, the write that each row was last part of, counted from 1; 0 before its first."""
    writes: Tensor
    """int32 scalar, writes so far: one a step that was applied, whatever the passes; also where no row is here."""
    mark: Tensor
    """int64; equal on two ranks that wrote the same bits into the same rows; not kept where rows are sharded."""
    odd_D: Tensor
    """int64 factors of a row's digest."""

    def __init__(
        self, n_rows: int, dim: int, *, seed: int, dtype: torch.dtype | None = None, part: int = 0, parts: int = 1
    ):
        super().__init__()
        self.n_rows, self.part, self.parts = n_rows, part, parts
        self._dtype = dtype
        mine = torch.arange(min(part, n_rows), n_rows, parts)
        rows_LD = torch.empty(len(mine), dim, dtype=dtype)
        for chunk in slices(len(mine), _CHUNK):
            rows_LD[chunk] = initial_rows(mine[chunk], dim, seed=seed)
        self.register_buffer("rows_ND", rows_LD)
        self.register_buffer("norm_N", _norms(rows_LD), persistent=False)
        self.register_buffer("written_N", torch.zeros(len(mine), dtype=torch.int32))
        self.register_buffer("writes", torch.zeros((), dtype=torch.int32))
        self.register_buffer("mark", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("odd_D", mix(torch.arange(dim)) | 1, persistent=False)

    @torch.no_grad()
    def write(self, index_G: Tensor, embedding_GD: Tensor, *, momentum: float, last_G: Tensor | None = None) -> None:
        """Blend embeddings into their rows and normalise them: row <- unit(momentum row + (1 - momentum) embedding).

        Every blend starts from the row as it was; of several embeddings for a row the last in order wins. An embedding
        of zeros leaves the direction of its row as it is. No host sync.

        Args:
            index_G: int64 rows, 0 <= index < N, of all ranks; rows that lie elsewhere are passed over.
            embedding_GD: unit embeddings.
            momentum: share of the old row, 0 <= momentum < 1.
            last_G: `last_of_equals(index_G)`, for banks that are written together.

        Raises:
            ShapeError: another width than the bank's, or an index without a row.
        """
        if embedding_GD.shape[1:] != self.rows_ND.shape[1:]:
            raise ShapeError(f"embeddings have width {embedding_GD.shape[1]}, the bank has {self.rows_ND.shape[1]}")
        check_index(index_G, self.n_rows, "the write of a memory bank")
        self.writes.add_(1)
        if not len(self.rows_ND):
            return
        embedding_GD = embedding_GD[last_of_equals(index_G) if last_G is None else last_G]
        if self.parts == 1:
            row_GD = self._blend(index_G, embedding_GD, momentum)
            self.mark += _digests(index_G, row_GD, self.odd_D).sum()
            self._put(index_G, row_GD, self.writes)
            return
        place_G = index_G.div(self.parts, rounding_mode="floor")
        mine_G = (index_G - place_G * self.parts) == self.part
        place_G = torch.where(mine_G, place_G, 0)
        row_GD = self._blend(place_G, embedding_GD, momentum)
        self._put(*self._instead(mine_G, place_G, row_GD))

    def _blend(self, place_G: Tensor, embedding_GD: Tensor, momentum: float) -> Tensor:
        wide = torch.promote_types(self.rows_ND.dtype, torch.float32)
        old_GD = self.rows_ND.index_select(0, place_G).to(wide)
        blend_GD = momentum * old_GD + (1 - momentum) * embedding_GD.to(wide)
        return (blend_GD / blend_GD.norm(dim=1, keepdim=True).clamp_min(1e-12)).to(self.rows_ND.dtype)

    def _put(self, place_G: Tensor, row_GD: Tensor, written: Tensor) -> None:
        # equal indices write equal values, so the order of the scatter does not matter
        self.rows_ND[place_G] = row_GD
        self.norm_N[place_G] = row_GD.to(self.norm_N.dtype).norm(dim=1)
        self.written_N[place_G] = written

    def _instead(self, mine_G: Tensor, place_G: Tensor, row_GD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whoever lies elsewhere writes what a sample of this rank writes, or what is there already, once more."""
        # a dimension is kept: an index without one is read by the host
        first = mine_G.to(torch.uint8).argmax(dim=0, keepdim=True)
        any_mine = mine_G.any()
        place = torch.where(any_mine, place_G[first], 0)
        row_1D = torch.where(any_mine, row_GD[first], self.rows_ND[:1])
        written = torch.where(any_mine, self.writes, self.written_N[0])
        return torch.where(mine_G, place_G, place), torch.where(mine_G[:, None], row_GD, row_1D), written

    def refresh(self) -> None:
        """Follow rows that were changed from outside."""
        self.norm_N.copy_(_norms(self.rows_ND))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}rows_ND" in state_dict:
            # older checkpoints do not tell how old their rows are: as if all had been written at the restart
            state_dict.setdefault(f"{prefix}written_N", torch.ones_like(self.written_N))
            state_dict.setdefault(f"{prefix}writes", torch.ones_like(self.writes))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryBank:
        if self._dtype is None:
            before = self.rows_ND.dtype
            super()._apply(fn, recurse)
            if self.rows_ND.dtype != before:
                self.refresh()  # norms are those of the rows in their own type, as a resumed run finds them
            return self
        # a module is cast as a whole; rows of a chosen type are only moved
        rows_ND = self.rows_ND
        self.rows_ND = rows_ND.new_empty(0)
        super()._apply(fn, recurse)
        self.rows_ND = rows_ND.to(self.rows_ND.device)
        return self


def initial_rows(row_L: Tensor, dim: int, *, seed: int) -> Tensor:
    """Rows before their first update: uniform with expected squared norm 1, not normalised.

    Args:
        row_L: int64 numbers of the rows.
        dim: D.
        seed: of the bank.

    Returns:
        float32 (L, D), a function of (seed, row) only, in steps of 2^-15 of the bound sqrt(3 / D).

    Source: card `crd`, section 2.
    """
    word = torch.arange(-(-dim // 4), device=row_L.device)
    key_L = fold_in(torch.full((), integer_key(seed), device=row_L.device), row_L)
    draws_LD = fold_in(key_L[:, None], word).view(torch.int16)[:, :dim]
    return draws_LD.float().add_(0.5).mul_(math.sqrt(3 / dim) / 2**15)


def row_digests(bank: MemoryBank, chunk: slice) -> Tensor:
    """int64 of every row in a part of a bank that is whole: equal where the rows are equal bit by bit."""
    rows_LD = bank.rows_ND[chunk]
    index_L = torch.arange(chunk.start, chunk.start + len(rows_LD), device=rows_LD.device)
    return _digests(index_L, rows_LD, bank.odd_D)


def _digests(index_L: Tensor, rows_LD: Tensor, odd_D: Tensor) -> Tensor:
    bits_LD = rows_LD.view(_BITS[rows_LD.element_size()]).to(torch.int64)
    return fold_in((bits_LD * odd_D).sum(dim=1), index_L)


def _norms(rows_LD: Tensor) -> Tensor:
    norm_L = rows_LD.new_empty(len(rows_LD), dtype=torch.promote_types(rows_LD.dtype, torch.float32))
    for chunk in slices(len(rows_LD), _CHUNK):
        norm_L[chunk] = rows_LD[chunk].to(norm_L.dtype).norm(dim=1)
    return norm_L


def last_of_equals(index_G: Tensor) -> Tensor:
    """For each position the last position that holds the same index; O(G log G), no host sync."""
    n = index_G.shape[0]
    order = index_G.argsort(stable=True)
    ordered = index_G[order]
    place = torch.arange(n, device=index_G.device)
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    following = torch.where(is_last, place, n).flip(0).cummin(dim=0).values.flip(0)
    return torch.empty_like(order).scatter_(0, order, order[following])


class Normaliser(nn.Module):
    """The constant Z of noise contrast: measured over all ranks at the first step, frozen ever after."""

    log_z: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_z", torch.full((), math.nan, dtype=torch.float64))
        self.known = False
        """Host twin of `log_z`, so that no step asks the device."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.look()

    def look(self) -> None:
        """Notice that `log_z` was changed from outside; a host sync."""
        self.known = not math.isnan(self.log_z.item())

    @torch.no_grad()
    def measure(self, score_BM: Tensor, n_rows: int, world: World) -> None:
        """Fix Z by these scores; those that are infinite do not count.

        Collectives: one all-reduce of two numbers.
        """
        counts_BM = torch.isfinite(score_BM)
        exponential_BM = torch.where(counts_BM, score_BM.double(), -math.inf).exp()
        total = all_reduce_sum(torch.stack([exponential_BM.sum(), counts_BM.sum().double()]), world)
        self.log_z.copy_(log_normaliser(total[0].log(), total[1], n_rows))
        self.known = True
