from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distkd.errors import ConfigError
from distkd.ops.selection import kept_ranks, select_by_discrepancy

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
