"""Batches of random values for the tests of the models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distkd.base import Batch, InputSpec
from distkd.ops.draws import integer_key

__all__ = ["make_batch", "rows_of"]


def make_batch(
    specs: Mapping[str, InputSpec],
    n: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    present: Mapping[str, Tensor] | None = None,
) -> Batch:
    """`n` samples of the modalities; values and keys are a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(n, *spec.shape, generator=generator, dtype=dtype) for name, spec in specs.items()}
    everywhere = {name: torch.ones(n, dtype=torch.bool) for name in specs}
    return Batch(
        views=(inputs,),
        present={**everywhere, **(present or {})},
        label_B=torch.zeros(n, dtype=torch.int64),
        index_B=torch.arange(n),
        sample_B=torch.arange(n),
        key_B=torch.tensor([integer_key(seed, number) for number in range(n)]),
    )


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """The batch with these samples, in this order."""
    return Batch(
        views=tuple({name: x[rows] for name, x in view.items()} for view in batch.views),
        present={name: x[rows] for name, x in batch.present.items()},
        label_B=batch.label_B[rows],
        index_B=batch.index_B[rows],
        sample_B=batch.sample_B[rows],
        key_B=batch.key_B[rows],
    )
