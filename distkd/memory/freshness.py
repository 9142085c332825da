"""How old the rows of memories are and how far they drifted: numbers for a logging step, from what is kept anyway.

Each rank gives scalars on its device whose mean over ranks is that of the whole bank, replicated or sharded alike.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distkd.memory.bank import MemoryBank
from distkd.memory.queue import Queue

__all__ = ["freshness", "settle"]

_AGE, _WRITTEN, _UNWRITTEN, _STALENESS = "age_steps", "written_ratio", "unwritten_ratio", "staleness_steps"
_CHUNK = 1 << 16
"""Norms at a time."""


@torch.no_grad()
def freshness(state: nn.Module, *, global_batch: int) -> dict[str, Tensor]:
    """Age and drift of every bank and queue of a method, to be averaged over ranks and then given to `settle`.

    A bank is named by its path in `state` without the first part (`teacher.student`), which is the same for all of
    them, or as a whole where it has one part only (`queue`) or two would share a name.

    Args:
        state: of the method.
        global_batch: keys that a queue is given at each step.

    Returns:
        float64 scalars on the device of the rows. `bank/<bank>/unwritten_ratio`, share of the rows that still are what
        the bank began with; `bank/<bank>/norm_drift`, mean distance of the rows' norms from 1, of banks only; and what
        `settle` makes `bank/<bank>/staleness_steps` of. Collectives: none, no host sync.
    """
    found: dict[str, Tensor] = {}
    for bank, memory in _named(state).items():
        values = _of_bank(memory) if isinstance(memory, MemoryBank) else _of_queue(memory, global_batch)
        found |= {f"bank/{bank}/{name}": value for name, value in values.items()}
    return found


def settle(means: Mapping[str, float]) -> dict[str, float]:
    """Means over ranks with `staleness_steps`, the mean age in steps of the rows that were written at least once.

    It is left out of a bank without such rows. A quotient of two means, since ranks may hold different numbers of them.

    Args:
        means: of `freshness`, under its names or with a prefix; what else is there is passed on.
    """
    settled: dict[str, float] = {}
    for name, mean in means.items():
        if not name.endswith((_AGE, _WRITTEN)):  # most of them
            settled[name] = mean
            continue
        bank, _, what = name.rpartition("/")
        if what == _AGE and f"{bank}/{_WRITTEN}" in means:
            written = means[f"{bank}/{_WRITTEN}"]
            if written:
                settled[f"{bank}/{_STALENESS}"] = mean / written
        elif not (what == _WRITTEN and f"{bank}/{_AGE}" in means):
            settled[name] = mean
    return settled


def _named(state: nn.Module) -> dict[str, MemoryBank | Queue]:
    memories = {name: m for name, m in state.named_modules() if isinstance(m, MemoryBank | Queue)}
    short = {name: name.partition(".")[2] or name for name in memories}
    if len(set(short.values())) < len(short):
        return memories
    return {short[name]: memory for name, memory in memories.items()}


def _of_bank(bank: MemoryBank) -> dict[str, Tensor]:
    written = bank.written_N.count_nonzero()
    # in pieces that fit a cache; float32 is accurate within one of them
    drift = torch.stack([(norm_L - 1).abs_().sum() for norm_L in bank.norm_N.split(_CHUNK)]).sum(dtype=torch.float64)
    sums = {
        _AGE: written * bank.writes - bank.written_N.sum(),  # rows that never were add nothing to either
        _WRITTEN: written,
        _UNWRITTEN: len(bank.written_N) - written,
        "norm_drift": drift,
    }
    # A rank has every `parts`-th row: that many times its sums, over all rows, average to what the whole bank has,
    # also where ranks have different numbers of rows, or none
    return _over(sums, bank.n_rows, bank.parts)


def _of_queue(queue: Queue, global_batch: int) -> dict[str, Tensor]:
    """The rows are the last keys in a row, so their ages follow from how many there are."""
    length, filled = len(queue.rows_QD), queue.filled()
    whole = filled // global_batch  # steps all of whose keys are still here
    age = global_batch * whole * (whole - 1) // 2 + (filled - global_batch * whole) * whole
    return _over({_AGE: age, _WRITTEN: filled, _UNWRITTEN: length - filled}, length, 1)


def _over(sums: dict[str, Tensor], n_rows: int, parts: int) -> dict[str, Tensor]:
    shares = torch.stack(list(sums.values())).double() * parts / n_rows
    return dict(zip(sums, shares.unbind(), strict=True))
