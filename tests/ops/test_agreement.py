from __future__ import annotations

import torch

from distkd.ops.agreement import cosine_matrix, pack_symmetric, row_sum_weights, unpack_symmetric
from tests.golden_numbers import golden, tensor

TOY = golden("dc-distill-gk-refine")["gradient_agreement_toy"]


def test_weights_of_hand_made_gradients_are_golden():
    gradients = tensor(TOY["gradients"])
    cosines = cosine_matrix(gradients @ gradients.T)
    torch.testing.assert_close(cosines, tensor(TOY["cosine_matrix"]), atol=1e-8, rtol=0)
    weights = row_sum_weights(cosines)
    torch.testing.assert_close(weights, tensor(TOY["weights_released"])[:4], atol=1e-8, rtol=0)
    torch.testing.assert_close(weights @ tensor(TOY["losses"]), tensor(TOY["sum_kd"]), atol=1e-8, rtol=0)


def test_a_zero_gradient_agrees_with_nobody_and_spoils_nothing():
    gradients = tensor(TOY["gradients"])
    alive = cosine_matrix(gradients[:3] @ gradients[:3].T)
    gradients[3] = 0
    cosines = cosine_matrix(gradients @ gradients.T)
    assert torch.equal(cosines[3], torch.tensor([0.0, 0, 0, 1, 0], dtype=torch.float64))
    torch.testing.assert_close(cosines[:3, :3], alive)
    assert row_sum_weights(cosines)[3] == 4


def test_weights_can_be_bounded_below_and_brought_to_size():
    cosines = tensor(TOY["cosine_matrix"])
    assert row_sum_weights(cosines, clamp_min=0.0).min() == 0
    assert row_sum_weights(cosines)[2] < 0
    torch.testing.assert_close(row_sum_weights(cosines, normalise=True).abs().mean().item(), 1.0)


def test_symmetric_packing_is_lossless():
    half = torch.randn(5, 5, dtype=torch.float64)
    matrix = half + half.T
    packed = pack_symmetric(matrix)
    assert packed.shape == (15,)
    assert torch.equal(unpack_symmetric(packed, 5), matrix)
