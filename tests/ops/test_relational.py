"""Relations to many rows against the plain formula, in values, gradients and what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distkd.errors import ShapeError
from distkd.ops import relational
from distkd.ops.relational import relational_cross_entropy, softmax_mean

B, D, Q = 5, 6, 23
TEMPERATURES = {"student_temperature": 0.02, "teacher_temperature": 0.1}


def units(rows: int, seed: int, dtype: torch.dtype = torch.float64, dim: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def by_formula(student: Tensor, teacher: Tensor, rows: Tensor, *, with_own: bool = False) -> Tensor:
    """Every score of every sample at once."""
    scores = [(side @ rows.T, (side * teacher).sum(1, keepdim=True)) for side in (student, teacher)]
    of_student, of_teacher = (torch.cat(pair, dim=1) if with_own else pair[0] for pair in scores)
    target = F.softmax(of_teacher / 0.1, dim=1)
    return -(target * F.log_softmax(of_student / 0.02, dim=1)).sum(dim=1).mean()


@pytest.mark.parametrize("with_own", [False, True])
@pytest.mark.parametrize("filled", [1, 7, Q])
@pytest.mark.parametrize("tile", [1, 7, 8, 2048])
def test_value_and_gradient_are_those_of_the_formula(
    tile: int, filled: int, with_own: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(relational, "_TILE", tile)
    teacher, rows = units(B, 1), units(Q, 2)
    ours, plain = units(B, 0).requires_grad_(), units(B, 0).requires_grad_()
    loss = relational_cross_entropy(ours, teacher, rows, torch.tensor(filled), **TEMPERATURES, with_own=with_own)
    expected = by_formula(plain, teacher, rows[:filled], with_own=with_own)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-12, rtol=1e-12)


def test_a_student_that_is_the_teacher_pays_the_entropy_alone():
    teacher, rows = units(B, 1), units(Q, 2)
    student = teacher.clone().requires_grad_()
    same = {"student_temperature": 0.1, "teacher_temperature": 0.1}
    loss = relational_cross_entropy(student, teacher, rows, torch.tensor(Q), **same)
    loss.backward()
    p = F.softmax(teacher @ rows.T / 0.1, dim=1)
    torch.testing.assert_close(loss.detach(), -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(student.grad, torch.zeros(B, D, dtype=torch.float64), atol=1e-14, rtol=0.0)


def test_where_no_row_counts_there_is_no_loss():
    student = units(B, 0).requires_grad_()
    rows = torch.full((Q, D), 3.0, dtype=torch.float64)
    loss = relational_cross_entropy(student, units(B, 1), rows, torch.tensor(0), **TEMPERATURES)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros(B, D, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.02, 1e-4])
def test_float32_neither_overflows_nor_loses_the_value(temperature: float):
    temperatures = {"student_temperature": temperature, "teacher_temperature": 0.1}
    found, expected = (
        relational_cross_entropy(
            units(B, 0, dtype), units(B, 1, dtype), units(Q, 2, dtype), torch.tensor(Q), **temperatures
        )
        for dtype in (torch.float32, torch.float64)
    )
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=2e-6)


def test_embeddings_and_rows_in_half_precision_are_summed_in_single():
    student, teacher, rows = (units(n, seed, torch.bfloat16) for n, seed in ((B, 0), (B, 1), (Q, 2)))
    student.requires_grad_()
    loss = relational_cross_entropy(student, teacher, rows, torch.tensor(Q), **TEMPERATURES)
    loss.backward()
    assert (loss.dtype, student.grad.dtype) == (torch.float32, torch.bfloat16)
    exact = by_formula(student.detach().double(), teacher.double(), rows.double())
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6)


def test_the_gradient_scales_with_what_comes_from_above_and_reaches_the_student_alone():
    student, teacher = units(B, 0).requires_grad_(), units(B, 1).requires_grad_()
    loss = relational_cross_entropy(student, teacher, units(Q, 2), torch.tensor(Q), **TEMPERATURES)
    [plain] = torch.autograd.grad(loss, student, retain_graph=True)
    (1024 * loss).backward()
    assert torch.equal(student.grad, 1024 * plain)
    assert teacher.grad is None


def test_rows_may_be_written_before_the_backward_which_keeps_no_more_than_a_gradient():
    rows = units(Q, 2)
    gradients: list[Tensor] = []
    for write in (False, True):
        student = units(B, 0).requires_grad_()
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = relational_cross_entropy(student, units(B, 1), rows, torch.tensor(Q), **TEMPERATURES)
        if write:
            rows.zero_()
        loss.backward()
        gradients.append(student.grad)
        assert sum(kept) == B * D
    assert torch.equal(*gradients)


class _Largest(TorchDispatchMode):
    """Elements of the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result._is_view():
            self.numel = max(self.numel, result.numel())
        return result


def test_nothing_is_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(relational, "_TILE", 16)
    student, teacher, rows = units(8, 0), units(8, 1), units(160, 2)
    with _Largest() as largest:
        relational_cross_entropy(student, teacher, rows, torch.tensor(100), **TEMPERATURES)
    assert largest.numel == 2 * 8 * 16  # student and teacher at once; the whole product would be 8 x 160 for each


def test_a_student_that_is_not_finite_is_seen():
    student = units(B, 0)
    student[2, 3] = torch.nan
    assert relational_cross_entropy(student, units(B, 1), units(Q, 2), torch.tensor(Q), **TEMPERATURES).isnan()
    log_sum, mean = softmax_mean(student, units(Q, 2), torch.tensor(Q))
    assert log_sum.isnan().tolist() == mean.isnan().all(1).tolist() == [False, False, True, False, False]


def test_the_mean_of_rows_is_weighted_by_the_softmax():
    query, rows = 30 * units(4, 0), units(Q, 2)
    log_sum, mean = softmax_mean(query, rows, torch.tensor(9))
    score = query @ rows[:9].T
    torch.testing.assert_close(log_sum, score.logsumexp(1))
    torch.testing.assert_close(mean, score.softmax(1) @ rows[:9])


def test_a_row_of_the_querys_own_is_one_row_more_and_left_as_it_was():
    query, rows, own = 30 * units(4, 0), units(Q, 2), units(4, 3)
    before = own.clone()
    log_sum, mean = softmax_mean(query, rows, torch.tensor(Q), own)
    for i in range(4):
        candidates = torch.cat([rows, before[i : i + 1]])
        score = candidates @ query[i]
        torch.testing.assert_close(log_sum[i], score.logsumexp(0))
        torch.testing.assert_close(mean[i], score.softmax(0) @ candidates)
    assert torch.equal(own, before)


def test_widths_have_to_be_equal():
    with pytest.raises(ShapeError, match="student, teacher and rows have widths 6, 6 and 4, expected equal ones"):
        relational_cross_entropy(units(B, 0), units(B, 1), units(Q, 2, dim=4), torch.tensor(Q), **TEMPERATURES)
