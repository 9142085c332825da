from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from distkd.base import World
from distkd.errors import ConfigError
from distkd.memory.candidates import Candidates

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, -1, -1, 0, 0])
"""Class 0 has 6 rows, classes 1 and 2 have 4, two rows have none; 10 or 8 rows are of another class."""

KEYS = st.integers(-(2**63), 2**63 - 1)


def _sides(found: Tensor, n_positive: int) -> tuple[list[int], list[int]]:
    (row,) = found.tolist()
    return row[:n_positive], row[n_positive:]


def _draw(index: int, key: int, labels: Tensor = LABELS, label: int | None = None, **options: Any):
    candidates = Candidates(labels, **options)
    label_B = None if label is None else torch.tensor([label])
    return _sides(candidates(torch.tensor([key]), torch.tensor([index]), label_B), options["n_positive"])


@given(index=st.integers(0, 11), key=KEYS, negatives=st.integers(1, 40))
def test_positives_are_of_the_class_and_negatives_of_another(index: int, key: int, negatives: int):
    positive, negative = _draw(index, key, n_positive=3, n_negative=negatives)
    assert positive[0] == index
    assert {LABELS[row].item() for row in positive} == {LABELS[index].item()}
    assert len(set(positive[1:])) == len(positive) - 1
    assert all(LABELS[row] >= 0 and LABELS[row] != LABELS[index] for row in negative)
    pool = int(((LABELS >= 0) & (LABELS[index] != LABELS)).sum())
    assert len(negative) == negatives
    # 8 and 10 rows: from 9 to 10 negatives one anchor draws with replacement and another without
    assert len(set(negative)) == negatives if negatives <= pool else len(set(negative)) <= pool


