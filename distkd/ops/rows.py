"""Products of anchors with chosen rows of a bank, and sums of those rows weighted by them, without autograd.

Two forms give the same numbers up to the order of sums. *Dense* multiplies the anchors with the whole bank, which is
read once and in order, and picks; *gathered* reads the chosen rows, a tile at a time that stays in the cache. The size
decides (`docs/decisions/0009-banks.md` has the measured crossover). Neither keeps anything for a backward.
"""

# torch leaves the types of some of its results out
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

# Shapes: B anchors, S sets of them, D embedding, N rows of the bank, J chosen rows of each anchor, t anchors of a tile

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distkd.errors import ShapeError

__all__ = ["Weigh", "assert_async", "check_index", "is_dense", "products", "scan", "slices", "weighted_sum"]

Weigh = Callable[[Tensor, slice], Tensor]
"""From the products (t, J) of the anchors in a slice to the weights (t, J) of their rows."""

DENSE_WASTE, DENSE_WASTE_CACHED = 7, 16
"""Dense wins while it computes at most this many times more products than are asked for; the second number is for banks
of at most `_CACHED_BYTES`, which stay in a cache from one product to the next."""
_CACHED_BYTES = 1 << 22
_PLANE = 1 << 24
"""Numbers of a (t, N) plane of dense products at a time."""
_TILE_BYTES = 1 << 28
"""Rows that a device gathers at a time; a CPU takes one anchor, whose rows stay in its cache."""
_CHUNK_ROWS = 1 << 14
"""Rows of a half-precision bank that are widened at a time."""


def is_dense(rows_ND: Tensor, n_columns: int) -> bool:
    """Whether the whole bank is multiplied for this many chosen rows of each anchor."""
    waste = DENSE_WASTE_CACHED if rows_ND.nbytes <= _CACHED_BYTES else DENSE_WASTE
    return rows_ND.shape[0] <= waste * n_columns


def assert_async(condition: Tensor, message: str) -> None:
    """Stop if a bool scalar is false: at once on a CPU, on CUDA when the device comes to it. No host sync.

    Raises:
        RuntimeError: with the message.
    """
    torch._assert_async(condition, message)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def check_index(index: Tensor, n_rows: int, what: str) -> None:
    """Stop before rows outside of a bank are touched; no host sync on a device, where the assertion is asynchronous.

    Raises:
        ShapeError: an index is negative or not below `n_rows`; on CUDA a device-side assertion instead.
    """
    inside = ((index >= 0) & (index < n_rows)).all()
    try:
        assert_async(inside, f"{what} has an index outside of 0 to {n_rows - 1}")
    except RuntimeError as error:
        wrong = index[(index < 0) | (index >= n_rows)].flatten()[0].item()
        raise ShapeError(
            f"{what} has index {wrong}, rows are 0 to {n_rows - 1}: only samples of the training split have a row"
        ) from error


def products(anchors: Sequence[Tensor], rows_ND: Tensor, index_BJ: Tensor) -> list[Tensor]:
    """Inner products of anchors with the rows that belong to each of them.

    Args:
        anchors: sets of embeddings (B, D) that share their rows, which are read once for all sets.
        rows_ND: the bank, of any floating-point type; sums are taken in the type of the anchors.
        index_BJ: int64 rows of each anchor, 0 <= index < N.

    Returns:
        (B, J) for every set, in the type of the anchors. No gradient, no collective.

    Raises:
        ShapeError: D of anchors and bank differ.
    """
    anchor_BSD = torch.stack(list(anchors), dim=1)
    _check_width(anchor_BSD, rows_ND)
    found: list[Tensor] = []
    if is_dense(rows_ND, index_BJ.shape[1]):
        for t in _planes(index_BJ, rows_ND):
            found += [_times(anchor_BD[t], rows_ND).gather(1, index_BJ[t]) for anchor_BD in anchors]
        per_set = [found[number :: len(anchors)] for number in range(len(anchors))]
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in per_set]
    product_BSJ = anchor_BSD.new_empty(*anchor_BSD.shape[:2], index_BJ.shape[1])
    if _on_cpu(rows_ND):
        rows = _one_by_one(rows_ND, index_BJ, anchor_BSD.dtype)
        for anchor_SD, rows_JD, product_SJ in zip(anchor_BSD.unbind(), rows, product_BSJ.unbind(), strict=True):
            torch.mm(anchor_SD, rows_JD.T, out=product_SJ)
    else:
        for t, rows_tJD in _tiles(rows_ND, index_BJ, anchor_BSD.dtype):
            torch.bmm(anchor_BSD[t], rows_tJD.transpose(1, 2), out=product_BSJ[t])
    return list(product_BSJ.unbind(dim=1))


