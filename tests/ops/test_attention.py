"""Maps and their losses: the card's numbers, a slow form that differentiates twice, and where nothing is left to scale.

`slow_maps` and `slow_distance` are the released code's form: one backward with a graph for each class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distkd.base import World
from distkd.comm.roots import global_roots
from distkd.errors import ShapeError
from distkd.ops import attention
from distkd.ops.attention import (
    attention_energy,
    class_activation_maps,
    class_maps,
    class_slopes,
    map_distance,
    normalised,
    of_class,
    on_one_grid,
    pooled_to,
    unit_map_distance,
    upsampled,
)
from distkd.ops.kd import labelled_cross_entropy, soft_cross_entropy
from tests.golden_numbers import golden, tensor

CARD = golden("inter-resolution-at-plus")
INPUTS, LOSS, GRAD, NATIVE = (CARD[name] for name in ("inputs", "loss", "grad", "native_resolution_extension"))
CONTRAST = CARD["contrast_do_not_confuse"]
LABEL_B = tensor(CARD["config"]["labels"])
EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 0.0}
NOT_AT_ALL: dict[str, Any] = {"atol": 0.0, "rtol": 0.0}
sides = pytest.mark.parametrize("side", ["student", "teacher"])


def inputs(side: str, *, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, weight and bias of a side."""
    return tuple(tensor(INPUTS[f"{name}_{side}"], grad=grad) for name in "AWb")  # type: ignore[return-value]


def classes_first(maps: Any) -> Tensor:
    return tensor(maps).permute(0, 3, 1, 2)


