"""Floating-point operations of a step, counted once, and what the device could do in that time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distkd.train.job import Job

__all__ = ["PEAK_FLOPS", "Flops"]

PEAK_FLOPS = {
    "H200": (494e12, 989e12), "GH200": (494e12, 989e12), "H100 PCIe": (378e12, 756e12), "H100 NVL": (418e12, 835e12),
    "H100": (494e12, 989e12), "A100": (156e12, 312e12), "L40S": (183e12, 362e12), "L40": (90.5e12, 181e12),
    "L4": (60e12, 121e12), "A40": (75e12, 150e12), "A6000": (77e12, 155e12), "A30": (82e12, 165e12),
    "A10G": (35e12, 70e12), "A10": (62e12, 125e12), "V100": (15.7e12, 125e12), "T4": (8.1e12, 65e12),
    "RTX 4090": (82.6e12, 165e12), "RTX 3090": (35.6e12, 71e12),
}  # fmt: skip
"""By words of the device's name, the first that fits: dense operations per second in TF32 (float32 where a device has
none) and in half precision, from the makers' data sheets."""

_NOT_WHOLE = ("MIG", "Laptop")
"""Words of names of devices that do less than others of the name."""


class Flops:
    """What this rank computes in a step: forward and backward of everything, teachers included.

    Matrix products, convolutions and attention are counted, by torch, during one step; the engines that take a module
    apart, and compiled ones, are left alone. A step counts as the first one did.
    """

    def __init__(self, job: Job):
        config = job.settings.engine
        self.can_count = job.settings.metrics.exports and config.name == "ddp" and not config.compile
        """Whether a step is still to be counted."""
        self.per_step = 0
        self.peak: float | None = None
        if job.device.type == "cuda":
            name, half = torch.cuda.get_device_name(job.device), config.precision in ("bf16", "fp16")
            known = _peaks_of(name)
            self.peak = None if known is None or config.precision == "fp64" else known[half]

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around the first step of an attempt, which takes some milliseconds more and computes the same.

        What cannot be counted leaves `per_step` at 0.
        """
        self.can_count = False
        with _Counter() as counter:
            yield
        self.per_step = 0 if counter.failed else counter.total


def _peaks_of(name: str) -> tuple[float, float] | None:
    """Of a device by its name, in whole words: an `RTX A4000` is no `A40`."""
    words = re.split(r"[ -]", name)
    if any(word in words for word in _NOT_WHOLE):
        return None
    spaced = f" {' '.join(words)} "
    return next((peaks for known, peaks in PEAK_FLOPS.items() if f" {known} " in spaced), None)


class _Counter(TorchDispatchMode):
    """Adds up what torch knows of the operations that pass by.

    Its own `FlopCounterMode` asks for them by module, too, through hooks that `autograd.grad` on leaves refuses.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # loads slowly, and only who exports needs it

        self.failed = False
        self.known: dict[Any, Callable[..., int]] = flop_registry
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        out = func(*args, **options)
        count = self.known.get(func.overloadpacket)
        try:
            self.total += 0 if count is None else count(*args, **options, out_val=out)
        except Exception:  # noqa: BLE001 - torch's formulas do not know every shape, and who looks must not disturb
            self.failed = True
        return out
