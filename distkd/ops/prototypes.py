"""Classes as a few unit codes each: which code a sample belongs to, and a margin between classes."""

# torch leaves the types of some of its results out
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

# Shapes: B samples of this rank, G of all ranks, C classes, M codes of a class, D embedding

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distkd.errors import ShapeError

__all__ = ["choose_codes", "prototype_margin", "unit_codes"]

_SMALLEST = 1e-12
"""Norm below which a sum of unit embeddings has no direction."""


def unit_codes(sum_CMD: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of sums of embeddings, (C, M, D), and which of them there are, bool (C, M); zeros elsewhere."""
    norm_CM = torch.linalg.vector_norm(sum_CMD, dim=2)
    known_CM = ~(norm_CM <= _SMALLEST)  # a sum that is not finite is known: the loss has to show it
    return torch.where(known_CM[..., None], sum_CMD / norm_CM.clamp_min(_SMALLEST)[..., None], 0.0), known_CM


def choose_codes(embedding_GD: Tensor, label_G: Tensor, code_CMD: Tensor, known_CM: Tensor) -> Tensor:
    """The code of its class that each sample moves.

    A class whose codes are all known gives each sample the nearest. Until then its samples take turns, unknown codes
    first, so that the first M samples of a class set its M codes.

    Args:
        embedding_GD: unit embeddings.
        label_G: int64 class < C; a negative one gets an answer that means nothing.
        code_CMD: unit codes.
        known_CM: bool, which codes there are.

    Returns:
        int64 (G,), 0 <= code < M. A function of the samples' order, no collective.
    """
    n_classes, n_codes = known_CM.shape
    class_G = label_G.clamp_min(0)
    nearest_G = torch.einsum("gd,gmd->gm", embedding_GD, code_CMD[class_G]).argmax(dim=1)
    is_class_GC = label_G[:, None] == torch.arange(n_classes, device=label_G.device)
    before_G = is_class_GC.cumsum(dim=0).gather(1, class_G[:, None]).squeeze(1) - 1
    n_known_G = known_CM.sum(dim=1)[class_G]
    return torch.where(n_known_G == n_codes, nearest_G, (n_known_G + before_G) % n_codes)


def prototype_margin(
    embedding_BD: Tensor,
    label_B: Tensor,
    code_CMD: Tensor,
    known_CM: Tensor,
    *,
    sharpness: float,
    margin: float,
    scale: float,
    labelled_share: float = 1.0,
) -> Tensor:
    """How far each sample is from being nearer to its own class than to each other one, by a margin.

    The score of a class is s_c = logsumexp over its codes of (sharpness x cosine), divided by sharpness. A sample of
    class y costs softplus(scale x (margin - (s_y - s_c))), averaged over the other classes c: the published formula for
    two classes, applied to every pair that y is in. Codes and classes that are not known yet are left out.

    Args:
        embedding_BD: unit embeddings; the gradient flows here only.
        label_B: int64 class < C, negative where there is none: such a sample costs nothing.
        code_CMD: unit codes, constants.
        known_CM: bool, which codes there are; the same on all ranks.
        sharpness: how close s_c is to the largest cosine, unitless, > 0 (5 in the source).
        margin: difference of scores to reach, on the scale of cosines (0.3 in the source).
        scale: steepness of the softplus, unitless, > 0 (20 in the source).
        labelled_share: share of the training set that has a label, 0 < share <= 1; the sum is divided by
            B x `labelled_share`, the labels to expect, as in `ops.kd.labelled_cross_entropy`.

    Returns:
        Scalar >= 0, 0 while fewer than two classes are known. float64 for float64, float32 otherwise. Local: no
        collective inside.

    Raises:
        ShapeError: D differs.

    Source: MoMKD, arXiv 2602.21395; card `beyond`, section 3.1 (two classes, codes learned by gradient).
    """
    if embedding_BD.shape[1] != code_CMD.shape[2]:
        raise ShapeError(f"embeddings have width {embedding_BD.shape[1]}, the codes have width {code_CMD.shape[2]}")
    precise = torch.promote_types(embedding_BD.dtype, torch.float32)
    class_known_C = known_CM.any(dim=1)
    # an unknown class keeps its zero codes: its score is then a number, and left out below
    left_out_CM = class_known_C[:, None] & ~known_CM
    cosine_BCM = torch.einsum("bd,cmd->bcm", embedding_BD.to(precise), code_CMD.to(precise))
    score_BC = torch.logsumexp((sharpness * cosine_BCM).masked_fill(left_out_CM, -torch.inf), dim=2) / sharpness
    class_B1 = label_B.clamp_min(0)[:, None]
    gap_BC = score_BC.gather(1, class_B1) - score_BC
    cost_BC = F.softplus(scale * (margin - gap_BC), threshold=50)
    other_BC = class_known_C & (torch.arange(len(class_known_C), device=label_B.device) != class_B1)
    counted_BC = other_BC & (class_known_C[class_B1] & (label_B >= 0)[:, None])
    n_others = (class_known_C.sum() - 1).clamp_min(1)
    return cost_BC.masked_fill(~counted_BC, 0.0).sum() / (n_others * len(label_B) * labelled_share)