def logits_of(map_BKHW: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    return F.linear(map_BKHW.mean(dim=(2, 3)), weight_CK, bias_C)


def root_mean_square(difference: Tensor) -> Tensor:
    return global_roots({"": (difference.square().sum(), difference.numel())}, World())[""]


# golden numbers


@sides
def test_maps_are_golden(side: str):
    map_BKHW, weight_CK, _ = inputs(side)
    maps_BCHW = class_maps(map_BKHW, weight_CK)
    torch.testing.assert_close(maps_BCHW, classes_first(CARD["maps_raw"][side]), **EXACT)
    torch.testing.assert_close(normalised(maps_BCHW), classes_first(CARD["maps_normalised"][side]), **EXACT)


@sides
def test_logits_are_the_sums_of_the_activation_maps(side: str):
    map_BKHW, weight_CK, bias_C = inputs(side)
    summed_BC = class_activation_maps(map_BKHW, weight_CK).sum(dim=(2, 3))
    torch.testing.assert_close(summed_BC + bias_C, tensor(CARD["logits"][side]), **EXACT)


def test_the_attention_loss_and_its_gradients_are_golden():
    map_BKHW, weight_CK, _ = inputs("student", grad=True)
    student, teacher = normalised(class_maps(map_BKHW, weight_CK)), normalised(class_maps(*inputs("teacher")[:2]))
    loss = map_distance(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensor(LOSS["attention"]), **EXACT)
    each = [map_distance(student[b : b + 1], teacher[b : b + 1]).item() for b in range(2)]
    assert each == pytest.approx(LOSS["attention_per_sample"], abs=1e-12)
    torch.testing.assert_close(map_BKHW.grad, tensor(GRAD["attention_wrt_A_student"]), **EXACT)
    torch.testing.assert_close(weight_CK.grad, tensor(GRAD["attention_wrt_W_student"]), **EXACT)
    assert GRAD["attention_wrt_b_student"] is None  # no function here is given the bias


def test_other_maps_are_golden_and_other_maps():
    map_BKHW, weight_CK, _ = inputs("student")
    ours = class_maps(map_BKHW, weight_CK)
    others = {
        "plain_cam_student": class_activation_maps(map_BKHW, weight_CK),
        "gradcam_relu_after_sum_student": class_activation_maps(map_BKHW, weight_CK).relu(),
        "relu_on_weight_only_student": class_activation_maps(map_BKHW, weight_CK.relu()),
        "maps_if_activation_were_rectified_student": class_maps(map_BKHW.relu(), weight_CK),
    }
    for name, maps in others.items():
        torch.testing.assert_close(maps, classes_first(CONTRAST[name]), **EXACT, msg=name)
        assert (maps - ours).abs().max() > 0.04, name


def test_other_losses_are_golden_and_other_losses():
    (map_s, weight_s, _), (map_t, weight_t, _) = inputs("student"), inputs("teacher")
    both = class_maps(map_s, weight_s), class_maps(map_t, weight_t)
    of_target = (normalised(class_maps(a, of_class(w, LABEL_B))) for a, w in ((map_s, weight_s), (map_t, weight_t)))
    by_class = (normalised(maps.flatten(0, 1).unsqueeze(1)).view_as(maps) for maps in both)
    others = {
        "attention_loss_target_class_only": map_distance(*of_target),
        "attention_loss_minmax_per_class": map_distance(*by_class),
        "classic_at_power2_loss": unit_map_distance(attention_energy(map_s), attention_energy(map_t)),
    }
    for name, loss in others.items():
        torch.testing.assert_close(loss, tensor(CONTRAST[name]), **EXACT, msg=name)
        assert abs(loss.item() - LOSS["attention"]) > 5e-3, name


def test_maps_of_a_small_student_are_golden():
    map_BKhw, weight_CK = tensor(NATIVE["A_student"], grad=True), tensor(INPUTS["W_student"], grad=True)
    teacher_BKHW = tensor(NATIVE["A_teacher"])
    size = teacher_BKHW.shape[2], teacher_BKHW.shape[3]
    raw_BCHW = upsampled(class_maps(map_BKhw, weight_CK), size)
    torch.testing.assert_close(raw_BCHW.detach(), classes_first(NATIVE["maps_raw_student_upsampled"]), **EXACT)
    loss = map_distance(normalised(raw_BCHW), normalised(class_maps(teacher_BKHW, tensor(INPUTS["W_teacher"]))))
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensor(NATIVE["attention"]), **EXACT)
    torch.testing.assert_close(map_BKhw.grad, tensor(NATIVE["grad_A_student"]), **EXACT)
    torch.testing.assert_close(weight_CK.grad, tensor(NATIVE["grad_W_student"]), **EXACT)
    features = root_mean_square(upsampled(map_BKhw.detach(), size) - teacher_BKHW)
    torch.testing.assert_close(features, tensor(NATIVE["feature_matching"]), **EXACT)


def all_losses(map_BKHW: Tensor, weight_CK: Tensor, bias_C: Tensor) -> dict[str, Tensor]:
    logits_BC, (map_t, weight_t, bias_t) = logits_of(map_BKHW, weight_CK, bias_C), inputs("teacher")
    teacher_BC = logits_of(map_t, weight_t, bias_t)
    return {
        "cross_entropy": labelled_cross_entropy(logits_BC, LABEL_B),
        "attention": map_distance(normalised(class_maps(map_BKHW, weight_CK)), normalised(class_maps(map_t, weight_t))),
        "kd": soft_cross_entropy(logits_BC, teacher_BC, 1.0),
        "feature_matching": root_mean_square(map_BKHW - map_t),
        "softmax_regression": root_mean_square(logits_of(map_BKHW, weight_t, bias_t) - teacher_BC),
    }


