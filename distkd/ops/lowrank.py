"""Pull of a batch's similarity matrices towards their low tensor-rank approximation (M3LR).

For each modality the row-normalised similarity matrices of V views of a batch are the slices of a tensor. Its t-SVD, a
singular value decomposition per frequency of the Fourier transform along the query rows, is shrunk, and one view is
pulled towards its slice of the result. Only V x V matrices are decomposed: singular values and right vectors are those
of the slices' Gram matrices, the value follows from the singular values alone (Parseval), and the gradient needs a
single slice back from the Fourier domain. Everything is float32 or wider.

Source: card `m3lr-dscd-gkm`, section 3.
"""

# torch leaves the types of some of its results out
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

# Shapes: U modalities, V views, X = U V, B samples of all ranks (i query rows, j key columns), D feature width,
# F = B // 2 + 1 frequencies, K = U F

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distkd.errors import ShapeError
from distkd.ops.injected import inject

__all__ = [
    "Shrinkage",
    "hermitian_eigh",
    "low_rank_penalty",
    "penalty_weight",
    "rotated_eigh",
    "row_similarity",
    "shrunk",
]

_FLAT = 1e-6
"""Norm of a row of similarities up to which its sample is left out: dead units, whose gradient would explode."""
_EPSILON = 1e-5
"""Added to a singular value where it divides, as in the source."""
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Shrinkage:
    """How singular values are made smaller."""

    rho: float
    """Strength, >= 0: Lambda / mu before the step's increase."""
    form: Literal["weighted", "plain"] = "weighted"
    """max(S - rho B / (S + 1e-5), 0), or max(S - rho B, 0)."""
    double_shrink: bool = False
    """Shrink one conjugate pair of frequencies twice, as the published routine does; it needs B >= 3."""
    reference_batch: int | None = None
    """B in the formula; None takes the batch's own. The published value was chosen for 16."""


def penalty_weight(step: int, *, start: float = 1e-5, factor: float = 1.1, cap: float = 1.0) -> float:
    """mu after this many steps: the shrinkage of step t (from 0) uses the value of t, the penalty that of t + 1.

    Source: card `m3lr-dscd-gkm`, section 3.2 and quirk 10; the cap is reached at step 121.
    """
    growth = step * math.log(factor)
    return cap if growth >= math.log(cap / start) else start * math.exp(growth)


def row_similarity(feature_BD: Tensor) -> Tensor:
    """Inner products of all pairs of samples, each row divided by its norm. No gradient is meant.

    Args:
        feature_BD: (..., B, D).

    Returns:
        (..., B, B) with rows of norm 1, in [0, 1] for features after a ReLU. A row of norm below 1e-6 is zero.
    """
    product_BB = feature_BD @ feature_BD.mT
    return product_BB / _row_norm(product_BB)[..., None]


def _row_norm(product_BB: Tensor) -> Tensor:
    """(..., B), infinite where a row counts as zero: what is divided by it is left out."""
    norm_B: Tensor = torch.linalg.vector_norm(product_BB, dim=-1)
    return torch.threshold(norm_B, _FLAT, math.inf)


def shrunk(similar_UVBB: Tensor, how: Shrinkage) -> Tensor:
    """The tensors after one proximal step: shrunk singular values, same vectors. No gradient is meant.

    Args:
        similar_UVBB: (U, V, i, j) float; the Fourier transform runs along i.
        how: the shrinkage.

    Returns:
        The same shape and dtype. Local: no collective.

    Source: card `m3lr-dscd-gkm`, section 3.3.
    """
    n_modalities, _, n_rows, _ = similar_UVBB.shape
    slice_KVj = _slices(similar_UVBB.mT)
    square_KV, vector_KVV = hermitian_eigh(slice_KVj @ slice_KVj.mH)
    lost_KV = _lost_share(_singular(square_KV), n_rows, how)
    removed_KVj = (vector_KVV * lost_KV[:, None]) @ vector_KVV.mH @ slice_KVj
    removed_UFVj = removed_KVj.unflatten(0, (n_modalities, -1))
    return similar_UVBB - torch.fft.irfft(removed_UFVj, n=n_rows, dim=1).permute(0, 2, 1, 3)


def low_rank_penalty(views: Sequence[Sequence[Tensor]], how: Shrinkage, *, weight: float, learning: int = 2) -> Tensor:
    """Half the weighted squared distance of the views' similarities from their shrunk form, summed over modalities.

    Args:
        views: for each modality its V features (B, D), of the global batch, in the card's order: fused, fused of the
            mean teacher, the modality's own, that of its mean teacher. Widths may differ.
        how: the shrinkage; its result is a constant.
        weight: mu, after the step's increase.
        learning: which view learns. The gradient flows to this feature of each modality, where a row is both query
            and key; rows that other ranks own are constants if their part of the tensor is one.

    Returns:
        Scalar >= 0, float32 or wider, once differentiable. It is that of the whole batch, not of this rank's share: a
        reducer that averages gradients over ranks needs it times the number of ranks. Local: no collective, no host
        sync.

    Raises:
        ShapeError: numbers of views or of samples differ, or B < 3 with `double_shrink`.

    Source: card `m3lr-dscd-gkm`, sections 3.2, 3.3 and 8, quirks 7 and 9.
    """
    _check(views, how)
    learners = [own[learning] for own in views]
    # many tiny operations, whose cost is their dispatch: less of it where no versions are counted
    with torch.inference_mode():
        energy, slope_UBB = _energy_and_slope(views, how, learning)
    with torch.no_grad():
        gradients = [
            torch.addmm(feature, slope_BB, feature, beta=0, alpha=weight)
            for slope_BB, feature in zip(slope_UBB.unbind(), map(_wide, learners), strict=True)
        ]
        value = energy * (0.5 * weight)
    return inject(value, learners, gradients)


