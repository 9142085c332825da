from __future__ import annotations

from math import factorial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from distkd.errors import ConfigError
from distkd.ops import permutation
from distkd.ops.permutation import Pools, distinct, distinct_of

EDGES = [255, 256, 257, 263, 289, 290, 1009, 1023, 1024, 1025, 1087, 9999, 10000, 10001, 16383, 16384, 99991]
HUGE = [2**25, 2**25 + 1, 10**10, 10**10 + 19, 2**40 + 7]


def _p(counts: Tensor, expected: Tensor | None = None) -> float:
    return float(stats.chisquare(counts.double().numpy(), None if expected is None else expected.numpy()).pvalue)


# exactness


@pytest.mark.parametrize("pool", [*range(1, 41), *EDGES])
def test_as_many_as_the_pool_are_all_of_it(pool: int):
    drawn = distinct(torch.arange(3), pool, pool)
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(pool).expand(3, pool))


@pytest.mark.parametrize("pool", HUGE)
def test_draws_of_a_huge_pool_are_different_and_spread_over_it(pool: int):
    drawn = distinct(torch.arange(30), 2000, pool)
    assert drawn.min() >= 0
    assert drawn.max() < pool
    assert all(len(row.unique()) == 2000 for row in drawn)
    assert _p(torch.bincount((drawn.double() / pool * 64).long().flatten(), minlength=64)) > 1e-4
    # what is left of the numbers after a division is as uniform as they are
    assert _p(torch.bincount((drawn % 61).flatten(), minlength=61)) > 1e-4


@given(pool=st.integers(1, 3000), n=st.integers(1, 3000), key=st.integers(-(2**63), 2**63 - 1))
def test_draws_are_different_and_in_range(pool: int, n: int, key: int):
    n = min(n, pool)
    (drawn,) = distinct(torch.tensor([key]), n, pool).tolist()
    assert len(set(drawn)) == n
    assert min(drawn) >= 0
    assert max(drawn) < pool


