"""Several tensors of equal length gathered in one collective, bit for bit."""

# torch leaves the types of some of its results out
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

# Shapes: B rows of this rank, G rows of all ranks in rank order

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from distkd.base import World
from distkd.comm.world import start_all_gather_rows

__all__ = ["Gathering", "all_gather_packed", "start_gather"]


class Gathering:
    """Rows that are on their way; `wait` gives those of all ranks."""

    def __init__(self, arrived: Callable[[], Tensor], names: Sequence[str], like: Sequence[Tensor], widths: list[int]):
        self._arrived = arrived
        self._like = dict(zip(names, like, strict=True))
        self._widths = widths
        self._found: dict[str, Tensor] | None = None

    def wait(self) -> dict[str, Tensor]:
        """All ranks' rows of each tensor, (G, ...), in rank order; no gradient. May be asked again."""
        if self._found is None:
            parts = self._arrived().split(self._widths, dim=1)
            self._found = {
                name: part.contiguous().view(like.dtype).view(-1, *like.shape[1:])
                for (name, like), part in zip(self._like.items(), parts, strict=True)
            }
        return self._found


def start_gather(tensors: Mapping[str, Tensor], world: World) -> Gathering:
    """Start one all-gather of the rows of several tensors, bit for bit; it runs beside what follows.

    Args:
        tensors: name to (B, ...), any dtypes, the same B, names and shapes on every rank.
        world: the ranks.

    Collectives: one all-gather of B x (bytes of a row of every tensor), whatever the number of tensors.
    """
    rows = [tensor.detach() for tensor in tensors.values()]
    columns = [tensor.contiguous().view(len(tensor), -1).view(torch.uint8) for tensor in rows]
    arrived = start_all_gather_rows(torch.cat(columns, dim=1) if len(columns) > 1 else columns[0], world)
    return Gathering(arrived, list(tensors), rows, [column.shape[1] for column in columns])


def all_gather_packed(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """`start_gather` and its `wait` in one."""
    return start_gather(tensors, world).wait()
