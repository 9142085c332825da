"""A student step of GK-Refine against a plain sum of the same losses, and against one full backward per loss.

Targets: at most 1.05 x the plain sum; at least 2.8 x faster than K + 2 backwards (K losses, the task, the total). The
three sides share model, losses and banks; teacher outputs are computed once beforehand, so that only the student's step
is timed. The reference side reads each loss's gradient at the feature from its own backward through the whole network,
as the released code does (card `dc-distill-gk-refine`, section 8), and ends with the same gradient, which is checked.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import compare, report
from distkd.base import Batch, InputSpec, Outputs, World
from distkd.methods import Setup, dc_distill
from distkd.models.build import EncoderConfig, ModelConfig
from distkd.ops.agreement import cosine_matrix, row_sum_weights

ROWS = 1072


def make(config: dc_distill.Config, batch: int, size: int, device: torch.device) -> tuple[dc_distill.DCDistill, Batch]:
    """The published student on one batch of random pixels."""
    specs = {"path": InputSpec("image", (3, size, size))}
    model = ModelConfig(modalities=["path"], encoders={"path": EncoderConfig(name="resnet18")})
    label_N = torch.arange(ROWS) % 3
    teacher = Setup(model, specs, 3, label_N, seed=1, world=World()).build_student().eval()
    method = dc_distill.build(config, Setup(model, specs, 3, label_N, seed=0, world=World(), teacher=teacher))
    for part in (method.trainable, method.frozen, method.state):
        part.to(device)
    generator = torch.Generator().manual_seed(0)
    index_B = torch.randperm(ROWS, generator=generator)[:batch]
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    found = Batch(
        views=({"path": pixels},),
        present={"path": torch.ones(batch, dtype=torch.bool)},
        label_B=label_N[index_B],
        index_B=index_B,
        sample_B=index_B,
        key_B=index_B,
    )
    return method, found.to(device, torch.float32)


class Cached(nn.Module):
    """Outputs that are already there: a teacher that costs nothing."""

    def __init__(self, outputs: Outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, batch: Batch) -> Outputs:
        return self.outputs


def cache_teachers(method: dc_distill.DCDistill, batch: Batch) -> None:
    with torch.no_grad():
        method.frozen["teacher"] = Cached(method.frozen["teacher"](batch))
        method.mean_teacher = Cached(method.mean_teacher(batch))  # pyright: ignore[reportAttributeAccessIssue]


def reference_step(method: dc_distill.DCDistill, batch: Batch) -> None:
    """K + 2 backwards through the whole network."""
    student = method.trainable(batch)
    feature = student.feature_BD
    task, distillation = losses_of(method, feature, batch)
    gradients: list[Tensor] = []
    for loss in (*distillation.values(), task):
        method.trainable.zero_grad()
        handle = feature.register_hook(lambda g: gradients.append(g.flatten().clone()))
        loss.backward(retain_graph=True)
        handle.remove()
    stacked = torch.stack(gradients)
    weights = row_sum_weights(cosine_matrix(stacked @ stacked.T))
    method.trainable.zero_grad()
    (task + torch.stack(list(distillation.values())) @ weights).backward()


def losses_of(method: dc_distill.DCDistill, feature: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    return method.losses(feature, method.frozen["teacher"](batch), method.mean_teacher(batch), batch, World())[:2]


def agreement_step(method: dc_distill.DCDistill, batch: Batch) -> None:
    """The method's own step, bookkeeping included."""
    out = method.step(method.trainable, batch, World())
    method.trainable.zero_grad()
    out.loss.backward()


def plain_step(method: dc_distill.DCDistill, batch: Batch) -> None:
    student = method.trainable(batch)
    task, distillation = losses_of(method, student.feature_BD, batch)
    method.trainable.zero_grad()
    (task + torch.stack(list(distillation.values())).sum()).backward()


def check_equal(method: dc_distill.DCDistill, batch: Batch) -> float:
    """Largest difference of a gradient between ours and the reference, relative to the largest gradient."""
    found: list[list[Tensor]] = []
    for step in (agreement_step, reference_step):
        step(method, batch)
        found.append([p.grad.clone() for p in method.trainable.parameters() if p.grad is not None])
    largest = max(g.abs().max().item() for g in found[1])
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True)) / largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="autocast the trunk")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method, batch = make(dc_distill.Config(), arguments.batch, arguments.size, device)
    method.trainable.train()
    cache_teachers(method, batch)
    difference = check_equal(method, batch)

    def side(step: Callable[[dc_distill.DCDistill, Batch], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
                return step(method, batch)

        return run

    sides = compare(
        {"ours": side(agreement_step), "plain_sum": side(plain_step), "one_backward_per_loss": side(reference_step)},
        repeats=arguments.repeats,
    )
    key = "wall_s" if device.type == "cuda" else "processor_s"
    ratios = {
        "ours / plain_sum": sides["ours"][key] / sides["plain_sum"][key],
        "one_backward_per_loss / ours": sides["one_backward_per_loss"][key] / sides["ours"][key],
    }
    about = {"size": arguments.size, "batch": arguments.batch, "relative_gradient_difference": difference}
    report("student_step", sides, ratios, **about)


if __name__ == "__main__":
    main()
