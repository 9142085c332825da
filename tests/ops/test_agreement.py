"""The rules as functions of a Gram matrix: the cards' numbers, then what they promise where no number is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distkd.ops.agreement import (
    agreement_counts,
    conflict_averse_weights,
    cosine_matrix,
    minimum_norm_weights,
    pack_symmetric,
    projected_weights,
    row_sum_weights,
    running_mean,
    sample_cosines,
    unpack_symmetric,
)
from tests.golden_numbers import golden, tensor

GK_REFINE = golden("dc-distill-gk-refine")["gradient_agreement_toy"]
GKM = golden("m3lr-dscd-gkm")["gradient_modulation_toy"]
CONFLICT = golden("beyond")["gradient_conflict"]
CLOSE = {"atol": 1e-8, "rtol": 0.0}

ON_TRUNK: dict[str, Callable[[Tensor], Tensor]] = {
    "pcgrad": projected_weights,
    "pcgrad_each": partial(projected_weights, of="each"),
    "mgda": minimum_norm_weights,
    "cagrad": conflict_averse_weights,
}
every_trunk_rule = pytest.mark.parametrize("name", ON_TRUNK)


def _gram(*gradients: Tensor) -> Tensor:
    stacked = torch.stack(gradients)
    return stacked @ stacked.T


def _vectors(n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(n, 6, generator=generator, dtype=torch.float64).unbind())


# golden numbers


def test_row_sums_of_hand_made_gradients_are_golden():
    gradients = tensor(GK_REFINE["gradients"])
    cosines = cosine_matrix(gradients @ gradients.T)
    torch.testing.assert_close(cosines, tensor(GK_REFINE["cosine_matrix"]), **CLOSE)
    weights = row_sum_weights(cosines)
    torch.testing.assert_close(weights, tensor(GK_REFINE["weights_released"])[:4], **CLOSE)
    torch.testing.assert_close(weights @ tensor(GK_REFINE["losses"]), tensor(GK_REFINE["sum_kd"]), **CLOSE)


def test_counts_of_hand_made_gradients_are_golden():
    gradients = tensor(GKM["gradients"])
    cosines = cosine_matrix(gradients @ gradients.T)
    torch.testing.assert_close(cosines, tensor(GKM["cosine_matrix"]), **CLOSE)
    counts = agreement_counts(cosines)
    torch.testing.assert_close(counts, tensor(GKM["counts"])[:4], **CLOSE)
    weights = running_mean(torch.tensor(GKM["previous_weights"][:4]).double(), counts, 0.5)
    torch.testing.assert_close(weights, tensor(GKM["weights"])[:4], **CLOSE)
    torch.testing.assert_close(weights @ tensor(GKM["losses"]), tensor(GKM["sum_kd"]), **CLOSE)


@pytest.mark.parametrize(
    "name, key", [("pcgrad", "pcgrad_task_priority"), ("pcgrad_each", "pcgrad_task_priority"), ("mgda", "mgda")]
)
def test_two_conflicting_gradients_are_combined_as_the_card_says(name: str, key: str):
    gradients = tensor([CONFLICT["g_kd"], CONFLICT["g_task"]])
    gram = gradients @ gradients.T
    torch.testing.assert_close(cosine_matrix(gram)[0, 1], tensor(CONFLICT["cosine"]), **CLOSE)
    torch.testing.assert_close(ON_TRUNK[name](gram) @ gradients, tensor(CONFLICT[key]), **CLOSE)
    if name == "mgda":
        torch.testing.assert_close(ON_TRUNK[name](gram)[1], tensor(CONFLICT["mgda_weight_on_task"]), **CLOSE)


def test_a_conflict_averse_step_is_golden():
    gradients = tensor([CONFLICT["g_kd"], CONFLICT["g_task"]])
    weights = conflict_averse_weights(gradients @ gradients.T, c=CONFLICT["cagrad_c"])
    share = (weights - 0.5)[1] / (weights - 0.5).sum()
    # the card's minimum was searched by its values, which tell shares apart to the root of float64's precision
    torch.testing.assert_close(share, tensor(CONFLICT["cagrad_weight_on_task"]), atol=2e-8, rtol=0)
    torch.testing.assert_close(weights @ gradients, tensor(CONFLICT["cagrad"]), atol=2e-8, rtol=0)


# what the rules promise


@given(seed=st.integers(0, 10_000), c=st.floats(0.01, 2.0), opposed=st.booleans())
def test_no_other_share_is_better_for_the_worse_off(seed: int, c: float, opposed: bool):
    distilled, task = _vectors(2, seed)
    if opposed:
        distilled = 0.01 * distilled - task
    weights = conflict_averse_weights(_gram(distilled, task), c=c)
    mean = (distilled + task) / 2

    def worst(share: Tensor) -> Tensor:
        mixed = share[..., None] * task + (1 - share[..., None]) * distilled
        return mixed @ mean + c * mean.norm() * mixed.norm(dim=-1)

    share = ((weights - 0.5)[1] / (weights - 0.5).sum()).clamp(0, 1)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert worst(share) <= worst(grid).min() + 1e-12
    moved = weights[0] * distilled + weights[1] * task - mean
    torch.testing.assert_close(moved.norm(), c * mean.norm())


@given(seed=st.integers(0, 10_000))
def test_the_minimum_norm_mixture_undoes_neither(seed: int):
    first, second, task = _vectors(3, seed)
    weights = minimum_norm_weights(_gram(first, second, task))
    mixed = weights @ torch.stack([first, second, task])
    assert weights[0] == weights[1]
    assert mixed.dot(task) >= -1e-12
    assert mixed.dot(first + second) >= -1e-12
    for share in torch.linspace(0, 1, 101, dtype=torch.float64):
        assert mixed.norm() <= (share * task + (1 - share) * (first + second)).norm() + 1e-12


@pytest.mark.parametrize("of", ["sum", "each"])
def test_projection_removes_what_undoes_the_task_and_nothing_else(of: str):
    first, second, task = _vectors(3, seed=4)
    second = second - 2 * task
    assert first.dot(task) > 0 > (first + second).dot(task)

    def without_conflict(gradient: Tensor) -> Tensor:
        return gradient - gradient.dot(task).clamp_max(0) / task.dot(task) * task

    if of == "each":
        expected = task + without_conflict(first) + without_conflict(second)
    else:
        expected = task + without_conflict(first + second)
    weights = projected_weights(_gram(first, second, task), of=of)
    torch.testing.assert_close(weights @ torch.stack([first, second, task]), expected)


@every_trunk_rule
def test_gradients_that_agree_are_not_projected_and_scaling_all_changes_nothing(name: str):
    first, second, task = _vectors(3, seed=7)
    gram = _gram(first + 3 * task, second + 3 * task, task)
    if name.startswith("pcgrad"):
        assert torch.equal(ON_TRUNK[name](gram), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(ON_TRUNK[name](gram * 1e-6), ON_TRUNK[name](gram))


@every_trunk_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_missing_gradient_leaves_nothing_to_settle(name: str, dtype: torch.dtype):
    first, task = (vector.to(dtype) for vector in _vectors(2))
    zero = torch.zeros_like(task)
    for gradients in ([zero, task], [first, zero], [zero, zero]):
        assert torch.equal(ON_TRUNK[name](_gram(*gradients)), torch.ones(2, dtype=dtype))


@every_trunk_rule
@pytest.mark.parametrize("factor", [1.0, -1.0, -2.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parallel_and_opposed_gradients_have_finite_factors(name: str, factor: float, dtype: torch.dtype):
    task = _vectors(1)[0].to(dtype)
    weights = ON_TRUNK[name](_gram(factor * task, task))
    assert weights.isfinite().all()
    assert weights.abs().max() < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_gradients_are_shared_evenly(dtype: torch.dtype):
    task = _vectors(1)[0].to(dtype)
    gram = _gram(task, task)
    torch.testing.assert_close(minimum_norm_weights(gram), torch.full((2,), 0.5, dtype=dtype))
    torch.testing.assert_close(conflict_averse_weights(gram, c=0.5), torch.full((2,), 0.75, dtype=dtype))


@given(seed=st.integers(0, 1000), factor=st.floats(0.2, 5.0), c=st.floats(1.2, 3.0))
def test_a_mixture_that_cancels_has_no_direction_to_move_in(seed: int, factor: float, c: float):
    """Opposite gradients and c > 1: the best mixture is zero, what is left of it is rounding."""
    for dtype in (torch.float32, torch.float64):
        task = _vectors(1, seed)[0].to(dtype)
        weights = conflict_averse_weights(_gram(-factor * task, task), c=c)
        torch.testing.assert_close(weights, torch.full((2,), 0.5, dtype=dtype))


def test_a_zero_gradient_agrees_with_nobody_and_spoils_nothing():
    gradients = tensor(GK_REFINE["gradients"])
    alive = cosine_matrix(gradients[:3] @ gradients[:3].T)
    gradients[3] = 0
    cosines = cosine_matrix(gradients @ gradients.T)
    assert torch.equal(cosines[3], torch.tensor([0.0, 0, 0, 1, 0], dtype=torch.float64))
    torch.testing.assert_close(cosines[:3, :3], alive)
    assert row_sum_weights(cosines)[3] == 4
    assert agreement_counts(cosines)[3] == 1
    assert agreement_counts(cosines, count_self=False)[3] == 0
    assert agreement_counts(cosines, drop_alone=True)[3] == 0


def test_counting_itself_and_dropping_the_lonely_are_options():
    cosines = tensor(GKM["cosine_matrix"])
    assert agreement_counts(cosines).tolist() == [3, 3, 1, 1]
    assert agreement_counts(cosines, count_self=False).tolist() == [2, 2, 0, 0]
    assert agreement_counts(cosines, drop_alone=True).tolist() == [3, 3, 0, 0]
    assert agreement_counts(cosines, threshold=0.6).tolist() == [3, 2, 1, 1]
    assert agreement_counts(cosines, threshold=-1.0).tolist() == [5, 5, 5, 5]


def test_a_running_mean_begins_with_its_first_value():
    fresh = torch.tensor([1.0, 3.0])
    assert torch.equal(running_mean(torch.full((2,), torch.nan), fresh, 0.9), fresh)
    torch.testing.assert_close(running_mean(torch.zeros(2), fresh, 0.9), 0.1 * fresh)


def test_weights_can_be_bounded_below_and_brought_to_size():
    cosines = tensor(GK_REFINE["cosine_matrix"])
    assert row_sum_weights(cosines, clamp_min=0.0).min() == 0
    assert row_sum_weights(cosines)[2] < 0
    torch.testing.assert_close(row_sum_weights(cosines, normalise=True).abs().mean().item(), 1.0)


def test_cosines_by_sample_know_who_has_a_task():
    task_BX = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    distilled_LBX = torch.tensor([[[3.0, 0.0], [0.0, -1.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]])
    cosines_LB, has_task_B = sample_cosines(distilled_LBX, task_BX)
    torch.testing.assert_close(cosines_LB, torch.tensor([[1.0, -1.0, 0.0], [0.5**0.5, 0.0, 0.0]]))
    assert has_task_B.tolist() == [True, True, False]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_symmetric_packing_is_lossless(n: int):
    half = torch.randn(n, n, dtype=torch.float64)
    matrix = half + half.T
    packed = pack_symmetric(matrix)
    assert packed.shape == (n * (n + 1) // 2,)
    assert torch.equal(unpack_symmetric(packed, n), matrix)
