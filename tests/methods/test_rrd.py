"""RRD as a method: its losses against the plain formula, and what moves when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from distkd.base import StepOutput, World
from distkd.errors import ConfigError
from distkd.methods.rrd import RRD, Config
from tests.methods.common import batch_of, gradients, make

SMALL = {"embedding_dim": 4, "queue_length": 10}


def rrd(**config: Any) -> RRD:
    method = make("rrd", **SMALL, **config)
    assert isinstance(method, RRD)
    method.trainable.train()
    return method


def step_of(method: RRD, rows: list[int], step: int = 0) -> StepOutput:
    return method.step(method.trainable, batch_of(rows, step=step), World())


def relation_by_autograd(method: RRD, rows: list[int], step: int, own_key: bool) -> Tensor:
    batch = batch_of(rows, step=step)
    with torch.no_grad():
        key = method.state["key"](method.frozen["teacher"](batch).feature_BD)
    student = method.model.own(method.student(batch).feature_BD)
    queue = method.queue.rows_QD[: int(method.queue.filled())]
    scores = {}
    for name, side, temperature in (("student", student, 0.05), ("teacher", key, 0.2)):
        score = side @ queue.T
        if own_key:
            score = torch.cat([score, (side * key).sum(1, keepdim=True)], dim=1)
        scores[name] = score / temperature
    target = F.softmax(scores["teacher"], dim=1)
    return -(target * F.log_softmax(scores["student"], dim=1)).sum(1).mean()


@pytest.mark.parametrize("own_key", [False, True])
def test_loss_and_all_gradients_are_those_of_the_formula(own_key: bool):
    temperatures = {"student_temperature": 0.05, "teacher_temperature": 0.2, "temperature": 2.0}
    method = rrd(beta=0.7, alpha=0.3, own_key=own_key, **temperatures)
    for step in range(3):
        method.after_step(step_of(method, [0, 1, 2, 5], step), World())
    out = step_of(method, [3, 4, 7], step=3)
    out.loss.backward()
    found = gradients(method.trainable)
    method.trainable.zero_grad()
    batch = batch_of([3, 4, 7], step=3)
    student, teacher = method.student(batch), method.frozen["teacher"](batch)
    task = F.cross_entropy(student.logits_BC, batch.label_B)
    kl = 4 * F.kl_div(
        F.log_softmax(student.logits_BC / 2, 1), F.softmax(teacher.logits_BC / 2, 1), reduction="batchmean"
    )
    relation = relation_by_autograd(method, [3, 4, 7], 3, own_key)
    (task + 0.3 * kl + 0.7 * relation).backward()
    expected = gradients(method.trainable)
    assert out.loss.item() == pytest.approx((task + 0.3 * kl + 0.7 * relation).item(), abs=1e-12)
    for name, value in {"task": task, "kl_teacher": kl, "relation": relation}.items():
        torch.testing.assert_close(out.parts[name], value.detach())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=1e-10)


def test_keys_are_the_teachers_and_enter_after_the_step_pass_by_pass():
    method = rrd()
    outs = [step_of(method, rows) for rows in ([0, 1], [2, 5])]
    assert method.queue.filled() == 0
    out = StepOutput.merge(outs)
    method.after_step(out, World())
    batch = batch_of([0, 1, 2, 5])
    expected = F.normalize(method.state["key"].linear(method.frozen["teacher"](batch).feature_BD), dim=1)
    torch.testing.assert_close(method.queue.rows_QD[:4], expected)
    assert method.queue.filled() == 4
    assert step_of(method, [0]).gauges["queue/filled"] == pytest.approx(0.4)


def test_the_first_step_learns_from_the_labels_alone():
    method = rrd(beta=5.0)
    out = step_of(method, [0, 1, 2])
    assert out.parts["relation"] == 0
    assert torch.equal(out.loss, out.parts["task"])


def test_the_teachers_projection_is_kept_in_checkpoints_and_never_learns():
    method = rrd()
    keys = {name for name in method.state.state_dict() if name.startswith("key.")}
    assert keys == {"key.linear.weight", "key.linear.bias"}
    assert not [p for p in method.state.parameters() if p.requires_grad]
    learning = {id(p) for group in method.groups() for p in group["params"]}
    assert not learning & {id(p) for p in method.state.parameters()}
    assert {id(p) for p in method.outside} == {id(p) for p in method.model.own.parameters()}
    assert not method.follows_weights


def test_a_batch_without_labels_is_still_related():
    method = rrd()
    method.after_step(step_of(method, [0, 1, 2, 5]), World())
    out = method.step(method.trainable, batch_of([3, 4], unlabelled=(3, 4), step=1), World())
    assert out.parts["task"] == 0
    assert out.parts["relation"] > 0


@pytest.mark.parametrize("field", ["queue_length", "embedding_dim", "student_temperature", "teacher_temperature"])
def test_nothing_below_its_range_is_taken(field: str):
    with pytest.raises(ValidationError, match="greater than 0"):
        Config.model_validate({"name": "rrd", field: 0})


def test_a_state_of_another_length_does_not_load():
    with pytest.raises(RuntimeError, match=r"queue\.rows_QD"):
        rrd().state.load_state_dict(make("rrd", embedding_dim=4, queue_length=11).state.state_dict())


def test_it_needs_no_classes():
    make("rrd", **SMALL, labels=torch.full((24,), 2))
    with pytest.raises(ConfigError, match="or method 'rrd', which needs no labels"):
        make("prototype_kd", labels=torch.full((24,), 2))
