"""Several tensors of equal length gathered in one collective, bit for bit."""

# torch leaves the types of some of its results out
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

# Shapes: B rows of this rank, G rows of all ranks in rank order

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distkd.base import World
from distkd.comm.world import all_gather_rows

__all__ = ["all_gather_packed"]


def all_gather_packed(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """All ranks' rows of each tensor, (G, ...), in rank order.

    Args:
        tensors: name to (B, ...), any dtypes, the same B, names and shapes on every rank.
        world: the ranks.

    Returns:
        The same names; no gradient.

    Collectives: one all-gather of B x (bytes of a row of every tensor), whatever the number of tensors.
    """
    if world.size == 1:
        return {name: tensor.detach() for name, tensor in tensors.items()}
    columns = [
        tensor.detach().contiguous().flatten(1) if tensor.dim() > 1 else tensor[:, None] for tensor in tensors.values()
    ]
    as_bytes = [column.contiguous().view(torch.uint8) for column in columns]
    gathered = all_gather_rows(torch.cat(as_bytes, dim=1), world)
    widths = [part.shape[1] for part in as_bytes]
    parts = gathered.split(widths, dim=1)
    return {
        name: part.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }
