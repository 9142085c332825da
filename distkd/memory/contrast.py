"""Contrast of a student with one of its teachers through a pair of memory banks, on the candidates they disagree on."""

# Shapes: B samples of this rank, D embedding, N rows, J candidates (P positive first), R kept positives, M kept columns

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from distkd.base import World
from distkd.memory.bank import MemoryBank, Normaliser
from distkd.ops.contrastive import bank_cosines, bank_products, noise_contrastive
from distkd.ops.draws import integer_key
from distkd.ops.selection import select_by_discrepancy

__all__ = ["DiscrepancyContrast"]


class DiscrepancyContrast(nn.Module):
    """A student bank, a teacher bank and their normalisers; the projectors stay with what is trained."""

    def __init__(self, rows: int, dim: int, *, seed: int):
        super().__init__()
        self.student = MemoryBank(rows, dim, seed=integer_key(seed, 0))
        self.teacher = MemoryBank(rows, dim, seed=integer_key(seed, 1))
        self.student_z = Normaliser()
        self.teacher_z = Normaliser()

    def forward(
        self,
        student_BD: Tensor,
        teacher_BD: Tensor,
        candidate_BJ: Tensor,
        ranks_R: Tensor,
        *,
        n_positive: int,
        keep_negative: int | None,
        temperature: float,
        direction: Literal["paper", "released"],
        world: World,
    ) -> Tensor:
        """Loss of both directions: student queries on teacher rows, teacher queries on student rows.

        Args:
            student_BD, teacher_BD: unit embeddings of the same samples; the gradient flows to both, never to rows.
            candidate_BJ: int64 rows, the P positives first and the anchor in column 0.
            ranks_R: places in the order of discrepancy that are kept (`ops.selection.kept_ranks`).
            n_positive: P.
            keep_negative: how many negatives are kept; None keeps all.
            temperature: divisor of the cosines, unitless, > 0 (0.07 in the source).
            direction: `paper` keeps positives that the teacher holds closer than the student does, and negatives that
                it holds farther; `released` is the opposite sign, as the published code computes it.
            world: ranks over which Z is measured at the first call.

        Returns:
            Scalar, mean over B. Collectives: two of two numbers at the very first call, none later.

        Source: card `dc-distill-gk-refine`, sections 4.2 to 4.4 and quirk 1.
        """
        student_rows, teacher_rows = self.student.rows_ND, self.teacher.rows_ND
        rows = student_rows.shape[0]
        student_BJ = bank_products(student_BD, teacher_rows, candidate_BJ)
        teacher_BJ = bank_products(teacher_BD, student_rows, candidate_BJ)
        with torch.no_grad():
            own = bank_products(student_BD, student_rows, candidate_BJ)
            held = bank_products(teacher_BD, teacher_rows, candidate_BJ)
            own = bank_cosines(own, student_rows, candidate_BJ)
            held = bank_cosines(held, teacher_rows, candidate_BJ)
            columns_BM = select_by_discrepancy(
                held - own if direction == "paper" else own - held,
                n_positive=n_positive,
                ranks_P=ranks_R,
                keep_negative=keep_negative,
            )
        loss = student_BD.new_zeros(())
        for score_BJ, normaliser in ((student_BJ, self.student_z), (teacher_BJ, self.teacher_z)):
            score_BM = score_BJ.gather(1, columns_BM) / temperature
            log_z = normaliser(score_BM.detach(), rows, world)
            loss = loss + noise_contrastive(score_BM, ranks_R.shape[0], log_z, rows)
        return loss
