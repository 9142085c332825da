"""Means over steps and ranks by one collective, and host time by phase."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distkd.base import World
from distkd.metrics import meters
from distkd.metrics.meters import CudaTimeline, HostTimeline, Laps, Meter, Stopwatch


def on_ranks(monkeypatch, per_rank, flags):
    """`reduce` as every rank would see it: each rank's packed vector is recorded, then each gets the sum."""
    sent = []

    def filled(rank: int) -> Meter:
        meter = Meter()
        for step in per_rank[rank]:
            meter.add({name: torch.tensor(value) for name, value in step.items()})
        return meter

    worlds = [World(rank, len(per_rank)) for rank in range(len(per_rank))]

    def record(packed, world):
        sent.append(packed)
        raise InterruptedError

    monkeypatch.setattr(meters, "all_reduce_sum", record)
    for world in worlds:
        with pytest.raises(InterruptedError):
            filled(world.rank).reduce(world, flag=flags[world.rank], own=(world.rank, 7))
    assert len({packed.shape for packed in sent}) == 1  # one collective of one shape, whatever the names
    monkeypatch.setattr(meters, "all_reduce_sum", lambda packed, world: torch.stack(sent).sum(dim=0))
    return [filled(world.rank).reduce(world, flag=flags[world.rank], own=(world.rank, 7)) for world in worlds]


def like_a_device() -> Meter:
    """On this host, but as if each read of a value were waited for."""
    meter = Meter()
    meter._reads_are_free = False
    return meter


def test_one_process_gets_the_mean_over_its_steps_and_starts_afresh():
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value), "kl": torch.tensor(value) / 2})
    assert meter.reduce(World()).means == {"kl": 1.5, "loss": 3.0}
    assert meter.reduce(World()).means == {}


def test_names_may_come_and_go_between_steps():
    meter = Meter()
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    meter.add({"a": torch.tensor(3.0)})
    assert meter.reduce(World()).means == {"a": 2.0, "b": 5.0}


def test_values_are_detached_and_the_callers_tensor_is_not_changed():
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    meter = Meter()
    meter.add({"x": weight})
    meter.add({"x": weight})
    assert meter.reduce(World()).means == {"x": 2.0}
    assert (weight.item(), weight.requires_grad) == (2.0, True)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_gets_the_mean_over_steps_and_ranks_and_the_sum_of_flags(monkeypatch, size):
    per_rank = [[{"b": rank + step, "a": 1.0} for step in range(3)] for rank in range(size)]
    results = on_ranks(monkeypatch, per_rank, flags=[rank % 2 for rank in range(size)])
    mean = sum(rank + step for rank in range(size) for step in range(3)) / (3 * size)
    for found in results:
        assert list(found.means) == ["a", "b"]
        assert found.means == pytest.approx({"a": 1.0, "b": mean})
        assert found.flags == size // 2
        assert found.by_rank == [[rank, 7] for rank in range(size)]


@pytest.mark.parametrize("other", [{"loss": 1.0, "extra": 2.0}, {"lost": 1.0}, {f"n{i}": 0.0 for i in range(26)}])
def test_a_rank_with_other_names_is_our_own_fault(monkeypatch, other):
    with pytest.raises(AssertionError, match="another rank measures other names"):
        on_ranks(monkeypatch, [[{"loss": 1.0}], [{"loss": 1.0}], [other]], flags=[0, 0, 0])


@settings(deadline=None)
@given(names=st.lists(st.text(min_size=1), unique=True, max_size=80))
def test_any_number_of_names_survives_the_packing(names):
    meter = Meter()
    meter.add({name: torch.tensor(float(i)) for i, name in enumerate(names)})
    found = meter.reduce(World(), flag=1)
    assert (found.means, found.flags) == ({name: float(i) for i, name in enumerate(names)}, 1)


def test_adding_never_waits_for_the_device():
    meter = Meter("meta")  # a meta tensor has no value: any read of one would raise
    for _ in range(3):
        meter.add({"loss": torch.zeros((), device="meta")})


def test_reducing_reads_the_device_once(monkeypatch):
    reads = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or plain(self))
    for name in ("item", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_: pytest.fail("a second read"))
    meter = like_a_device()
    meter.add({f"part {i}": torch.tensor(1.0) for i in range(20)})
    meter.reduce(World())
    assert len(reads) == 1


def test_a_device_and_the_host_find_the_same_means():
    found = []
    for meter in (Meter(), like_a_device()):
        for step in range(7):
            meter.add({"loss": torch.tensor(1 / (step + 3))}, parts={"kl": torch.tensor(step / 7, dtype=torch.float64)})
            meter.add({"loss": torch.tensor(step / 3, dtype=torch.float64)})
        found.append(meter.reduce(World()))
    assert found[0].means == pytest.approx(found[1].means, rel=1e-15)
    assert list(found[0].means) == ["loss", "parts:kl"]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_sum_over_steps_until_read_in_a_fixed_order():
    clock = Clock()
    watch = Stopwatch(HostTimeline(clock))
    for _ in range(2):
        with watch.phase("forward"):
            clock.now += 2.0
        clock.now += 50.0  # between two phases: the first one's
        with watch.phase("data"):
            clock.now += 1.0
        watch.lap()
        clock.now += 7.0  # between two steps: nobody's
    assert watch.read() == Laps(2, {"data": 2.0, "forward": 104.0})
    assert list(watch.read().seconds) == []