@st.composite
def _training_sets(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Labels in any order with some missing, two classes at least, and an anchor."""
    labels = draw(st.lists(st.integers(-1, 5), min_size=2, max_size=40).filter(lambda x: len(set(x) - {-1}) > 1))
    return torch.tensor(labels), draw(st.integers(0, len(labels) - 1))


@given(
    training_set=_training_sets(),
    key=KEYS,
    negatives=st.integers(1, 45),
    own=st.booleans(),
    other=st.booleans(),
    data=st.data(),
)
def test_candidates_are_those_of_the_definition(
    training_set: tuple[Tensor, int], key: int, negatives: int, own: bool, other: bool, data: st.DataObject
):
    labels, index = training_set
    known = labels >= 0
    smallest = int(labels[known].unique(return_counts=True)[1].min())
    n_positive = data.draw(st.integers(1, smallest))
    label = data.draw(st.sampled_from([None, -1, *labels.unique().tolist()]))
    positive, negative = _draw(
        index,
        key,
        labels,
        label,
        n_positive=n_positive,
        n_negative=negatives,
        negatives="other_class" if other else "others",
        positive="own" if own else "class",
    )
    believed = labels[index].item() if label is None else label
    rows = set(range(len(labels)))
    if believed < 0:
        assert positive == [index] * n_positive
    else:
        of_class = {row for row in rows if labels[row] == believed}
        drawn = positive[1:] if own else positive
        assert not own or positive[0] == index
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= of_class
    pool = rows - {index}
    if other and believed >= 0:
        pool = {row for row in rows if known[row] and labels[row] != believed}
    assert set(negative) <= pool
    assert len(negative) == negatives
    if negatives <= len(pool):
        assert len(set(negative)) == negatives


def test_an_unlabelled_anchor_knows_itself_alone():
    positive, negative = _draw(12, 7, n_positive=3, n_negative=15)
    assert positive == [12, 12, 12]
    assert sorted(negative) == [row for row in range(16) if row != 12]


def test_a_label_that_is_given_is_believed_in_place_of_the_rows():
    positive, negative = _draw(4, 7, label=-1, n_positive=2, n_negative=15)
    assert positive == [4, 4]
    assert sorted(negative) == [row for row in range(16) if row != 4]
    positive, negative = _draw(12, 7, label=1, n_positive=4, n_negative=10)
    assert positive[0] == 12
    assert set(positive[1:]) < {1, 4, 7, 10}
    assert sorted(negative) == [0, 2, 3, 5, 6, 8, 9, 11, 14, 15]


def _frequencies(found: Tensor, pool: Tensor) -> float:
    counts = torch.bincount(found.flatten(), minlength=len(LABELS))
    assert counts[~pool].sum() == 0
    return float(stats.chisquare(counts[pool].numpy()).pvalue)


@pytest.mark.parametrize("n_negative", [4, 9, 20])
@pytest.mark.parametrize("anchor", [0, 1, 13])
def test_draws_are_uniform_over_the_class_and_over_the_others(n_negative: int, anchor: int):
    keys = torch.arange(4000)
    candidates = Candidates(LABELS, n_positive=3, n_negative=n_negative)
    rows = candidates(keys, torch.full_like(keys, anchor))
    label = LABELS[anchor]
    others = (LABELS >= 0) & (label != LABELS) if label >= 0 else torch.arange(16) != anchor
    assert _frequencies(rows[:, 3:], others) > 1e-4
    assert _frequencies(rows[:, 3], others) > 1e-4
    if label >= 0:
        assert _frequencies(rows[:, 1:3], label == LABELS) > 1e-4
        # the two sides are drawn independently
        codes = torch.unique(rows[:, 1] * 16 + rows[:, 3], return_counts=True)[1]
        assert len(codes) == int((label == LABELS).sum() * others.sum())
        assert stats.chisquare(codes.numpy()).pvalue > 1e-4


def test_all_other_rows_need_no_table():
    candidates = Candidates(LABELS, n_positive=1, n_negative=5, negatives="others")
    assert not list(candidates.buffers())
    keys = torch.arange(4000)
    rows = candidates(keys, torch.full_like(keys, 3))
    assert rows[:, 0].unique().tolist() == [3]
    assert all(len(row.unique()) == 5 for row in rows[:200, 1:])
    assert _frequencies(rows[:, 1:], torch.arange(16) != 3) > 1e-4


def test_a_relaxed_positive_is_any_row_of_the_class():
    keys = torch.arange(3000)
    for negatives in ("other_class", "others"):
        candidates = Candidates(LABELS, n_positive=1, n_negative=4, negatives=negatives, positive="class")
        assert _frequencies(candidates(keys, torch.full_like(keys, 4))[:, 0], LABELS == 1) > 1e-4
        assert candidates(keys, torch.full_like(keys, 12))[:, 0].unique().tolist() == [12]


SETS = {
    "without": {"n_positive": 3, "n_negative": 8},
    "mixed": {"n_positive": 2, "n_negative": 9},
    "with": {"n_positive": 1, "n_negative": 30},
    "others": {"n_positive": 1, "n_negative": 12, "negatives": "others"},
}


def _share(world: World, options: list[dict[str, Any]]) -> Tensor:
    """Each rank's own anchors of a global batch of 8."""
    anchors = torch.arange(8).view(world.size, -1)[world.rank]
    keys, index = anchors * 11 - 40, anchors + 5
    return torch.cat([Candidates(LABELS, **each)(keys, index) for each in options], dim=1)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_draw_what_one_process_draws(ranks, size: int):
    options = list(SETS.values())
    assert torch.equal(torch.cat(ranks(size).run(_share, options=options)), _share(World(), options))


@pytest.mark.parametrize("name", SETS)
def test_any_rank_can_make_the_draw_of_any_sample(name: str):
    candidates = Candidates(LABELS, **SETS[name])
    keys, index = torch.arange(16) * 3, torch.arange(16)
    whole = candidates(keys, index)
    order = torch.tensor([9, 2, 13, 5, 0])
    assert torch.equal(candidates(keys[order], index[order]), whole[order])
    assert torch.equal(candidates(keys, index, LABELS), whole)
    assert not torch.equal(candidates(keys + 1, index), whole)


@pytest.mark.parametrize("name", SETS)
def test_nothing_waits_for_the_device_and_nothing_is_saved(name: str):
    candidates = Candidates(LABELS, **SETS[name])
    assert not candidates.state_dict()
    columns = candidates(torch.arange(4), torch.arange(4)).shape[1]
    # tensors without values: whoever reads one on the host fails
    candidates.to("meta")
    keys = torch.arange(4, device="meta")
    assert candidates(keys, keys).shape == candidates(keys, keys, keys).shape == (4, columns)


@pytest.mark.parametrize("name", SETS)
def test_a_compiled_step_has_the_same_candidates(name: str):
    candidates = Candidates(LABELS, **SETS[name])
    keys = torch.arange(8)
    compiled = torch.compile(lambda keys: candidates(keys * 5, keys) + 1, backend="aot_eager")
    assert torch.equal(compiled(keys), candidates(keys * 5, keys) + 1)


def test_a_large_set_is_drawn_from_all_over():
    labels = torch.arange(30000) * 7 % 10 - torch.arange(30000).eq(8).long() * 99
    candidates = Candidates(labels, n_positive=300, n_negative=4096)
    assert candidates.row_N.dtype == torch.int32
    index = torch.tensor([8, 4001, 29999])
    rows = candidates(torch.arange(3), index)
    assert torch.equal(rows[:, 0], index)
    assert set(rows[0, :300].tolist()) == {8}
    for row, anchor in zip(rows, index, strict=True):
        assert len(row[300:].unique()) == 4096
        counts = torch.bincount(row[300:] * 20 // 30000, minlength=20)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
        if anchor != 8:
            assert (labels[row[:300]] == labels[anchor]).all()
            assert not (labels[row[300:]] == labels[anchor]).any()


@pytest.mark.parametrize(
    "labels, options, message",
    [
        (
            [0, 0, 1],
            {"n_positive": 2},
            "class 1 has 1 labelled training rows, fewer than the 2 positives to draw; ask ",
        ),
        ([3, 3, -1], {}, "all 2 labelled training rows are of class 3, so there are no negatives of another class"),
        ([0, 1], {"n_positive": 0}, "candidates are 0 positives and 4 negatives; both must be at least 1"),
        ([0, 1], {"n_negative": 0}, "candidates are 1 positives and 0 negatives; both must be at least 1"),
        ([0], {"negatives": "others"}, "the training set has 1 rows, and an anchor needs another to be told from"),
        ([], {}, "the training set has 0 rows, and an anchor needs another to be told from; add samples"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(labels: list[int], options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Candidates(torch.tensor(labels, dtype=torch.int64), **{"n_positive": 1, "n_negative": 4, **options})


def test_empty_classes_and_sets_without_labels_are_no_obstacle():
    positive, negative = _draw(1, 5, torch.tensor([7, 2, 7, 2, 7]), n_positive=2, n_negative=3)
    assert positive[0] == 1
    assert positive[1] in (1, 3)
    assert sorted(negative) == [0, 2, 4]
    positive, negative = _draw(1, 5, torch.full((4,), -1), n_positive=2, n_negative=3)
    assert positive == [1, 1]
    assert sorted(negative) == [0, 2, 3]
    one_class = torch.zeros(4, dtype=torch.int64)
    assert sorted(_draw(1, 5, one_class, n_positive=2, n_negative=3, negatives="others")[1]) == [0, 2, 3]
