"""Noise contrast on CUDA in one kernel: scores, loss and gradient while a block of rows is on the chip.

Imported only where Triton is installed. `ops.contrastive.contrast` is the reference and decides who is asked.
"""

# Triton is optional and a kernel is no Python that a type checker could follow
# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingParameterType=false, reportMissingTypeArgument=false, reportIndexIssue=false
# pyright: reportMissingTypeStubs=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

# Shapes: B anchors, D embedding, N bank rows, M columns, S blocks of columns

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from distkd.ops.contrastive import Noise

__all__ = ["contrast_kernel"]

_BLOCK_NUMBERS = 8192
"""Numbers of a block of rows: what a program keeps in its registers."""


@triton.jit
def _softplus(x):
    # log1p(u) of u = exp(-|x|): log(1 + u) alone would lose small u in the rounding of 1 + u
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    rest = w - 1.0
    log1p = tl.where(rest == 0.0, u, tl.log(w) * (u / tl.where(rest == 0.0, 1.0, rest)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _contrast(  # noqa: PLR0913 - a kernel takes everything by argument
    anchor, rows, index, offset, log_z, loss, gradient,
    D, M, n_columns, n_positive, temperature, bias,
    HAS_OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    m = s * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m, inside_d = m < M, d < D
    query = tl.load(anchor + b * D + d, mask=inside_d, other=0.0)
    n = tl.load(index + b * M + m, mask=inside_m, other=0)
    inside = inside_m[:, None] & inside_d[None, :]
    block = tl.load(rows + n[:, None] * D + d[None, :], mask=inside, other=0.0).to(query.dtype)
    score = tl.sum(block * query[None, :], axis=1) / temperature
    if HAS_OFFSET:
        score += tl.load(offset + b * M + m, mask=inside_m, other=0.0)
    margin = score - (tl.load(log_z).to(query.dtype) + bias)
    positive = m < n_columns
    turned = tl.where(positive, -margin, margin)
    term = tl.where(positive, 1.0 / n_positive, 1.0) * _softplus(turned)
    shrunk = tl.exp(-tl.abs(turned))
    sigmoid = tl.where(turned >= 0.0, 1.0 / (1.0 + shrunk), shrunk / (1.0 + shrunk))
    slope = tl.where(positive, -sigmoid / n_positive, sigmoid) / temperature
    slope = tl.where(inside_m, slope, 0.0)
    tl.store(loss + b * tl.num_programs(1) + s, tl.sum(tl.where(inside_m, term, 0.0), axis=0))
    partial = tl.sum(block * slope[:, None], axis=0)
    tl.store(gradient + (b * tl.num_programs(1) + s) * D + d, partial, mask=inside_d)


def contrast_kernel(
    anchor_BD: Tensor,
    rows_ND: Tensor,
    index_BM: Tensor,
    n_columns: int,
    noise: Noise,
    temperature: float,
    offset_BM: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `ops.contrastive.contrast` returns, with every row read once.

    Each program scores one block of columns of one anchor; the blocks' sums are added afterwards in a fixed order, so
    the result does not change from run to run.
    """
    B, D = anchor_BD.shape
    M = index_BM.shape[1]
    width = triton.next_power_of_2(D)
    height = max(1, min(triton.next_power_of_2(M), _BLOCK_NUMBERS // width))
    blocks = triton.cdiv(M, height)
    loss_BS = anchor_BD.new_empty(B, blocks)
    gradient_BSD = anchor_BD.new_empty(B, blocks, D)
    index_BM = index_BM.contiguous()
    offset = loss_BS if offset_BM is None else offset_BM.contiguous()
    _contrast[(B, blocks)](
        anchor_BD.contiguous(), rows_ND, index_BM, offset, noise.log_z, loss_BS, gradient_BSD,
        D, M, n_columns, noise.n_positive, temperature, noise.bias,
        HAS_OFFSET=offset_BM is not None, BLOCK_M=height, BLOCK_D=width,
    )  # fmt: skip
    return loss_BS.sum(dim=1), gradient_BSD.sum(dim=1)
