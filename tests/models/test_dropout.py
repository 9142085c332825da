"""Dropout by key: the same values are dropped whatever the order, the split or the rank."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distkd.errors import ShapeError
from distkd.models.dropout import KeyedAlphaDropout, KeyedDropout, dropout_keys, salt_by_path
from distkd.ops.draws import integer_key

LAYERS = [KeyedDropout, KeyedAlphaDropout]


def _keys(n: int, seed: int = 0) -> Tensor:
    return torch.tensor([integer_key(seed, number) for number in range(n)])


def _apply(layer: nn.Module, x: Tensor, key_B: Tensor, role: str = "student") -> Tensor:
    with dropout_keys(key_B, role):
        return layer(x)


@pytest.mark.parametrize("kind", LAYERS)
@settings(deadline=None)
@given(n=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99), cut=st.integers(0, 9))
def test_a_sample_drops_the_same_values_in_any_order_and_any_split(kind, n, width, seed, cut):
    layer, x, key_B = kind(0.4), torch.randn(n, width, 3), _keys(n, seed)
    whole = _apply(layer, x, key_B)
    order = torch.randperm(n)
    assert torch.equal(_apply(layer, x[order], key_B[order]), whole[order])
    parts = [_apply(layer, x[rows], key_B[rows]) for rows in (slice(cut), slice(cut, None)) if len(key_B[rows])]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_share_of_dropped_values_is_p(kind, p):
    with dropout_keys(_keys(64), "student"):
        kept = kind(p).kept(torch.zeros(64, 4001))
    n = kept.numel()
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    by_sample = kept.double().mean(dim=1)
    assert (by_sample - (1 - p)).abs().max() < 5 * math.sqrt(p * (1 - p) / 4001)


def test_neighbours_are_dropped_independently():
    with dropout_keys(_keys(64), "student"):
        kept = KeyedDropout(0.5).kept(torch.zeros(64, 4000)).double() * 2 - 1
    for along, shift in [(1, 1), (1, 2), (0, 1)]:
        correlation = (kept * kept.roll(shift, dims=along)).mean().item()
        assert abs(correlation) < 5 / math.sqrt(kept.numel())


def test_a_mask_is_of_the_values_in_their_order_whatever_the_shape_and_the_memory_format():
    layer, x, key_B = KeyedDropout(0.5), torch.randn(3, 4, 5, 2), _keys(3)
    flat = _apply(layer, x.flatten(1), key_B)
    assert torch.equal(_apply(layer, x, key_B).flatten(1), flat)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(_apply(layer, last, key_B).flatten(1), flat)


def test_a_block_of_keys_inside_another_ends_with_the_outer_one_in_force():
    layer, x = KeyedDropout(0.5), torch.ones(2, 64)
    with dropout_keys(_keys(2), "student"):
        before = layer(x)
        assert not torch.equal(_apply(layer, x, _keys(2), "mean_teacher"), before)
        assert torch.equal(layer(x), before)


def test_what_is_kept_is_scaled_up():
    x = torch.ones(8, 1000, dtype=torch.float64)
    assert set(_apply(KeyedDropout(0.2), x, _keys(8)).unique().tolist()) == {0.0, 1 / (1 - 0.2)}


def test_masks_differ_between_samples_layers_and_roles():
    model = nn.ModuleDict({"a": KeyedDropout(0.5), "b": nn.Sequential(KeyedDropout(0.5))})
    salt_by_path(model)
    x, key_B = torch.ones(2, 200), _keys(2)
    first = _apply(model["a"], x, key_B)
    others = [_apply(model["b"], x, key_B), _apply(model["a"], x, key_B, "teacher"), _apply(model["a"], x, key_B + 1)]
    for other in [*others, first.flip(0)]:
        assert 0.35 < (first == other).double().mean().item() < 0.65  # two fair coins agree half of the time
    again = nn.ModuleDict({"a": KeyedDropout(0.5)})
    salt_by_path(again)
    assert torch.equal(_apply(again["a"], x, key_B), first)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_alpha_dropout_has_the_two_values_of_torch(p):
    """With the same mask it is torch's formula: what is kept and what is dropped go through one affine map."""
    x = torch.linspace(-2, 3, 400, dtype=torch.float64).repeat(4, 1)
    layer, key_B = KeyedAlphaDropout(p), _keys(4)
    found = _apply(layer, x, key_B)
    with dropout_keys(key_B, "student"):
        noise = layer.kept(x).double()
    alpha = 1.7580993408473766
    a = 1 / math.sqrt((alpha**2 * p + 1) * (1 - p))
    torch.testing.assert_close(found, x * noise * a + (noise - 1) * alpha * a + alpha * a * p, atol=1e-12, rtol=0)
    torch.manual_seed(0)
    dropped = nn.AlphaDropout(p)(torch.zeros(1000, dtype=torch.float64)).unique()
    zeros = _apply(layer, torch.zeros(4, 400, dtype=torch.float64), key_B).unique()
    torch.testing.assert_close(zeros, dropped, atol=1e-12, rtol=0)


def test_alpha_dropout_keeps_mean_and_variance():
    x = torch.randn(256, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = _apply(KeyedAlphaDropout(0.2), x, _keys(256))
    assert abs(y.mean().item()) < 0.01
    assert abs(y.var().item() - 1) < 0.02


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_is_dropped_or_asked_for_in_eval_or_at_zero(kind):
    x = torch.randn(3, 4)
    assert kind(0.5).eval()(x) is x
    assert kind(0.0)(x) is x


@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_flows_through_kept_values_only(kind):
    x = torch.randn(4, 50, dtype=torch.float64, requires_grad=True)
    layer, key_B = kind(0.3), _keys(4)
    _apply(layer, x, key_B).sum().backward()
    with dropout_keys(key_B, "student"):
        kept = layer.kept(x)
    assert x.grad is not None
    assert torch.equal(x.grad != 0, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_all_types_drop_the_same_values(kind, dtype):
    x, key_B = torch.ones(4, 33), _keys(4)
    found = _apply(kind(0.3), x.to(dtype), key_B)
    assert found.dtype is dtype
    assert torch.equal(found == found.max(), (y := _apply(kind(0.3), x, key_B)) == y.max())


def test_refuses_to_train_without_keys():
    with pytest.raises(RuntimeError, match="dropout in train mode outside of `dropout_keys`"):
        KeyedDropout(0.1)(torch.zeros(2, 2))


def test_keys_end_with_their_block_also_after_an_error():
    with pytest.raises(ZeroDivisionError), dropout_keys(_keys(2), "student"):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="outside of `dropout_keys`"):
        KeyedDropout(0.1)(torch.zeros(2, 2))


def test_refuses_keys_of_another_batch():
    with pytest.raises(ShapeError, match=r"dropout got 3 samples of shape \(7,\) and keys of 2"):
        _apply(KeyedDropout(0.1), torch.zeros(3, 7), _keys(2))
