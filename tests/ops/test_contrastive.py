"""Noise contrast: value and gradient in one pass against autograd, in every form and precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distkd.errors import ShapeError
from distkd.ops import rows as ops_rows
from distkd.ops.contrastive import EPSILON, Noise, contrast, noise_contrast
from distkd.ops.injected import inject
from distkd.ops.rows import check_index, products, scan, weighted_sum
from tests.golden_numbers import golden

B, D, N, M, P, T = 3, 8, 60, 25, 4, 0.07
GENERATOR = torch.Generator().manual_seed(3)
ANCHOR = F.normalize(torch.randn(B, D, generator=GENERATOR, dtype=torch.float64), dim=1)
ROWS = F.normalize(torch.randn(N, D, generator=GENERATOR, dtype=torch.float64), dim=1)
INDEX = torch.randint(0, N, (B, M), generator=GENERATOR)
NOISE = Noise(torch.tensor(5.0, dtype=torch.float64), P, M - P, N)


def released(anchor: Tensor, rows: Tensor, index: Tensor, noise: Noise) -> Tensor:
    """The loss as the papers write it, with exponentials and autograd; (B,)."""
    o = torch.exp(torch.einsum("bd,bmd->bm", anchor, rows[index]) / T) / noise.log_z.exp()
    c = noise.n_negative / noise.n_rows
    positive, negative = o[:, : noise.n_positive], o[:, noise.n_positive :]
    return -(torch.log(positive / (positive + c + EPSILON)).mean(1) + torch.log(c / (negative + c + EPSILON)).sum(1))


@pytest.fixture(params=["dense", "gathered"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(ops_rows, "is_dense", lambda *_: request.param == "dense")
    return request.param


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("plane", [1 << 24, N + 1])
def test_value_and_gradient_are_those_of_autograd(form: str, known: bool, plane: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops_rows, "_PLANE", plane)
    anchor = ANCHOR.clone().requires_grad_()
    expected = released(anchor, ROWS, INDEX, NOISE)
    [gradient] = torch.autograd.grad(expected.sum(), anchor)
    product = products((ANCHOR,), ROWS, INDEX)[0] if known else None
    loss, found = contrast(ANCHOR, ROWS, INDEX, P, NOISE, temperature=T, product_BM=product)
    torch.testing.assert_close(loss + NOISE.constant, expected.detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(found, gradient, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_any_precision_are_summed_in_that_of_the_anchors(form: str, dtype: torch.dtype):
    rows = ROWS.to(dtype)
    expected = contrast(ANCHOR, rows.double(), INDEX, P, NOISE, temperature=T)
    for found, value in zip(contrast(ANCHOR, rows, INDEX, P, NOISE, temperature=T), expected, strict=True):
        torch.testing.assert_close(found, value, atol=1e-12, rtol=0)
    [expected] = products((ANCHOR,), rows.double(), INDEX)
    torch.testing.assert_close(weighted_sum(expected, rows, INDEX), weighted_sum(expected, rows.double(), INDEX))


def test_sets_of_anchors_share_the_reading_of_their_rows(form: str):
    other = ANCHOR.flip(1)
    for found, anchor in zip(products((ANCHOR, other), ROWS, INDEX), (ANCHOR, other), strict=True):
        torch.testing.assert_close(found, torch.einsum("bd,bmd->bm", anchor, ROWS[INDEX]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_device_gathers_several_anchors_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Its road, taken on a CPU: `meta` tensors would compute nothing."""
    monkeypatch.setattr(ops_rows, "is_dense", lambda *_: False)
    monkeypatch.setattr(ops_rows, "_on_cpu", lambda _: False)
    monkeypatch.setattr(ops_rows, "_TILE_BYTES", at_once * M * D * 8)
    expected = released(ANCHOR, ROWS, INDEX, NOISE)
    for known in (None, products((ANCHOR,), ROWS, INDEX)[0]):
        loss, gradient = contrast(ANCHOR, ROWS, INDEX, P, NOISE, temperature=T, product_BM=known)
        torch.testing.assert_close(loss + NOISE.constant, expected, atol=1e-10, rtol=0)
        half = contrast(ANCHOR, ROWS.half(), INDEX, P, NOISE, temperature=T, product_BM=known)[1]
        torch.testing.assert_close(half, gradient, atol=1e-2, rtol=1e-2)