def test_all_losses_and_the_gradients_of_their_sum_are_golden():
    leaves = inputs("student", grad=True)
    losses = all_losses(*leaves)
    for name, loss in losses.items():
        torch.testing.assert_close(loss.detach(), tensor(LOSS[name]), **EXACT, msg=name)
    weights = CARD["config"]["weights"]
    alone = losses["cross_entropy"] + weights["fm"] * losses["feature_matching"] + weights["la"] * losses["attention"]
    torch.testing.assert_close(alone.detach(), tensor(LOSS["total_readme_weights_fm0p1_la10"]), **EXACT)
    total = alone + weights["kd"] * losses["kd"] + weights["sr"] * losses["softmax_regression"]
    torch.testing.assert_close(total.detach(), tensor(LOSS["total_with_all_weights"]), **EXACT)
    total.backward()
    for name, leaf in zip("AWb", leaves, strict=True):
        torch.testing.assert_close(leaf.grad, tensor(GRAD[f"total_wrt_{name}_student"]), **EXACT, msg=name)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_only_the_teachers_soft_labels_have_a_temperature(temperature: float):
    student_BC, teacher_BC = torch.randn(2, 5, 4, dtype=torch.float64)
    p_BC = (teacher_BC / temperature).softmax(dim=1)
    expected = -(p_BC * student_BC.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(soft_cross_entropy(student_BC, teacher_BC, temperature), expected, **EXACT)
    assert expected > -(p_BC * p_BC.log()).sum(dim=1).mean()


# against one backward with a graph for each class


def slow_maps(logits_BC: Tensor, map_BKHW: Tensor) -> Tensor:
    found: list[Tensor] = []
    for c in range(logits_BC.shape[1]):
        (slope,) = torch.autograd.grad(logits_BC[:, c].sum(), map_BKHW, create_graph=True)
        found.append((slope.mean(dim=(2, 3), keepdim=True) * map_BKHW).relu().sum(dim=1))
    return torch.stack(found, dim=1)


def slow_distance(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    total = student_BCHW.new_zeros(())
    for pair in zip(student_BCHW, teacher_BCHW, strict=True):
        scaled = [(x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else x * 0 for x in pair]
        mean = (scaled[0] - scaled[1]).square().mean()
        total = total + (mean.sqrt() if mean > 0 else mean)
    return total / len(student_BCHW)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_both_forms(seed: int, shape: tuple[int, int, int, int], n_classes: int, rectified: bool) -> list[list[Tensor]]:
    """Loss, gradient at the map, gradient at the weight: slow, then ours."""
    student, teacher = draw(seed, *shape), draw(seed + 1, *shape)
    if rectified:
        student, teacher = student.relu(), teacher.relu()
    heads = draw(seed + 2, 2, n_classes, shape[1])
    heads[:, 0, 0] = 0.0
    found: list[list[Tensor]] = []
    for slow in (True, False):
        leaf, weight = student.clone().requires_grad_(), heads[0].clone().requires_grad_()
        if slow:
            frozen = teacher.clone().requires_grad_()
            teacher_maps = slow_maps(logits_of(frozen, heads[1], heads[1, :, 0]), frozen).detach()
            loss = slow_distance(slow_maps(logits_of(leaf, weight, weight[:, 0].detach()), leaf), teacher_maps)
        else:
            loss = map_distance(normalised(class_maps(leaf, weight)), normalised(class_maps(teacher, heads[1])))
        found.append([loss.detach(), *torch.autograd.grad(loss, [leaf, weight])])
    return found


@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)),
    n_classes=st.integers(1, 4),
    rectified=st.booleans(),
)
def test_loss_and_gradients_are_those_of_the_slow_form(
    seed: int, shape: tuple[int, int, int, int], n_classes: int, rectified: bool
):
    for expected, found in zip(*by_both_forms(seed, shape, n_classes, rectified), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_images_in_parts_are_images_all_at_once(
    at_once: int, memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch
):
    """A CPU takes as many as its cache holds, a device all; in any order of memory."""
    monkeypatch.setattr(attention, "_PART_BYTES", at_once * 5 * 4 * 2 * 8 + 1)
    map_BKHW = draw(0, 3, 5, 4, 2).contiguous(memory_format=memory).requires_grad_()
    weight_BCK, upstream = draw(1, 3, 4, 5).requires_grad_(), draw(2, 3, 4, 4, 2)
    found = class_maps(map_BKHW, weight_BCK)
    expected = (weight_BCK[..., None, None] * map_BKHW.unsqueeze(1)).relu().sum(dim=2) / 8
    torch.testing.assert_close(found, expected, **EXACT)
    gradients = [torch.autograd.grad(maps, [map_BKHW, weight_BCK], upstream) for maps in (found, expected)]
    for ours, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, slow, **EXACT)