def _energy_and_slope(views: Sequence[Sequence[Tensor]], how: Shrinkage, learning: int) -> tuple[Tensor, Tensor]:
    """Squared distance of all views from their shrunk form; and (U, B, B), whose product with a learning view's feature
    is half its slope there.
    """
    features = [_wide(feature) for own in views for feature in own]
    n_modalities, n_rows = len(views), features[0].shape[0]
    product_XBB = _products(features)
    norm_XB = _row_norm(product_XBB)
    # products are symmetric, so this is the similarity with queries last, along which the transform is fastest
    turned_UVBB = (product_XBB / norm_XB[:, None]).view(n_modalities, -1, n_rows, n_rows)
    slice_KVj = _slices(turned_UVBB)
    # M M^H with the views as rows of M: eigenvalues are squared singular values, vectors the views' share in them
    square_KV, vector_KVV = hermitian_eigh(torch.bmm(slice_KVj, slice_KVj.mH))
    singular_KV = _singular(square_KV)
    lost_KV = _lost_share(singular_KV, n_rows, how)
    # the learning view's row of what is taken away, V diag(lost) V^H M
    share_K1V = (lost_KV * vector_KVV[:, learning])[:, None]
    lost_K1j = torch.bmm(torch.bmm(share_K1V, vector_KVV.mH), slice_KVj)
    slope_UBB = torch.fft.irfft(lost_K1j.view(n_modalities, -1, n_rows), n=n_rows, dim=1)
    # from row-normalised similarities to products, of which a feature is both factors
    similar_UBB = turned_UVBB[:, learning].mT
    along_UB1 = (slope_UBB * similar_UBB).sum(dim=2, keepdim=True)
    norm_UB1 = norm_XB.view(n_modalities, -1, n_rows)[:, learning, :, None]
    slope_UBB.addcmul_(along_UB1, similar_UBB, value=-1).div_(norm_UB1)
    return _energy(singular_KV * lost_KV, n_rows), slope_UBB + slope_UBB.mT


def _check(views: Sequence[Sequence[Tensor]], how: Shrinkage) -> None:
    counts = {len(own) for own in views}
    rows = {feature.shape[0] for own in views for feature in own}
    if len(counts) != 1 or len(rows) != 1:
        raise ShapeError(
            f"modalities have {sorted(counts)} views of {sorted(rows)} samples, expected one number of each"
        )
    if how.double_shrink and min(rows) < 3:
        raise ShapeError(f"double_shrink has no second frequency with {min(rows)} samples, it needs at least 3")


def _wide(feature: Tensor) -> Tensor:
    return feature.float() if feature.dtype.itemsize < 4 else feature


def _products(features: Sequence[Tensor]) -> Tensor:
    """Inner products of all pairs of samples of each feature, (X, B, B)."""
    if len({feature.shape[1] for feature in features}) > 1:
        return torch.stack([feature @ feature.T for feature in features])
    stacked = torch.stack(list(features))
    return torch.bmm(stacked, stacked.mT)


def _slices(turned_UVjB: Tensor) -> Tensor:
    """V x j slices (K, V, j) of the Fourier transform along the last dimension, half of the frequencies."""
    return torch.fft.rfft(turned_UVjB).permute(0, 3, 1, 2).flatten(0, 1)


def _singular(square: Tensor) -> Tensor:
    return square.clamp_min(_TINY).sqrt_()


