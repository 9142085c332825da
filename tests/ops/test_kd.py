from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distkd.ops.kd import kl_at_temperature, labelled_cross_entropy
from tests.golden_numbers import golden, tensor


@pytest.mark.parametrize("temperature", [1, 4])
def test_divergence_and_its_gradient_are_golden(temperature: int):
    numbers = golden("dc-distill-gk-refine")["distill_kl"]
    student = tensor(numbers["student_logits"], grad=True)
    loss = kl_at_temperature(student, tensor(numbers["teacher_logits"]), temperature)
    loss.backward()
    expected = numbers[f"T={temperature}"]
    torch.testing.assert_close(loss.detach(), tensor(expected["loss"]), atol=1e-8, rtol=0)
    torch.testing.assert_close(student.grad, tensor(expected["grad_student_logits"]), atol=1e-8, rtol=0)


def test_cross_entropy_of_all_labels_is_the_plain_mean():
    logits, label = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 2, 0])
    torch.testing.assert_close(labelled_cross_entropy(logits, label), F.cross_entropy(logits, label))


def test_local_means_add_up_to_the_global_one_when_ranks_hold_different_numbers_of_labels():
    logits, label = torch.randn(8, 3, dtype=torch.float64), torch.tensor([0, -1, -1, -1, 2, 1, 0, -1])
    whole = labelled_cross_entropy(logits, label, 0.5)
    halves = [labelled_cross_entropy(logits[i : i + 4], label[i : i + 4], 0.5) for i in (0, 4)]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)
    torch.testing.assert_close(whole, F.cross_entropy(logits[label >= 0], label[label >= 0]))


def test_a_batch_without_labels_has_no_task_loss_and_a_zero_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = labelled_cross_entropy(logits, torch.full((3,), -1), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
