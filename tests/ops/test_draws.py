from __future__ import annotations

import pytest
import torch
from scipy import stats

from distkd.ops.draws import fold_in, integer_key, text_key, uniform, words


def test_host_and_tensor_keys_are_the_same_numbers():
    key = torch.zeros((), dtype=torch.int64)
    for number in (5, -3, 2**62, 0):
        assert fold_in(key, number).item() == fold_in(key, torch.tensor(number)).item() == integer_key(number)
    assert fold_in(fold_in(key, 5), 7).item() == integer_key(5, 7) != integer_key(7, 5)


def test_a_draw_depends_on_its_key_alone():
    keys = torch.tensor([3, 1, 4, 1, 5])
    assert torch.equal(uniform(keys, 6)[3], uniform(keys, 6)[1])
    assert torch.equal(uniform(keys, 6)[2], uniform(torch.tensor(4), 6))
    assert torch.equal(uniform(keys, 6), uniform(keys, 9)[:, :6])


@pytest.mark.parametrize("axis", [0, 1])
def test_draws_are_uniform_along_keys_and_along_a_key(axis: int):
    # keys that count up are the hardest for a weak hash: neighbours differ in one bit
    draws = uniform(torch.arange(400), 400, dtype=torch.float64)
    counts = torch.stack([torch.histc(row, 20, 0, 1) for row in draws.unbind(1 - axis)])
    p_values = stats.chisquare(counts.numpy(), axis=1).pvalue
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4


def test_neighbouring_keys_draw_independently():
    draws = uniform(torch.arange(200), 2000, dtype=torch.float64)
    correlation = torch.corrcoef(draws).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / 2000**0.5


def test_precisions_agree():
    keys = torch.arange(10)
    assert torch.equal(uniform(keys, 8).double(), uniform(keys, 8, dtype=torch.float64))


def test_names_have_stable_keys():
    assert text_key("teacher") == text_key("teacher") != text_key("mean_teacher")
    assert text_key("") == -3750763034362895579  # the offset basis of FNV-1a, as int64


def test_words_are_uniform_and_depend_on_their_key_alone():
    drawn = words(torch.arange(300), 501)
    assert drawn.shape == (300, 501)
    assert torch.equal(drawn[7], words(torch.tensor(7), 501))
    assert torch.equal(drawn[:, :20], words(torch.arange(300), 20))
    counts = torch.histc(drawn.double(), 64, -(2**31), 2**31)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
