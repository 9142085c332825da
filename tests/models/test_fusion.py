"""Fusions; golden numbers `fusion_eval` of card `dc-distill-gk-refine`, float64, tolerance 1e-8."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distkd.models.dropout import dropout_keys
from distkd.models.fusion import ConcatFusion, GatedBilinearFusion
from tests.golden_numbers import golden, tensor

NAMES = {
    "linear_h1.0": "first.hidden", "linear_z1": "first.form", "linear_o1.0": "first.out",
    "linear_h2.0": "second.hidden", "linear_z2": "second.form", "linear_o2.0": "second.out",
    "encoder1.0": "mix1.0", "encoder1.1": "mix1.1", "encoder2.0": "mix2.0", "encoder2.1": "mix2.1",
}  # fmt: skip
"""Layers of the released code by ours."""


def test_gated_bilinear_fusion_equals_the_golden_numbers():
    numbers = golden("dc-distill-gk-refine")["fusion_eval"]
    fusion = GatedBilinearFusion(2, 2, 2, norm="sync", dropout=0.1).double()
    state = {}
    for name, values in numbers["params"].items():
        layer, kind = name.rsplit(".", 1)
        state[f"{NAMES[layer]}.{kind}"] = tensor(values)
    for layer in ("mix1.1", "mix2.1"):
        state[f"{layer}.running_mean"] = tensor(numbers["bn_running_mean"])
        state[f"{layer}.running_var"] = tensor(numbers["bn_running_var"])
        state[f"{layer}.num_batches_tracked"] = torch.tensor(0)
    fusion.load_state_dict(state)
    fusion.eval()
    features = tensor(numbers["path_vec"]), tensor(numbers["omic_vec"])
    gated = fusion.gated(*features)
    for found, name in zip(gated, ("gated_path_with_one", "gated_omic_with_one"), strict=True):
        torch.testing.assert_close(found, tensor(numbers[name]), atol=1e-8, rtol=0)
    torch.testing.assert_close(fusion(features), tensor(numbers["output"]), atol=1e-8, rtol=0)


def test_gate_is_a_bilinear_form_of_both_features():
    fusion = GatedBilinearFusion(3, 4, 5, norm="sync", dropout=0.0).double()
    a, b = torch.rand(6, 3, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64)
    for side, own, found in zip((fusion.first, fusion.second), (a, b), fusion.gated(a, b), strict=True):
        z = side.form(a, b)
        expected = torch.relu(side.out(torch.sigmoid(z) * torch.relu(side.hidden(own))))
        torch.testing.assert_close(found[:, :-1], expected, atol=1e-12, rtol=0)
        assert (found[:, -1] == 1).all()


def test_gated_bilinear_fusion_equals_the_formula_of_the_card_at_unequal_widths():
    fusion = GatedBilinearFusion(3, 4, 5, norm="sync", dropout=0.0).double()
    features = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    a, b = fusion.gated(*features)
    assert (a.shape, b.shape) == ((6, 4), (6, 5))
    x = torch.stack([torch.outer(one, other).flatten() for one, other in zip(a, b, strict=True)])
    for mix in (fusion.mix1, fusion.mix2):
        linear = mix[0]
        assert isinstance(linear, nn.Linear)
        y = x @ linear.weight.T + linear.bias
        x = ((y - y.mean(dim=0)) / (y.var(dim=0, unbiased=False) + 1e-5).sqrt()).clamp_min(0)
    torch.testing.assert_close(fusion(features), x, atol=1e-12, rtol=0)


def test_gated_bilinear_fusion_sees_the_positive_part_of_its_features():
    fusion = GatedBilinearFusion(3, 3, 4, norm="group", dropout=0.0)
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(fusion((a, b)), fusion((a.relu(), b.relu())))


def test_gated_bilinear_fusion_has_the_parameters_of_the_card():
    fusion = GatedBilinearFusion(128, 128, 128, norm="sync", dropout=0.1)
    assert sum(p.numel() for p in fusion.parameters()) == 6_407_808


def test_linear_layers_start_as_in_the_source_and_bilinear_ones_as_in_torch():
    torch.manual_seed(0)
    fusion = GatedBilinearFusion(64, 64, 64, norm="sync", dropout=0.1)
    for layer in fusion.modules():
        if isinstance(layer, nn.Linear):
            assert not layer.bias.any()
            assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.05)
        if isinstance(layer, nn.Bilinear):
            assert layer.weight.abs().max().item() <= 64**-0.5
            assert layer.bias.any()


@pytest.mark.parametrize("n_modalities", [1, 2, 6])
@pytest.mark.parametrize("norm", ["sync", "group"])
def test_concat_fusion_takes_any_number_of_features(n_modalities, norm):
    fusion = ConcatFusion([4] * n_modalities, 8, norm=norm, dropout=0.2)
    features = [torch.rand(5, 4, requires_grad=True) for _ in range(n_modalities)]
    with dropout_keys(torch.arange(5), "student"):
        fused = fusion(features)
    fused.sum().backward()
    assert fused.shape == (5, 8)
    assert (fused >= 0).all()
    assert all(feature.grad is not None for feature in features)