def _lost_share(singular_KV: Tensor, n_rows: int, how: Shrinkage) -> Tensor:
    """What shrinkage takes away of each singular value, as a share of it: 1 of a value of zero."""
    threshold = how.rho * (how.reference_batch or n_rows)
    lost_KV = _lost(singular_KV, threshold, how.form)
    if how.double_shrink:
        twice = n_rows - (n_rows // 2 + 1)  # its mirror is the frequency that the published loop takes one too many
        pair = slice(twice, None, n_rows // 2 + 1)
        kept = 1 - lost_KV[pair]
        lost_KV[pair] = 1 - kept * (1 - _lost((singular_KV[pair] * kept).clamp_min(_TINY), threshold, how.form))
    return lost_KV


def _lost(singular: Tensor, threshold: float, form: str) -> Tensor:
    below = torch.addcmul(singular * _EPSILON, singular, singular) if form == "weighted" else singular
    return below.reciprocal().mul_(threshold).clamp_max_(1)


@cache
def _multiplicity(n_rows: int, modalities: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(K, 1): how often each of half of the frequencies stands in the full transform, divided by its length."""
    count_F = torch.full((n_rows // 2 + 1,), 2.0 / n_rows, dtype=dtype, device=device)
    count_F[0] = 1.0 / n_rows
    if n_rows % 2 == 0:
        count_F[-1] = 1.0 / n_rows
    return count_F.repeat(modalities)[:, None]


def _energy(change_KV: Tensor, n_rows: int) -> Tensor:
    """Sum of the squares of what half of the spectrum holds, before the transform (Parseval)."""
    modalities = change_KV.shape[0] // (n_rows // 2 + 1)
    count_K1 = _multiplicity(n_rows, modalities, change_KV.dtype, change_KV.device)
    return torch.dot((change_KV * count_K1).flatten(), change_KV.flatten())


# eigen-decomposition of small Hermitian matrices


def hermitian_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of (..., V, V) Hermitian matrices, in no order.

    LAPACK on the CPU, NaN where a matrix is not finite. Elsewhere torch's own routine makes the host wait for its
    error code, so that there rotations of all matrices at once do it.
    """
    if matrix.device.type != "cpu":
        return rotated_eigh(matrix)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        # a step that is not finite is left out by whoever looks at the loss
        return matrix.real.new_full(matrix.shape[:-1], math.nan), torch.full_like(matrix, math.nan)
    return values, vectors


_SWEEPS = 6
"""Rotations of every pair; convergence is quadratic (4 x 4 in float64: rounding after 4; 8 x 8: after 6)."""


def rotated_eigh(matrix: Tensor, sweeps: int = _SWEEPS) -> tuple[Tensor, Tensor]:
    """`hermitian_eigh` by Jacobi's rotations of disjoint pairs, a fixed number of rounds, without a host sync.

    The pairs of a round are neighbours, (0, 1), (2, 3)...; between rounds the places go round like players in a
    tournament, so that each pair meets once in a sweep. An odd V gets a zero row and column, which nothing mixes with.
    """
    n = matrix.shape[-1]
    if n % 2:
        matrix = F.pad(matrix, (0, 1, 0, 1))
    size = matrix.shape[-1]
    batch = matrix.shape[:-2]
    current = matrix.reshape(-1, size, size)
    vectors = torch.eye(size, dtype=matrix.dtype, device=matrix.device).expand_as(current)
    turn = _turn(size, matrix.device)
    for _ in range(sweeps * (size - 1)):
        rotation = _rotations(current)
        current = _rotate(_rotate(current, rotation).mH, rotation).mH
        vectors = _rotate(vectors, rotation)
        if size > 2:
            current = current.index_select(1, turn).index_select(2, turn)
            vectors = vectors.index_select(2, turn)
    values = current.diagonal(dim1=-2, dim2=-1).real
    return values.reshape(*batch, size), vectors[:, :n].reshape(*batch, n, size)


def _turn(size: int, device: torch.device) -> Tensor:
    """Places of a tournament's next round: the first stays, the others move on by one seat around the table."""
    seats = torch.arange(size, device=device)
    around = torch.cat([seats[2::2], seats[1::2].flip(0)])  # clockwise from the seat right of the first
    moved = around.roll(1)
    upper, lower = moved[: size // 2 - 1], moved[size // 2 - 1 :].flip(0)
    return torch.stack([torch.cat([seats[:1], upper]), lower], dim=1).flatten()


def _rotations(current: Tensor) -> Tensor:
    """(n, V / 2, 2, 2) unitary matrices that make the neighbouring pairs of each matrix diagonal."""
    size = current.shape[-1]
    diagonal = current.diagonal(dim1=-2, dim2=-1).real
    first, second = diagonal[:, 0::2], diagonal[:, 1::2]
    off = current.diagonal(offset=1, dim1=-2, dim2=-1)[:, 0:size:2]
    length = off.abs()
    tiny = torch.finfo(length.dtype).tiny
    phase = torch.where(length > tiny, off / length.clamp_min(tiny), 1.0)
    half = (second - first) / 2
    # tangent of the smaller angle; 0 where there is nothing to rotate
    tangent = length * torch.where(half < 0, -1.0, 1.0) / (half.abs() + torch.hypot(half, length)).clamp_min(tiny)
    cosine = (1 + tangent.square()).rsqrt()
    sine = phase * (tangent * cosine)
    cosine = cosine.to(sine.dtype)
    return torch.stack([cosine, sine, -sine.conj(), cosine], dim=-1).unflatten(-1, (2, 2))


def _rotate(matrix: Tensor, rotation: Tensor) -> Tensor:
    """Neighbouring pairs of columns times their rotation."""
    pairs = matrix.unflatten(-1, (-1, 2)).transpose(-3, -2)  # (n, V / 2, rows, 2)
    return (pairs @ rotation).transpose(-3, -2).flatten(-2)
