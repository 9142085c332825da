"""The plan over sequential shards: laws of epochs and ranks, and near in time is near on disk."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distkd.base import World
from distkd.data import stream_plan
from distkd.data.stream_plan import StreamPlan, eval_places, shuffle_quality
from distkd.errors import ConfigError, DataError

counts = st.lists(st.integers(0, 30), min_size=1, max_size=25)


@st.composite
def plans(draw: st.DrawFn) -> StreamPlan:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 8]))
    global_batch = lanes * draw(st.integers(1, 6))
    shards = draw(counts)
    if sum(shards) < global_batch:
        shards.append(global_batch + draw(st.integers(0, 40)))
    return StreamPlan(shards, global_batch, draw(st.integers(0, 99)), 2, lanes, draw(st.integers(1, 40)))


def numbers(plan: StreamPlan, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The samples numbered as they are stored; every place must exist."""
    shard, inside = places
    assert (inside >= 0).all()
    assert (inside < plan.count_S[shard]).all()
    return (np.cumsum(plan.count_S) - plan.count_S)[shard] + inside


def epoch_of(plan: StreamPlan, epoch: int) -> np.ndarray:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return np.concatenate([numbers(plan, plan.global_places(step)) for step in steps])


def divisors(n: int) -> list[int]:
    return [size for size in range(1, n + 1) if n % size == 0]


@settings(max_examples=50)
@given(plan=plans())
def test_an_epoch_reads_each_sample_at_most_once_and_drops_less_than_a_batch(plan: StreamPlan):
    for epoch in range(2):
        seen = epoch_of(plan, epoch)
        assert len(set(seen.tolist())) == len(seen)
        assert len(seen) == plan.n_samples - plan.n_samples % plan.global_batch
        assert (
            plan.epoch_of(epoch * plan.steps_per_epoch)
            == plan.epoch_of((epoch + 1) * plan.steps_per_epoch - 1)
            == epoch
        )
    assert plan.n_steps == 2 * plan.steps_per_epoch


