"""Losses that are not finite: noticed without a host sync per step, decided together, and the samples named."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distkd.base import Batch
from distkd.comm.world import gather_objects
from distkd.data.loader import batches_of_step
from distkd.errors import NonFiniteError
from distkd.train.job import Job

__all__ = ["FiniteGuard"]

IN_A_ROW = 10
"""Steps that may be left out one after the other before the run ends."""


class FiniteGuard:
    """Notices the first step whose loss or gradient is not finite, without asking the device at every step.

    The gradient is averaged over ranks and so is the loss when it is read, so all ranks find it together.
    """

    def __init__(self, job: Job):
        self.job = job
        self.recent: list[tuple[int, Tensor, Tensor]] = []
        self.in_a_row = 0

    def watch(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """A step whose update was applied."""
        self.recent.append((step, loss.detach(), norm))
        self.in_a_row = 0

    def check(self, mean_loss: float, mean_norm: float) -> None:
        """Called where the host waits anyway, with the means of the watched steps over all ranks.

        One that is not finite leaves no finite mean, so nothing is asked of the device where all is well.

        Raises:
            NonFiniteError: on all ranks at once, naming the step, the ranks and their samples.
        """
        recent, self.recent = self.recent, []
        if math.isfinite(mean_norm) and math.isfinite(mean_loss):
            return
        norms = [math.isfinite(norm.item()) for _, _, norm in recent]
        losses = [math.isfinite(loss.item()) for _, loss, _ in recent]
        job = self.job
        bad = [step for (step, _, _), *finite in zip(recent, norms, losses, strict=True) if not all(finite)]
        step = min(steps[0] for steps in gather_objects(bad, job.world) if steps)
        innocent = losses[[number for number, _, _ in recent].index(step)]
        where, _ = self._where([] if innocent else batches_of_step(job.dataset, job.plan, job.world, job.passes, step))
        raise NonFiniteError(
            f"loss or gradient is not finite at step {step}: {where}; {_ADVICE}; the last checkpoint is from before"
        )

    def skipped(self, step: int, passes: Sequence[Batch], loss: Tensor) -> str | None:
        """A step whose update was left out on all ranks; its words, or None for an overflow of float16.

        Raises:
            NonFiniteError: on all ranks, when a step may not be left out, or too many were.

        Collectives: one gather.
        """
        settings = self.job.settings
        self.in_a_row += 1
        where, found = self._where([] if math.isfinite(loss.item()) else passes)
        if settings.engine.precision == "fp16" and not found:
            return None  # the engine lowers its scale, and gives up by itself
        if settings.run.nonfinite == "stop":
            raise NonFiniteError(f"loss or gradient is not finite at step {step}: {where}; {_ADVICE}")
        if self.in_a_row >= IN_A_ROW:
            raise NonFiniteError(
                f"loss or gradient was not finite in {self.in_a_row} steps in a row, the last at step {step}: {where}; "
                f"{_ADVICE}"
            )
        return f"step {step} is left out, its loss or gradient is not finite: {where}"

    def _where(self, batches: Sequence[Batch]) -> tuple[str, bool]:
        """Ranks and samples in words, and whether any could be named; the same on every rank. One gather.

        Args:
            batches: of the step, where this rank's loss is not finite; none elsewhere.
        """
        per_rank = gather_objects(_suspects(self.job, batches), self.job.world)
        # batch statistics carry a bad sample's NaN to all ranks: where one is found, the others are innocent
        known = [inputs for inputs, _ in per_rank]
        per_rank = known if any(known) else [names for _, names in per_rank]
        ranks = ", ".join(str(rank) for rank, names in enumerate(per_rank) if names)
        names = [name for some in per_rank for name in some]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        words = f"rank {ranks}, samples {shown}" if names else "in the gradient only, on no single rank"
        return words, bool(names)


_ADVICE = "look at these samples, or lower optim.lr or set optim.clip and pass --allow-change"


def _suspects(job: Job, batches: Sequence[Batch]) -> tuple[list[str], list[str]]:
    """Keys of the samples with values that are not finite, and of all."""
    bad: list[str] = []
    keys: list[str] = []
    for batch in batches:
        finite_B = torch.ones(len(batch), dtype=torch.bool, device=batch.label_B.device)
        for values in (values for view in batch.views for values in view.values()):
            finite_B &= torch.isfinite(values.flatten(1)).all(dim=1)
        keys_B = [job.dataset.describe(sample)["key"] for sample in batch.sample_B.tolist()]
        keys += keys_B
        bad += [key for key, finite in zip(keys_B, finite_B.tolist(), strict=True) if not finite]
    return bad, keys
