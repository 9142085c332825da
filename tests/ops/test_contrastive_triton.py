"""The CUDA kernel of noise contrast, run by Triton's interpreter: the same numbers as the torch form."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; pip install triton"
)

# in a process of its own: the interpreter is chosen when Triton is imported
COMPARE = """
import math, torch
import torch.nn.functional as F
from distkd.ops.contrastive import Noise, contrast
from distkd.ops.contrastive_triton import contrast_kernel

generator = torch.Generator().manual_seed(0)
for B, D, N, M, n_columns, dtype, offset in (
    (3, 16, 40, 33, 1, torch.float32, False),
    (2, 20, 50, 70, 5, torch.float16, True),
    (2, 128, 300, 260, 1, torch.float32, True),
    (1, 5, 9, 4, 2, torch.bfloat16, False),
):
    anchor = F.normalize(torch.randn(B, D, generator=generator), dim=1)
    rows = F.normalize(torch.randn(N, D, generator=generator), dim=1).to(dtype)
    index = torch.randint(0, N, (B, M), generator=generator)
    noise = Noise(torch.tensor(3.0, dtype=torch.float64), n_columns, M - n_columns, N)
    added = None
    if offset:
        added = 0.1 * torch.randn(B, M, generator=generator)
        added[0, 0], added[0, -1] = math.inf, -math.inf
    expected = contrast(anchor, rows, index, n_columns, noise, temperature=0.07, offset_BM=added)
    found = contrast_kernel(anchor, rows, index, n_columns, noise, 0.07, added)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # scores that a float16 could not exponentiate, and losses below the rounding of 1 + x
    for shift in (-60.0, 60.0):
        extreme = Noise(torch.tensor(shift, dtype=torch.float64), n_columns, M - n_columns, N)
        a = contrast_kernel(anchor, rows, index, n_columns, extreme, 0.07, None)
        b = contrast(anchor, rows, index, n_columns, extreme, temperature=0.07)
        torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=0)
        assert (a[1] - b[1]).abs().max() <= 1e-5 * b[1].abs().max()
print("equal")
"""


def test_the_kernel_computes_what_torch_computes():
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("equal")
