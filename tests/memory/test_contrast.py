"""Contrast through banks against the numbers of the released codes: CRD, DC-Distill and DSCD."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distkd.base import World
from distkd.memory.bank import MemoryBank
from distkd.memory.contrast import Choice, ContrastPair, choose
from tests.golden_numbers import golden, tensor

CARD = golden("dc-distill-gk-refine")
INPUTS = CARD["contrast_inputs"]
CRD = golden("crd")
M3LR = golden("m3lr-dscd-gkm")
RANKS = {"hard": [0, 1, 2], "mid": INPUTS["mid_rank_positions"]}
CLOSE = {"atol": 1e-8, "rtol": 0.0}


def contrast_of(student: Tensor, teacher: Tensor) -> ContrastPair:
    pair = ContrastPair(*student.shape, seed=0).double()
    for bank, rows in ((pair.student, student), (pair.teacher, teacher)):
        bank.rows_ND.copy_(rows)
        bank.refresh()
    return pair


def project(feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.normalize(F.linear(feature, weight, bias), dim=1)


def discrepant(
    pair: ContrastPair, student: Tensor, teacher: Tensor, candidates: Tensor, ranks: Tensor, **how: Any
) -> Tensor:
    """The loss on the candidates that are chosen by discrepancy, on one process."""
    anchors = (student.detach(), teacher.detach())
    temperature = how.pop("temperature")
    choice = choose(pair, anchors, candidates, ranks, **how)
    return pair(student, teacher, anchors, choice, temperature=temperature, world=World())


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
        loss = discrepant(
            contrast,
            student,
            teacher,
            tensor(INPUTS["candidate_rows"]),
            torch.tensor(RANKS[mode]),
            n_positive=INPUTS["nce_p"],
            keep_negative=INPUTS["nce_k2"],
            temperature=INPUTS["nce_t"],
            direction=direction,
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
    loss = discrepant(
        contrast,
        student,
        teacher,
        (anchor[:, None] + torch.arange(220)) % rows,
        torch.tensor(case["mid_rank_positions"]),
        n_positive=case["nce_p"],
        keep_negative=case["nce_k2"],
        temperature=case["nce_t"],
        direction=direction,
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


@pytest.mark.parametrize("reweight", [False, True])
def test_two_steps_of_dscd_are_golden(reweight: bool):
    inputs, cases = M3LR["dscd_inputs"], M3LR["dscd"][f"neg_reweight_{reweight}"]
    pair = contrast_of(tensor(inputs["bank_student_init"]), tensor(inputs["bank_teacher_init"]))
    weight_s, weight_t = tensor(inputs["embed_s_weight"], grad=True), tensor(inputs["embed_t_weight"], grad=True)
    index = tensor(inputs["anchor_rows"])
    for step in (1, 2):
        expected = cases[f"step{step}"]
        feature = tensor(inputs[f"feat_student_step{step}"], grad=True)
        student = project(feature, weight_s, tensor(inputs["embed_s_bias"]))
        teacher = project(tensor(inputs[f"feat_teacher_step{step}"]), weight_t, tensor(inputs["embed_t_bias"]))
        loss = discrepant(
            pair,
            student,
            teacher,
            tensor(inputs["candidate_rows"]),
            torch.arange(inputs["nce_p2"]),
            n_positive=inputs["nce_p"],
            keep_negative=None,
            temperature=inputs["nce_t"],
            direction="paper",
            reweight=reweight,
        )
        weight_s.grad = weight_t.grad = None
        loss.backward()
        for bank, rows, name in ((pair.student, student, "student"), (pair.teacher, teacher, "teacher")):
            bank.write(index, rows.detach(), momentum=inputs["nce_m"])
            torch.testing.assert_close(bank.rows_ND[index], tensor(expected[f"bank_{name}_rows_after"]), **CLOSE)
        torch.testing.assert_close(loss.detach(), tensor(expected["loss"]), **CLOSE)
        torch.testing.assert_close(feature.grad, tensor(expected["grad_feat_student"]), **CLOSE)
        torch.testing.assert_close(weight_s.grad, tensor(expected["grad_embed_s_weight"]), **CLOSE)
        torch.testing.assert_close(weight_t.grad, tensor(expected["grad_embed_t_weight"]), **CLOSE)
        assert pair.student_z.log_z.exp().item() == pytest.approx(expected["Z_student_query"], rel=1e-10)
        assert pair.teacher_z.log_z.exp().item() == pytest.approx(expected["Z_teacher_query"], rel=1e-10)


def test_instance_contrast_of_the_shipped_trainer_is_golden():
    inputs, case = M3LR["dscd_inputs"], M3LR["instance_crd_with_epoch_ramp"]
    pair = contrast_of(tensor(inputs["bank_student_init"]), tensor(inputs["bank_teacher_init"]))
    embedded = [
        project(
            tensor(inputs[f"feat_{name}_step1"]), tensor(inputs[f"embed_{n}_weight"]), tensor(inputs[f"embed_{n}_bias"])
        )
        for name, n in (("student", "s"), ("teacher", "t"))
    ]
    loss = instance(pair, *embedded, tensor(case["candidate_rows"]), temperature=inputs["nce_t"])
    assert loss.item() == pytest.approx(case["loss_without_ramp"], abs=1e-8)


def instance(pair: ContrastPair, student: Tensor, teacher: Tensor, rows: Tensor, *, temperature: float) -> Tensor:
    """CRD's loss on one process: one positive in column 0."""
    choice = Choice(rows, 1, (1, rows.shape[1] - 1))
    anchors = (student.detach(), teacher.detach())
    return pair(student, teacher, anchors, choice, temperature=temperature, world=World())


