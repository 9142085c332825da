"""Replicated and sharded banks: the same numbers on 1, 2 and 4 ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distkd.base import World
from distkd.comm import world as comm
from distkd.memory.bank import MemoryBank
from distkd.memory.contrast import Choice, ContrastPair, choose, write_rows
from distkd.memory.placement import Placement, Replicated, Sharded, capacity
from distkd.ops.draws import words
from tests.golden_numbers import golden, tensor

CRD = golden("crd")
ROWS, DIM, GLOBAL, STEPS, POSITIVES, NEGATIVES = 37, 6, 8, 4, 5, 19


@dataclass
class Trace:
    losses: list[Tensor]
    gradients: list[Tensor]
    rows: dict[str, Tensor]
    log_z: list[float]
    counts: list[dict[str, int]]


def placed(world: World, placement: str) -> Placement:
    return Sharded(world, 0.5, 0.5) if placement == "sharded" and world.size > 1 else Replicated()


def candidates(key_A: Tensor, index_A: Tensor) -> Tensor:
    """Rows by key alone, the anchor first, some of them twice."""
    drawn = words(key_A, POSITIVES + NEGATIVES).long().remainder(ROWS)
    drawn[:, 0] = index_A
    return drawn


def run(world: World, *, placement: str, discrepancy: bool, dtype: torch.dtype | None = None) -> Trace:
    """Some steps of a global batch divided over the ranks, two rows written twice."""
    where = placed(world, placement)
    pair = ContrastPair(ROWS, DIM, seed=3, placement=where, dtype=dtype).double()
    generator = torch.Generator().manual_seed(5)
    mine = slice(world.rank * GLOBAL // world.size, (world.rank + 1) * GLOBAL // world.size)
    trace = Trace([], [], {}, [], [])
    for step in range(STEPS):
        index = torch.randint(0, ROWS, (GLOBAL,), generator=generator)
        index[5] = index[2]
        features = [torch.randn(GLOBAL, DIM, generator=generator, dtype=torch.float64) for _ in range(2)]
        own = [feature[mine].clone().requires_grad_() for feature in features]
        student, teacher = (F.normalize(feature, dim=1) for feature in own)
        before = comm.counts.copy()
        key = 1000 * step + torch.arange(GLOBAL)[mine]
        arriving, anchors = where.meet({"index": index[mine], "student": student, "teacher": teacher}, key, world)
        both = (anchors["student"], anchors["teacher"])
        rows = candidates(anchors["key"], anchors["index"])
        choice = Choice(rows, POSITIVES, (POSITIVES, NEGATIVES))
        if discrepancy:
            ranks = torch.tensor([0, 2, 2])
            choice = choose(
                pair, both, rows, ranks, n_positive=POSITIVES, keep_negative=7, direction="paper", reweight=True
            )
        loss = pair(student, teacher, both, choice, temperature=0.07, world=world)
        loss.backward()
        write_rows({"student": pair.student, "teacher": pair.teacher}, [arriving], momentum=0.5)
        trace.counts.append(dict(comm.counts - before))
        trace.losses.append(comm.all_reduce_sum(loss.detach().clone(), world) / world.size)
        gradient = torch.stack([feature.grad for feature in own], dim=1)
        trace.gradients.append(comm.all_gather_rows(gradient, world) / world.size)
    trace.rows = {"student": pair.student.rows_ND, "teacher": pair.teacher.rows_ND}
    trace.log_z = [pair.student_z.log_z.item(), pair.teacher_z.log_z.item()]
    return trace


def whole(traces: list[Trace], name: str, sharded: bool) -> Tensor:
    if not sharded or len(traces) == 1:
        return traces[0].rows[name]
    rows = torch.empty(ROWS, DIM, dtype=traces[0].rows[name].dtype)
    for rank, trace in enumerate(traces):
        rows[rank :: len(traces)] = trace.rows[name]
    return rows


@pytest.mark.parametrize("discrepancy", [False, True])
@pytest.mark.parametrize(("size", "placement"), [(2, "replicated"), (4, "replicated"), (2, "sharded"), (4, "sharded")])
def test_losses_gradients_and_rows_are_those_of_one_process(ranks, size: int, placement: str, discrepancy: bool):
    [alone] = ranks(1).run(run, placement="replicated", discrepancy=discrepancy)
    traces = ranks(size).run(run, placement=placement, discrepancy=discrepancy)
    for trace in traces:
        torch.testing.assert_close(trace.losses, alone.losses, atol=1e-9, rtol=0)
        torch.testing.assert_close(trace.gradients, alone.gradients, atol=1e-9, rtol=0)
        assert trace.log_z == pytest.approx(alone.log_z, abs=1e-9)
    for name in ("student", "teacher"):
        found = whole(traces, name, placement == "sharded")
        torch.testing.assert_close(found, alone.rows[name], atol=1e-12, rtol=0)


def test_the_losses_of_a_run_differ_from_step_to_step_and_depend_on_the_choice(ranks):
    [plain] = ranks(1).run(run, placement="replicated", discrepancy=False)
    [chosen] = ranks(1).run(run, placement="replicated", discrepancy=True)
    assert len({loss.item() for loss in (*plain.losses, *chosen.losses)}) == 2 * STEPS


@pytest.mark.parametrize(("placement", "first", "later"), [("replicated", 2, 0), ("sharded", 2, 0)])
def test_collectives_of_a_step_are_those_that_are_stated(ranks, placement: str, first: int, later: int):
    for trace in ranks(2).run(run, placement=placement, discrepancy=True):
        sharded = int(placement == "sharded")
        for step, counts in enumerate(trace.counts):
            assert counts.get("all_gather_rows", 0) == 1
            assert counts.get("all_reduce_sum", 0) == (first if step == 0 else later) + sharded
            assert counts.get("reduce_scatter_rows", 0) == sharded


def _golden_step(world: World, *, placement: str) -> tuple[float, list[Tensor], list[Tensor], list[float]]:
    case, config = CRD["data_parallel_2x2"], CRD["config"]
    where = placed(world, placement)
    pair = ContrastPair(config["N"], config["d"], seed=0, placement=where).double()
    for bank, name in ((pair.student, "student"), (pair.teacher, "teacher")):
        bank.rows_ND.copy_(tensor(CRD["inputs"][f"bank_{name}_before"])[where.part :: where.parts])
        bank.refresh()
    mine = slice(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    weights = [tensor(CRD["inputs"][f"embed_{n}_weight"], grad=True) for n in "st"]
    student, teacher = (
        F.normalize(F.linear(tensor(case[f"f_{n}"])[mine], w, tensor(CRD["inputs"][f"embed_{n}_bias"])), dim=1)
        for n, w in zip("st", weights, strict=True)
    )
    own = {"index": tensor(case["y"])[mine], "student": student, "teacher": teacher}
    arriving, anchors = where.meet(own, torch.arange(4)[mine], world)
    rows = tensor(case["idx"])[anchors["key"]]  # the draw of a sample, as any rank can make it
    both = (anchors["student"], anchors["teacher"])
    choice = Choice(rows, 1, (1, config["K"]))
    loss = pair(student, teacher, both, choice, temperature=config["T"], world=world)
    loss.backward()
    write_rows({"student": pair.student, "teacher": pair.teacher}, [arriving], momentum=config["momentum"])
    gradients = [comm.all_reduce_sum(w.grad, world) / world.size for w in weights]
    z = [math.exp(n.log_z.item()) for n in (pair.student_z, pair.teacher_z)]
    return loss.item(), gradients, [pair.student.rows_ND, pair.teacher.rows_ND], z


@pytest.mark.parametrize(("size", "placement"), [(1, "replicated"), (2, "replicated"), (2, "sharded")])
def test_a_step_of_crd_on_two_ranks_is_golden(ranks, size: int, placement: str):
    case = CRD["data_parallel_2x2"]
    close = {"atol": 1e-8, "rtol": 0.0}
    results = ranks(size).run(_golden_step, placement=placement)
    losses = [loss for loss, *_ in results]
    assert sum(losses) / size == pytest.approx(case["loss"], abs=1e-8)
    if size == 2:
        assert losses == pytest.approx(case["per_rank_loss"], abs=1e-8)
    for rank, (_, gradients, banks, z) in enumerate(results):
        assert z == pytest.approx([case["Z_student_anchor"], case["Z_teacher_anchor"]], rel=1e-10)
        for gradient, bank, n, name in zip(gradients, banks, "st", ("student", "teacher"), strict=True):
            torch.testing.assert_close(gradient, tensor(case[f"grad_embed_{n}_weight"]), **close)
            part = slice(rank, None, size) if placement == "sharded" else slice(None)
            torch.testing.assert_close(bank, tensor(case[f"bank_{name}_after"])[part], **close)


def _bytes(world: World, *, rows: int, dim: int, batch: int) -> int:
    """Bytes that a rank ends up with in the step's gather, seen at torch.distributed."""
    import torch.distributed as dist

    seen: list[int] = []
    original = dist.all_gather_single

    def watched(out: Tensor, *args, **kwargs):
        seen.append(out.numel() * out.element_size())
        return original(out, *args, **kwargs)

    dist.all_gather_single = watched
    try:
        pair = ContrastPair(rows, dim, seed=0)
        index = torch.arange(batch) + world.rank * batch
        student, teacher = F.normalize(torch.randn(2, batch, dim), dim=2)
        arriving, _ = pair.placement.meet({"index": index, "student": student, "teacher": teacher}, index, world)
        write_rows({"student": pair.student, "teacher": pair.teacher}, [arriving], momentum=0.5)
    finally:
        dist.all_gather_single = original
    return sum(seen)


@pytest.mark.parametrize(("rows", "dim", "batch"), [(50, 7, 3), (5000, 7, 3), (50, 16, 8)])
def test_a_step_moves_exactly_the_bytes_that_are_stated(ranks, rows: int, dim: int, batch: int):
    for found in ranks(2).run(_bytes, rows=rows, dim=dim, batch=batch):
        assert found == 2 * batch * (2 * dim * 4 + 8)


def test_rows_start_alike_wherever_they_lie():
    whole_bank = MemoryBank(23, 10, seed=9)
    for part in range(4):
        shard = MemoryBank(23, 10, seed=9, part=part, parts=4)
        assert torch.equal(shard.rows_ND, whole_bank.rows_ND[part::4])


def test_more_rows_on_one_rank_than_were_set_aside_stop_the_step():
    where = Sharded(World(rank=0, size=2), 0.1, 0.1)
    index = torch.zeros(2, 300, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="more rows of an anchor lie on one rank than were set aside"):
        where.columns(index, 1, (1, 299))


def test_capacity_is_never_more_than_the_draws_and_far_above_the_mean():
    assert capacity(0.5, 3) == 3
    assert capacity(0.25, 4096) == 1024 + 320 + 16
    assert capacity(1.0, 100) == 100
