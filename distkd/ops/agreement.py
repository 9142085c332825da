"""How much losses agree at the student's feature, and what follows from it: everything from one Gram matrix.

Rules come in two kinds. Some weigh *losses*: one number per distillation loss, the heads' gradients included. Others
act on what *enters the trunk*: the heads learn from the plain sum of the losses, and only the gradient that the feature
receives is recombined. Which tensors get which is decided in `comm.agreement`; here are the numbers. A gradient of
norm below `NEGLIGIBLE` agrees with nobody: no rule divides by it.
"""

# Shapes: L distillation losses, then the task loss in the last row and column, so matrices are (L + 1, L + 1);
# B samples of this rank, X numbers of the gradient of one sample

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "NEGLIGIBLE",
    "agreement_counts",
    "conflict_averse_weights",
    "cosine_matrix",
    "minimum_norm_weights",
    "pack_symmetric",
    "projected_weights",
    "row_sum_weights",
    "running_mean",
    "sample_cosines",
    "unpack_symmetric",
]

NEGLIGIBLE = 1e-12
"""Norm up to which a gradient counts as zero; the released codes divide by it and get NaN."""


@cache
def _triangle(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat places of the upper triangle in the matrix, and for each place of the matrix its place in the triangle."""
    rows, columns = torch.triu_indices(n, n, device=device)
    place = torch.empty(n, n, dtype=torch.int64, device=device)
    place[rows, columns] = place[columns, rows] = torch.arange(len(rows), device=device)
    return rows * n + columns, place.flatten()


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Upper triangle with the diagonal, (n (n + 1) / 2,): what needs to be summed over ranks."""
    return matrix.flatten()[_triangle(matrix.shape[0], matrix.device)[0]]


def unpack_symmetric(packed: Tensor, n: int) -> Tensor:
    """Inverse of `pack_symmetric`."""
    return packed[_triangle(n, packed.device)[1]].view(n, n)


def cosine_matrix(gram: Tensor) -> Tensor:
    """Cosines of all pairs from inner products.

    A gradient of zero norm agrees with nobody: row and column 0, diagonal 1 (the released code gives NaN).
    """
    inverse = _inverse(gram.diagonal().clamp_min(0).sqrt())
    return (gram * inverse[:, None] * inverse).fill_diagonal_(1.0)


def _inverse(norm: Tensor) -> Tensor:
    """1 / norm, 0 where the norm counts as zero."""
    return torch.where(norm > NEGLIGIBLE, norm.reciprocal(), 0.0)


# Rules that weigh losses


def row_sum_weights(cosines: Tensor, *, clamp_min: float | None = None, normalise: bool = False) -> Tensor:
    """Weight of each distillation loss: the sum of its cosines with all losses, task included, times their number.

    Args:
        cosines: (L + 1, L + 1), the task last.
        clamp_min: lower bound of a weight; None as published, where a conflicting loss is pushed up.
        normalise: divide by the mean absolute weight, so that their size does not depend on L.

    Returns:
        (L,), in [-L (L - 1), L (L + 1)] before the options; L for a loss that agrees with nobody.

    Source: card `dc-distill-gk-refine`, section 4.5 (GK-Refine); with a running mean over steps the form of card
    `m3lr-dscd-gkm`, section 4.3, without a threshold.
    """
    n = cosines.shape[0] - 1
    weights = n * cosines[:n].sum(dim=1)
    if clamp_min is not None:
        weights = weights.clamp_min(clamp_min)
    if normalise:
        weights = weights / weights.abs().mean().clamp_min(1e-12)
    return weights


def agreement_counts(
    cosines: Tensor, *, threshold: float = 0.1, count_self: bool = True, drop_alone: bool = False
) -> Tensor:
    """Weight of each distillation loss: with how many losses it agrees.

    Args:
        cosines: (L + 1, L + 1), the task last.
        threshold: cosine above which two losses agree, -1 <= threshold < 1.
        count_self: whether a loss agrees with itself, as published; then no loss is ever left out.
        drop_alone: weight 0 for a loss that agrees with no other, as the paper's figure has it.

    Returns:
        (L,), whole numbers from 0 to L + 1 in the dtype of `cosines`.

    Source: card `m3lr-dscd-gkm`, section 4.3 and quirks 4 and 5 (GKM).
    """
    n = cosines.shape[0] - 1
    others = (cosines[:n] > threshold).to(cosines.dtype).fill_diagonal_(0.0).sum(dim=1)
    counts = others + 1 if count_self else others
    return counts * (others > 0) if drop_alone else counts


def running_mean(previous: Tensor, fresh: Tensor, momentum: float) -> Tensor:
    """momentum x previous + (1 - momentum) x fresh; `fresh` alone where `previous` is NaN, that is, never set."""
    return torch.where(previous.isnan(), fresh, momentum * previous + (1 - momentum) * fresh)


# Rules on what enters the trunk: weights (L + 1,) of the gradients, to be used at the feature alone


def projected_weights(gram: Tensor, *, of: Literal["sum", "each"] = "sum") -> Tensor:
    """Distillation without the part that undoes the task: the task's own gradient is never touched.

    Args:
        gram: (L + 1, L + 1) inner products, the task last.
        of: project the `sum` of the distillation gradients, or `each` by itself; the same for L = 1.

    Returns:
        (L + 1,): 1 for every distillation gradient, at least 1 for the task's, whose multiple is the projection.

    Source: card `beyond`, section 2.1 (PCGrad, one-sided).
    """
    n = gram.shape[0] - 1
    with_task, task = gram[n, :n], gram[n, n]
    conflict = with_task.sum().clamp_max(0) if of == "sum" else with_task.clamp_max(0).sum()
    return _weights(n, torch.ones_like(task), 1 - conflict * _inverse(task.clamp_min(0).sqrt()).square())


def minimum_norm_weights(gram: Tensor) -> Tensor:
    """The shortest mixture of the task's gradient and the sum of the distillation gradients: it undoes neither.

    Args:
        gram: (L + 1, L + 1) inner products, the task last.

    Returns:
        (L + 1,): w for the task and 1 - w for every other, 0 <= w <= 1; 1/2 where the two are equal, and 1 for both
        where one of them has no gradient.

    Source: card `beyond`, section 2.2 (MGDA, two terms).
    """
    task, both, distilled = _two_terms(gram)
    apart = task - 2 * both + distilled
    share = torch.where(apart > _rounding(task, distilled), (distilled - both) / apart, 0.5).clamp(0, 1)
    return _unless_alone(gram.shape[0] - 1, task, distilled, on_distilled=1 - share, on_task=share)


def conflict_averse_weights(gram: Tensor, *, c: float = 0.5) -> Tensor:
    """Mean of the task's gradient and the sum of the distillation gradients, moved towards what helps the worse off.

    g0 + c |g0| g_w / |g_w| with g0 = (t + k) / 2, g_w = w t + (1 - w) k and w in [0, 1] minimising
    g_w . g0 + c |g0| |g_w|. The minimum is found in closed form: no search, no host sync.

    Args:
        gram: (L + 1, L + 1) inner products, the task last.
        c: how far from the mean, >= 0.

    Returns:
        (L + 1,) >= 0; 1 for both where one of them has no gradient.

    Source: card `beyond`, section 2.3 (CAGrad, Liu et al., NeurIPS 2021).
    """
    task, both, distilled = _two_terms(gram)
    floor = _rounding(task, distilled)
    apart = (task - 2 * both + distilled).clamp_min(0)
    half = 0.5 * (task + 2 * both + distilled).clamp_min(0).sqrt()  # |g0|
    share = _conflict_averse_share(task, both, distilled, c * half).clamp(0, 1)
    share = torch.where(apart > floor, share, 0.5)
    square = share.square() * task + 2 * share * (1 - share) * both + (1 - share).square() * distilled
    # two gradients of opposite directions can cancel: g_w then has no direction, and the mean stays as it is
    push = torch.where(square > floor, c * half * square.clamp_min(0).rsqrt(), 0.0)
    return _unless_alone(
        gram.shape[0] - 1, task, distilled, on_distilled=0.5 + push * (1 - share), on_task=0.5 + push * share
    )


def _conflict_averse_share(task: Tensor, both: Tensor, distilled: Tensor, reach: Tensor) -> Tensor:
    """Where d/dw [g_w . g0 + reach |g_w|] = 0, before w is bounded.

    With u = a w + b, a = |t - k|^2, b = (t - k) . k and h the squared distance of the line g_w from 0, |g_w|^2 is
    u^2 / a + h, and the equation is u / sqrt(u^2 / a + h) = r for r = -(t - k) . g0 / reach: a slope that has a zero
    for r^2 < a only, and is else of one sign.
    """
    a, b = task - 2 * both + distilled, both - distilled
    h = ((task * distilled - both.square()) / a).clamp_min(0)
    r = (distilled - task) / (2 * reach)
    u = r * (h * a / (a - r.square())).sqrt()
    return torch.where(r.square() < a, (u - b) / a, (r > 0).to(a.dtype))


def _two_terms(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t . t, t . k and k . k of the task's gradient t and the sum k of the others."""
    n = gram.shape[0] - 1
    return gram[n, n], gram[n, :n].sum(), gram[:n, :n].sum().clamp_min(0)


def _rounding(task: Tensor, distilled: Tensor) -> Tensor:
    """Below this a squared norm of a mixture of the two is rounding."""
    return 16 * torch.finfo(task.dtype).eps * (task + distilled)


def _unless_alone(n: int, task: Tensor, distilled: Tensor, *, on_distilled: Tensor, on_task: Tensor) -> Tensor:
    """The weights; 1 for all where the task or the distillation has no gradient, for there is nothing to settle."""
    alone = torch.minimum(task, distilled) <= NEGLIGIBLE**2
    return torch.where(alone, 1.0, _weights(n, on_distilled, on_task))


def _weights(n: int, on_distilled: Tensor, on_task: Tensor) -> Tensor:
    return torch.cat([on_distilled.expand(n), on_task.view(1)])


# A rule by sample


def sample_cosines(gradients_LBX: Tensor, task_BX: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of each distillation gradient with the task's, for each sample by itself.

    Returns:
        (L, B), 0 where either gradient counts as zero; and (B,) bool, which samples have a task gradient at all:
        one without a label has none. Local: no collective.

    Source: card `beyond`, section 2, feature-level version.
    """
    norm_LB, norm_B = gradients_LBX.square().sum(dim=-1).sqrt(), task_BX.square().sum(dim=-1).sqrt()
    inner_LB = torch.einsum("lbx,bx->lb", gradients_LBX, task_BX)
    return inner_LB * _inverse(norm_LB) * _inverse(norm_B), norm_B > NEGLIGIBLE
