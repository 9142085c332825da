"""Memory banks in checkpoints: whole under their name, or a part for each rank that held one.

Row n of a bank that was sharded over W ranks is row n // W of part n mod W, so any layout can be read into any other.
"""

# Shapes: D embedding, L rows of a part, C rows of a chunk

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from distkd.engines import Entry
from distkd.errors import CheckpointError
from distkd.memory.bank import MemoryBank

__all__ = ["bank_rows", "fill_rows", "is_part", "part_name", "rows_entry"]

_PART = re.compile(r"/part-(\d{5})-of-(\d{5})$")
_CHUNK = 1 << 16
"""Rows that are read at a time."""


def bank_rows(state: nn.Module) -> dict[str, MemoryBank]:
    """Banks by the name that their rows have in the state dict."""
    found = {name: module for name, module in state.named_modules() if isinstance(module, MemoryBank)}
    return {f"{name}.rows_ND" if name else "rows_ND": bank for name, bank in found.items()}


def part_name(name: str, bank: MemoryBank) -> str:
    """The name of this rank's rows in a checkpoint."""
    return name if bank.parts == 1 else f"{name}/part-{bank.part:05d}-of-{bank.parts:05d}"


def is_part(name: str) -> bool:
    return _PART.search(name) is not None


def rows_entry(name: str, bank: MemoryBank) -> Entry:
    """This rank's rows as a part of a checkpoint: they change after the update and until the next one."""
    rows_LD = bank.rows_ND
    return Entry(part_name(name, bank), rows_LD.nbytes, lambda: rows_LD, steady=True, local=bank.parts > 1)


def fill_rows(
    bank: MemoryBank, name: str, names: Iterator[str] | list[str], read: Callable[[str, slice], Tensor]
) -> None:
    """Put the rows of a checkpoint into a bank, whichever way either is laid out.

    Args:
        bank: its rows are replaced.
        name: of the rows when they are whole.
        names: all names of the checkpoint.
        read: some rows of a tensor by its name.

    Raises:
        CheckpointError: rows are missing, or there are more or fewer of them than the bank has.
    """
    sources = _sources(name, names)
    if not sources:
        raise CheckpointError(f"the checkpoint has no rows {name!r}")
    filled = 0
    for source, (part, parts) in sources.items():
        if parts == bank.parts and part != bank.part:
            continue
        filled += _fill_from(bank, source, part, parts, read)
    if filled != len(bank.rows_ND):
        raise CheckpointError(
            f"the checkpoint has {filled} of the {len(bank.rows_ND)} rows of {name!r} that belong to this rank: it was "
            "written for another number of training samples, or a part of it is missing"
        )


def _sources(name: str, names: Iterator[str] | list[str]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for candidate in names:
        if candidate == name:
            found[candidate] = (0, 1)
        elif (match := _PART.search(candidate)) and candidate[: match.start()] == name:
            found[candidate] = (int(match[1]), int(match[2]))
    return found


def _fill_from(bank: MemoryBank, source: str, part: int, parts: int, read: Callable[[str, slice], Tensor]) -> int:
    filled = first = 0
    while len(rows_CD := read(source, slice(first, first + _CHUNK))):
        if rows_CD.shape[1:] != bank.rows_ND.shape[1:]:
            raise CheckpointError(
                f"rows {source!r} have width {rows_CD.shape[1]}, the bank has {bank.rows_ND.shape[1]}"
            )
        row_C = part + parts * torch.arange(first, first + len(rows_CD))
        mine_C = row_C % bank.parts == bank.part
        if row_C[-1] >= bank.n_rows:
            raise CheckpointError(f"rows {source!r} are more than the {bank.n_rows} training samples of this run")
        place_C = row_C[mine_C].div(bank.parts, rounding_mode="floor").to(bank.rows_ND.device)
        bank.rows_ND[place_C] = rows_CD[mine_C].to(bank.rows_ND)
        filled += len(place_C)
        first += len(rows_CD)
    return filled
