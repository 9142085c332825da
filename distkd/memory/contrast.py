"""Contrast of a student with a teacher through a pair of memory banks."""

# Shapes: B samples of this rank, A anchors that it scores (its own, or all ranks' where rows are sharded), D embedding,
# N rows, J candidates and M chosen columns of each anchor, positives first

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from distkd.base import Arriving, World
from distkd.memory.bank import MemoryBank, Normaliser, last_of_equals
from distkd.memory.placement import Columns, Placement, Replicated
from distkd.ops.contrastive import Noise, contrast
from distkd.ops.draws import integer_key
from distkd.ops.injected import inject
from distkd.ops.rows import check_index, products
from distkd.ops.selection import select_by_discrepancy

__all__ = ["Choice", "ContrastPair", "choose", "write_rows"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The rows that each anchor is compared with."""

    index_AM: Tensor
    """int64 rows, 0 <= index < N, positives first."""
    n_positive: int
    drawn: tuple[int, int]
    """Positives and negatives that they were chosen from."""
    products: tuple[Tensor, Tensor] | None = None
    """Of student anchors with teacher rows and of teacher anchors with student rows, (A, M), where they are known."""
    log_weight_AM: Tensor | None = None
    """Log of what the exponentiated scores are multiplied with; -inf leaves a negative out."""


class ContrastPair(nn.Module):
    """A student bank, a teacher bank and their normalisers; the projectors stay with what is trained.

    Args:
        n_rows: N.
        dim: D.
        seed: of the rows before their first update.
        dtype: of the rows; None follows the run.
        placement: where the rows lie.
    """

    def __init__(
        self,
        n_rows: int,
        dim: int,
        *,
        seed: int,
        dtype: torch.dtype | None = None,
        placement: Placement | None = None,
    ):
        super().__init__()
        self.placement = placement or Replicated()
        where = {"dtype": dtype, "part": self.placement.part, "parts": self.placement.parts}
        self.student = MemoryBank(n_rows, dim, seed=integer_key(seed, 0), **where)
        self.teacher = MemoryBank(n_rows, dim, seed=integer_key(seed, 1), **where)
        self.student_z = Normaliser()
        self.teacher_z = Normaliser()

    @torch.no_grad()
    def compare(
        self, anchors: tuple[Tensor, Tensor], candidate_AJ: Tensor, drawn: tuple[int, int]
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """How much closer the teacher holds each candidate than the student does.

        Args:
            anchors: the student's and the teacher's unit embeddings (A, D) that this rank scores.
            candidate_AJ: int64 rows.
            drawn: how many of them are positives and negatives.

        Returns:
            Differences of cosines (A, J) in [-2, 2], and the products of each with the other's rows (A, J), which cost
            no further reading of rows; None where rows are sharded, since each rank has some. No gradient. Collectives:
            none; one all-reduce of A x J numbers where rows are sharded.

        Source: card `dc-distill-gk-refine`, sections 4.2 and 4.3.
        """
        columns = self.placement.columns(candidate_AJ, drawn[0], drawn)
        student_AD, teacher_AD = map(_wide, anchors)
        place_AM = columns.place_AM
        own_AM, teacher_on_student = products((student_AD, teacher_AD), self.student.rows_ND, place_AM)
        student_on_teacher, held_AM = products((student_AD, teacher_AD), self.teacher.rows_ND, place_AM)
        gap_AM = held_AM / _norm(self.teacher, place_AM) - own_AM / _norm(self.student, place_AM)
        crossed = None if columns.column_AM is not None else (student_on_teacher, teacher_on_student)
        return self.placement.assemble(gap_AM, columns, candidate_AJ), crossed

    def forward(
        self,
        student_BD: Tensor,
        teacher_BD: Tensor,
        anchors: tuple[Tensor, Tensor],
        choice: Choice,
        *,
        temperature: float,
        world: World,
    ) -> Tensor:
        """Loss of both directions: student anchors on teacher rows, teacher anchors on student rows.

        Args:
            student_BD, teacher_BD: unit embeddings of this rank's samples; the gradient flows to both, never to rows.
            anchors: the student's and the teacher's embeddings (A, D) that this rank scores (`Placement.meet`).
            choice: the rows that the A anchors are compared with.
            temperature: divisor of the cosines, unitless, > 0 (0.07 in the source).
            world: ranks over which Z is measured at the first call.

        Returns:
            Scalar in float32 or wider, mean over B. Collectives: two of two numbers at the very first call; where rows
            are sharded one reduce-scatter of A x (2 D + 2) numbers, whatever N and M.

        Raises:
            ShapeError: an index without a row, or embeddings of another width than the banks'.

        Source: card `crd`, sections 2 and 8.
        """
        check_index(choice.index_AM, self.student.n_rows, "the choice of rows to compare with")
        columns = self.placement.columns(choice.index_AM, choice.n_positive, choice.drawn)
        offset_AM = _offset(columns, choice.log_weight_AM)
        counts = (choice.n_positive, choice.index_AM.shape[1] - choice.n_positive)
        known = choice.products or (None, None)
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for anchor_AD, bank, z, product_AM in (
            (_wide(anchors[0]), self.teacher, self.student_z, known[0]),
            (_wide(anchors[1]), self.student, self.teacher_z, known[1]),
        ):
            if not z.known:
                if product_AM is None:
                    [product_AM] = products((anchor_AD,), bank.rows_ND, columns.place_AM)
                score_AM = product_AM / temperature
                z.measure(score_AM if offset_AM is None else score_AM + offset_AM, bank.n_rows, world)
            noise = Noise(z.log_z, *counts, bank.n_rows)
            loss_A, gradient_AD = contrast(
                anchor_AD,
                bank.rows_ND,
                columns.place_AM,
                columns.n_columns,
                noise,
                temperature=temperature,
                product_BM=product_AM,
                offset_BM=offset_AM,
            )
            losses.append(loss_A + noise.constant / self.placement.parts)
            gradients.append(gradient_AD / len(student_BD))
        home_BX = self.placement.home(torch.cat([*gradients, torch.stack(losses, dim=1)], dim=1))
        *found, loss_B2 = home_BX.split([*(gradient_AD.shape[1] for gradient_AD in gradients), 2], dim=1)
        own = [student_BD, teacher_BD]
        at_own = [gradient_BD.to(x.dtype) for gradient_BD, x in zip(found, own, strict=True)]
        return inject(loss_B2.sum(dim=1).mean(), own, at_own)


def choose(
    pair: ContrastPair,
    anchors: tuple[Tensor, Tensor],
    candidate_AJ: Tensor,
    ranks_R: Tensor,
    *,
    n_positive: int,
    keep_negative: int | None,
    direction: Literal["paper", "released"],
    reweight: bool = False,
) -> Choice:
    """The candidates that teacher and student disagree on.

    Args:
        pair: the banks.
        anchors: the student's and the teacher's embeddings (A, D) that this rank scores.
        candidate_AJ: int64 rows, the P positives first and the anchor in column 0.
        ranks_R: places in the order of discrepancy that are kept (`ops.selection.kept_ranks`).
        n_positive: P.
        keep_negative: how many negatives are kept; None keeps all.
        direction: `paper` keeps positives that the teacher holds closer than the student does, and negatives that it
            holds farther; `released` is the opposite sign, as the published code computes it.
        reweight: multiply the exponentiated score of a negative by 1 - discrepancy, where that is above 0.

    Returns:
        R positives and the kept negatives. No gradient. Collectives: those of `ContrastPair.compare`.

    Source: card `dc-distill-gk-refine`, section 4.3 and quirk 1; card `m3lr-dscd-gkm`, section 4.2 (`reweight`).
    """
    check_index(candidate_AJ, pair.student.n_rows, "the candidates")
    drawn = (n_positive, candidate_AJ.shape[1] - n_positive)
    gap_AJ, crossed = pair.compare(anchors, candidate_AJ, drawn)
    columns_AM = select_by_discrepancy(
        gap_AJ if direction == "paper" else -gap_AJ,
        n_positive=n_positive,
        ranks_P=ranks_R,
        keep_negative=keep_negative,
    )
    log_weight_AM = None
    if reweight:
        log_weight_AM = (1 - gap_AJ.gather(1, columns_AM)).clamp_min(0).log()
        log_weight_AM[:, : len(ranks_R)] = 0
    known = None if crossed is None else (crossed[0].gather(1, columns_AM), crossed[1].gather(1, columns_AM))
    return Choice(candidate_AJ.gather(1, columns_AM), len(ranks_R), drawn, known, log_weight_AM)


def _norm(bank: MemoryBank, place_AM: Tensor) -> Tensor:
    return bank.norm_N.index_select(0, place_AM.flatten()).view_as(place_AM).clamp_min_(1e-12)


def _wide(anchor_AD: Tensor) -> Tensor:
    return anchor_AD.detach().to(torch.promote_types(anchor_AD.dtype, torch.float32))


def _offset(columns: Columns, log_weight_AM: Tensor | None) -> Tensor | None:
    if log_weight_AM is None or columns.column_AM is None or columns.offset_AM is None:
        return columns.offset_AM if log_weight_AM is None else log_weight_AM
    weight_AM = log_weight_AM.gather(1, columns.column_AM)
    return torch.where(torch.isfinite(columns.offset_AM), weight_AM, columns.offset_AM)


def write_rows(banks: Mapping[str, MemoryBank], rows: Sequence[Arriving], *, momentum: float) -> None:
    """Write a step's embeddings of all ranks into their banks, in the order of the global batch.

    Args:
        banks: name to bank.
        rows: for each pass `index` (G,) and the embeddings (G, D) of every bank by name.
        momentum: share of the old row.
    """
    passes = [arriving.wait() for arriving in rows]
    index_G = torch.cat([found["index"] for found in passes])
    last_G = last_of_equals(index_G)
    for name, bank in banks.items():
        bank.write(index_G, torch.cat([found[name] for found in passes]), momentum=momentum, last_G=last_G)
