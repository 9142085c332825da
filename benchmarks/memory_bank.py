"""A step of contrast through memory banks against the textbook form: gather, batched product, autograd, index copy.

    python -m benchmarks.memory_bank                      # CRD and DC-Distill at 1e4, 1e5 and 1e6 rows
    python -m benchmarks.memory_bank --crossover          # dense against gathered, by rows and columns
    torchrun --standalone --nproc-per-node 2 -m benchmarks.memory_bank --sharded 1e7    # a sharded bank in float16

A step is: both losses from given embeddings, the gradient at the embeddings, the update of both banks; drawing is timed
in `benchmarks.draws`. Both sides compare the same rows, and losses and gradients are checked to agree. B 16, D 128, one
thread; ratios are of the least processor time, which other users of a machine disturb least. Targets: CRD with K 4096
at least 15 x, 6 x, 4 x faster at 1e4, 1e5, 1e6 rows; DC-Distill with 300 + 1024 candidates at least 5 x at every size;
both banks of 1e6 rows built within a second.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import compare, report
from distkd.base import World
from distkd.comm import world as comm
from distkd.memory.contrast import Choice, ContrastPair, choose, write_rows
from distkd.memory.placement import Sharded
from distkd.ops import rows as ops_rows
from distkd.ops.contrastive import EPSILON
from distkd.ops.rows import scan

B, D, T, MOMENTUM = 16, 128, 0.07, 0.5
K = 4096
POSITIVES, NEGATIVES, KEPT = 300, 1024, (20, 512)


class Textbook:
    """Both banks and the loss as one writes them from the papers."""

    def __init__(self, pair: ContrastPair):
        self.banks = [pair.student.rows_ND.clone(), pair.teacher.rows_ND.clone()]
        self.z: list[Tensor] = []

    def __call__(self, index_B: Tensor, rows_BJ: Tensor, embedded: list[Tensor], select: Tensor | None) -> Tensor:
        n_positive = 1 if select is None else len(select)
        found = [self.gather(side, rows_BJ) for side in range(2)]
        columns = None if select is None else self.select(found, embedded, select)
        loss = embedded[0].new_zeros(())
        for side, anchor in enumerate(embedded):
            score = torch.exp(torch.bmm(found[1 - side], anchor.view(B, D, 1)).squeeze(2) / T)
            score = score if columns is None else score.gather(1, columns)
            if len(self.z) <= side:
                self.z.append(score.detach().mean() * len(self.banks[0]))
            loss = loss + self.noise_contrast(score / self.z[side], n_positive)
        loss.backward()
        with torch.no_grad():
            for bank, anchor in zip(self.banks, embedded, strict=True):
                blend = bank.index_select(0, index_B) * MOMENTUM + anchor * (1 - MOMENTUM)
                bank.index_copy_(0, index_B, blend / blend.norm(dim=1, keepdim=True))
        return loss.detach()

    def gather(self, side: int, rows_BJ: Tensor) -> Tensor:
        return self.banks[side].index_select(0, rows_BJ.flatten()).view(B, -1, D)

    def noise_contrast(self, p: Tensor, n_positive: int) -> Tensor:
        c = (p.shape[1] - n_positive) / len(self.banks[0])
        positive = torch.log(p[:, :n_positive] / (p[:, :n_positive] + c + EPSILON)).mean(dim=1)
        negative = torch.log(c / (p[:, n_positive:] + c + EPSILON)).sum(dim=1)
        return -(positive + negative).mean()

    def select(self, found: list[Tensor], embedded: list[Tensor], ranks: Tensor) -> Tensor:
        with torch.no_grad():
            own, held = (
                torch.bmm(F.normalize(rows, dim=2), anchor.view(B, D, 1)).squeeze(2)
                for rows, anchor in zip(found, embedded, strict=True)
            )
            gap = held - own
            positive = gap[:, :POSITIVES].sort(dim=1, descending=True).indices[:, ranks]
            positive[:, 0] = 0
            negative = gap[:, POSITIVES:].sort(dim=1).indices[:, : KEPT[1]] + POSITIVES
            return torch.cat([positive, negative], dim=1)


def our_step(
    pair: ContrastPair, index_B: Tensor, rows_BJ: Tensor, embedded: list[Tensor], select: Tensor | None
) -> Tensor:
    own = {"index": index_B, "student": embedded[0], "teacher": embedded[1]}
    arriving, anchors = pair.placement.meet(own, index_B, World())
    both = (anchors["student"], anchors["teacher"])
    choice = Choice(rows_BJ, 1, (1, K))
    if select is not None:
        how = {"n_positive": POSITIVES, "keep_negative": KEPT[1], "direction": "paper"}
        choice = choose(pair, both, rows_BJ, select, **how)
    loss = pair(embedded[0], embedded[1], both, choice, temperature=T, world=World())
    loss.backward()
    write_rows({"student": pair.student, "teacher": pair.teacher}, [arriving], momentum=MOMENTUM)
    return loss.detach()


class Batches:
    """The same batches for every side: each call goes on to the next one."""

    def __init__(self, n_rows: int, n_columns: int):
        generator = torch.Generator().manual_seed(n_rows)
        self.index = [torch.randperm(n_rows, generator=generator)[:B] for _ in range(4)]
        self.rows = [torch.randint(0, n_rows, (B, n_columns), generator=generator) for _ in range(4)]
        self.features = [torch.randn(2, B, D, generator=generator) for _ in range(4)]
        for index, rows in zip(self.index, self.rows, strict=True):
            rows[:, 0] = index

    def take(self, number: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        number %= 4
        embedded = [F.normalize(x, dim=1).requires_grad_() for x in self.features[number].unbind()]
        return self.index[number], self.rows[number], embedded


def step_sides(n_rows: int, select: Tensor | None) -> tuple[dict[str, Callable[[], Any]], float]:
    """Both sides as calls, and how far their losses and gradients are apart, relatively, after four steps."""
    pair = ContrastPair(n_rows, D, seed=1)
    textbook = Textbook(pair)
    batches = Batches(n_rows, 1 + K if select is None else POSITIVES + NEGATIVES)
    apart = 0.0
    for number in range(4):
        index, rows, own = batches.take(number)
        _, _, other = batches.take(number)
        ours = our_step(pair, index, rows, own, select)
        theirs = textbook(index, rows, other, select)
        apart = max(apart, abs(ours.item() / theirs.item() - 1))
        for a, b in zip(own, other, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            apart = max(apart, ((a.grad - b.grad).abs().max() / b.grad.abs().max()).item())
    counts = {"ours": 0, "textbook": 0}

    def next_of(side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
        counts[side] += 1
        return batches.take(counts[side])

    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: our_step(pair, *next_of("ours"), select),
        "textbook": lambda: textbook(*next_of("textbook"), select),
    }
    return sides, apart


def build_seconds(n_rows: int) -> float:
    """Processor seconds to build both banks; the least of three."""
    seconds: list[float] = []
    for _ in range(3):
        start = time.process_time()
        ContrastPair(n_rows, D, seed=1)
        seconds.append(time.process_time() - start)
    return min(seconds)


def steps(sizes: list[int], repeats: int) -> None:
    figures: dict[str, dict[str, float]] = {}
    ratios: dict[str, float] = {}
    about: dict[str, Any] = {"B": B, "D": D, "K": K, "candidates": [POSITIVES, NEGATIVES]}
    mid = torch.arange(30, 30 + KEPT[0])
    for n_rows in sizes:
        for name, select in (("crd", None), ("dc_distill", mid)):
            sides, apart = step_sides(n_rows, select)
            found = compare(sides, repeats=repeats)
            label = f"{name} {n_rows:.0e}"
            ratios[f"textbook / ours, {label}"] = (
                found["textbook"]["least_processor_s"] / found["ours"]["least_processor_s"]
            )
            about[f"relative difference, {label}"] = float(f"{apart:.2g}")
            figures |= {f"{side} {label}": values for side, values in found.items()}
    about["seconds to build both banks of 1e6"] = round(build_seconds(10**6), 3)
    report("memory_bank", figures, ratios, **about)


def crossover(repeats: int) -> None:
    """Where a product with the whole bank stops being faster than a gather of the chosen rows."""
    ratios: dict[str, float] = {}
    figures: dict[str, dict[str, float]] = {}
    for n_anchors in (16, 128):
        for n_columns in (512, 4096):
            for waste in (2, 4, 8, 12, 16, 24):
                n_rows = waste * n_columns
                rows_ND = torch.randn(n_rows, D)
                anchor_BD = F.normalize(torch.randn(n_anchors, D), dim=1)
                index_BJ = torch.randint(0, n_rows, (n_anchors, n_columns))

                def call(dense: bool, anchor=anchor_BD, rows=rows_ND, index=index_BJ) -> Any:
                    ops_rows.is_dense = lambda *_: dense
                    return scan(anchor, rows, index, lambda product, _: product)

                found = compare({"dense": lambda: call(True), "gathered": lambda: call(False)}, repeats=repeats)
                label = f"B {n_anchors}, {n_columns} columns, {waste} x as many rows"
                ratios[f"gathered / dense, {label}"] = (
                    found["gathered"]["least_processor_s"] / found["dense"]["least_processor_s"]
                )
    report("memory_bank_crossover", figures, ratios, D=D)


def sharded(n_rows: int, n_steps: int) -> None:
    """Steps of a bank that no rank holds alone: memory, bytes and time of each rank."""
    world = World.from_environment()
    comm.init(world, device=torch.device("cpu"), timeout_s=600)
    start = time.perf_counter()
    where = Sharded(world, 1 / world.size, 1 / world.size) if world.size > 1 else None
    pair = ContrastPair(n_rows, D, seed=1, dtype=torch.float16, placement=where)
    built = time.perf_counter() - start
    seconds: list[float] = []
    losses: list[float] = []
    for step in range(n_steps):
        generator = torch.Generator().manual_seed(step)
        index_G = torch.randint(0, n_rows, (B * world.size,), generator=generator)
        feature_GD = torch.randn(2, B * world.size, D, generator=generator)
        rows_GJ = torch.randint(0, n_rows, (B * world.size, 1 + K), generator=generator)
        rows_GJ[:, 0] = index_G
        mine = slice(world.rank * B, (world.rank + 1) * B)
        start = time.perf_counter()
        student, teacher = (F.normalize(x[mine], dim=1).requires_grad_() for x in feature_GD)
        own = {"index": index_G[mine], "student": student, "teacher": teacher}
        arriving, anchors = pair.placement.meet(own, torch.arange(len(index_G))[mine], world)
        choice = Choice(rows_GJ[anchors["key"]], 1, (1, K))
        loss = pair(student, teacher, (anchors["student"], anchors["teacher"]), choice, temperature=T, world=world)
        loss.backward()
        write_rows({"student": pair.student, "teacher": pair.teacher}, [arriving], momentum=MOMENTUM)
        seconds.append(time.perf_counter() - start)
        losses.append(comm.all_reduce_sum(loss.detach().clone(), world).item() / world.size)
    if world.is_main:
        line = {
            "benchmark": "memory_bank_sharded",
            "ranks": world.size,
            "rows": n_rows,
            "gib_of_both_banks_here": round(2 * pair.student.rows_ND.nbytes / 2**30, 3),
            "peak_gib_of_the_process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
            "build_s": round(built, 2),
            "median_step_s": round(sorted(seconds)[n_steps // 2], 4),
            "collectives_per_step": {name: count / n_steps for name, count in comm.counts.items()},
            "first_and_last_loss": [round(losses[0], 6), round(losses[-1], 6)],
        }
        print(json.dumps(line), flush=True)
    comm.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e4, 1e5, 1e6])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--sharded", type=float, default=None, metavar="ROWS")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.sharded is not None:
        sharded(int(arguments.sharded), n_steps=arguments.repeats)
    elif arguments.crossover:
        crossover(arguments.repeats)
    else:
        steps([int(rows) for rows in arguments.rows], arguments.repeats)


if __name__ == "__main__":
    main()
