"""Losses on logits: cross entropy over the labelled samples, and soft labels from a teacher."""

# Shapes: B samples of this rank, C classes

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["kl_at_temperature", "labelled_cross_entropy", "soft_cross_entropy"]


def kl_at_temperature(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Divergence of the student's softened prediction from the teacher's, times the squared temperature.

    Args:
        student_BC: logits; the gradient flows here only if `teacher_BC` is detached.
        teacher_BC: logits.
        temperature: divisor of the logits, unitless, > 0.

    Returns:
        Mean over B of the sum over C, scalar >= 0, natural units. Local: no collective inside.

    Source: Hinton et al. 2015; as `KL_T` in card `dc-distill-gk-refine`, section 4.
    """
    log_p_BC = F.log_softmax(student_BC / temperature, dim=-1)
    log_q_BC = F.log_softmax(teacher_BC / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p_BC, log_q_BC, reduction="batchmean", log_target=True)


def labelled_cross_entropy(logits_BC: Tensor, label_B: Tensor, labelled_share: float = 1.0) -> Tensor:
    """Cross entropy of the samples that have a label.

    The sum is divided by the number of labels to expect, B x `labelled_share`, not by the number found: the count of a
    rank differs from its neighbour's, and a mean of local means would not be the mean of the global batch.

    Args:
        logits_BC: logits; the gradient flows here.
        label_B: int64 class, negative where there is none.
        labelled_share: share of the training set that has a label, 0 < share <= 1.

    Returns:
        Scalar >= 0; the plain mean where every sample has a label. Local: no collective inside.
    """
    total = F.cross_entropy(logits_BC, label_B.clamp_min(-1), ignore_index=-1, reduction="sum")
    return total / (label_B.shape[0] * labelled_share)


def soft_cross_entropy(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Cross entropy of the student's prediction with the teacher's softened one; the student's logits stay as they are.

    Args:
        student_BC: logits; the gradient flows here only if `teacher_BC` is detached.
        teacher_BC: logits.
        temperature: divisor of the teacher's logits, unitless, > 0 (1 in the source).

    Returns:
        Mean over B, scalar, natural units, at least the entropy of the teacher's prediction. Local: no collective.

    Source: card `inter-resolution-at-plus`, section 4.
    """
    return F.cross_entropy(student_BC, F.softmax(teacher_BC / temperature, dim=-1))