def scan(anchor_BD: Tensor, rows_ND: Tensor, index_BJ: Tensor, weigh: Weigh) -> Tensor:
    """Sum of each anchor's rows, weighted by a function of their products with it, in one pass over the rows.

    Args:
        anchor_BD, rows_ND, index_BJ: as for `products`.
        weigh: called once for every part of the anchors; such as the derivative of a loss by each product.

    Returns:
        (B, D). No gradient, no collective.

    Raises:
        ShapeError: D of anchors and bank differ.
    """
    _check_width(anchor_BD, rows_ND)
    sum_BD = torch.empty_like(anchor_BD)
    if is_dense(rows_ND, index_BJ.shape[1]):
        for t in _planes(index_BJ, rows_ND):
            weight_tJ = weigh(_times(anchor_BD[t], rows_ND).gather(1, index_BJ[t]), t)
            sum_BD[t] = _dense_sum(weight_tJ, rows_ND, index_BJ[t])
        return sum_BD
    if _on_cpu(rows_ND):
        for number, rows_JD in enumerate(_one_by_one(rows_ND, index_BJ, anchor_BD.dtype)):
            t = slice(number, number + 1)
            torch.mm(weigh(anchor_BD[t] @ rows_JD.T, t), rows_JD, out=sum_BD[t])
        return sum_BD
    for t, rows_tJD in _tiles(rows_ND, index_BJ, anchor_BD.dtype):
        weight_tJ = weigh(torch.bmm(rows_tJD, anchor_BD[t, :, None])[..., 0], t)
        sum_BD[t] = torch.bmm(weight_tJ[:, None], rows_tJD)[:, 0]
    return sum_BD


def weighted_sum(weight_BJ: Tensor, rows_ND: Tensor, index_BJ: Tensor) -> Tensor:
    """Sum of each anchor's rows with known weights, (B, D) in the type of the weights; no gradient, no collective."""
    if is_dense(rows_ND, index_BJ.shape[1]):
        return torch.cat([_dense_sum(weight_BJ[t], rows_ND, index_BJ[t]) for t in _planes(index_BJ, rows_ND)])
    if rows_ND.dtype == weight_BJ.dtype:
        return F.embedding_bag(index_BJ, rows_ND, mode="sum", per_sample_weights=weight_BJ)
    if _on_cpu(rows_ND):
        rows = _one_by_one(rows_ND, index_BJ, weight_BJ.dtype)
        return torch.cat([weight_1J @ rows_JD for weight_1J, rows_JD in zip(weight_BJ[:, None], rows, strict=True)])
    tiles = _tiles(rows_ND, index_BJ, weight_BJ.dtype)
    return torch.cat([torch.bmm(weight_BJ[t, None], rows_tJD)[:, 0] for t, rows_tJD in tiles])


def _on_cpu(rows_ND: Tensor) -> bool:
    return rows_ND.device.type == "cpu"


def _check_width(anchor: Tensor, rows_ND: Tensor) -> None:
    if anchor.shape[-1] != rows_ND.shape[1]:
        raise ShapeError(f"anchors have width {anchor.shape[-1]}, the bank has width {rows_ND.shape[1]}")


def _planes(index_BJ: Tensor, rows_ND: Tensor) -> Iterator[slice]:
    return slices(len(index_BJ), _PLANE // max(1, rows_ND.shape[0]))


def slices(n: int, step: int) -> Iterator[slice]:
    """0 to n in parts of `step`, of 1 at least; the last part may be smaller."""
    step = max(1, step)
    return (slice(first, min(first + step, n)) for first in range(0, n, step))


def _chunks(rows_ND: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The bank in `dtype`: as it is where that is its type, else a chunk of rows at a time."""
    if rows_ND.dtype == dtype:
        yield slice(0, rows_ND.shape[0]), rows_ND
        return
    for chunk in slices(rows_ND.shape[0], _CHUNK_ROWS):
        yield chunk, rows_ND[chunk].to(dtype)


def _times(anchor_tD: Tensor, rows_ND: Tensor) -> Tensor:
    found = [anchor_tD @ rows.T for _, rows in _chunks(rows_ND, anchor_tD.dtype)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _dense_sum(weight_tJ: Tensor, rows_ND: Tensor, index_tJ: Tensor) -> Tensor:
    weight_tN = weight_tJ.new_zeros(len(weight_tJ), rows_ND.shape[0]).scatter_add_(1, index_tJ, weight_tJ)
    found = [weight_tN[:, chunk] @ rows for chunk, rows in _chunks(rows_ND, weight_tJ.dtype)]
    return found[0] if len(found) == 1 else torch.stack(found).sum(dim=0)


def _one_by_one(rows_ND: Tensor, index_BJ: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The chosen rows (J, D) of one anchor after the other: on a CPU they stay in a cache, and for a single anchor a
    product of matrices is several times faster than a batched one."""
    if rows_ND.dtype != torch.float32:
        yield from (rows_ND.index_select(0, index_J).to(dtype) for index_J in index_BJ.unbind())
        return
    # bags of one row: unlike `index_select` this asks for the next rows ahead
    each_J = torch.arange(index_BJ.shape[1])
    for index_J in index_BJ.unbind():
        rows_JD: Tensor = torch.embedding_bag(rows_ND, index_J, each_J)[0]
        yield rows_JD.to(dtype)


def _tiles(rows_ND: Tensor, index_BJ: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The chosen rows (t, J, D) of as many anchors at a time as may be gathered."""
    row_bytes = max(1, index_BJ.shape[1] * rows_ND.shape[1] * rows_ND.element_size())
    for t in slices(len(index_BJ), _TILE_BYTES // row_bytes):
        yield t, rows_ND.index_select(0, index_BJ[t].flatten()).to(dtype).view(t.stop - t.start, -1, rows_ND.shape[1])
