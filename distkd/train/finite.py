"""Losses that are not finite: noticed without a host sync per step, stopped together, and the samples named."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distkd.comm.world import gather_objects
from distkd.errors import NonFiniteError
from distkd.train.job import Job

__all__ = ["FiniteGuard"]


class FiniteGuard:
    """Notices the first step whose loss or gradient is not finite, without asking the device at every step.

    The gradient is averaged over ranks and so is the loss when it is read, so all ranks find it together.
    """

    def __init__(self, job: Job):
        self.job = job
        self.recent: list[tuple[int, Tensor, Tensor]] = []

    def watch(self, step: int, loss: Tensor, norm: Tensor) -> None:
        self.recent.append((step, loss.detach(), norm))

    def check(self, mean_loss: float) -> None:
        """Called where the host waits anyway, with the mean loss of the watched steps over all ranks.

        Raises:
            NonFiniteError: on all ranks at once, naming the step, the ranks and their samples.
        """
        recent, self.recent = self.recent, []
        norms = torch.stack([norm for _, _, norm in recent]).isfinite().tolist()
        if all(norms) and math.isfinite(mean_loss):
            return
        losses = [math.isfinite(loss.item()) for _, loss, _ in recent]
        job = self.job
        bad = [step for (step, _, _), *finite in zip(recent, norms, losses, strict=True) if not all(finite)]
        step = min(steps[0] for steps in gather_objects(bad, job.world) if steps)
        here = not losses[[number for number, _, _ in recent].index(step)]
        bad_inputs, samples = _suspects(job, step) if here else ([], [])
        per_rank = gather_objects((bad_inputs, samples), job.world)
        # batch statistics carry a bad sample's NaN to all ranks: where one is found, the others are innocent
        known = [inputs for inputs, _ in per_rank]
        per_rank = known if any(known) else [names for _, names in per_rank]
        ranks = ", ".join(str(rank) for rank, names in enumerate(per_rank) if names)
        names = [name for some in per_rank for name in some]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        where = f"rank {ranks}, samples {shown}" if names else "in the gradient only, on no single rank"
        raise NonFiniteError(
            f"loss or gradient is not finite at step {step}: {where}; look at these samples, or lower optim.lr or set "
            "optim.clip and pass --allow-change; the last checkpoint is from before"
        )


def _suspects(job: Job, step: int) -> tuple[list[str], list[str]]:
    """Keys of this rank's samples of a step: those with values that are not finite, and all."""
    samples: list[int] = []
    for number in range(job.passes):
        positions = job.plan.local_positions(step, number, job.passes, job.world)
        samples += [int(sample) for sample in job.dataset.split_samples("train")[positions]]
    batch = job.dataset.batch(samples, epoch=job.plan.epoch_of(step), train=True)
    finite_B = torch.ones(len(samples), dtype=torch.bool)
    for view in batch.views:
        for values in view.values():
            finite_B &= torch.isfinite(values.flatten(1)).all(dim=1)
    keys = [job.dataset.describe(sample)["key"] for sample in samples]
    return [key for key, finite in zip(keys, finite_B.tolist(), strict=True) if not finite], keys