def test_columns_that_do_not_count_change_nothing(form: str):
    loss, gradient = contrast(ANCHOR, ROWS, INDEX, P, NOISE, temperature=T)
    padded = torch.cat([INDEX[:, :P], INDEX[:, :2], INDEX[:, P:], INDEX[:, :3]], dim=1)
    offset = torch.zeros(B, M + 5, dtype=torch.float64)
    offset[:, P : P + 2], offset[:, -3:] = math.inf, -math.inf
    found = contrast(ANCHOR, ROWS, padded, P + 2, NOISE, temperature=T, offset_BM=offset)
    torch.testing.assert_close(found[0], loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(found[1], gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_z", [-200.0, 0.0, 200.0])
def test_no_score_overflows_and_no_small_loss_is_lost(log_z: float, dtype: torch.dtype):
    """exp(1 / 0.07) alone is beyond a float16, exp(200) beyond a float32."""
    score = torch.tensor([[14.0, -14.0, 14.0, -14.0]], dtype=dtype)
    noise = Noise(torch.tensor(log_z), 2, 2, 1000)
    loss, slope = noise_contrast(noise.margin(score, 1.0), 2, 2)
    exact, exact_slope = noise_contrast(noise.margin(score.double(), 1.0), 2, 2)
    torch.testing.assert_close(loss, exact.to(dtype), rtol=1e-5, atol=0)
    torch.testing.assert_close(slope, exact_slope.to(dtype), rtol=1e-4, atol=1e-30)
    assert loss.item() > 0


def test_nothing_of_the_size_of_all_gathered_rows_is_kept():
    """What a backward has to remember is one gradient for each anchor."""
    anchor = ANCHOR.clone().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss, gradient = contrast(anchor.detach(), ROWS, INDEX, P, NOISE, temperature=T)
        inject(loss.mean(), [anchor], [gradient / B])
    assert [tuple(x.shape) for x in kept] == [(B, D)]


def test_an_injected_gradient_is_scaled_by_what_comes_from_above():
    x, y = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    loss = inject(torch.tensor(7.0), [x, y], [torch.arange(3.0), torch.full((2,), 5.0)])
    (1024 * loss).backward()
    assert loss.item() == 7
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1024, 2048]
    assert y.grad is not None
    assert y.grad.tolist() == [5120, 5120]


@pytest.mark.parametrize(("index", "words"), [(-3, "index -3"), (60, "index 60")])
def test_an_index_without_a_row_is_named(index: int, words: str):
    wrong = INDEX.clone()
    wrong[1, 2] = index
    with pytest.raises(ShapeError, match=f"the choice has {words}, rows are 0 to 59"):
        check_index(wrong, N, "the choice")


def test_another_width_is_refused(form: str):
    for call in (
        lambda: products((ANCHOR,), ROWS[:, :5], INDEX),
        lambda: scan(ANCHOR, ROWS[:, :5], INDEX, lambda x, _: x),
    ):
        with pytest.raises(ShapeError, match="anchors have width 8, the bank has width 5"):
            call()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_loss_compiles_as_one_graph(backend: str):
    score = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = Noise(torch.tensor(1.0, dtype=torch.float64), 2, 7, 50)

    def loss(score: Tensor) -> tuple[Tensor, Tensor]:
        return noise_contrast(noise.margin(score, T), 2, 2)

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for found, expected in zip(compiled(score), loss(score), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("name", "n_rows"), [("cifar100", 50_000), ("imagenet", 1_281_167)])
def test_the_constant_of_epsilon_is_golden(name: str, n_rows: int):
    constants = golden("crd")["constants"]
    noise = Noise(torch.tensor(0.0), 1, 16384, n_rows)
    assert noise.constant == pytest.approx(constants[f"constant_offset_from_eps_{name}"], rel=1e-9)
    assert math.exp(noise.bias) == pytest.approx(constants[f"{name}_mPn"] + EPSILON, rel=1e-12)
