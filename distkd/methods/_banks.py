"""Memory banks of a method: what can be configured, and the banks that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor, nn

from distkd.base import StepOutput, StrictConfig, World
from distkd.errors import ConfigError
from distkd.memory.bank import MemoryBank
from distkd.memory.contrast import ContrastPair, write_rows
from distkd.memory.guard import check_banks
from distkd.memory.placement import Placement, Replicated, Sharded
from distkd.methods._protocol import Setup
from distkd.ops.draws import integer_key, text_key

__all__ = ["BankConfig", "Banks"]

_BESIDE_BYTES = 8
"""Of a row, beside its values: its norm and when it was written."""
_DTYPES = {"run": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class BankConfig(StrictConfig):
    """Where the rows of the memory banks lie, and in which precision."""

    placement: Literal["replicated", "sharded"] = "replicated"
    """`replicated`: all rows on every rank. `sharded`: row n on rank n mod ranks; the same results."""
    dtype: Literal["run", "bf16", "fp16"] = "run"
    """Precision of the rows, `run` for that of the weights; sums are taken in float32 or wider. A half-precision row is
    rounded, which moves its cosines by less than 2^-8 (bf16) or 2^-11 (fp16), also between numbers of ranks."""
    memory_share: float = Field(default=0.5, gt=0, le=1)
    """Banks that would take more than this share of the memory of the device, or of the host, are refused."""
    check_every: NonNegativeInt = 100
    """Steps between two comparisons of the replicas, which cost 8 bytes a bank and one host sync; 0 for never."""


class Banks(nn.Module):
    """A pair of banks for each teacher, written together.

    Args:
        config: placement and precision.
        sides: names of the teachers.
        dim: D.
        setup: the task; one row for every training sample.
        momentum: share of the old row when a row is updated.

    Raises:
        ConfigError: they do not fit into the share of the memory they may take.
    """

    def __init__(self, config: BankConfig, sides: tuple[str, ...], dim: int, setup: Setup, *, momentum: float):
        super().__init__()
        self.config, self.momentum = config, momentum
        self.placement = _placement(config, setup)
        n_rows, dtype = len(setup.train_label_N), _DTYPES[config.dtype]
        _check_memory(config, n_rows, 2 * len(sides), dim, dtype or setup.dtype, setup)
        for side in sides:
            seed = integer_key(setup.seed, text_key(side))
            self.add_module(side, ContrastPair(n_rows, dim, seed=seed, dtype=dtype, placement=self.placement))

    def pair(self, side: str) -> ContrastPair:
        return self.get_submodule(side)  # pyright: ignore[reportReturnType]

    def named_banks(self) -> Mapping[str, MemoryBank]:
        """By the name under which embeddings are gathered: `<side>.student` and `<side>.teacher`."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MemoryBank)}

    def after_step(self, out: StepOutput, world: World) -> None:
        """Write the step's embeddings of all ranks; now and then compare the replicas.

        Collectives: none but the gathers that `out` waits for; one of 8 bytes a bank every `check_every` steps.
        """
        banks = self.named_banks()
        write_rows(banks, out.rows, momentum=self.momentum)
        step = out.step + 1
        if self.config.check_every and step % self.config.check_every == 0:
            check_banks(banks, step, world)


def _placement(config: BankConfig, setup: Setup) -> Placement:
    if config.placement == "replicated" or setup.world.size == 1:
        return Replicated()
    return Sharded(setup.world, *_largest_shares(setup.train_label_N, setup.world.size))


def _largest_shares(label_N: Tensor, parts: int) -> tuple[float, float]:
    """Of all classes the largest share that lies on one rank: of the class itself, and of all rows but the class."""
    part_N = torch.arange(len(label_N)) % parts
    total_P = torch.bincount(part_N, minlength=parts)
    # an anchor without a label has its own row in every column of its positives
    own = 1.0 if (label_N < 0).any() else 1 / parts
    others = (total_P / len(label_N)).max().item()
    for label in label_N[label_N >= 0].unique():
        class_P = torch.bincount(part_N[label_N == label], minlength=parts)
        own = max(own, (class_P.max() / class_P.sum()).item())
        rest_P = torch.bincount(part_N[(label_N >= 0) & (label_N != label)], minlength=parts)
        others = max(others, (rest_P.max() / rest_P.sum().clamp_min(1)).item())
    return own, others


def _check_memory(config: BankConfig, n_rows: int, n_banks: int, dim: int, dtype: torch.dtype, setup: Setup) -> None:
    parts = setup.world.size if config.placement == "sharded" else 1
    needed = n_banks * -(-n_rows // parts) * (dim * dtype.itemsize + _BESIDE_BYTES)
    allowed = config.memory_share * setup.memory_bytes
    if needed <= allowed:
        return
    ways = ["--method.bank.placement sharded"] if parts == 1 and setup.world.size > 1 else []
    ways += ["--method.bank.dtype bf16"] if config.dtype == "run" else []
    ways += ["more ranks" if parts > 1 else "sharded banks on more ranks", "a larger --method.bank.memory_share"]
    raise ConfigError(
        f"{n_banks} memory banks of {n_rows:,} rows x {dim} take {_gib(needed)} on a rank and may take {_gib(allowed)} "
        f"(method.bank.memory_share={config.memory_share:g} of {_gib(setup.memory_bytes)}); use {', or '.join(ways)}"
    )


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.3g} GiB"
