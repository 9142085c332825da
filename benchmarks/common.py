"""Sides taken in turn within one run, and one JSON line with their ratios: seconds alone mean nothing here."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["compare", "report"]


def compare(sides: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 2) -> dict[str, dict[str, float]]:
    """Median wall and processor seconds of one call of each side, and the least of processor seconds.

    The order turns round from repeat to repeat. Other users of a machine only ever add time, so for small differences
    the least of many is the steadier number.
    """
    wall: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-warmup, repeats):
        order = list(sides)[:: 1 if repeat % 2 else -1]
        for name in order:
            _wait()
            start, start_processor = time.perf_counter(), time.process_time()
            sides[name]()
            _wait()
            if repeat >= 0:
                wall[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - start_processor)
    return {
        name: {
            "wall_s": statistics.median(wall[name]),
            "processor_s": statistics.median(processor[name]),
            "least_processor_s": min(processor[name]),
        }
        for name in sides
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(name: str, sides: Mapping[str, Mapping[str, float]], ratios: Mapping[str, float], **about: Any) -> None:
    """Print the one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    rounded = {side: {key: float(f"{value:.4g}") for key, value in figures.items()} for side, figures in sides.items()}
    line = {
        "benchmark": name,
        "device": device,
        "ratios": {k: round(v, 3) for k, v in ratios.items()},
        "sides": rounded,
        **about,
    }
    print(json.dumps(line), flush=True)