@pytest.mark.parametrize("learns", ["map", "weight"])
def test_a_gradient_nobody_asks_for_is_not_made(learns: str):
    made = {"map": draw(0, 2, 3, 2, 2), "weight": draw(1, 4, 3)}
    made[learns].requires_grad_()
    expected = {name: x.detach().clone().requires_grad_() for name, x in made.items()}
    for tensors in (made, expected):
        class_maps(tensors["map"], tensors["weight"]).square().sum().backward()
    torch.testing.assert_close(made[learns].grad, expected[learns].grad, **EXACT)
    assert [name for name, x in made.items() if x.grad is not None] == [learns]


def test_float32_is_near_float64():
    losses: list[list[Tensor]] = []
    for dtype in (torch.float64, torch.float32):
        map_BKHW, weight_CK = draw(0, 4, 64, 8, 8, dtype=dtype), draw(1, 4, 64, dtype=dtype)
        for leaf in (map_BKHW, weight_CK):
            leaf.requires_grad_()
        teacher = class_maps(draw(2, 4, 64, 8, 8, dtype=dtype), draw(3, 4, 64, dtype=dtype))
        loss = map_distance(normalised(class_maps(map_BKHW, weight_CK)), normalised(teacher))
        losses.append([loss.detach(), *torch.autograd.grad(loss, [map_BKHW, weight_CK])])
    for exact, found in zip(*losses, strict=True):
        assert found.dtype == torch.float32
        assert (found.double() - exact).norm() < 1e-5 * exact.norm()


# where there is nothing to scale or to compare


@pytest.mark.parametrize("value", [0.0, 1.5])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 2)])
def test_constant_maps_are_zero_with_a_zero_gradient(value: float, shape: tuple[int, ...]):
    maps = torch.full(shape, value, dtype=torch.float64, requires_grad=True)
    scaled = normalised(maps)
    assert torch.equal(scaled, torch.zeros_like(maps))
    loss = map_distance(scaled, draw(0, *shape).abs())
    loss.backward()
    assert loss > 0
    torch.testing.assert_close(maps.grad, torch.zeros_like(maps), **NOT_AT_ALL)


def test_a_constant_image_leaves_its_neighbours_as_they_are():
    maps = draw(0, 3, 2, 2, 2)
    maps[1] = 0.25
    kept = [0, 2]
    found, alone = maps.clone().requires_grad_(), maps[kept].clone().requires_grad_()
    target = draw(1, 3, 2, 2, 2)
    torch.testing.assert_close(normalised(found)[kept], normalised(alone), **EXACT)
    (3 * map_distance(normalised(found), target)).backward()
    (2 * map_distance(normalised(alone), target[kept])).backward()
    assert found.grad is not None
    torch.testing.assert_close(found.grad[kept], alone.grad, **EXACT)


@pytest.mark.parametrize("distance", [map_distance, unit_map_distance])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(distance: Callable[[Tensor, Tensor], Tensor]):
    leaf = class_maps(draw(0, 3, 5, 4, 4), draw(1, 4, 5)).requires_grad_()
    loss = distance(normalised(leaf), normalised(leaf.detach()))
    loss.backward()
    assert loss == 0
    torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), **NOT_AT_ALL)


def test_a_map_of_zeros_stays_zero_when_scaled_to_unit_length():
    maps = draw(0, 2, 3, 2, 2)
    maps[1, 2] = 0.0
    maps.requires_grad_()
    teacher = draw(1, 2, 3, 2, 2)
    unit = F.normalize(teacher.flatten(2), dim=2)
    loss = unit_map_distance(maps, teacher)
    loss.backward()
    torch.testing.assert_close(loss.detach(), (F.normalize(maps.detach().flatten(2), dim=2) - unit).square().mean())
    assert maps.grad is not None
    assert torch.equal(maps.grad[1, 2], torch.zeros(2, 2, dtype=torch.float64))
    assert maps.grad.abs().max() < 1