@given(plan=plans(), passes=st.integers(1, 8), where=st.floats(0, 0.999))
def test_passes_and_ranks_together_are_the_global_batch_at_every_world(plan: StreamPlan, passes: int, where: float):
    step = int(where * plan.n_steps)
    whole = numbers(plan, plan.global_places(step))
    of_passes: list[list[list[int]]] = []
    for size in divisors(plan.lanes):
        if plan.global_batch % (size * passes):
            continue
        world = [World(rank, size) for rank in range(size)]
        parts = [[numbers(plan, plan.local_places(step, p, passes, w)).tolist() for w in world] for p in range(passes)]
        slots = [[plan.local_slots(p, passes, w).tolist() for w in world] for p in range(passes)]
        assert {len(part) for of_pass in parts for part in of_pass} == {plan.global_batch // passes // size}
        assert [[whole[s].tolist() for s in of_pass] for of_pass in slots] == parts
        assert sorted(chain.from_iterable(chain.from_iterable(slots))) == list(range(plan.global_batch))
        of_passes.append([list(chain.from_iterable(of_pass)) for of_pass in parts])
    assert all(other == of_passes[0] for other in of_passes)


@settings(max_examples=30)
@given(plan=plans())
def test_one_step_asked_for_alone_is_that_of_the_run(plan: StreamPlan):
    run = [numbers(plan, plan.global_places(step)).tolist() for step in range(plan.n_steps)]
    arguments = (plan.count_S.tolist(), plan.global_batch, plan.seed, 2, plan.lanes, plan.buffer)
    for step in reversed(range(plan.n_steps)):
        assert numbers(plan, StreamPlan(*arguments).global_places(step)).tolist() == run[step]


def slow_epoch(plan: StreamPlan, epoch: int) -> list[list[set[int]]]:
    """For each lane its windows as sets, from the documented rule: ring of shuffled shards, lanes, windows."""
    order = plan._sequence(epoch)
    first = np.cumsum(plan.count_S) - plan.count_S
    ring = np.concatenate([first[s] + np.arange(int(plan.count_S[s])) for s in order.shard_S])
    ring = np.roll(ring, -order.start)
    assert sorted(order.shard_S.tolist()) == list(range(len(plan.count_S)))
    length = plan.steps_per_epoch * plan.global_batch // plan.lanes
    size = math.ceil(length / math.ceil(length / plan.buffer))
    lanes = [ring[lane * length : (lane + 1) * length] for lane in range(plan.lanes)]
    return [[set(lane[at : at + size].tolist()) for at in range(0, length, size)] for lane in lanes]


@settings(max_examples=50)
@given(plan=plans(), epoch=st.integers(0, 1))
def test_a_lane_reads_window_after_window_of_neighbours_on_the_ring(plan: StreamPlan, epoch: int):
    of_lane = plan.global_batch // plan.lanes
    read = epoch_of(plan, epoch).reshape(plan.steps_per_epoch, plan.lanes, of_lane).transpose(1, 0, 2)
    for lane, windows in zip(read.reshape(plan.lanes, -1), slow_epoch(plan, epoch), strict=True):
        at = 0
        for window in windows:
            assert len(window) <= plan.buffer
            assert set(lane[at : at + len(window)].tolist()) == window
            at += len(window)
        assert at == len(lane)


@settings(max_examples=30)
@given(plan=plans(), epoch=st.integers(0, 1))
def test_no_more_shards_are_cut_than_lanes_begin_and_end(plan: StreamPlan, epoch: int):
    lanes_of: dict[int, set[int]] = {}
    of_lane = plan.global_batch // plan.lanes
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        for slot, shard in enumerate(plan.global_places(step)[0].tolist()):
            lanes_of.setdefault(shard, set()).add(slot // of_lane)
    assert sum(len(lanes) > 1 for lanes in lanes_of.values()) <= plan.lanes + 1


@settings(max_examples=50)
@given(plan=plans(), where=st.floats(0, 1), n=st.integers(1, 30), pick=st.integers(0, 99))
def test_shards_ahead_are_those_that_come_next(plan: StreamPlan, where: float, n: int, pick: int):
    step = int(where * plan.n_steps)
    sizes = divisors(plan.lanes)
    size = sizes[pick % len(sizes)]
    world = World(pick % size, size)
    ahead = plan.shards_ahead(step, world, n)
    assert len(set(ahead)) == len(ahead) <= n
    coming = [set(plan.local_places(t, 0, 1, world)[0].tolist()) for t in range(step, plan.n_steps)]
    needed: set[int] = set().union(*coming)
    assert set(ahead) <= needed
    assert len(ahead) == min(n, len(needed))
    # a shard comes late only if those before it fill the places: what the first steps need is among the first
    if ahead:
        assert ahead[0] in coming[0]
        assert coming[0] <= set(plan.shards_ahead(step, world, len(plan.count_S)))


def in_order_of_first_use(plan: StreamPlan, step: int, world: World) -> list[int]:
    """Of the window that a step lies in, place after place, lanes in turn."""
    of_lane, shards = plan.global_batch // plan.lanes, list[int]()
    epoch, inside = divmod(step, plan.steps_per_epoch)
    length = plan.steps_per_epoch * of_lane
    size = math.ceil(length / math.ceil(length / plan.buffer))
    last = min((inside * of_lane // size + 1) * size, length)
    for later in range(inside, math.ceil(last / of_lane)):
        shard = plan.local_places(epoch * plan.steps_per_epoch + later, 0, 1, world)[0].reshape(-1, of_lane)
        shards += shard[:, : last - later * of_lane].T.ravel().tolist()
    return list(dict.fromkeys(shards))


@settings(max_examples=50)
@given(plan=plans(), draws=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 7)), min_size=1, max_size=6))
def test_shards_of_the_current_window_come_in_the_order_of_their_next_use(
    plan: StreamPlan, draws: list[tuple[float, int]]
):
    sizes = divisors(plan.lanes)
    for where, pick in draws:  # in any order, on any rank
        step, size = int(where * plan.n_steps), sizes[pick % len(sizes)]
        world = World(pick % size, size)
        expected = in_order_of_first_use(plan, step, world)
        assert plan.shards_ahead(step, world, len(expected)) == expected


def test_a_window_is_made_once_for_all_looks_at_it(monkeypatch: pytest.MonkeyPatch):
    plan, made = StreamPlan([50] * 40, 8, seed=1, epochs=2, lanes=2, buffer=100), list[int]()
    real = plan._at
    monkeypatch.setattr(plan, "_at", lambda epoch, lane, place: made.append(len(place)) or real(epoch, lane, place))
    for step in range(0, 50, 5):
        plan.shards_ahead(step, World(), 5)
    assert made == [200, 200]  # two windows of 100 samples in two lanes


def test_shards_ahead_name_what_a_step_reads_first():
    plan = StreamPlan([50] * 40, 8, seed=1, epochs=2, lanes=2, buffer=100)
    world = World(1, 2)
    for step in range(0, plan.n_steps, 7):
        window = range(step, min(step + 25 - step % plan.steps_per_epoch % 25, plan.n_steps))
        used = set(np.concatenate([plan.local_places(t, 0, 1, world)[0] for t in window]).tolist())
        assert set(plan.shards_ahead(step, world, len(used))) == used


@settings(max_examples=20)
@given(plan=plans(), where=st.floats(0, 0.999), slot=st.floats(0, 0.999))
def test_a_replacement_comes_from_the_same_lane_and_all_of_it_in_the_end(plan: StreamPlan, where: float, slot: float):
    step, at = int(where * plan.n_steps), int(slot * plan.global_batch)
    shard, inside = plan.global_places(step)
    assert plan.after(step, at, 0) == (shard[at], inside[at])
    if (step + 1) % plan.steps_per_epoch:
        shard, inside = plan.global_places(step + 1)
        assert plan.after(step, at, 1) == (shard[at], inside[at])
    of_lane = plan.global_batch // plan.lanes
    length = plan.steps_per_epoch * of_lane
    others = np.array([plan.after(step, at, attempt) for attempt in range(length)])
    lane = epoch_of(plan, plan.epoch_of(step)).reshape(-1, plan.lanes, of_lane)[:, at // of_lane]
    assert sorted(numbers(plan, (others[:, 0], others[:, 1])).tolist()) == sorted(lane.ravel().tolist())


def test_epochs_and_seeds_have_orders_and_left_out_samples_of_their_own():
    plan, other = (StreamPlan([100], 64, seed, 12, lanes=4, buffer=50) for seed in (0, 1))
    left_out = [frozenset(range(100)) - set(epoch_of(plan, epoch).tolist()) for epoch in range(12)]
    assert len(set(left_out)) > 6
    assert all(len(left) == 36 for left in left_out)
    assert len(frozenset.union(*left_out)) > 90
    assert epoch_of(plan, 0).tolist() != epoch_of(other, 0).tolist()
    longer = StreamPlan([100], 64, 0, 99, lanes=4, buffer=50)
    assert epoch_of(plan, 3).tolist() == epoch_of(longer, 3).tolist()


def test_a_billion_samples_cost_what_their_steps_ask_for(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    shuffled = stream_plan.shuffled

    def counting(position: np.ndarray, n: int, key: Any) -> np.ndarray:
        asked.append(len(position))
        return shuffled(position, n, key)

    monkeypatch.setattr(stream_plan, "shuffled", counting)
    plan = StreamPlan(np.full(1000, 10**6), 1024, seed=0, epochs=100, lanes=64, buffer=8192)
    places = {step: numbers(plan, plan.global_places(step)) for step in (0, plan.n_steps * 9 // 10, plan.n_steps - 1)}
    assert all(len(np.unique(place)) == 1024 for place in places.values())
    assert sum(asked) == 3 * (1000 + 1024)


@given(shards=counts, size=st.integers(1, 9))
def test_evaluation_sees_each_sample_exactly_once_in_contiguous_parts(shards: list[int], size: int):
    parts = [np.stack(eval_places(shards, World(rank, size))) for rank in range(size)]
    expected = [(shard, inside) for shard, count in enumerate(shards) for inside in range(count)]
    assert [tuple(place) for part in parts for place in part.T.tolist()] == expected
    lengths = [part.shape[1] for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_quality_of_a_full_shuffle_is_one_and_of_none_is_not():
    rng = np.random.default_rng(0)
    shards, n = [200] * 50, 10_000
    full = shuffle_quality((rng.permutation(n), rng.permutation(n)), shards, 100)
    assert (full.displacement, full.same_shard, full.neighbours) == pytest.approx((1, 1, 1), abs=0.15)
    assert full.shards == pytest.approx(50 * (1 - math.comb(9800, 100) / math.comb(10_000, 100)), abs=0.5)
    none = shuffle_quality((np.arange(n), np.arange(n)), shards, 100)
    assert none.displacement == 0
    assert none.same_shard == pytest.approx(9999 / 199)  # every pair, where a full shuffle has 199 of 9999
    assert none.neighbours == pytest.approx(198 / 199 * 9999 / 99)  # all but one pair of a shard
    assert none.shards == 1


def test_more_lanes_shuffle_better_than_windows_as_many_times_as_long_and_those_than_neither():
    shards = [100] * 100

    def same_shard(lanes: int, buffer: int) -> float:
        plan = StreamPlan(shards, 64, 0, 2, lanes, buffer)
        return shuffle_quality((epoch_of(plan, 0), epoch_of(plan, 1)), shards, 64).same_shard

    narrow, lanes, buffer = same_shard(4, 100), same_shard(16, 100), same_shard(4, 400)
    assert narrow > 1.8 * lanes
    assert narrow > 1.8 * buffer
    assert lanes < buffer


SMALL: dict[str, Any] = {"shard_samples": [9, 9], "global_batch": 8, "seed": 0, "epochs": 1, "lanes": 8, "buffer": 4096}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            {"global_batch": 12},
            ConfigError,
            r"global_batch=12 is not a multiple of data\.stream\.lanes=8; .* are 6 and 12",
        ),
        (
            {"lanes": 0},
            ConfigError,
            r"data\.stream\.lanes=0 and data\.stream\.buffer=4096, expected at least 1 of each",
        ),
        ({"buffer": 0}, ConfigError, r"data\.stream\.buffer=0, expected at least 1"),
        ({"epochs": 0}, ConfigError, "epochs=0, expected at least 1 of each"),
        (
            {"shard_samples": [3, -1, 9]},
            DataError,
            r"shard 1 has -1 samples, expected at least 0; run `distkd shards v",
        ),
        (
            {"shard_samples": [3, 4]},
            DataError,
            r"has 7 training samples, fewer than .*global_batch=8; set .* 7 at most",
        ),
        ({"shard_samples": []}, DataError, r"has 0 training samples"),
    ],
)
def test_what_no_plan_can_be_made_of_is_refused(arguments: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        StreamPlan(**(SMALL | arguments))


def test_a_world_that_does_not_divide_the_lanes_is_refused():
    plan = StreamPlan([9, 9, 9], 12, seed=0, epochs=1, lanes=6, buffer=9)
    expected = (
        r"data\.stream\.lanes=6 do not divide into 4 ranks; use a number of ranks that does \(1, 2, 3, 6\), or set"
    )
    with pytest.raises(ConfigError, match=expected):
        plan.local_places(0, 0, 1, World(0, 4))
    with pytest.raises(ConfigError, match=expected):
        plan.shards_ahead(0, World(0, 4), 3)
    with pytest.raises(ConfigError, match=r"global_batch=12 does not divide into 5 passes x 2 ranks = 10; use a mul"):
        plan.local_places(0, 0, 5, World(0, 2))
