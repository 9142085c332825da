from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distkd.base import World
from distkd.comm import world as comm
from distkd.comm.packed import start_gather
from distkd.errors import ConfigError, ShapeError
from distkd.memory.queue import Queue


def numbered(first: int, n: int) -> Tensor:
    """Keys that tell which they are."""
    return torch.arange(first, first + n, dtype=torch.float64)[:, None].expand(n, 2)


@given(length=st.integers(1, 9), sizes=st.lists(st.integers(0, 25), max_size=8))
def test_it_holds_the_last_keys_whatever_their_numbers(length: int, sizes: list[int]):
    queue, expected, first = Queue(length, 2).double(), deque[int](maxlen=length), 0
    for size in sizes:
        queue.push(numbered(first, size))
        expected.extend(range(first, first + size))
        first += size
        filled = int(queue.filled())
        assert filled == len(expected)
        assert sorted(queue.rows_QD[:filled, 0].tolist()) == sorted(expected)
    for key in expected:
        assert queue.rows_QD[key % length, 0] == key  # a ring: the slot follows from how many came before


def test_it_starts_with_nothing_that_counts():
    queue = Queue(5, 3)
    assert queue.filled() == 0
    assert torch.equal(queue.rows_QD, torch.zeros(5, 3))


def test_keys_carry_no_graph_and_take_the_type_of_the_rows():
    queue = Queue(3, 2)
    queue.push(numbered(1, 2).clone().requires_grad_())
    assert (queue.rows_QD.dtype, queue.rows_QD.requires_grad) == (torch.float32, False)
    assert queue.rows_QD[:, 0].tolist() == [1, 2, 0]


LENGTH, DIM, BATCH, STEPS = 20, 6, 8, 10


def _push_steps(world: World, passes: int, first: int = 0, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Steps of a global batch of 8, divided over ranks and passes, each pass with one collective."""
    queue = Queue(LENGTH, DIM).double()
    if state is not None:
        queue.load_state_dict(state)
    micro = BATCH // (passes * world.size)
    for step in range(first, STEPS):
        keys = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        before = sum(comm.counts.values())
        starts = [(number * world.size + world.rank) * micro for number in range(passes)]
        arriving = [start_gather({"key": keys[start : start + micro]}, world) for start in starts]
        assert sum(comm.counts.values()) - before == (passes if world.size > 1 else 0)
        for rows in arriving:
            queue.push(rows.wait()["key"])
        if state is None and step == first + 4:
            half = {name: tensor.clone() for name, tensor in queue.state_dict().items()}
    return {**queue.state_dict(), **({} if state is not None else {f"half/{k}": v for k, v in half.items()})}


@pytest.mark.parametrize(("size", "passes"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_it_is_equal_to_the_bit_on_every_rank_and_at_every_world_size(ranks, size: int, passes: int):
    expected = _push_steps(World(), 1)
    assert expected["pushed"] == STEPS * BATCH
    for found in ranks(size).run(_push_steps, passes=passes):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_it_goes_on_at_another_world_size(ranks):
    expected = _push_steps(World(), 1)
    [two, _] = ranks(2).run(_push_steps, passes=1)
    half = {name.removeprefix("half/"): tensor for name, tensor in two.items() if name.startswith("half/")}
    for found in ranks(4).run(_push_steps, passes=1, first=5, state=half):
        assert torch.equal(found["rows_QD"], expected["rows_QD"])
        assert torch.equal(found["pushed"], expected["pushed"])


@pytest.mark.parametrize(("length", "dim"), [(0, 4), (-1, 4), (4, 0)])
def test_a_queue_of_nothing_is_refused(length: int, dim: int):
    with pytest.raises(ConfigError, match=f"a queue of {length} rows of width {dim}; both must be at least 1"):
        Queue(length, dim)


@pytest.mark.parametrize("shape", [(3, 5), (3,), (3, 4, 1)])
def test_keys_of_another_width_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ShapeError, match=r"keys of shape \(3.*\) do not fit a queue of width 4, expected \(G, 4\)"):
        Queue(7, 4).push(torch.zeros(shape))
