"""M3LR's penalty: the card's numbers, then against a loop of complex singular value decompositions and autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distkd.errors import ShapeError
from distkd.ops.lowrank import (
    Shrinkage,
    hermitian_eigh,
    low_rank_penalty,
    penalty_weight,
    rotated_eigh,
    row_similarity,
    shrunk,
)
from tests.golden_numbers import golden, tensor

CARD = golden("m3lr-dscd-gkm")
CLOSE: dict[str, Any] = {"atol": 1e-8, "rtol": 0.0}
READINGS: dict[str, dict[str, Any]] = {"released": {"double_shrink": True}, "weighted": {}, "plain": {"form": "plain"}}
MODALITIES = ("path", "omic")
every_reading = pytest.mark.parametrize("reading", READINGS)
every_batch = pytest.mark.parametrize("batch", ["B=4", "B=5"])


def _views(case: dict[str, Any]) -> list[list[Tensor]]:
    """Fused and its mean teacher are the same tensors for both modalities; view 2 learns."""
    fused, fused_teacher = tensor(case["fused"]), tensor(case["fused_mean_teacher"])
    return [
        [fused, fused_teacher, tensor(case[name], grad=True), tensor(case[f"{name}_mean_teacher"])]
        for name in MODALITIES
    ]


def _similar(views: list[Tensor]) -> Tensor:
    """(1, V, B, B)."""
    return torch.stack([row_similarity(view.detach()) for view in views])[None]


def _as_card(tensor_1VBB: Tensor) -> Tensor:
    return tensor_1VBB[0].permute(1, 2, 0)


# golden numbers


@every_batch
def test_similarities_and_their_spectrum_are_golden(batch: str):
    case = CARD["low_rank"][batch]
    for name, views in zip(MODALITIES, _views(case), strict=True):
        similar = _similar(views)
        torch.testing.assert_close(_as_card(similar), tensor(case[f"adj_{name}_BxBx4"]), **CLOSE)
        if name == "path":
            singular = torch.linalg.svdvals(torch.fft.fft(similar[0], dim=1).permute(1, 2, 0))
            torch.testing.assert_close(singular, tensor(case["path_singular_values_per_frequency"]), **CLOSE)
            total = case["path_tensor_nuclear_norm_sum"]
            assert singular.sum().item() == pytest.approx(total, abs=1e-8)


@every_batch
@every_reading
@pytest.mark.parametrize("rho", ["0.02", "0.2", "1"])
def test_a_shrunk_tensor_is_golden(batch: str, reading: str, rho: str):
    case = CARD["low_rank"][batch]
    expected = case["shrink"][f"rho={rho}"][reading]
    similar = _similar(_views(case)[0])
    found = shrunk(similar, Shrinkage(float(rho), **READINGS[reading]))
    torch.testing.assert_close(_as_card(found), tensor(expected["aux_path"]), **CLOSE)
    residual = (similar - found).square().sum()
    torch.testing.assert_close(residual, tensor(expected["sq_frobenius_residual"]), **CLOSE)


@every_batch
@every_reading
def test_the_penalty_and_its_gradients_are_golden(batch: str, reading: str):
    case = CARD["low_rank"][batch]
    about, expected = case["loss"], case["loss"][reading]
    views = _views(case)
    how = Shrinkage(about["Lambda_global"] / about["mu_before"], **READINGS[reading])
    assert how.rho == pytest.approx(about["rho_used_for_shrink"])
    loss = low_rank_penalty(views, how, weight=about["mu_after"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), tensor(expected["loss"]), **CLOSE)
    for name, own in zip(MODALITIES, views, strict=True):
        torch.testing.assert_close(own[2].grad, tensor(expected[f"grad_{name}"]), **CLOSE)
    similar = torch.cat([_similar(own) for own in views])
    learning = (similar - shrunk(similar, how))[:, 2].square().sum() * about["mu_after"] / 2
    torch.testing.assert_close(learning, tensor(expected["loss_only_unimodal_view"]), **CLOSE)


def _formula_views() -> list[Tensor]:
    i, d = torch.arange(16, dtype=torch.float64)[:, None], torch.arange(128, dtype=torch.float64)
    return [torch.sin(0.37 * (i + 1) * (v + 1) + 0.11 * d).clamp_min(0) + 0.01 for v in range(4)]


@every_reading
@pytest.mark.parametrize("rho", ["0.01", "0.1", "1"])
def test_a_batch_of_16_is_golden(reading: str, rho: str):
    case = CARD["low_rank_B16_formula"]
    expected = case["results"][f"rho={rho}"][reading]
    views = _formula_views()
    similar = _similar(views)
    singular = torch.linalg.svdvals(torch.fft.fft(similar[0], dim=1).permute(1, 2, 0))
    torch.testing.assert_close(singular[:9], tensor(case["singular_values_frequencies_0_to_8"]), **CLOSE)
    how = Shrinkage(float(rho), **READINGS[reading])
    found = shrunk(similar, how)
    torch.testing.assert_close(found.sum(), tensor(expected["aux_sum"]), **CLOSE)
    torch.testing.assert_close(found[0, :, 0, 0], tensor(expected["aux_0_0"]), **CLOSE)
    torch.testing.assert_close(found[0, :, 3, 5], tensor(expected["aux_3_5"]), **CLOSE)
    residual = tensor(expected["sq_frobenius_residual"])
    torch.testing.assert_close((similar - found).square().sum(), residual, **CLOSE)
    torch.testing.assert_close(low_rank_penalty([views], how, weight=2.0), residual, **CLOSE)


def test_the_weight_grows_as_in_the_card():
    case = CARD["mu_schedule"]
    assert penalty_weight(0) == case["start"]
    for step, value in case["after_step"].items():
        assert penalty_weight(int(step)) == pytest.approx(value, abs=1e-13, rel=1e-9)
    assert penalty_weight(case["first_step_at_cap"] - 1) < 1 == penalty_weight(case["first_step_at_cap"])
    assert penalty_weight(10**9) == 1


# against the obvious form


def _slow(views: list[list[Tensor]], how: Shrinkage, weight: float, learning: int) -> Tensor:
    """A loop over all frequencies of complex singular value decompositions; gradients by autograd."""
    total = views[0][0].new_zeros(())
    for own in views:
        matrices: list[Tensor] = []
        for number, view in enumerate(own):
            product = (view if number == learning else view.detach()) @ view.T
            norm = product.norm(dim=1, keepdim=True)
            dead = norm < 1e-6
            matrices.append(torch.where(dead, 0.0, product / torch.where(dead, 1.0, norm)))
        z_ijv = torch.stack(matrices, dim=2)
        n = z_ijv.shape[0]
        spectrum = torch.fft.fft(z_ijv.detach(), dim=0)
        threshold = how.rho * (how.reference_batch or n)
        for k in range(n):
            u, s, vh = torch.linalg.svd(spectrum[k], full_matrices=False)
            again = how.double_shrink and k in (n // 2 + 1, n - (n // 2 + 1))
            for _ in range(2 if again else 1):
                by = threshold / (s + 1e-5) if how.form == "weighted" else threshold
                s = (s - by).clamp_min(0)
            spectrum[k] = (u * s) @ vh
        total = total + weight / 2 * (z_ijv - torch.fft.ifft(spectrum, dim=0).real).square().sum()
    return total


def _random_views(n_views: int, batch: int, seed: int, modalities: int = 2) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        return torch.randn(batch, width, generator=generator, dtype=torch.float64).relu() + 0.05

    shared = [draw(6) for _ in range(max(0, n_views - 2))]
    return [[*shared, draw(6 + u).requires_grad_(), draw(6 + u)][-n_views:] for u in range(modalities)]


@every_reading
@pytest.mark.parametrize("batch", [3, 6, 7])
@pytest.mark.parametrize("n_views, modalities", [(2, 2), (4, 1), (4, 2), (6, 3), (8, 1)])
def test_value_and_gradient_are_those_of_the_obvious_form(n_views: int, modalities: int, batch: int, reading: str):
    how = Shrinkage(0.15, **READINGS[reading])
    learning = n_views - 2
    views = _random_views(n_views, batch, 1, modalities)
    own = [view[learning] for view in views]
    expected = _slow(views, how, 0.7, learning)
    found = low_rank_penalty(views, how, weight=0.7, learning=learning)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    for left, right in zip(torch.autograd.grad(found, own), torch.autograd.grad(expected, own), strict=True):
        torch.testing.assert_close(left, right, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("batch", [1, 2])
def test_batches_of_one_and_two_are_defined(batch: int):
    views = _random_views(4, batch, 2)
    how = Shrinkage(0.1)
    torch.testing.assert_close(low_rank_penalty(views, how, weight=1.0), _slow(views, how, 1.0, 2))


@pytest.mark.parametrize("n_views", [3, 4])
@pytest.mark.parametrize("form", ["weighted", "plain"])
def test_other_devices_decompose_without_lapack_and_find_the_same(n_views: int, form: Any, monkeypatch):
    how, weight = Shrinkage(0.15, form), 0.7
    views = _random_views(n_views, 7, 3)
    own = [view[n_views - 2] for view in views]
    expected = low_rank_penalty(views, how, weight=weight, learning=n_views - 2)
    monkeypatch.setattr("distkd.ops.lowrank.hermitian_eigh", rotated_eigh)
    found = low_rank_penalty(views, how, weight=weight, learning=n_views - 2)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for left, right in zip(torch.autograd.grad(found, own), torch.autograd.grad(expected, own), strict=True):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_rotations_diagonalise_every_kind_of_matrix(n: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(n)
    factor = torch.randn(6, n, 12, generator=generator, dtype=dtype)
    factor[1] = factor[1, :1]  # rank one
    factor[2] = 0
    matrix = factor @ factor.mH
    matrix[3] = torch.eye(n)
    matrix[4] *= 1e-12
    values, vectors = rotated_eigh(matrix)
    eps = torch.finfo(dtype).eps
    largest = matrix.abs().amax(dim=(1, 2)).clamp_min(eps**2)
    back = (vectors * values[:, None]) @ vectors.mH
    assert ((back - matrix).abs().amax(dim=(1, 2)) / largest).max() < 200 * eps
    torch.testing.assert_close(vectors @ vectors.mH, torch.eye(n, dtype=dtype).expand(6, n, n), atol=100 * eps, rtol=0)
    ours = values.sort(dim=1).values[:, -n:]
    reference = torch.linalg.eigvalsh(matrix)
    assert ((ours - reference).abs().amax(dim=1) / largest).max() < 200 * eps


# what it promises


def test_the_gradient_of_local_rows_is_their_part_of_the_whole():
    views = _random_views(4, 8, 4)
    whole = torch.autograd.grad(low_rank_penalty(views, Shrinkage(0.1), weight=1.0), [own[2] for own in views])
    for mine in (slice(0, 4), slice(4, 8)):
        local = [own[2].detach()[mine].requires_grad_() for own in views]
        joined: list[list[Tensor]] = []
        for own, rows in zip(views, local, strict=True):
            parts = [own[2].detach()[: mine.start], rows, own[2].detach()[mine.stop :]]
            joined.append([*own[:2], torch.cat(parts), own[3]])
        found = torch.autograd.grad(low_rank_penalty(joined, Shrinkage(0.1), weight=1.0), local)
        for part, gradient in zip(found, whole, strict=True):
            torch.testing.assert_close(part, gradient[mine], atol=1e-13, rtol=0)


def test_only_the_learning_view_receives_a_gradient():
    views = [[view.detach().requires_grad_() for view in own] for own in _random_views(4, 6, 5)]
    low_rank_penalty(views, Shrinkage(0.1), weight=1.0).backward()
    for own in views:
        assert [view.grad is not None for view in own] == [False, False, True, False]


@pytest.mark.parametrize("left", [0.0, 1e-8])
def test_a_dead_sample_has_no_gradient_and_spoils_none(left: float):
    views = _random_views(4, 6, 6, modalities=1)
    with torch.no_grad():
        views[0][2][3] = left
    loss = low_rank_penalty(views, Shrinkage(0.1), weight=1.0)
    (gradient,) = torch.autograd.grad(loss, views[0][2])
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 10
    torch.testing.assert_close(loss, _slow(views, Shrinkage(0.1), 1.0, 2))
    (slow,) = torch.autograd.grad(_slow(views, Shrinkage(0.1), 1.0, 2), views[0][2])
    torch.testing.assert_close(gradient, slow, atol=1e-11, rtol=0)
    assert not row_similarity(views[0][2].detach())[3].any()


def test_a_tiny_weight_shrinks_everything_away():
    """The card: 64 mu for B = 16, eight matrices of sixteen unit rows, while mu is small."""
    views = [_formula_views(), [view * 2 for view in _formula_views()]]
    mu = penalty_weight(0)
    loss = low_rank_penalty(views, Shrinkage(0.1 / mu), weight=penalty_weight(1))
    assert loss.item() == pytest.approx(64 * penalty_weight(1))


def test_without_shrinkage_there_is_nothing_to_pull():
    views = _random_views(4, 6, 7)
    loss = low_rank_penalty(views, Shrinkage(0.0), weight=1.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    similar = _similar(views[0])
    torch.testing.assert_close(shrunk(similar, Shrinkage(0.0)), similar)


def test_the_published_strength_can_be_kept_at_another_batch():
    views = _random_views(4, 8, 8)
    of_16 = low_rank_penalty(views, Shrinkage(0.1, reference_batch=16), weight=1.0)
    torch.testing.assert_close(of_16, low_rank_penalty(views, Shrinkage(0.2), weight=1.0))
    assert of_16 > low_rank_penalty(views, Shrinkage(0.1), weight=1.0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_lower_precisions_are_computed_in_float32(dtype: torch.dtype, tolerance: float):
    exact = [_formula_views()]
    views = [[view.to(dtype) for view in exact[0]]]
    views[0][2].requires_grad_()
    loss = low_rank_penalty(views, Shrinkage(0.1), weight=1.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert views[0][2].grad.dtype == dtype
    expected = low_rank_penalty(exact, Shrinkage(0.1), weight=1.0)
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=tolerance)


def test_an_upstream_factor_scales_the_gradient():
    views = _random_views(4, 6, 9)
    loss = low_rank_penalty(views, Shrinkage(0.1), weight=1.0)
    plain = torch.autograd.grad(loss, views[0][2], retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss * 1024, views[0][2])[0], plain * 1024)


def test_a_feature_that_is_not_finite_gives_a_loss_that_is_not():
    views = _random_views(4, 6, 10)
    with torch.no_grad():
        views[0][2][1, 0] = math.nan
    assert low_rank_penalty(views, Shrinkage(0.1), weight=1.0).isnan()
    values, vectors = hermitian_eigh(torch.full((3, 2, 2), math.nan, dtype=torch.complex128))
    assert values.shape == (3, 2)
    assert values.isnan().all()
    assert vectors.isnan().all()


def test_views_that_do_not_fit_are_refused():
    views = _random_views(4, 6, 11)
    with pytest.raises(ShapeError, match=r"modalities have \[3, 4\] views of \[6\] samples, expected one number of"):
        low_rank_penalty([views[0], views[1][1:]], Shrinkage(0.1), weight=1.0)
    with pytest.raises(ShapeError, match=r"views of \[5, 6\] samples"):
        low_rank_penalty([views[0], [view[1:] for view in views[1]]], Shrinkage(0.1), weight=1.0)
    with pytest.raises(ShapeError, match="double_shrink has no second frequency with 2 samples, it needs at least 3"):
        low_rank_penalty(_random_views(4, 2, 0), Shrinkage(0.1, double_shrink=True), weight=1.0)
