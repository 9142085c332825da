"""Rows to compare a sample with, drawn without and with replacement, against what one would write without thinking.

Target: at most 0.06 ms of one core a sample for 4096 different rows of a million, in batches of 16. The other sides
draw for one sample at a time, as a data loader does; their ratios are to our draw without replacement from that pool.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.common import compare, report
from distkd.memory.candidates import Candidates
from distkd.ops.draws import below, fold_in
from distkd.ops.permutation import distinct

POOLS = (10**4, 10**5, 10**6)
OURS = ("distinct", "below", "candidates")


def sides_of(pool: int, n: int, batch: int) -> dict[str, Callable[[], Any]]:
    """Our three draw for the whole batch, the others for one sample."""
    legacy, generator = np.random.RandomState(0), np.random.default_rng(0)
    index_B = torch.arange(batch)
    candidates = Candidates(torch.arange(pool) % 100, n_positive=1, n_negative=n)
    step = iter(range(1 << 40))

    def keys() -> torch.Tensor:
        return fold_in(index_B, next(step))

    return {
        "distinct": lambda: distinct(keys(), n, pool),
        "below": lambda: below(keys(), n, pool),
        "candidates": lambda: candidates(keys(), index_B),
        "numpy_choice": lambda: legacy.choice(pool, n, replace=False),
        "generator_choice": lambda: generator.choice(pool, n, replace=False, shuffle=False),
        "randperm": lambda: torch.randperm(pool)[:n],
        "randint": lambda: torch.randint(pool, (n,)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--negatives", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sides, ratios = {}, {}
    for pool in POOLS:
        measured = compare(sides_of(pool, arguments.negatives, arguments.batch), repeats=arguments.repeats)
        samples = {side: arguments.batch if side in OURS else 1 for side in measured}
        per_sample = {
            side: {name.replace("_s", "_ms"): 1e3 * value / samples[side] for name, value in figures.items()}
            for side, figures in measured.items()
        }
        ours = per_sample["distinct"]["least_processor_ms"]
        sides |= {f"{side}/{pool}": per_sample[side] for side in OURS}
        ratios |= {
            f"{side}/{pool}": figures["least_processor_ms"] / ours
            for side, figures in per_sample.items()
            if side != "distinct"
        }
    report("draws", sides, ratios, negatives=arguments.negatives, batch=arguments.batch, unit="ms a sample")


if __name__ == "__main__":
    main()
