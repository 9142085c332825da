"""Margins to prototypes against the published two-class formula and a loop over pairs of classes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distkd.errors import ShapeError
from distkd.ops.prototypes import choose_codes, prototype_margin, unit_codes

CARD = {"sharpness": 5.0, "margin": 0.3, "scale": 20.0}


def units(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def score(z: Tensor, codes: Tensor) -> float:
    """s_c, one number at a time."""
    return math.log(sum(math.exp(5 * float(z @ code)) for code in codes)) / 5


def pair_cost(own: float, other: float) -> float:
    return math.log1p(math.exp(20 * (0.3 - (own - other))))


@pytest.mark.parametrize("n_codes", [1, 3, 16])
def test_two_classes_are_the_published_formula(n_codes: int):
    z, label, codes = units(6, 4, seed=0), torch.tensor([0, 1, 1, 0, 1, 0]), units(2, n_codes, 4, seed=1)
    expected = 0.0
    for row, y in zip(z, label, strict=True):
        sign = 1 if y == 1 else -1
        difference = score(row, codes[1]) - score(row, codes[0])  # s+ - s-
        expected += math.log1p(math.exp(20 * (0.3 - sign * difference))) / 6
    known = torch.ones(2, n_codes, dtype=torch.bool)
    assert prototype_margin(z, label, codes, known, **CARD).item() == pytest.approx(expected, rel=1e-12)


def test_a_number_worked_out_by_hand():
    """One sample at 60 degrees from its only code and on the other class's: 20 x (0.3 - (0.5 - 1)) = 16."""
    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    codes = torch.tensor([[[0.5, math.sqrt(0.75)]], [[1.0, 0.0]]], dtype=torch.float64)
    known = torch.ones(2, 1, dtype=torch.bool)
    loss = prototype_margin(z, torch.tensor([0]), codes, known, **CARD)
    assert loss.item() == pytest.approx(16.000000112535, abs=1e-11)


def test_more_classes_are_the_mean_over_pairs_of_known_ones():
    z, codes = units(5, 4, seed=2), units(5, 2, 4, seed=3)
    known = torch.tensor([[True, True], [True, False], [False, False], [True, True], [False, True]])
    codes = torch.where(known[..., None], codes, 0.0)
    label = torch.tensor([0, 4, 2, -1, 1])
    held = [codes[c][known[c]] for c in range(5)]
    expected = 0.0
    for row, y in zip(z, label.tolist(), strict=True):
        if y >= 0 and len(held[y]):
            others = [c for c in range(5) if c != y and len(held[c])]
            costs = [pair_cost(score(row, held[y]), score(row, held[c])) for c in others]
            expected += sum(costs) / len(costs)
    z.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # nothing on the way is NaN either
        loss = prototype_margin(z, label, codes, known, **CARD, labelled_share=0.8)
        loss.backward()
    assert loss.item() == pytest.approx(expected / (5 * 0.8), rel=1e-12)
    assert z.grad.isfinite().all()
    assert (z.grad.norm(dim=1) > 0).tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("n_known", [0, 1])
def test_with_fewer_than_two_classes_there_is_no_loss(n_known: int):
    z = units(4, 3, seed=0).requires_grad_()
    known = torch.tensor([[c < n_known] for c in range(3)])
    codes = torch.where(known[..., None], units(3, 1, 3, seed=1), 0.0)
    loss = prototype_margin(z, torch.tensor([0, 1, 2, -1]), codes, known, **CARD)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_the_gradient_is_that_of_finite_differences():
    codes, label = units(3, 2, 4, seed=1), torch.tensor([0, 2, 1, -1])
    known = torch.ones(3, 2, dtype=torch.bool)
    known[1, 0] = False

    def loss(z: Tensor) -> Tensor:
        return prototype_margin(z, label, codes, known, **CARD)

    assert torch.autograd.gradcheck(loss, (units(4, 4, seed=5).requires_grad_(),))


def test_half_precision_is_computed_in_single():
    z, codes, known = units(6, 4, seed=0).bfloat16(), units(3, 2, 4, seed=1).float(), torch.ones(3, 2).bool()
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    loss = prototype_margin(z, label, codes, known, **CARD)
    assert loss.dtype == torch.float32
    exact = prototype_margin(z.double(), label, codes.double(), known, **CARD)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_the_first_samples_of_a_class_set_its_codes_in_turn():
    known = torch.zeros(2, 3, dtype=torch.bool)
    label = torch.tensor([1, 0, 1, -1, 1, 1, 0])
    found = choose_codes(units(7, 4, seed=0), label, torch.zeros(2, 3, 4, dtype=torch.float64), known)
    assert found[label == 1].tolist() == [0, 1, 2, 0]
    assert found[label == 0].tolist() == [0, 1]


def test_a_class_that_lacks_a_code_gives_it_the_next_sample():
    codes = units(1, 3, 4, seed=0)
    known = torch.tensor([[True, True, False]])
    z = torch.stack([codes[0, 1], codes[0, 0]])
    found = choose_codes(z, torch.tensor([0, 0]), torch.where(known[..., None], codes, 0.0), known)
    assert found.tolist() == [2, 0]


def test_a_class_with_all_codes_gives_each_sample_the_nearest():
    codes, z, label = units(3, 4, 5, seed=0), units(20, 5, seed=1), torch.arange(20) % 3
    found = choose_codes(z, label, codes, torch.ones(3, 4, dtype=torch.bool))
    expected = [max(range(4), key=lambda m: float(row @ codes[y, m])) for row, y in zip(z, label, strict=True)]
    assert found.tolist() == expected


def test_sums_without_a_direction_are_no_codes():
    sums = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1e-14, 0.0], [torch.nan, 1.0]]], dtype=torch.float64)
    codes, known = unit_codes(sums)
    assert known.tolist() == [[True, False], [False, True]]
    assert codes[0].tolist() == [[0.6, 0.8], [0.0, 0.0]]
    assert codes[1, 0].tolist() == [0.0, 0.0]
    assert codes[1, 1].isnan().all()  # the loss has to show it


def test_widths_have_to_be_equal():
    known = torch.ones(2, 1, dtype=torch.bool)
    with pytest.raises(ShapeError, match="embeddings have width 3, the codes have width 4"):
        prototype_margin(units(2, 3, seed=0), torch.tensor([0, 1]), units(2, 1, 4, seed=1), known, **CARD)
