"""Distillation through prototypes as a method: its losses against the plain formula, and what moves when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from distkd.base import StepOutput, World
from distkd.errors import ConfigError
from distkd.methods.prototype_kd import Config, PrototypeKD
from tests.methods.common import ROWS, batch_of, gradients, make


def prototype_kd(**config: Any) -> PrototypeKD:
    method = make("prototype_kd", embedding_dim=4, **config)
    assert isinstance(method, PrototypeKD)
    method.trainable.train()
    return method


def step_of(method: PrototypeKD, rows: list[int], step: int = 0, unlabelled: tuple[int, ...] = ()) -> StepOutput:
    return method.step(method.trainable, batch_of(rows, step=step, unlabelled=unlabelled), World())


def margin_by_pairs(z: Tensor, label: Tensor, codes: Tensor) -> Tensor:
    score = torch.stack([(5 * z @ codes[c].T).exp().sum(1).log() / 5 for c in range(3)], dim=1)
    cost = z.new_zeros(())
    for row, y in zip(score, label.tolist(), strict=True):
        if y >= 0:
            cost = cost + sum((1 + (20 * (0.3 - row[y] + row[c])).exp()).log() for c in range(3) if c != y) / 2
    return cost / (len(z) * 18 / 24)


@pytest.mark.parametrize("per_class", [1, 2])
def test_loss_and_all_gradients_are_those_of_the_formula(per_class: int):
    labels = torch.where(torch.arange(ROWS) < 18, torch.arange(ROWS) % 3, -1)
    weights = {"beta": 0.7, "teacher_beta": 0.2, "alpha": 0.3, "temperature": 2.0}
    method = prototype_kd(per_class=per_class, labels=labels, **weights)
    assert method.prototypes.sum_CMD.shape == (3, per_class, 4)
    for step in range(3):
        method.after_step(step_of(method, [0, 1, 2, 5, 3, 4], step), World())
    rows, hidden = [3, 4, 7, 8], (7,)
    out = step_of(method, rows, step=3, unlabelled=hidden)
    out.loss.backward()
    found = gradients(method.trainable)
    method.trainable.zero_grad()
    batch = batch_of(rows, step=3, unlabelled=hidden)
    student, teacher = method.student(batch), method.frozen["teacher"](batch)
    codes = F.normalize(method.prototypes.sum_CMD, dim=2)
    to_expect = 4 * 18 / 24
    parts = {
        "task": F.cross_entropy(student.logits_BC, batch.label_B, ignore_index=-1, reduction="sum") / to_expect,
        "kl_teacher": 4
        * F.kl_div(F.log_softmax(student.logits_BC / 2, 1), F.softmax(teacher.logits_BC / 2, 1), reduction="batchmean"),
        "margin_student": margin_by_pairs(method.model.own(student.feature_BD), batch.label_B, codes),
        "margin_teacher": margin_by_pairs(method.model.other(teacher.feature_BD), batch.label_B, codes),
    }
    total = parts["task"] + 0.3 * parts["kl_teacher"] + 0.7 * parts["margin_student"] + 0.2 * parts["margin_teacher"]
    total.backward()
    expected = gradients(method.trainable)
    assert out.loss.item() == pytest.approx(total.item(), abs=1e-12)
    for name, value in parts.items():
        torch.testing.assert_close(out.parts[name], value.detach())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=1e-10)


def test_codes_are_the_teachers_and_move_once_after_all_passes():
    """Two passes are one update: a code's older sum is shrunk once, not twice."""
    method = prototype_kd(momentum=0.5)
    method.after_step(step_of(method, [0, 1, 2]), World())
    before = method.prototypes.sum_CMD.clone()
    outs = [step_of(method, rows, step=1, unlabelled=(7,)) for rows in ([3, 4], [6, 7])]
    assert torch.equal(method.prototypes.sum_CMD, before)
    method.after_step(StepOutput.merge(outs), World())
    with torch.no_grad():
        z = method.model.other(method.frozen["teacher"](batch_of([3, 4, 6], step=1)).feature_BD)
    expected = torch.stack([0.5 * before[0, 0] + z[0] + z[2], 0.5 * before[1, 0] + z[1], before[2, 0]])
    torch.testing.assert_close(method.prototypes.sum_CMD[:, 0], expected)


def test_the_first_step_learns_from_the_labels_alone():
    method = prototype_kd()
    out = step_of(method, [0, 1, 2])
    assert out.parts["margin_student"] == out.parts["margin_teacher"] == out.gauges["prototypes/known"] == 0
    assert torch.equal(out.loss, out.parts["task"])
    method.after_step(out, World())
    out = step_of(method, [0, 1, 2], step=1)
    assert out.gauges["prototypes/known"] == 1
    assert out.parts["margin_student"] > 0


def test_heads_beyond_the_student_are_named_to_the_engine():
    method = prototype_kd()
    heads = [*method.model.own.parameters(), *method.model.other.parameters()]
    assert {id(p) for p in method.outside} == {id(p) for p in heads}
    assert not method.follows_weights


def test_one_class_is_refused():
    with pytest.raises(ConfigError, match="compares classes, but the training labels have 1 of the task's 3; use a"):
        make("prototype_kd", labels=torch.where(torch.arange(ROWS) % 2 == 0, 1, -1))


def test_labels_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="training labels reach 3, but the 3 classes of the task are 0 to 2; make"):
        make("prototype_kd", labels=torch.arange(ROWS) % 4)


@pytest.mark.parametrize(
    "field, value", [("per_class", 0), ("embedding_dim", 0), ("momentum", 1.0), ("momentum", -0.1), ("scale", 0)]
)
def test_nothing_outside_its_range_is_taken(field: str, value: float):
    with pytest.raises(ValidationError, match=field):
        Config.model_validate({"name": "prototype_kd", field: value})
