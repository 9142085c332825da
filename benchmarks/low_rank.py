"""M3LR's penalty, value and gradient, against a plain numpy loop over frequencies and modalities.

Target: at least 3 x faster for two modalities, 16 samples of width 128 and four views, on one thread. The loop is what
the card describes without the published helper's detours: a complex singular value decomposition of each 16 x 4 slice
of half of the spectrum, the other half by symmetry, and the same gradient by the same formula. Both sides' values and
gradients are compared in float64 first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import compare, report
from distkd.ops.lowrank import Shrinkage, low_rank_penalty

RHO, WEIGHT, LEARNING, CALLS = 0.1, 1.0, 2, 20
Views = list[list[Tensor]]
Arrays = list[list[Any]]


def make(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> Views:
    """Fused and its mean teacher are shared by both modalities, the third view learns."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return (torch.randn(batch, width, generator=generator) + 0.3).relu().to(device, dtype)

    fused, fused_teacher = draw(), draw()
    return [[fused, fused_teacher, draw().requires_grad_(), draw()] for _ in range(2)]


def ours(views: Views) -> tuple[float | Tensor, list[Any]]:
    loss = low_rank_penalty(views, Shrinkage(RHO), weight=WEIGHT)
    for own in views:
        own[LEARNING].grad = None
    loss.backward()
    return loss.detach(), [own[LEARNING].grad for own in views]


def numpy_loop(views: Arrays) -> tuple[float, list[Any]]:
    value, gradients = 0.0, []
    for own in views:
        products = [feature @ feature.T for feature in own]
        norms = [np.maximum(np.linalg.norm(product, axis=1, keepdims=True), 1e-6) for product in products]
        z = np.stack([product / norm for product, norm in zip(products, norms, strict=True)], axis=2)
        n = z.shape[0]
        spectrum = np.fft.fft(z, axis=0)
        for k in range(n // 2 + 1):
            u, s, vh = np.linalg.svd(spectrum[k], full_matrices=False)
            spectrum[k] = (u * np.maximum(s - RHO * n / (s + 1e-5), 0)) @ vh
            if 0 < k < n - k:
                spectrum[n - k] = spectrum[k].conj()
        residual = z - np.fft.ifft(spectrum, axis=0).real
        value += WEIGHT / 2 * float((residual**2).sum())
        unit, slope = z[:, :, LEARNING], WEIGHT * residual[:, :, LEARNING]
        slope = (slope - (slope * unit).sum(axis=1, keepdims=True) * unit) / norms[LEARNING]
        gradients.append((slope + slope.T) @ own[LEARNING])
    return value, gradients


def differences(batch: int, width: int) -> tuple[float, float]:
    """Of values and gradients, relative to the largest, in float64."""
    views = make(batch, width, torch.float64, torch.device("cpu"))
    value, gradients = ours(views)
    expected, slopes = numpy_loop(as_arrays(views))
    largest = max(float(np.abs(slope).max()) for slope in slopes)
    apart = max(
        float(np.abs(gradient.numpy() - slope).max()) for gradient, slope in zip(gradients, slopes, strict=True)
    )
    return abs(float(value) - expected) / expected, apart / largest


def as_arrays(views: Views) -> Arrays:
    return [[feature.detach().cpu().numpy() for feature in own] for own in views]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    value, gradient = differences(arguments.batch, arguments.width)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sides: dict[str, Callable[[], Any]] = {}

    def many(step: Callable[[Any], Any], views: Any) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                step(views)

        return run

    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        views = make(arguments.batch, arguments.width, dtype, device)
        sides[f"ours_{name}"] = many(ours, views)
        sides[f"numpy_loop_{name}"] = many(numpy_loop, as_arrays(views))
    found = compare(sides, repeats=arguments.repeats)
    key = "wall_s" if device.type == "cuda" else "processor_s"
    ratios = {
        f"numpy_loop / ours, {name}": found[f"numpy_loop_{name}"][key] / found[f"ours_{name}"][key]
        for name in ("float32", "float64")
    }
    about = {"batch": arguments.batch, "width": arguments.width, "calls_per_repeat": CALLS}
    report("low_rank", found, ratios, **about, relative_difference={"value": value, "gradient": gradient})


if __name__ == "__main__":
    main()