# other sizes


@given(
    seed=st.integers(0, 10**6),
    was=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    now=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_upsampling_is_bilinear_with_aligned_corners(seed: int, was: tuple[int, int], now: tuple[int, int]):
    small = draw(seed, 2, 3, *was).requires_grad_()
    expected = F.interpolate(small, now, mode="bilinear", align_corners=True)
    found = upsampled(small, now)
    torch.testing.assert_close(found, expected, **EXACT)
    upstream = draw(seed + 1, 2, 3, *now)
    gradients = [torch.autograd.grad(x, small, upstream)[0] for x in (found, expected) if x is not small]
    torch.testing.assert_close(gradients[0], gradients[-1], **EXACT)


def test_a_map_of_the_right_size_is_left_alone():
    maps = draw(0, 1, 2, 3, 4)
    assert upsampled(maps, (3, 4)) is maps


@given(seed=st.integers(0, 10**6), side=st.tuples(st.integers(1, 9), st.integers(1, 9)), places=st.integers(1, 5))
def test_pooling_is_adaptive_and_keeps_short_sides(seed: int, side: tuple[int, int], places: int):
    maps = draw(seed, 2, 3, *side)
    expected = F.adaptive_avg_pool2d(maps, (min(places, side[0]), min(places, side[1])))
    torch.testing.assert_close(pooled_to(maps, places), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_size_has_the_same_precision(dtype: torch.dtype):
    maps = draw(0, 1, 2, 3, 4, dtype=dtype)
    assert upsampled(maps, (6, 5)).dtype == pooled_to(maps, 2).dtype == dtype


# maps of earlier stages


class Rest(nn.Module):
    """What follows an inner map, without mixing samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.ReLU(), nn.MaxPool2d(2))
        self.last = nn.Conv2d(5, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        for number, p in enumerate(self.parameters()):
            p.data = draw(number, *p.shape)

    def forward(self, map_BKHW: Tensor) -> Tensor:
        return self.head(self.last(self.layers(map_BKHW)).mean(dim=(2, 3)))


def test_slopes_are_those_of_a_loop_and_can_be_differentiated_again():
    rest, start, upstream = Rest(), draw(20, 2, 3, 6, 4), draw(21, 2, 4, 3)
    found: list[list[Tensor]] = []
    for slow in (True, False):
        map_BKHW = start.clone().requires_grad_()
        logits_BC = rest(map_BKHW)
        if slow:
            rows = [torch.autograd.grad(logits_BC[:, c].sum(), map_BKHW, create_graph=True)[0] for c in range(4)]
            slopes = torch.stack([row.sum(dim=(2, 3)) for row in rows], dim=1)
        else:
            slopes = class_slopes(logits_BC, map_BKHW, create_graph=True)
        loss = (slopes * upstream).sum() + logits_BC.square().sum()
        found.append([slopes.detach(), *torch.autograd.grad(loss, [map_BKHW, *rest.parameters()])])
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


def test_slopes_of_a_teacher_are_constants_and_leave_no_graph():
    map_BKHW = draw(0, 2, 3, 4, 4).requires_grad_()
    logits_BC = Rest().requires_grad_(False)(map_BKHW)
    assert not class_slopes(logits_BC, map_BKHW, create_graph=False).requires_grad
    with pytest.raises(RuntimeError, match="a second time"):
        logits_BC.sum().backward()


def test_slopes_at_the_last_stage_are_the_head():
    map_BKHW, weight_CK = draw(0, 3, 5, 4, 2).requires_grad_(), draw(1, 4, 5)
    slopes = class_slopes(logits_of(map_BKHW, weight_CK, weight_CK[:, 0]), map_BKHW, create_graph=True)
    torch.testing.assert_close(slopes, weight_CK.expand(3, 4, 5), **EXACT)
    torch.testing.assert_close(class_maps(map_BKHW, slopes), class_maps(map_BKHW, weight_CK), **EXACT)


def test_a_class_of_each_sample_is_its_row():
    class_B = torch.tensor([2, 0, 2])
    weight_CK, weight_BCK, map_BKHW = draw(0, 4, 5), draw(1, 3, 4, 5), draw(2, 3, 5, 2, 2)
    for weight in (weight_CK, weight_BCK):
        every, one = class_maps(map_BKHW, weight), class_maps(map_BKHW, of_class(weight, class_B))
        assert one.shape == (3, 1, 2, 2)
        torch.testing.assert_close(one[:, 0], every[torch.arange(3), class_B], **EXACT)


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_gradients_are_those_of_small_differences(shape: tuple[int, ...]):
    map_BKHW, weight = draw(0, 2, 3, 2, 3).requires_grad_(), draw(1, *shape).requires_grad_()
    assert torch.autograd.gradcheck(class_maps, (map_BKHW, weight))
    teacher = draw(2, 2, 4, 2, 3).abs()

    def whole(map_BKHW: Tensor, weight: Tensor) -> Tensor:
        maps = upsampled(class_maps(map_BKHW, weight), (3, 4))
        return map_distance(normalised(maps), normalised(upsampled(teacher, (3, 4)))) + unit_map_distance(
            pooled_to(class_activation_maps(map_BKHW, weight), 2), pooled_to(teacher, 2)
        )

    assert torch.autograd.gradcheck(whole, (map_BKHW, weight))


def test_energy_is_the_mean_square_over_channels():
    map_BKHW = draw(0, 2, 3, 2, 2)
    torch.testing.assert_close(attention_energy(map_BKHW)[1, 0, 0, 1], (map_BKHW[1, :, 0, 1] ** 2).sum() / 3, **EXACT)


def test_a_distance_of_scaled_maps_is_at_most_one():
    ones, zeros = torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    assert map_distance(ones, zeros) == pytest.approx(1.0)
    assert math.isclose(map_distance(ones[:1], ones[:1] / 2).item(), 0.5, rel_tol=1e-6)


@pytest.mark.parametrize("maps", [class_maps, class_activation_maps])
@pytest.mark.parametrize(
    "map_shape, head_shape",
    [((2, 3, 4, 4), (5, 2)), ((2, 3, 16), (5, 3)), ((2, 3, 4, 4), (3,)), ((1, 3, 2, 2), (1, 3, 5))],
)
def test_a_head_of_another_width_is_refused(
    maps: Callable[[Tensor, Tensor], Tensor], map_shape: tuple[int, ...], head_shape: tuple[int, ...]
):
    with pytest.raises(ShapeError) as caught:
        maps(torch.zeros(map_shape), torch.zeros(head_shape))
    assert str(caught.value) == (
        f"a map of shape {map_shape} and a head of shape {head_shape} do not fit, expected (B, K, H, W) and (C, K) or "
        "(B, C, K)"
    )


def test_maps_meet_on_the_grid_with_more_places():
    fine, coarse = draw(1, 2, 3, 8, 2), draw(2, 2, 3, 2, 5)
    one, other = on_one_grid(fine, coarse)
    assert one.shape == other.shape == (2, 3, 8, 5)
    torch.testing.assert_close(one, F.interpolate(fine, size=(8, 5), mode="bilinear", align_corners=True))
    torch.testing.assert_close(other, F.interpolate(coarse, size=(8, 5), mode="bilinear", align_corners=True))
    assert on_one_grid(fine, fine + 1)[0] is fine


def test_a_range_too_small_to_divide_by_is_none():
    maps = (torch.rand(2, 3, 4, 4) * 1e-41).requires_grad_()
    made = normalised(maps)
    made.sum().backward()
    assert maps.grad is not None
    assert not made.any()
    assert not maps.grad.any()
