"""A cheap guard of law 1: banks that are replicated must hold the same rows on every rank."""

# Shapes: K banks, R ranks, L rows of a chunk

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distkd.base import World
from distkd.comm.world import all_gather_rows
from distkd.errors import DivergedError
from distkd.memory.bank import MemoryBank, row_digests
from distkd.ops.rows import slices

__all__ = ["check_banks"]

_CHUNK = 1 << 16


def check_banks(banks: Mapping[str, MemoryBank], step: int, world: World) -> None:
    """Compare what the ranks have written so far, and find the row if they differ.

    Costs 8 bytes for each bank and one host sync; only after a mismatch are the rows themselves gone through.

    Args:
        banks: name to bank; those whose rows are sharded have no replicas to compare.
        step: steps that were taken, for the message.
        world: the ranks.

    Raises:
        DivergedError: on all ranks, naming bank, rank and row.

    Collectives: one all-gather; more of them on the way to an error.
    """
    replicated = {name: bank for name, bank in banks.items() if bank.parts == 1}
    if world.size == 1 or not replicated:
        return
    mark_RK = all_gather_rows(torch.stack([bank.mark for bank in replicated.values()])[None], world)
    different = (mark_RK != mark_RK[0]).any(dim=0).tolist()
    for (name, bank), differs in zip(replicated.items(), different, strict=True):
        if differs:
            raise DivergedError(
                f"{_where(name, bank, world)} after step {step}; the last checkpoint is from before or tells the same: "
                "start again to resume, and look for code that differs by rank or for failing hardware"
            )


def _where(name: str, bank: MemoryBank, world: World) -> str:
    for chunk in slices(bank.n_rows, _CHUNK):
        digest_RL = all_gather_rows(row_digests(bank, chunk)[None], world)
        found = _first(digest_RL != digest_RL[0])
        if found is not None:
            rank, place = found
            return f"rank {rank} holds another row {chunk.start + place} of bank {name!r} than rank 0"
    return f"the ranks have written different rows into bank {name!r}, which were overwritten since,"


def _first(differs_RL: Tensor) -> tuple[int, int] | None:
    places = differs_RL.nonzero()
    if not len(places):
        return None
    rank, place = places[places[:, 1].argmin()].tolist()
    return rank, place
