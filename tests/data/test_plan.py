"""The plan: the same global batches at any world size, each sample at most once an epoch, any step found at once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkd.base import World
from distkd.data import plan as plan_module
from distkd.data.plan import Balance, Plan, along, eval_positions, oversampling, shuffled
from distkd.errors import ConfigError, DataError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "inter-resolution-at-plus.json").read_text())["balance"]

worlds = st.sampled_from([1, 2, 4])
BALANCES: list[Balance] = ["none", "oversample", "weighted"]
balances = st.sampled_from(BALANCES)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    global_batch = 4 * draw(st.integers(1, 6))
    n_samples = draw(st.integers(global_batch, 200))
    return Plan(
        n_samples=n_samples, global_batch=global_batch, seed=draw(st.integers(0, 99)), epochs=draw(st.integers(1, 3))
    )


@st.composite
def balanced_plans(draw: st.DrawFn) -> Plan:
    n, seed = draw(st.integers(4, 120)), draw(st.integers(0, 99))
    label_N = np.random.default_rng(seed).choice([-1, 0, 1, 4], size=n, p=[0.1, 0.5, 0.3, 0.1])
    label_N[0] = 1
    return Plan(n, draw(st.sampled_from([4, 8, 12]).filter(lambda g: g <= n)), seed, 2, draw(balances), label_N)


@settings(max_examples=50)
@given(n=st.integers(1, 500), key=st.integers(-(2**63), 2**63 - 1))
def test_shuffled_is_a_permutation(n: int, key: int):
    assert sorted(shuffled(np.arange(n), n, key).tolist()) == list(range(n))


@settings(max_examples=20)
@given(n=st.integers(1, 500), key=st.integers(0, 99))
def test_shuffled_positions_do_not_depend_on_each_other(n: int, key: int):
    whole = shuffled(np.arange(n), n, key)
    assert all(shuffled(np.array([i]), n, key)[0] == whole[i] for i in range(0, n, 1 + n // 4))


def test_every_place_of_a_shuffle_is_about_equally_likely():
    n, trials = 5, 250
    count = np.zeros((n, n))
    for key in range(trials):
        count[np.arange(n), shuffled(np.arange(n), n, key)] += 1
    chi_square = ((count - trials / n) ** 2 / (trials / n)).sum()
    assert chi_square < 45  # 16 degrees of freedom: beyond 45 once in ten thousand


@pytest.mark.parametrize("n", [2**27, 2**27 + 1, 10**9, 2**50 + 7])
def test_a_shuffle_of_any_size_has_no_value_twice_and_spreads_evenly(n: int):
    value = shuffled(np.arange(20_000), n, key=3)
    assert value.min() >= 0
    assert value.max() < n
    assert len(np.unique(value)) == len(value)
    # jumps from value to value, too: a permutation that only adds a number would pass the first
    for spread in (value, np.diff(value) % n):
        count = np.histogram(spread.astype(float), bins=50, range=(0, n))[0]
        assert ((count - count.mean()) ** 2 / count.mean()).sum() < 105  # 49 degrees: beyond 105 once in 1e5


def test_each_position_may_have_a_permutation_of_its_own():
    position, key = np.arange(300) % 100, np.arange(300) // 100 - 1
    whole = shuffled(position, 100, key)
    assert whole.tolist() == [v for k in (-1, 0, 1) for v in shuffled(np.arange(100), 100, k).tolist()]
    assert shuffled(np.arange(0), 100, 1).tolist() == []


@given(plan=plans(), size=worlds, passes=st.sampled_from([1, 2, 4]))
def test_passes_and_ranks_together_are_the_global_batch(plan: Plan, size: int, passes: int):
    if plan.global_batch % (size * passes):
        return
    for step in range(0, plan.n_steps, max(1, plan.n_steps // 5)):
        parts = [
            plan.local_positions(step, number, passes, World(rank, size))
            for number in range(passes)
            for rank in range(size)
        ]
        assert np.concatenate(parts).tolist() == plan.global_positions(step).tolist()
        assert len({len(part) for part in parts}) == 1
        slots = plan.local_slots(passes - 1, passes, World(size - 1, size))
        assert plan.global_positions(step)[slots].tolist() == parts[-1].tolist()


@given(plan=plans())
def test_an_epoch_reads_each_sample_at_most_once(plan: Plan):
    for epoch in range(plan.epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = np.concatenate([plan.global_positions(step) for step in steps])
        assert len(set(seen.tolist())) == len(seen) == plan.n_samples - plan.n_samples % plan.global_batch
        assert 0 <= seen.min() <= seen.max() < plan.n_samples
        assert {plan.epoch_of(step) for step in steps} == {epoch}


def test_epochs_and_seeds_have_orders_of_their_own():
    first, other = Plan(97, 8, seed=0, epochs=2), Plan(97, 8, seed=1, epochs=2)
    assert first.n_steps == 24
    assert first.global_positions(0).tolist() != first.global_positions(12).tolist()
    assert first.global_positions(0).tolist() != other.global_positions(0).tolist()
    assert first.global_positions(5).tolist() == Plan(97, 8, seed=0, epochs=9).global_positions(5).tolist()


def test_blocks_of_the_order_join_without_a_seam(monkeypatch: pytest.MonkeyPatch):
    plan = Plan(100, 12, seed=3, epochs=1)
    whole = [plan.global_positions(step).tolist() for step in range(plan.n_steps)]
    monkeypatch.setattr(plan_module, "_BLOCK", 8)
    plan_module._block.cache_clear()
    try:
        assert [plan.global_positions(step).tolist() for step in range(plan.n_steps)] == whole
    finally:
        plan_module._block.cache_clear()


def test_a_step_among_a_billion_samples_is_found_at_once():
    plan = Plan(10**9, 4096, seed=0, epochs=1000)
    positions = plan.global_positions(plan.n_steps - 1)
    assert len(set(positions.tolist())) == 4096
    assert positions.max() < 10**9


def test_the_plan_cannot_be_changed_through_what_it_returns():
    with pytest.raises(ValueError, match="read-only"):
        plan_module._block(50, 0, 0, 0)[0] = 1


@given(n=st.integers(0, 300), size=st.integers(1, 8))
def test_evaluation_sees_each_sample_exactly_once(n: int, size: int):
    parts = [eval_positions(n, World(rank, size)) for rank in range(size)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_classes_are_repeated_as_the_source_does():
    assert oversampling(np.array(GOLDEN["counts"])).tolist() == GOLDEN["upsampling"]
    counts = np.random.default_rng(0).integers(1, 60, size=(200, 5))
    assert all(oversampling(row).tolist() == [round(row.max() / count) for count in row] for row in counts)


@settings(max_examples=25)
@given(plan=balanced_plans())
def test_the_oversampled_list_holds_each_class_as_often_as_its_factor_says(plan: Plan):
    plan = Plan(plan.n_samples, plan.global_batch, plan.seed, 1, "oversample", plan.label_N)
    label_N = np.asarray(plan.label_N)
    counts = {label: int((label_N == label).sum()) for label in np.unique(label_N).tolist()}
    most = max(count for label, count in counts.items() if label != -1)
    factors = {label: 1 if label == -1 else round(most / count) for label, count in counts.items()}
    length = sum(counts[label] * factors[label] for label in counts)
    listed = np.array([plan.after(0, 0, attempt) for attempt in range(length)])
    for label, factor in factors.items():
        mine = listed[label_N[listed] == label]
        assert len(mine) == counts[label] * factor
        assert factor > 1 or sorted(mine.tolist()) == np.flatnonzero(label_N == label).tolist()
    assert plan.steps_per_epoch == plan.n_samples // plan.global_batch


def test_what_a_short_class_repeats_is_drawn_once_for_the_run_and_by_the_seed():
    label_N = np.repeat([0, 1], [600, 60])

    def drawn(seed: int, epoch: int) -> list[int]:
        plan = Plan(660, 660, seed, 3, "oversample", label_N)
        return sorted(value for a in range(1200) if (value := plan.after(epoch, 0, a)) >= 600)

    first = drawn(0, 0)
    assert len(first) == 600
    assert drawn(0, 1) == first != drawn(1, 0)
    times = np.bincount(np.array(first) - 600, minlength=60)
    assert (
        3 < times.var() < 20
    )  # a tenth of the draws each, Poisson-like: repeated with replacement, not ten times each


def test_an_oversampled_batch_is_about_balanced():
    label_N = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [7000, 700, 70]))
    plan = Plan(len(label_N), 777, 0, 1, "oversample", label_N)
    shares = np.bincount(label_N[np.concatenate([plan.global_positions(t) for t in range(10)])]) / 7770
    assert np.allclose(shares, 1 / 3, atol=0.03)


def test_weights_are_the_chances_of_samples():
    weight_N = np.array([0.0, 1.0, 2.0, 5.0, 0.0])
    plan = Plan(5, 5, 0, 2000, "weighted", weight_N=weight_N)
    drawn = np.bincount(np.concatenate([plan.global_positions(step) for step in range(plan.n_steps)]), minlength=5)
    assert drawn[[0, 4]].tolist() == [0, 0]
    assert np.allclose(drawn / 10_000, weight_N / 8, atol=0.02)


def test_without_weights_classes_are_equally_likely_and_the_unlabelled_keep_their_share():
    label_N = np.repeat([-1, 0, 3], [500, 450, 50])
    plan = Plan(1000, 1000, 1, 20, "weighted", label_N)
    drawn = label_N[np.concatenate([plan.global_positions(step) for step in range(20)])]
    assert np.allclose([(drawn == label).mean() for label in (-1, 0, 3)], [0.5, 0.25, 0.25], atol=0.015)


@settings(max_examples=25)
@given(plan=balanced_plans(), size=worlds, passes=st.sampled_from([1, 2]))
def test_balanced_batches_do_not_depend_on_the_world_or_on_what_was_asked_before(plan: Plan, size: int, passes: int):
    if plan.global_batch % (size * passes):
        return
    again = replace(plan)
    for step in reversed(range(plan.n_steps)):
        parts = [
            plan.local_positions(step, number, passes, World(rank, size))
            for number in range(passes)
            for rank in range(size)
        ]
        assert np.concatenate(parts).tolist() == again.global_positions(step).tolist()
        assert set(np.concatenate(parts).tolist()) <= set(range(plan.n_samples))


def test_epochs_and_seeds_draw_anew():
    weight_N = np.ones(64)
    batches = [
        Plan(64, 64, seed, 2, "weighted", weight_N=weight_N).global_positions(e) for seed in (0, 1) for e in (0, 1)
    ]
    assert len({tuple(batch.tolist()) for batch in batches}) == 4


@given(place=st.integers(0, 10**6), stride=st.integers(1, 90), length=st.integers(1, 90))
def test_strides_visit_every_place_of_a_ring_once(place: int, stride: int, length: int):
    visited = [along(place % length, attempt, stride, length) for attempt in range(length)]
    assert visited[0] == place % length
    assert sorted(visited) == list(range(length))


@given(plan=plans(), where=st.floats(0, 0.999), slot=st.floats(0, 0.999))
def test_a_replacement_is_the_same_slot_of_the_next_step(plan: Plan, where: float, slot: float):
    step, at = int(where * plan.n_steps), int(slot * plan.global_batch)
    assert plan.after(step, at, 0) == plan.global_positions(step)[at]
    if (step + 1) % plan.steps_per_epoch:
        assert plan.after(step, at, 1) == plan.global_positions(step + 1)[at]
    others = {plan.after(step, at, attempt) for attempt in range(plan.n_samples)}
    assert others == set(range(plan.n_samples))


@given(plan=plans(), step=st.integers(0, 10**6))
def test_first_replacements_repeat_no_sample_of_their_batch_while_a_step_is_left(plan: Plan, step: int):
    step %= plan.n_steps
    if (step + 1) % plan.steps_per_epoch:
        batch = plan.global_positions(step)
        replaced = [plan.after(step, slot, 1) for slot in range(0, plan.global_batch, 2)]
        assert len({*replaced, *batch[1::2].tolist()}) == plan.global_batch


def test_steps_ask_for_no_more_than_their_blocks(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def counting(position: np.ndarray, n: int, key: Any) -> np.ndarray:
        asked.append(len(position))
        return shuffled(position, n, key)

    monkeypatch.setattr(plan_module, "shuffled", counting)
    plan_module._block.cache_clear()
    plan = Plan(10**9, 1024, seed=0, epochs=1)
    for step in (0, 1, 2, plan.n_steps * 9 // 10):
        plan.global_positions(step)
    assert sum(asked) <= 3 * plan_module._BLOCK


def test_fewer_samples_than_a_batch_are_refused():
    with pytest.raises(
        DataError, match=r"has 5 training samples, fewer than batch\.global_batch=8; set .* to 5 at most"
    ):
        Plan(5, 8, seed=0, epochs=1)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(
        ConfigError, match=r"global_batch=8 does not divide into 2 passes x 3 ranks = 6; use a multiple"
    ):
        Plan(20, 8, seed=0, epochs=1).local_positions(0, 0, 2, World(0, 3))


def test_an_empty_plan_is_refused():
    with pytest.raises(ConfigError, match="epochs=0, expected at least 1 of each"):
        Plan(20, 8, seed=0, epochs=0)


LABELS = np.array([0, 1] * 10)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"balance": "oversample"}, ConfigError, r"balance=oversample was given no labels .*; pass label_N"),
        ({"balance": "even", "label_N": LABELS}, ConfigError, r"unknown data\.balance 'even'; available: none, over"),
        (
            {"balance": "weighted", "label_N": LABELS[:19]},
            DataError,
            r"labels of shape \(19,\), expected \(20,\), one for each training sample; pass those",
        ),
        ({"balance": "weighted", "weight_N": np.ones((20, 1))}, DataError, r"weights of shape \(20, 1\), expected"),
        (
            {"balance": "oversample", "label_N": LABELS - 2},
            DataError,
            r"sample 0 has label -2, expected a class .*; mend",
        ),
        ({"balance": "oversample", "label_N": LABELS * 0 - 1}, DataError, r"none of 20 .* has a label.*; set data\.b"),
        (
            {"balance": "weighted", "weight_N": np.array([1.0, math.nan] * 10)},
            DataError,
            r"sample 1 has weight nan, expected a finite number of at least 0 \(10 such samples\); mend",
        ),
        ({"balance": "weighted", "weight_N": -np.ones(20)}, DataError, r"sample 0 has weight -1\.0, expected a finite"),
        (
            {"balance": "weighted", "weight_N": np.zeros(20)},
            DataError,
            r"have the sum 0\.0, expected .* positive weight",
        ),
        ({"balance": "weighted", "weight_N": np.full(20, 1e308)}, DataError, r"have the sum inf, expected a finite"),
    ],
)
def test_what_a_balance_cannot_use_is_refused(arguments: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        Plan(20, 8, seed=0, epochs=1, **arguments)


@pytest.mark.parametrize("balance", ["oversample", "weighted"])
def test_fewer_samples_than_a_batch_are_refused_with_any_balance(balance: Any):
    with pytest.raises(DataError, match="has 20 training samples, fewer than"):
        Plan(20, 24, seed=0, epochs=1, balance=balance, label_N=LABELS)
