"""The float64 numbers of the method cards, as tensors."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["golden", "tensor"]


@cache
def golden(card: str) -> dict[str, Any]:
    """The numbers of `tests/golden/<card>.json`, made by running the released code in float64."""
    return json.loads((Path(__file__).parent / "golden" / f"{card}.json").read_text())


def tensor(values: Any, *, grad: bool = False) -> Tensor:
    found = torch.tensor(values)
    if found.is_floating_point():
        found = torch.tensor(values, dtype=torch.float64, requires_grad=grad)
    return found
