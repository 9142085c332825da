"""What a compiler may do with the pure functions: one graph and the same numbers, or it leaves them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distkd.ops.agreement import (
    agreement_counts,
    conflict_averse_weights,
    cosine_matrix,
    minimum_norm_weights,
    projected_weights,
    row_sum_weights,
)
from distkd.ops.kd import kl_at_temperature
from distkd.ops.selection import select_by_discrepancy

GENERATOR = torch.Generator().manual_seed(0)
GRADIENTS = torch.randn(5, 12, generator=GENERATOR, dtype=torch.float64)
GRAM = GRADIENTS @ GRADIENTS.T
LOGITS = torch.randn(2, 4, 3, generator=GENERATOR, dtype=torch.float64)
GAP = torch.randn(3, 11, generator=GENERATOR, dtype=torch.float64)

CALLS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "gk_refine": (lambda gram: row_sum_weights(cosine_matrix(gram)), GRAM),
    "gkm": (lambda gram: agreement_counts(cosine_matrix(gram), threshold=0.1), GRAM),
    "pcgrad": (projected_weights, GRAM),
    "mgda": (minimum_norm_weights, GRAM),
    "cagrad": (lambda gram: conflict_averse_weights(gram, c=0.5), GRAM),
    "kl": (lambda logits: kl_at_temperature(logits[0], logits[1], 2.0), LOGITS),
    "select": (
        lambda gap: select_by_discrepancy(gap, n_positive=5, ranks_P=torch.tensor([0, 2]), keep_negative=4),
        GAP,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_is_one_graph_with_the_same_numbers(name: str):
    call, value = CALLS[name]
    expected: Any = call(value)
    found = torch.compile(call, backend="aot_eager", fullgraph=True)(value)
    torch.testing.assert_close(found, expected)