@pytest.mark.parametrize("radices", [(20, 20), (17, 18), (18, 17), (13, 40)])
@pytest.mark.parametrize("word", ["int32", "int64"])
def test_places_beyond_the_pool_are_walked_through(
    monkeypatch: pytest.MonkeyPatch, radices: tuple[int, int], word: str
):
    """Against the walk itself, one step after the other, with many more spare places than a real pool has."""
    size = 300
    monkeypatch.setattr(permutation, "_radices", lambda _: radices)
    monkeypatch.setattr(permutation, "_NARROW", 1 << 25 if word == "int32" else 0)
    pools, keys = Pools.of([size]), torch.arange(40)
    network = permutation._Network(keys, pools.cut_C3.expand(40, 3), pools)
    number = torch.arange(radices[0] * radices[1]).expand(40, -1).to(network.word.dtype)
    image = network._run(number // radices[1], number % radices[1])
    assert torch.equal(image.sort(dim=1).values[0], torch.arange(radices[0] * radices[1]))

    walked = image[:, :size].clone()
    while (walked >= size).any():
        walked = torch.where(walked >= size, image.gather(1, walked), walked)
    zeros = torch.zeros_like(keys)
    assert torch.equal(distinct_of(keys, size, pools, zeros), walked)
    assert torch.equal(distinct_of(keys, 90, pools, zeros), walked[:, :90])


@pytest.mark.parametrize("pool", [100, 257, 1000, 10007, 20000, 10**10])
def test_a_draw_depends_on_its_key_alone_and_more_draws_begin_with_fewer(monkeypatch: pytest.MonkeyPatch, pool: int):
    keys = torch.tensor([3, 1, 4, 1, 5, -9, 2**62])
    drawn = distinct(keys, 100, pool)
    assert torch.equal(drawn[3], drawn[1])
    assert torch.equal(drawn[5:6], distinct(keys[5:6], 100, pool))
    assert torch.equal(drawn[:, :7], distinct(keys, 7, pool))
    monkeypatch.setattr(permutation, "_CHUNK", 200)
    assert torch.equal(drawn, distinct(keys, 100, pool))


def test_no_key_draws_nothing():
    assert distinct(torch.arange(0), 5, 1000).shape == (0, 5)
    assert distinct(torch.arange(0), 5, 50).shape == (0, 5)


# tables


SIZES = [70, 256, 257, 1000, 40000, 61]


def test_each_key_draws_from_its_own_pool(monkeypatch: pytest.MonkeyPatch):
    pools, which = Pools.of(SIZES), torch.arange(6).repeat(50)
    drawn = distinct_of(torch.arange(300), 61, pools, which)
    assert all(len(row.unique()) == 61 for row in drawn)
    assert drawn.min() == 0
    for row, size in enumerate(SIZES):
        assert 0.98 * size < drawn[which == row].max() + 1 <= size
    monkeypatch.setattr(permutation, "_CHUNK", 1000)
    assert torch.equal(drawn, distinct_of(torch.arange(300), 61, pools, which))


@pytest.mark.parametrize("sizes", [[20, 200], [257, 40000], [1087, 1025, 9999], [2**25 + 1, 2**33]])
def test_a_table_of_pools_of_one_kind_draws_as_each_alone(sizes: list[int]):
    keys, pools = torch.arange(5), Pools.of(sizes)
    which = torch.zeros_like(keys)
    assert torch.equal(distinct_of(keys, 20, pools, which), distinct(keys, 20, sizes[0]))


def test_nothing_waits_for_the_device():
    """Tensors without values: whoever reads one on the host fails."""
    keys = torch.arange(6, device="meta")
    pools = Pools.of(SIZES)
    pools = pools.on(pools.cut_C3.to("meta"))
    assert distinct_of(keys, 61, pools, keys).shape == (6, 61)
    for pool in (100, 257, 10**10 + 19):
        assert distinct(keys, 9, pool).shape == (6, 9)


@pytest.mark.parametrize("n", [0, 301])
def test_more_than_the_pool_are_refused(n: int):
    expected = f"cannot draw {n} different numbers of a pool of 300; draw 1 to 300 of them"
    with pytest.raises(ConfigError, match=expected):
        distinct(torch.arange(3), n, 300)
    with pytest.raises(ConfigError, match=expected):
        distinct_of(torch.arange(3), n, Pools.of([400, 300]), torch.zeros(3, dtype=torch.int64))


def test_a_compiled_caller_draws_the_same():
    def rows(keys: Tensor) -> Tensor:
        return distinct(keys * 3, 20, 1000) + distinct_of(keys, 20, pools, keys) + 1

    pools, keys = Pools.of(SIZES), torch.arange(5)
    assert torch.equal(torch.compile(rows, backend="aot_eager")(keys), rows(keys))


# every outcome equally likely; the keys are fixed, so a test passes always or never


@pytest.mark.parametrize("pool", [2, 3, 4, 5])
def test_all_permutations_of_a_small_pool_are_equally_frequent(pool: int):
    drawn = distinct(torch.arange(24000), pool, pool)
    code = (drawn * pool ** torch.arange(pool)).sum(dim=1)
    counts = code.unique(return_counts=True)[1]
    assert len(counts) == factorial(pool)
    assert _p(counts) > 1e-4


@pytest.mark.parametrize("pool", [40, 256, 257, 300, 1000, 1087, 2000])
def test_every_number_is_equally_frequent_in_every_column(pool: int):
    drawn = distinct(torch.arange(40 * pool), 40, pool)
    p_values = [_p(torch.bincount(column, minlength=pool)) for column in drawn.unbind(1)]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("pool", [40, 257, 300, 1087])
def test_a_number_is_equally_frequent_at_all_positions(pool: int):
    position = distinct(torch.arange(20 * pool), pool, pool).argsort(dim=1)
    numbers = range(0, pool, pool // 20)
    p_values = [_p(torch.bincount(position[:, number], minlength=pool)) for number in numbers]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("pool", [30, 257, 1000, 20000, 10**10 + 19])
def test_pairs_of_columns_are_jointly_uniform(pool: int):
    drawn = (distinct(torch.arange(40000), 60 if pool > 60 else 30, pool).double() / pool * 10).long()
    sizes = torch.bincount((torch.arange(min(pool, 10**5)).double() / min(pool, 10**5) * 10).long(), minlength=10)
    # two different numbers: the second finds one fewer in the bin of the first
    pairs = (sizes[:, None] * sizes - torch.diag(sizes)).double()
    expected = (pairs / pairs.sum() * 40000).flatten()
    codes = drawn[:, ::2] * 10 + drawn[:, 1::2]
    p_values = [_p(torch.bincount(code, minlength=100), expected) for code in codes.unbind(1)]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("pool", [257, 1024, 1087])
def test_the_steps_from_draw_to_draw_are_uniform(pool: int):
    drawn = distinct(torch.arange(4000), 200, pool)
    for lag in (1, 2, 31, 32):
        steps = (drawn[:, lag:] - drawn[:, :-lag]).flatten() % pool
        counts = torch.bincount(steps, minlength=pool)
        assert counts[0] == 0
        assert _p(counts[1:]) > 1e-4


def _pairs_that_keep_their_distance(pool: int) -> tuple[int, float]:
    """How many pairs of one column of the grid end as far apart as they began, and how many should."""
    left, right = permutation._radices(pool)
    assert left * right == pool
    kept, pairs = 0, 0
    for first in range(0, 60000, 10000):
        drawn = distinct(torch.arange(first, first + 10000), 2 * right, pool) // right
        distance = drawn[:, :right] - drawn[:, right:]
        kept += int(((distance + 1) % left == 0).sum() + ((distance - 1) % left == 0).sum())
        pairs += distance.numel()
    return kept, pairs * 2 * right / (pool - 1)


def test_the_network_has_rounds_enough():
    """Too few rounds show where the halves collide: with four, twice as many pairs keep their distance as should."""
    kept, expected = _pairs_that_keep_their_distance(1024)
    assert abs(kept - expected) < 5 * expected**0.5


def test_four_rounds_would_be_too_few(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(permutation, "_rounds", lambda _: 4)
    permutation._one_pool.cache_clear()
    kept, expected = _pairs_that_keep_their_distance(1024)
    permutation._one_pool.cache_clear()
    assert kept > 1.3 * expected


@pytest.mark.parametrize("pool", [200, 1000, 20000])
def test_two_keys_share_as_many_as_chance_has_it(pool: int):
    drawn = distinct(torch.arange(3000), 100, pool)
    present = torch.zeros(3000, pool, dtype=torch.bool).scatter_(1, drawn, True)
    for lag in (1, 2):
        shared = (present[lag:] & present[:-lag]).sum(dim=1)
        law = stats.hypergeom(pool, 100, 100)
        low, high = int(law.ppf(0.01)), int(law.ppf(0.99))
        counts = torch.bincount(shared.clamp(low, high) - low, minlength=high - low + 1)
        share = [law.cdf(low), *law.pmf(range(low + 1, high)), law.sf(high - 1)]
        assert _p(counts, torch.tensor(share).double() * len(shared)) > 1e-4


def test_the_same_column_of_neighbouring_keys_is_independent():
    drawn = distinct(torch.arange(40001), 20, 1000)
    steps = (drawn[1:] - drawn[:-1]) % 1000
    p_values = [_p(torch.bincount(column, minlength=1000)) for column in steps.unbind(1)]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4


def test_three_draws_in_a_row_are_jointly_uniform():
    drawn = (distinct(torch.arange(60000), 60, 20000) * 6) // 20000
    codes = (drawn[:, :-2] * 36 + drawn[:, 1:-1] * 6 + drawn[:, 2:]).unbind(1)
    p_values = [_p(torch.bincount(code, minlength=216)) for code in codes[::3]]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4
