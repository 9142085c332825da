"""The mean teacher; golden numbers `ema` of card `dc-distill-gk-refine`."""

from __future__ import annotations

import pytest
import torch

from distkd.base import InputSpec
from distkd.models.build import EncoderConfig, ModelConfig, build
from distkd.models.ema import MeanTeacher, ema_alpha
from tests.golden_numbers import golden
from tests.models.common import make_batch

SPECS = {"x": InputSpec("vector", (6,))}
CONFIG = ModelConfig(modalities=["x"], encoders={"x": EncoderConfig(widths=(5,))}, feature_dim=4, dropout=0.3)


def _model(seed: int):
    return build(CONFIG, SPECS, 3, seed=seed).double()


def test_alpha_equals_the_golden_numbers():
    numbers = golden("dc-distill-gk-refine")["ema"]
    for step, alpha in numbers["alpha_at_step"].items():
        assert ema_alpha(int(step), numbers["decay"]) == pytest.approx(alpha, abs=1e-14)


def test_first_update_copies_the_student():
    student, teacher = _model(0), MeanTeacher(_model(1), decay=0.99)
    assert not torch.equal(next(teacher.parameters()), next(student.parameters()))
    teacher.update(student, 0)
    for own, new in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(own, new)


def test_updates_equal_the_formula_for_every_parameter():
    student, teacher = _model(0), MeanTeacher(_model(1), decay=0.6)
    expected = [p.detach().clone() for p in teacher.parameters()]
    for step in range(6):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn(p.shape, dtype=p.dtype))
        teacher.update(student, step)
        alpha = min(1 - 1 / (step + 1), 0.6)
        expected = [
            alpha * old + (1 - alpha) * p.detach() for old, p in zip(expected, student.parameters(), strict=True)
        ]
    for own, value in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(own.detach(), value, atol=1e-12, rtol=0)


def test_buffers_are_its_own():
    student, teacher = _model(0), MeanTeacher(_model(1), decay=0.9)
    student(make_batch(SPECS, 8, seed=5))
    before = {name: b.clone() for name, b in teacher.named_buffers()}
    teacher.update(student, 0)
    assert before
    assert all(torch.equal(b, before[name]) for name, b in teacher.named_buffers())
    teacher(make_batch(SPECS, 8, seed=6))
    assert not all(torch.equal(b, before[name]) for name, b in teacher.named_buffers())


def test_forward_is_in_train_mode_without_a_graph_and_drops_other_values_than_the_student():
    student, teacher = _model(0), MeanTeacher(_model(1), decay=0.9)
    teacher.update(student, 0)
    teacher.eval()  # it trains on all the same, as in the source
    batch = make_batch(SPECS, 8)
    found = teacher(batch)
    assert all(layer.training for layer in teacher.model.modules())
    assert not found.logits_BC.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(found.logits_BC, teacher(batch).logits_BC)
    assert not torch.equal(found.logits_BC, student(batch).logits_BC)
    student.role = "mean_teacher"
    torch.testing.assert_close(found.logits_BC, student(batch).logits_BC, atol=1e-12, rtol=0)


def test_its_state_is_saved_and_restored():
    teacher, other = MeanTeacher(_model(1), decay=0.9), MeanTeacher(_model(2), decay=0.9)
    other.load_state_dict(teacher.state_dict())
    batch = make_batch(SPECS, 4)
    assert torch.equal(teacher(batch).logits_BC, other(batch).logits_BC)
