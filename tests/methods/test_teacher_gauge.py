"""How a frozen teacher itself does on the batch, beside the student's task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from distkd import methods
from distkd.base import Outputs, World
from distkd.methods import Method
from distkd.methods._plain import teacher_gauges
from tests.methods.common import ROWS, batch_of, make

WITH_TEACHER = [name for name in methods.available() if methods.config_class(name).needs_teacher]
LABELS = (torch.arange(ROWS) % 3).where(torch.arange(ROWS) % 4 > 0, -1)
"""Three of four training samples have a label."""


def calls_of(method: Method) -> list[Outputs]:
    """What the frozen teacher answers from now on."""
    seen: list[Outputs] = []

    def note(_module: Any, _inputs: Any, out: Any) -> None:
        seen.append(out)

    method.frozen["teacher"].register_forward_hook(note)
    return seen


@pytest.mark.parametrize("name", methods.available())
def test_the_gauge_is_there_where_a_trained_teacher_is(name: str):
    method = make(name)
    out = method.step(method.trainable, batch_of([0, 1, 2, 5]), World())
    assert ("teacher/task" in out.gauges) == (name in WITH_TEACHER)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_it_is_the_cross_entropy_of_the_logits_that_the_step_has_anyway(name: str):
    method, batch = make(name, labels=LABELS), batch_of([0, 1, 2, 4, 5, 7], unlabelled=(0, 4))
    seen = calls_of(method)
    gauge = method.step(method.trainable, batch, World()).gauges["teacher/task"]
    assert len(seen) == 1
    labelled = batch.label_B >= 0
    total = F.cross_entropy(seen[0].logits_BC[labelled], batch.label_B[labelled], reduction="sum")
    assert gauge.item() == pytest.approx(total.item() / (6 * 0.75), rel=1e-6)  # as the part `task` is normalised
    assert not gauge.requires_grad


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_teacher_that_answers_as_the_student_has_the_students_task(name: str):
    method, batch = make(name, labels=LABELS), batch_of([0, 1, 2, 4, 5, 7], unlabelled=(0, 4))
    method.trainable.eval()
    out = method.step(method.trainable, batch, World())
    share = (LABELS >= 0).float().mean().item()
    same = teacher_gauges(method.student(batch), batch, share)
    assert same["teacher/task"].item() == pytest.approx(out.parts["task"].item(), rel=1e-12)


def test_the_mean_over_ranks_is_that_of_the_global_batch_whoever_has_the_labels():
    teacher = make("logit_kd").frozen["teacher"]
    halves = [batch_of([0, 4, 8, 1], unlabelled=(0, 4, 8)), batch_of([2, 3, 5, 6], unlabelled=())]
    whole = batch_of([0, 4, 8, 1, 2, 3, 5, 6], unlabelled=(0, 4, 8))
    each = [teacher_gauges(teacher(batch), batch, 0.75)["teacher/task"].item() for batch in (*halves, whole)]
    assert (each[0] + each[1]) / 2 == pytest.approx(each[2], rel=1e-12)
