"""A line of `metrics.jsonl` as named numbers, grouped as charts are: what TensorBoard and W&B are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distkd.metrics.table import PHASES

__all__ = ["Scalars"]

_AGREEMENT = ("weight", "cosine", "cosine_with_task", "gated")
"""First words of the gauges that gradient agreement hands out, one number for each loss or pair of losses."""
_PLAIN = ("lr", "grad_norm", "skipped", "replaced")


class Scalars:
    """Turns the records of one attempt into numbers, in the order in which they are written.

    Args:
        step: where the attempt begins: seconds of a phase are divided by the steps since the line before.
    """

    def __init__(self, step: int = 0):
        self._since = step

    def of(self, record: Mapping[str, Any]) -> dict[str, float]:
        """`loss/total`, `loss/<part>`, `agreement/...`, `timings/<phase>` in seconds per step, `val/<metric>` and so
        on; without what is null. NaN stays NaN."""
        return {name: float(value) for name, value in self._named(record) if isinstance(value, int | float)}

    def _named(self, record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        yield "loss/total", record.get("loss")
        yield from ((f"loss/{name}", value) for name, value in record.get("parts", {}).items())
        yield from ((_gauge(name), value) for name, value in record.get("gauges", {}).items())
        yield from ((name, record.get(name)) for name in _PLAIN)
        yield from ((f"val/{name}", value) for name, value in record.get("val", {}).items())
        if "timings" in record:
            steps = max(1, record["step"] - self._since)
            self._since = record["step"]
            for name, value in record["timings"].items():
                yield f"timings/{name}", value / steps if name in PHASES else value


def _gauge(name: str) -> str:
    """`weight/kl` as `agreement/weight/kl`; groups that a method names itself, as `bank/...`, stay."""
    group, _, rest = name.partition("/")
    if not rest:
        return f"gauges/{name}"
    return f"agreement/{name}" if group in _AGREEMENT else name
