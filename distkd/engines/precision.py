"""Half precision inside the wrapped model, float32 outside of it."""

from __future__ import annotations

from dataclasses import replace

from distkd.base import Outputs

__all__ = ["float32_outputs"]


def float32_outputs(out: Outputs) -> Outputs:
    """What losses, agreement and banks see: float32, branches included."""
    branches = {name: float32_outputs(branch) for name, branch in out.branches.items()}
    return replace(
        out,
        feature_BD=out.feature_BD.float(),
        logits_BC=out.logits_BC.float(),
        branches=branches,
        map_BKHW=None if out.map_BKHW is None else out.map_BKHW.float(),
        inner_BKHW=None if out.inner_BKHW is None else out.inner_BKHW.float(),
    )
