from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from distkd.errors import ConfigError
from distkd.ops.selection import candidate_rows, kept_ranks, select_by_discrepancy

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, -1, -1, 0, 0])


def _candidates(index: int, *, key: int = 7, positives: int = 3, negatives: int = 5) -> tuple[list[int], list[int]]:
    index_B = torch.tensor([index])
    rows = candidate_rows(
        torch.tensor([key]), index_B, LABELS[index_B], LABELS, n_positive=positives, n_negative=negatives
    )[0].tolist()
    return rows[:positives], rows[positives:]


@given(index=st.integers(0, 11), key=st.integers(-(2**63), 2**63 - 1), negatives=st.integers(1, 40))
def test_positives_are_of_the_class_and_negatives_of_another(index: int, key: int, negatives: int):
    positive, negative = _candidates(index, key=key, negatives=negatives)
    assert positive[0] == index
    assert {LABELS[row].item() for row in positive} == {LABELS[index].item()}
    assert len(set(positive[1:])) == len(positive) - 1
    assert all(LABELS[row] >= 0 and LABELS[row] != LABELS[index] for row in negative)
    pool = int(((LABELS >= 0) & (LABELS[index] != LABELS)).sum())
    assert len(negative) == negatives
    assert len(set(negative)) == negatives if negatives <= pool else True


def test_an_unlabelled_anchor_knows_itself_alone():
    positive, negative = _candidates(12, negatives=15)
    assert positive == [12, 12, 12]
    assert sorted(negative) == [row for row in range(16) if row != 12]


def test_draws_are_uniform_over_the_class_and_over_the_others():
    keys = torch.arange(3000)
    rows = candidate_rows(keys, torch.zeros_like(keys), torch.zeros_like(keys), LABELS, n_positive=3, n_negative=4)
    for drawn, pool in ((rows[:, 1:3], LABELS == 0), (rows[:, 3:], LABELS > 0)):
        counts = torch.bincount(drawn.flatten(), minlength=16)[pool]
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_any_rank_can_make_the_draw_of_any_sample():
    keys, index = torch.arange(8), torch.arange(8)
    whole = candidate_rows(keys, index, LABELS[:8], LABELS, n_positive=3, n_negative=20)
    parts = [
        candidate_rows(keys[i : i + 2], index[i : i + 2], LABELS[i : i + 2], LABELS, n_positive=3, n_negative=20)
        for i in range(0, 8, 2)
    ]
    assert torch.equal(torch.cat(parts), whole)


KEY = torch.tensor(11)


def test_windows_are_those_of_the_released_code_at_300_candidates():
    seen = {mode: set() for mode in ("mid", "random")}
    for key in range(200):
        for mode, places in seen.items():
            places |= set(kept_ranks(mode, torch.tensor(key), n_positive=300, keep=20).tolist())
    assert seen["mid"] == set(range(30, 100))
    assert min(seen["random"]) < 3
    assert max(seen["random"]) > 296
    for progress, (first, last) in ((0.0, (100, 149)), (0.5, (50, 99)), (0.9, (0, 49))):
        places = kept_ranks("curriculum", KEY, n_positive=300, keep=200, progress=progress)
        assert first <= places.min() <= places.max() <= last
    assert kept_ranks("hard", KEY, n_positive=300, keep=20).tolist() == list(range(20))


@given(n=st.integers(1, 320), keep=st.integers(1, 320), mode=st.sampled_from(["hard", "mid", "random", "curriculum"]))
def test_places_are_always_within_the_candidates(n: int, keep: int, mode: str):
    if keep > n:
        with pytest.raises(ConfigError, match=f"cannot keep {keep} of {n} positive candidates"):
            kept_ranks(mode, KEY, n_positive=n, keep=keep)
        return
    places = kept_ranks(mode, KEY, n_positive=n, keep=keep).tolist()
    assert len(places) == keep
    assert all(0 <= place < n for place in places)
    assert len(set(places)) == keep if mode in ("hard", "mid") else True


def test_all_negatives_are_kept_on_request_and_column_0_always():
    discrepancy = torch.randn(4, 9)
    columns = select_by_discrepancy(discrepancy, n_positive=4, ranks_P=torch.tensor([0, 1]), keep_negative=None)
    assert columns[:, 0].tolist() == [0] * 4
    assert columns[:, 2:].tolist() == [[4, 5, 6, 7, 8]] * 4
