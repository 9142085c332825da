from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from distkd.ops.draws import below, fold_in, integer_key, mix, text_key, uniform, weighted, words
from tests.golden_numbers import golden

WORD = (1 << 64) - 1


def _bits(key: int, counter: int) -> int:
    """The 64 bits behind a draw, in whole numbers that do not wrap around."""
    x = (key + 0x9E3779B97F4A7C15 * (counter + 1)) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


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


KEYS = st.integers(-(2**63), 2**63 - 1)


@given(key=KEYS)
def test_draws_are_those_of_splitmix(key: int):
    """What a seed means must not change: runs are resumed with it."""
    bits = [_bits(key, counter) for counter in range(4)]
    assert fold_in(torch.tensor(key), 3).item() & WORD == bits[3]
    assert uniform(torch.tensor(key), 4, dtype=torch.float64).tolist() == [
        word / 2**24 for word in (b >> 40 for b in bits)
    ]
    halves = [half for b in bits for half in (b & 0xFFFFFFFF, b >> 32)]
    assert [word & 0xFFFFFFFF for word in words(torch.tensor(key), 7).tolist()] == halves[:7]


def test_mixing_leaves_its_keys_as_they_are():
    keys = torch.arange(6)
    mixed = mix(keys.view(2, 3).t())
    assert torch.equal(keys, torch.arange(6))
    assert torch.equal(mixed, mix(keys).view(2, 3).t())
    assert mix(keys[:1].expand(4)).unique().numel() == 1


# with replacement


@given(key=KEYS, pool=st.integers(1, 2**35))
def test_a_number_below_is_the_product_of_pool_and_56_bits(key: int, pool: int):
    drawn = below(torch.tensor([key]), 3, pool)
    bits = [_bits(key, 2**48 + counter) for counter in range(3)]
    fractions = [(b >> 36 << 28) | (b & (2**28 - 1)) for b in bits]
    assert drawn.tolist() == [[fraction * pool >> 56 for fraction in fractions]]


@pytest.mark.parametrize("pool", [1, 2, 7, 100, 1000])
def test_numbers_below_are_equally_frequent_along_keys_and_along_a_key(pool: int):
    drawn = below(torch.arange(500), 500, pool)
    assert drawn.min() == 0
    assert drawn.max() == pool - 1
    for lines in (drawn, drawn.t()):
        coarse = (lines * 20 // pool).clamp(max=19) if pool > 20 else lines
        counts = torch.stack([torch.bincount(line, minlength=min(pool, 20)) for line in coarse])
        if pool > 1:
            assert stats.kstest(stats.chisquare(counts.numpy(), axis=1).pvalue, "uniform").pvalue > 1e-4
    assert stats.chisquare(torch.bincount(drawn.flatten(), minlength=pool).numpy()).pvalue > 1e-4 or pool == 1


def test_pairs_of_numbers_below_are_independent():
    drawn = below(torch.arange(40001), 20, 16)
    for first, second in ((drawn[:, 0], drawn[:, 1]), (drawn[:-1, 3], drawn[1:, 3]), (drawn[:-1, 5], drawn[1:, 4])):
        assert stats.chisquare(torch.bincount(first * 16 + second, minlength=256).numpy()).pvalue > 1e-4


def test_repeats_are_as_frequent_as_chance_has_them():
    drawn = below(torch.arange(2000), 100, 5000).sort(dim=1).values
    repeats = int((drawn[:, 1:] == drawn[:, :-1]).sum())
    expected = 2000 * (100 - 5000 * (1 - (1 - 1 / 5000) ** 100))
    assert abs(repeats - expected) < 5 * expected**0.5


def test_each_key_may_have_a_pool_of_its_own():
    keys, pool = torch.arange(4), torch.tensor([3, 1, 10**6, 2**34])
    drawn = below(keys, 50, pool)
    assert all(torch.equal(drawn[i], below(keys[i : i + 1], 50, int(pool[i]))[0]) for i in range(4))


def test_weights_are_the_frequencies():
    card = golden("crd")["alias_table"]
    drawn = weighted(torch.arange(500), 400, torch.tensor(card["weights"], dtype=torch.float64).cumsum(0))
    expected = torch.tensor(card["implied_probability"], dtype=torch.float64) * drawn.numel()
    assert stats.chisquare(torch.bincount(drawn.flatten()).numpy(), expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("scale", [1e-300, 1 / 3, 1.0, 1e300])
def test_a_row_without_weight_is_never_drawn(scale: float):
    weights = torch.tensor([0.0, 0.0, 2.0, 0.0, 1.0, 0.0], dtype=torch.float64) * scale
    drawn = weighted(torch.arange(100), 1000, weights.cumsum(0))
    assert drawn.unique().tolist() == [2, 4]


# the compiler


def _all_draws(key: Tensor) -> list[Tensor]:
    folded = fold_in(key, 5) + mix(key)
    cumulative = torch.arange(1.0, 9.0, dtype=torch.float64)
    return [
        folded * 2,
        words(folded, 5),
        uniform(folded, 5).sin(),
        below(folded, 6, 77) + 1,
        weighted(folded, 4, cumulative),
    ]


def test_a_compiled_caller_gets_the_same_draws_and_compiles_none():
    operations: list[str] = []

    def record(module: torch.fx.GraphModule, inputs: list[Tensor]):
        operations.extend(str(node.target) for node in module.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    key = torch.arange(6)
    compiled = torch.compile(_all_draws, backend=record)(key)
    assert all(map(torch.equal, compiled, _all_draws(key)))
    assert any("sin" in operation for operation in operations)
    assert not any("shift" in operation or "xor" in operation for operation in operations)


def test_the_compiler_is_not_loaded_for_a_draw():
    """Loading it takes longer than loading torch, in every worker that reads data."""
    code = (
        "import sys, torch; from distkd.ops.draws import fold_in; from distkd.ops.permutation import distinct;"
        "distinct(fold_in(torch.arange(3), 1), 5, 1000); sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