def test_every_step_is_told_once_it_is_over():
    clock, told = Clock(), []
    watch = Stopwatch(HostTimeline(clock), told.append)
    for step in range(3):
        with watch.phase("forward"):
            clock.now += step
        with watch.phase("forward"):
            clock.now += 1.0
        assert len(told) == step
        watch.lap()
        clock.now += 100.0
    assert told == [{"forward": 1.0}, {"forward": 2.0}, {"forward": 3.0}]


def test_an_inner_phase_takes_its_time_from_the_outer():
    clock = Clock()
    watch = Stopwatch(HostTimeline(clock))
    with watch.phase("backward"):
        clock.now += 3.0
        with watch.phase("collective"):
            clock.now += 4.0
        clock.now += 5.0
    watch.lap()
    assert watch.read().seconds == {"backward": 8.0, "collective": 4.0}


def test_a_step_that_is_not_over_is_not_read():
    clock = Clock()
    watch = Stopwatch(HostTimeline(clock))
    with watch.phase("data"):
        clock.now += 1.0
    assert watch.read() == Laps(0, {})
    watch.lap()
    assert watch.read() == Laps(1, {"data": 1.0})


def test_time_counts_when_the_phase_fails():
    clock = Clock()
    watch = Stopwatch(HostTimeline(clock))

    def work() -> None:
        with watch.phase("checkpoint"):
            clock.now += 7.0
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        work()
    watch.lap()
    assert watch.read().seconds == {"checkpoint": 7.0}


def test_an_unknown_phase_is_our_own_fault():
    with pytest.raises(AssertionError, match="phase 'lunch' is not one of"), Stopwatch().phase("lunch"):
        pass


def test_waiting_for_others_is_taken_from_the_phase_it_happens_in():
    clock = Clock()
    watch = Stopwatch(HostTimeline(clock))
    with watch.phase("forward"):
        clock.now += 2.0
        with watch.waiting():
            clock.now += 3.0
        with watch.phase("data"):
            clock.now += 1.0
    with watch.phase("optimizer"):
        clock.now += 2.0
    watch.lap()
    with watch.waiting():  # in an evaluation: no part of a step
        clock.now += 9.0
    watch.lap()
    assert watch.read().seconds == {"data": 1.0, "forward": 2.0, "collective": 3.0, "optimizer": 2.0}


class Device:
    """A timeline whose marks are reached one after the other, as the events of a stream are, and asked before."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.reached = 0
        self.now = 0.0

    def mark(self) -> int:
        self.marks.append(self.now)
        return len(self.marks) - 1

    def spans(self, marks: Sequence[int]) -> list[float] | None:
        if marks[-1] >= self.reached:
            return None
        return [self.marks[end] - self.marks[start] for start, end in pairwise(marks)]


def test_steps_are_told_in_order_when_the_device_has_reached_their_end():
    device, told = Device(), []
    watch = Stopwatch(device, told.append)
    for step in (1.0, 2.0):
        with watch.phase("forward"):
            device.now += step
            with watch.phase("collective"):
                device.now += 10.0
            device.now += step
        with watch.phase("backward"):
            device.now += 5.0
        watch.lap()
    assert len(device.marks) == 2 * 5  # a mark a turn and one at the end, none between two phases
    assert (told, watch.read()) == ([], Laps(0, {}))
    device.reached = 9
    assert watch.read() == Laps(1, {"forward": 2.0, "backward": 5.0, "collective": 10.0})
    device.reached = 10
    watch.lap()  # of a step without phases
    assert told == [
        {"forward": 2.0, "collective": 10.0, "backward": 5.0},
        {"forward": 4.0, "collective": 10.0, "backward": 5.0},
    ]
    assert watch.read() == Laps(1, {"forward": 4.0, "backward": 5.0, "collective": 10.0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_marks_on_a_device_are_never_waited_for():
    watch = Stopwatch(CudaTimeline())
    with watch.phase("forward"):
        torch.cuda._sleep(100_000_000)
    watch.lap()
    assert watch.read().n == 0
    torch.cuda.synchronize()
    laps = watch.read()
    assert laps.n == 1
    assert laps.seconds["forward"] > 0.01


def _measure(world: World) -> tuple[dict[str, float], int, list[list[float]]]:
    meter = Meter()
    for step in range(3):
        meter.add({"loss": torch.tensor(float(world.rank + step))})
    found = meter.reduce(world, flag=int(world.rank == 0), own=(float(world.rank),))
    return found.means, found.flags, found.by_rank


@pytest.mark.parametrize("size", [1, 2, 4])
def test_real_ranks_agree_on_means_and_flag(ranks, size):
    assert (
        ranks(size).run(_measure)
        == [({"loss": 1.0 + (size - 1) / 2}, 1, [[float(rank)] for rank in range(size)])] * size
    )
