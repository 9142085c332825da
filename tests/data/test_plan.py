"""The plan: the same global batches at any world size, each sample at most once an epoch, any step found at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkd.base import World
from distkd.data import plan as plan_module
from distkd.data.plan import Plan, eval_positions, shuffled
from distkd.errors import ConfigError, DataError

worlds = st.sampled_from([1, 2, 4])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    global_batch = 4 * draw(st.integers(1, 6))
    n_samples = draw(st.integers(global_batch, 200))
    return Plan(
        n_samples=n_samples, global_batch=global_batch, seed=draw(st.integers(0, 99)), epochs=draw(st.integers(1, 3))
    )


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