class Heads:
    """The two projections of the CRD card, and what its golden file says of their gradients."""

    def __init__(self) -> None:
        inputs = CRD["inputs"]
        self.weight = [tensor(inputs[f"embed_{n}_weight"], grad=True) for n in "st"]
        self.bias = [tensor(inputs[f"embed_{n}_bias"], grad=True) for n in "st"]

    def __call__(self, features: list[Tensor]) -> list[Tensor]:
        return [project(*parts) for parts in zip(features, self.weight, self.bias, strict=True)]

    def check(self, expected: dict[str, Any]) -> None:
        for side, n in enumerate("st"):
            for grad, name in ((self.weight[side].grad, "weight"), (self.bias[side].grad, "bias")):
                if f"grad_embed_{n}_{name}" in expected:
                    torch.testing.assert_close(grad, tensor(expected[f"grad_embed_{n}_{name}"]), **CLOSE)


def crd_pair() -> ContrastPair:
    return contrast_of(tensor(CRD["inputs"]["bank_student_before"]), tensor(CRD["inputs"]["bank_teacher_before"]))


def check_banks(pair: ContrastPair, expected: dict[str, Any]) -> None:
    for bank, name in ((pair.student, "student"), (pair.teacher, "teacher")):
        torch.testing.assert_close(bank.rows_ND, tensor(expected[f"bank_{name}_after"]), **CLOSE)


def test_two_steps_of_crd_are_golden():
    pair, config = crd_pair(), CRD["config"]
    for step, suffix in ((1, ""), (2, "_step2")):
        expected, heads = CRD[f"step{step}"], Heads()
        features = [tensor(CRD["inputs"][f"f_{n}{suffix}"], grad=True) for n in "st"]
        embedded = heads(features)
        loss = instance(pair, *embedded, tensor(expected["idx"]), temperature=config["T"])
        loss.backward()
        assert loss.item() == pytest.approx(expected["loss"], abs=1e-8)
        for feature, n in zip(features, "st", strict=True):
            torch.testing.assert_close(feature.grad, tensor(expected[f"grad_f_{n}"]), **CLOSE)
        heads.check(expected)
        for bank, rows in zip((pair.student, pair.teacher), embedded, strict=True):
            bank.write(tensor(expected["y"]), rows.detach(), momentum=config["momentum"])
        check_banks(pair, expected)
        assert pair.student_z.log_z.exp().item() == pytest.approx(expected["Z_student_anchor"], rel=1e-10)
        assert pair.teacher_z.log_z.exp().item() == pytest.approx(expected["Z_teacher_anchor"], rel=1e-10)


def test_a_sample_that_occurs_twice_is_golden():
    case, pair, config = CRD["duplicate_positive"], crd_pair(), CRD["config"]
    embedded = Heads()([tensor(CRD["inputs"][f"f_{n}"]) for n in "st"])
    loss = instance(pair, *embedded, tensor(case["idx"]), temperature=config["T"])
    assert loss.item() == pytest.approx(case["loss"], abs=1e-8)
    for bank, rows, name in zip((pair.student, pair.teacher), embedded, ("student", "teacher"), strict=True):
        bank.write(tensor(case["y"]), rows.detach(), momentum=config["momentum"])
        torch.testing.assert_close(bank.rows_ND[3], tensor(case[f"bank_{name}_after_row3"]), **CLOSE)
