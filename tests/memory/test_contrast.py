"""DC-Distill's contrast against the numbers of the released code, both readings of the discrepancy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distkd.base import World
from distkd.memory.bank import MemoryBank
from distkd.memory.contrast import DiscrepancyContrast
from tests.golden_numbers import golden, tensor

CARD = golden("dc-distill-gk-refine")
INPUTS = CARD["contrast_inputs"]
RANKS = {"hard": [0, 1, 2], "mid": INPUTS["mid_rank_positions"]}
CLOSE = {"atol": 1e-8, "rtol": 0.0}


def contrast_of(student: Tensor, teacher: Tensor) -> DiscrepancyContrast:
    contrast = DiscrepancyContrast(*student.shape, seed=0).double()
    contrast.student.rows_ND.copy_(student)
    contrast.teacher.rows_ND.copy_(teacher)
    return contrast


def project(feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.normalize(F.linear(feature, weight, bias), dim=1)


@pytest.mark.parametrize("mode", ["hard", "mid"])
@pytest.mark.parametrize("direction", ["released", "paper"])
def test_two_steps_are_golden(direction: str, mode: str):
    contrast = contrast_of(tensor(INPUTS["bank_student_init"]), tensor(INPUTS["bank_teacher_init"]))
    weight_s, weight_t = tensor(INPUTS["embed_s_weight"], grad=True), tensor(INPUTS["embed_t_weight"], grad=True)
    index = tensor(INPUTS["anchor_rows"])
    for step in (1, 2):
        expected = CARD["contrast_cases"][f"{direction}_direction_{mode}"][f"step{step}"]
        feature = tensor(INPUTS[f"feat_student_step{step}"], grad=True)
        student = project(feature, weight_s, tensor(INPUTS["embed_s_bias"]))
        teacher = project(tensor(INPUTS[f"feat_teacher_step{step}"]), weight_t, tensor(INPUTS["embed_t_bias"]))
        loss = contrast(
            student,
            teacher,
            tensor(INPUTS["candidate_rows"]),
            torch.tensor(RANKS[mode]),
            n_positive=INPUTS["nce_p"],
            keep_negative=INPUTS["nce_k2"],
            temperature=INPUTS["nce_t"],
            direction=direction,
            world=World(),
        )
        weight_s.grad = weight_t.grad = None
        loss.backward()
        contrast.student.write(index, student.detach(), momentum=INPUTS["nce_m"])
        contrast.teacher.write(index, teacher.detach(), momentum=INPUTS["nce_m"])
        torch.testing.assert_close(loss.detach(), tensor(expected["loss"]), **CLOSE)
        torch.testing.assert_close(feature.grad, tensor(expected["grad_feat_student"]), **CLOSE)
        torch.testing.assert_close(weight_s.grad, tensor(expected["grad_embed_s_weight"]), **CLOSE)
        torch.testing.assert_close(weight_t.grad, tensor(expected["grad_embed_t_weight"]), **CLOSE)
        torch.testing.assert_close(
            contrast.student.rows_ND[index], tensor(expected["bank_student_rows_after"]), **CLOSE
        )
        torch.testing.assert_close(
            contrast.teacher.rows_ND[index], tensor(expected["bank_teacher_rows_after"]), **CLOSE
        )
        for normaliser, name in ((contrast.student_z, "student"), (contrast.teacher_z, "teacher")):
            assert normaliser.log_z.exp().item() == pytest.approx(expected[f"Z_{name}_query"], rel=1e-10)


def _by_formula(n: int, d: int, f: str) -> Tensor:
    """A table of a printed formula over row and column numbers."""
    names = {"sin": math.sin, "cos": math.cos}
    return tensor([[eval(f, names, {"n": i, "b": i, "d": j}) for j in range(d)] for i in range(n)])


@pytest.mark.parametrize(("direction", "reading"), [("released", "released_miccai"), ("paper", "paper")])
def test_a_real_window_of_places_is_golden(direction: str, reading: str):
    case = CARD["contrast_midsize"]
    rows, dim, batch = case["n_data"], case["feat_dim"], case["batch"]
    contrast = contrast_of(
        _by_formula(rows, dim, "0.35*sin(0.61*n+1.7*d+0.013*n*d)"),
        _by_formula(rows, dim, "0.35*cos(0.43*n-1.3*d+0.017*n*d)"),
    )
    student = F.normalize(_by_formula(batch, dim, "sin(0.9*b+0.5*d+0.3)"), dim=1)
    teacher = F.normalize(_by_formula(batch, dim, "cos(0.7*b-0.8*d+0.1)"), dim=1)
    anchor = torch.tensor([5, 105, 205, 305])
    loss = contrast(
        student,
        teacher,
        (anchor[:, None] + torch.arange(220)) % rows,
        torch.tensor(case["mid_rank_positions"]),
        n_positive=case["nce_p"],
        keep_negative=case["nce_k2"],
        temperature=case["nce_t"],
        direction=direction,
        world=World(),
    )
    expected = case["results"][reading]
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-8)
    assert contrast.student_z.log_z.exp().item() == pytest.approx(expected["Z_student_query"], rel=1e-10)
    assert contrast.teacher_z.log_z.exp().item() == pytest.approx(expected["Z_teacher_query"], rel=1e-10)


def test_bank_starts_from_its_seed_with_rows_of_unit_expected_square():
    bank = MemoryBank(4000, 16, seed=3)
    assert torch.equal(bank.rows_ND, MemoryBank(4000, 16, seed=3).rows_ND)
    assert not torch.equal(bank.rows_ND, MemoryBank(4000, 16, seed=4).rows_ND)
    assert bank.rows_ND.square().sum(1).mean().item() == pytest.approx(1.0, abs=0.02)
