"""Roots of means over the global batch: their gradient needs the sum of all ranks, once, as a number."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distkd.base import World
from distkd.comm.world import all_reduce_sum

__all__ = ["global_roots"]


def global_roots(sums: Mapping[str, tuple[Tensor, int]], world: World) -> dict[str, Tensor]:
    """Roots of means of squares over all ranks' values.

    A mean of each rank's own root would be another, smaller loss.

    Args:
        sums: by name, this rank's sum of squares, a scalar with a gradient, and of how many values, equal on all ranks.
        world: ranks that share the batch.

    Returns:
        By name the root, equal on all ranks. Averaged over ranks, as engines do, its gradient is that of one process
        with the whole batch; where the root is 0 the gradient is 0.

    Collectives: one all-reduce of a number for each name; none where there is no name.

    Source: card `inter-resolution-at-plus`, section 9.
    """
    if not sums:
        return {}
    local = [total for total, _ in sums.values()]
    totals = all_reduce_sum(torch.stack([total.detach() for total in local]), world)
    found: dict[str, Tensor] = {}
    for (name, (total, n)), over_ranks in zip(sums.items(), totals.unbind(), strict=True):
        n_global = n * world.size
        root = (over_ranks / n_global).sqrt()
        slope = torch.where(root > 0, world.size / (2 * n_global) / root, 0.0)
        found[name] = root + slope * (total - total.detach())
    return found
