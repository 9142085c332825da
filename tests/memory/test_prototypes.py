from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distkd.base import World
from distkd.comm import world as comm
from distkd.comm.packed import start_gather
from distkd.errors import ConfigError, ShapeError
from distkd.memory.prototypes import Prototypes

C, D, MOMENTUM = 3, 4, 0.9


def batch_of(step: int, n: int) -> tuple[Tensor, Tensor]:
    """Unit embeddings and labels of which some are unknown; class 2 comes late."""
    generator = torch.Generator().manual_seed(step)
    z = F.normalize(torch.randn(n, D, generator=generator, dtype=torch.float64), dim=1)
    return z, torch.randint(-1, C if step > 2 else C - 1, (n,), generator=generator)


def by_loop(sums: list[list[Tensor]], z: Tensor, label: Tensor) -> list[list[Tensor]]:
    """One sample at a time; a code is a sum of embeddings, unknown while it is zero."""
    n_codes = len(sums[0])
    added: list[list[list[Tensor]]] = [[[] for _ in range(n_codes)] for _ in range(C)]
    seen = [sum(bool(code.any()) for code in codes) for codes in sums]
    complete = [count == n_codes for count in seen]
    for row, y in zip(z, label.tolist(), strict=True):
        if y < 0:
            continue
        nearest = max(range(n_codes), key=lambda m: float(row @ F.normalize(sums[y][m], dim=0)))
        added[y][nearest if complete[y] else seen[y] % n_codes].append(row)
        seen[y] += 1
    return [
        [MOMENTUM * sums[c][m] + sum(new) if (new := added[c][m]) else sums[c][m] for m in range(n_codes)]
        for c in range(C)
    ]


@pytest.mark.parametrize("per_class", [1, 2, 5])
def test_twelve_steps_are_those_of_a_loop(per_class: int):
    prototypes = Prototypes(C, D, per_class=per_class, momentum=MOMENTUM).double()
    sums = [[torch.zeros(D, dtype=torch.float64)] * per_class for _ in range(C)]
    for step in range(12):
        z, label = batch_of(step, 9)
        sums = by_loop(sums, z, label)
        prototypes.update(z, label)
        expected = torch.stack([torch.stack(codes) for codes in sums])
        torch.testing.assert_close(prototypes.sum_CMD, expected, atol=1e-12, rtol=1e-12)
    codes, known = prototypes.codes()
    assert known.all()
    torch.testing.assert_close(codes, F.normalize(expected, dim=2))


