"""Replicated memory banks: one row per training sample, the same on every rank at every step.

Rows are read while the losses are computed and written once after the optimizer step, from one packed all-gather. The
buffers belong to a method's `state`, never to the wrapped module, so no engine broadcasts them.
"""

# Shapes: B samples of this rank, G of all ranks and passes of a step, D embedding, N rows, M kept columns

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distkd.base import World
from distkd.comm.packed import all_gather_packed
from distkd.comm.world import all_reduce_sum
from distkd.ops.contrastive import log_normaliser

__all__ = ["MemoryBank", "Normaliser", "write_gathered"]


class MemoryBank(nn.Module):
    """One embedding per training sample, addressed by its row."""

    rows_ND: Tensor

    def __init__(self, rows: int, dim: int, *, seed: int):
        super().__init__()
        bound = 1.0 / math.sqrt(dim / 3)  # rows of expected squared norm 1, as in the source; not normalised
        generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
        self.register_buffer("rows_ND", torch.empty(rows, dim).uniform_(-bound, bound, generator=generator))

    @torch.no_grad()
    def write(self, index_G: Tensor, embedding_GD: Tensor, *, momentum: float) -> None:
        """Blend embeddings into their rows and normalise them: row <- unit(momentum row + (1 - momentum) embedding).

        Every blend starts from the row as it was; of several embeddings for a row the last in order wins.

        Args:
            index_G: int64 rows, 0 <= index < N.
            embedding_GD: unit embeddings.
            momentum: share of the old row, 0 <= momentum < 1.
        """
        embedding_GD = embedding_GD.to(self.rows_ND.dtype)[last_of_equals(index_G)]
        blend_GD = momentum * self.rows_ND[index_G] + (1 - momentum) * embedding_GD
        # equal indices write equal values, so the order of the scatter does not matter
        self.rows_ND[index_G] = blend_GD / blend_GD.norm(dim=1, keepdim=True).clamp_min(1e-12)


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
        self._known = False  # host twin of `log_z`, so that no step asks the device

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.look()

    def look(self) -> None:
        """Notice that `log_z` was changed from outside; a host sync."""
        self._known = not math.isnan(self.log_z.item())

    @torch.no_grad()
    def __call__(self, score_BM: Tensor, rows: int, world: World) -> Tensor:
        """log Z for these scores, scalar in their dtype.

        Collectives: one all-reduce of two numbers at the first call, none later.
        """
        if not self._known:
            total = torch.stack([score_BM.double().exp().sum(), score_BM.new_tensor(score_BM.numel()).double()])
            total = all_reduce_sum(total, world)
            self.log_z.copy_(log_normaliser(total[0].log(), total[1], rows))
            self._known = True
        return self.log_z.to(score_BM.dtype)


def write_gathered(
    banks: Mapping[str, MemoryBank], rows: Mapping[str, Tensor], *, momentum: float, passes: int, world: World
) -> None:
    """Write the step's embeddings of all ranks into all banks, in the order of the global batch.

    Args:
        banks: name to bank.
        rows: bank name to (passes x B, D) embeddings of this rank, and `index` int64 (passes x B,).
        momentum: share of the old row.
        passes: forward passes in the step; pass is the slow index of the global batch, rank the fast one.
        world: the ranks.

    Collectives: one all-gather of index and embeddings together.
    """
    gathered = {name: _global_order(tensor, passes, world) for name, tensor in all_gather_packed(rows, world).items()}
    for name, bank in banks.items():
        bank.write(gathered["index"], gathered[name], momentum=momentum)


def _global_order(rank_major: Tensor, passes: int, world: World) -> Tensor:
    if passes == 1:
        return rank_major
    blocks = rank_major.view(world.size, passes, -1, *rank_major.shape[1:])
    return blocks.transpose(0, 1).reshape(rank_major.shape)