def test_one_code_is_the_direction_of_the_running_mean():
    """The mean in which a sample of k steps ago counts momentum^k, whatever the number of samples in a step."""
    prototypes = Prototypes(2, D, momentum=0.5).double()
    rows = F.normalize(torch.randn(6, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    for part in (rows[:3], rows[3:5], rows[5:]):
        prototypes.update(part, torch.zeros(len(part), dtype=torch.int64))
    weight = torch.tensor([0.25] * 3 + [0.5] * 2 + [1.0], dtype=torch.float64)
    mean = (weight[:, None] * rows).sum(0) / weight.sum()
    codes, known = prototypes.codes()
    torch.testing.assert_close(codes[0, 0], F.normalize(mean, dim=0))
    assert known.tolist() == [[True], [False]]


def test_it_starts_empty_and_the_first_samples_set_a_class():
    prototypes = Prototypes(C, D, momentum=0.99).double()
    codes, known = prototypes.codes()
    assert not known.any()
    assert torch.equal(codes, torch.zeros_like(codes))
    z, _ = batch_of(0, 1)
    prototypes.update(z, torch.tensor([1]))
    codes, known = prototypes.codes()
    torch.testing.assert_close(codes[1, 0], z[0])
    assert known[:, 0].tolist() == [False, True, False]


@given(labels=st.lists(st.integers(-2, 1), min_size=1, max_size=8), per_class=st.integers(1, 3))
def test_classes_without_samples_and_samples_without_labels_change_nothing(labels: list[int], per_class: int):
    prototypes = Prototypes(C, D, per_class=per_class, momentum=MOMENTUM).double()
    prototypes.update(*batch_of(3, 12))
    before = prototypes.sum_CMD.clone()
    z, _ = batch_of(5, len(labels))
    prototypes.update(z, torch.tensor(labels))
    for c in range(C):
        changed = not torch.equal(prototypes.sum_CMD[c], before[c])
        assert changed == (c in labels), c
    other = Prototypes(C, D, per_class=per_class, momentum=MOMENTUM).double()
    other.load_state_dict({"sum_CMD": before})
    known = torch.tensor(labels) >= 0
    other.update(z[known], torch.tensor(labels)[known])
    torch.testing.assert_close(other.sum_CMD, prototypes.sum_CMD, atol=1e-14, rtol=0.0)


def test_embeddings_that_cancel_or_are_zero_make_no_code_and_no_nan():
    prototypes = Prototypes(2, 2, momentum=0.5)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    prototypes.update(opposite, torch.tensor([0, 0, 1]))
    codes, known = prototypes.codes()
    assert not known.any()
    assert torch.equal(codes, torch.zeros(2, 1, 2))
    prototypes.update(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert prototypes.codes()[0][0, 0].tolist() == [0.0, 1.0]


BATCH, STEPS = 8, 10


def _update_steps(world: World, passes: int, per_class: int, start: int = 0, state: Any = None) -> dict[str, Tensor]:
    """Steps of a global batch of 8, divided over ranks and passes, each pass with one collective."""
    prototypes = Prototypes(C, D, per_class=per_class, momentum=MOMENTUM).double()
    if state is not None:
        prototypes.load_state_dict({"sum_CMD": state})
    found: dict[str, Tensor] = {}
    micro = BATCH // (passes * world.size)
    for step in range(start, STEPS):
        z, label = batch_of(step, BATCH)
        before = sum(comm.counts.values())
        first = [(number * world.size + world.rank) * micro for number in range(passes)]
        parts = [slice(at, at + micro) for at in first]
        arriving = [start_gather({"embedding": z[part], "label": label[part]}, world) for part in parts]
        rows = [gathered.wait() for gathered in arriving]
        assert sum(comm.counts.values()) - before == (passes if world.size > 1 else 0)
        prototypes.update(torch.cat([r["embedding"] for r in rows]), torch.cat([r["label"] for r in rows]))
        found[f"{step}"] = prototypes.sum_CMD.clone()
    return found


@pytest.mark.parametrize("per_class", [1, 3])
@pytest.mark.parametrize(("size", "passes"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_sums_are_equal_to_the_bit_on_all_ranks_of_any_world(ranks, size: int, passes: int, per_class: int):
    expected = _update_steps(World(), 1, per_class)
    for found in ranks(size).run(_update_steps, passes=passes, per_class=per_class):
        for step, sums in expected.items():
            assert torch.equal(found[step], sums), step


def test_they_go_on_at_another_world_size(ranks):
    expected = _update_steps(World(), 1, 2)
    [two, _] = ranks(2).run(_update_steps, passes=1, per_class=2)
    for found in ranks(4).run(_update_steps, passes=1, per_class=2, start=5, state=two["4"]):
        assert torch.equal(found["9"], expected["9"])


@pytest.mark.parametrize(
    "wrong", [{"n_classes": 1}, {"dim": 0}, {"per_class": 0}, {"momentum": 1.0}, {"momentum": -0.1}], ids=str
)
def test_prototypes_of_nothing_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ConfigError, match="expected at least two classes, at least one code per class"):
        Prototypes(**{"n_classes": 3, "dim": 4, "per_class": 1, "momentum": 0.9, **wrong})


@pytest.mark.parametrize("shape, labels", [((3, 5), 3), ((3, 4), 2), ((4,), 4)])
def test_embeddings_that_do_not_fit_are_refused(shape: tuple[int, ...], labels: int):
    said = f"embeddings of shape {shape} with {labels} labels do not fit prototypes of width 4, expected (G, 4)"
    with pytest.raises(ShapeError, match=re.escape(said)):
        Prototypes(C, 4, momentum=0.9).update(torch.zeros(shape), torch.zeros(labels, dtype=torch.int64))
