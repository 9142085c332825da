"""A student step with agreement weights: three ways with one trunk backward, the plain sum, and one backward per loss.

Targets for ours: at most 1.03 x the plain sum of the same losses; at least 2.9 x faster than K + 2 backwards through
the whole network (K losses, the task, the total), as the released code has it (card `dc-distill-gk-refine`, section
8). All sides share the model and DC-Distill's five losses; teacher outputs and bank rows are constants, so that only
the student's step is timed. Before that the sides' parameter gradients are compared in float64, and tensor operations
and autograd nodes beyond those of the plain sum are counted. Last, the same steps without their trunk.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import compare, report
from distkd.base import Batch, InputSpec, World
from distkd.comm.agreement import agree, leaf_of
from distkd.models.build import EncoderConfig, ModelConfig, build
from distkd.ops.agreement import cosine_matrix, row_sum_weights
from distkd.ops.injected import inject
from distkd.ops.kd import kl_at_temperature

ROWS, KEPT, POSITIVES, WIDTH, TEMPERATURE, BETA = 1072, 532, 20, 128, 0.07, 0.02
SIDES = ("teacher", "mean_teacher")
LOSSES = ("kl_teacher", "kl_mean_teacher", "contrast_teacher", "contrast_mean_teacher", "task")
Heads = Mapping[str, Tensor]


@dataclass
class Case:
    """A ResNet-18 student on random pixels, its heads, and what its teachers said."""

    student: nn.Module
    batch: Batch
    heads: dict[str, Tensor]
    constants: dict[str, Tensor]
    has_trunk: bool = True
    """Else the feature is a constant, and what is left is the heads' part of a step."""

    def parameters(self) -> list[Tensor]:
        trunk = [p for name, p in self.student.named_parameters() if not name.startswith("classifier")]
        return [*trunk, *self.heads.values()]

    def feature(self) -> Tensor:
        for p in self.parameters():
            p.grad = None
        if self.has_trunk:
            return self.student(self.batch).feature_BD
        return self.constants["teacher_feature"].clone().requires_grad_()

    def losses(self, feature: Tensor, heads: Heads, names: tuple[str, ...] = LOSSES) -> dict[str, Tensor]:
        """The named losses; those of logits share one product with the classifier."""
        found: dict[str, Tensor] = {}
        known = self.constants
        of_logits = any(not name.startswith("contrast") for name in names)
        logits = F.linear(feature, heads["classifier_weight"], heads["classifier_bias"]) if of_logits else feature
        for name in names:
            kind, _, side = name.partition("_")
            if kind == "task":
                found[name] = F.cross_entropy(logits, self.batch.label_B)
            elif kind == "kl":
                found[name] = kl_at_temperature(logits, known[f"{side}_logits"], 1.0)
            else:
                own = F.normalize(F.linear(feature, heads[f"{side}_own_weight"], heads[f"{side}_own_bias"]))
                other = F.linear(known[f"{side}_feature"], heads[f"{side}_other_weight"], heads[f"{side}_other_bias"])
                contrast = self.noise_contrast(own, known[f"{side}_bank"])
                found[name] = BETA * (contrast + self.noise_contrast(F.normalize(other), known[f"{side}_own_bank"]))
        return found

    def noise_contrast(self, query: Tensor, bank: Tensor) -> Tensor:
        noise = (KEPT - POSITIVES) / ROWS
        score = (query @ bank.T).gather(1, self.constants["columns"]) / TEMPERATURE - self.constants["log_z"]
        margin = score - torch.log(torch.full_like(self.constants["log_z"], noise))
        positive, negative = margin[:, :POSITIVES], margin[:, POSITIVES:]
        return (F.softplus(-positive).mean(dim=1) + F.softplus(negative).sum(dim=1)).mean()


def make(batch: int, size: int, device: torch.device, dtype: torch.dtype) -> Case:
    specs = {"path": InputSpec("image", (3, size, size))}
    model = ModelConfig(modalities=["path"], encoders={"path": EncoderConfig(name="resnet18")})
    student = build(model, specs, 3, seed=0).to(device, dtype).train()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    known = {"columns": torch.randint(ROWS, (batch, KEPT), generator=generator).to(device), "log_z": draw(1).abs() + 7}
    heads = {"classifier_weight": draw(3, WIDTH) / 11, "classifier_bias": draw(3)}
    for side in SIDES:
        known |= {f"{side}_logits": draw(batch, 3), f"{side}_feature": draw(batch, WIDTH).relu()}
        known |= {f"{side}_{name}": F.normalize(draw(ROWS, WIDTH)) for name in ("bank", "own_bank")}
        for name in ("own", "other"):
            heads |= {f"{side}_{name}_weight": draw(WIDTH, WIDTH) / 11, f"{side}_{name}_bias": draw(WIDTH)}
    number = torch.arange(batch)
    found = Batch(
        views=({"path": torch.randn(batch, 3, size, size, generator=generator)},),
        present={"path": torch.ones(batch, dtype=torch.bool)},
        label_B=number % 3,
        index_B=number,
        sample_B=number,
        key_B=number,
    )
    return Case(student, found.to(device, dtype), {name: x.requires_grad_() for name, x in heads.items()}, known)


def weights_of(gradients: list[Tensor]) -> Tensor:
    flat = torch.stack([gradient.flatten() for gradient in gradients])
    return row_sum_weights(cosine_matrix(flat @ flat.T))


def weighted(losses: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    *distillation, task = losses.values()
    return task + torch.stack(distillation) @ weights


def plain_sum(case: Case) -> None:
    torch.stack(list(case.losses(case.feature(), case.heads).values())).sum().backward()


def grad_then_backward(case: Case) -> None:
    """Way (a): each loss to the feature, then the weighted sum to everything."""
    feature = case.feature()
    losses = case.losses(feature, case.heads)
    gradients = [torch.autograd.grad(loss, feature, retain_graph=True)[0] for loss in losses.values()]
    weighted(losses, weights_of(gradients)).backward()


def ours(case: Case) -> None:
    """Way (b): each loss on a leaf, to the leaf and the heads, then one injected gradient."""
    feature = case.feature()
    leaf = leaf_of(feature)
    losses = case.losses(leaf, case.heads)
    task = losses.pop("task")
    heads = list(case.heads.values())
    found = agree(task, losses, feature_BD=feature, leaf_BD=leaf, heads=heads, weigh=row_sum_weights, world=World())
    found.loss.backward()


def ours_batched(case: Case) -> None:
    """Way (b) with all vector-Jacobian products of the heads in one call."""
    feature = case.feature()
    leaf = leaf_of(feature)
    losses = torch.stack(list(case.losses(leaf, case.heads).values()))
    inputs = [leaf, *case.heads.values()]
    rows = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
    found = torch.autograd.grad(losses, inputs, rows, is_grads_batched=True)
    scale = torch.cat([weights_of(list(found[0])), losses.new_ones(1)])
    combined = [(scale @ gradients.flatten(1)).view_as(x) for gradients, x in zip(found, inputs, strict=True)]
    inject(losses.detach() @ scale, [feature, *case.heads.values()], combined).backward()


class FanOut(torch.autograd.Function):
    """A copy of feature and heads for each loss; the backward sees all gradients at once, weighs and sums them."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.n = n
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for _ in range(n) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        columns = list(zip(*zip(*[iter(gradients)] * (len(gradients) // ctx.n), strict=True), strict=True))
        weights = weights_of(columns[0])  # pyright: ignore[reportArgumentType]
        scale = torch.cat([weights, weights.new_ones(1)]).unbind()
        sums: list[Tensor | None] = []
        for column in columns:
            terms = [w * g for w, g in zip(scale, column, strict=True) if g is not None]
            sums.append(torch.stack(terms).sum(dim=0) if terms else None)
        return (None, *sums)


def fan_out(case: Case) -> None:
    """Way (c): the weights are found inside the backward; every loss has its own branch of feature and heads."""
    feature, heads = case.feature(), case.heads
    copies = FanOut.apply(len(LOSSES), feature, *heads.values())
    branches = zip(*[iter(copies)] * (1 + len(heads)), strict=True)  # pyright: ignore[reportArgumentType, reportCallIssue]
    losses: list[Tensor] = []
    for name, (own_feature, *own_heads) in zip(LOSSES, branches, strict=True):
        losses += case.losses(own_feature, dict(zip(heads, own_heads, strict=True)), (name,)).values()
    torch.stack(losses).sum().backward()


def backward_per_loss(case: Case) -> None:
    """K + 2 backwards through the whole network; a hook reads each loss's gradient at the feature."""
    feature = case.feature()
    losses = case.losses(feature, case.heads)
    gradients: list[Tensor] = []
    for loss in losses.values():
        for p in case.parameters():
            p.grad = None
        handle = feature.register_hook(lambda g: gradients.append(g.clone()))
        loss.backward(retain_graph=True)
        handle.remove()
    for p in case.parameters():
        p.grad = None
    weighted(losses, weights_of(gradients)).backward()


WAYS = {"a_grad_then_backward": grad_then_backward, "ours": ours, "b_batched": ours_batched, "c_fan_out": fan_out}
STEPS = {"plain_sum": plain_sum, **WAYS, "backward_per_loss": backward_per_loss}


def differences(case: Case) -> dict[str, float]:
    """Largest difference of a gradient between a way and the released form, relative to the largest gradient."""
    found: dict[str, list[Tensor]] = {}
    for name in ("backward_per_loss", *WAYS):
        STEPS[name](case)
        found[name] = [p.grad.clone() for p in case.parameters() if p.grad is not None]
    expected = found.pop("backward_per_loss")
    largest = max(g.abs().max().item() for g in expected)
    return {
        name: max((a - b).abs().max().item() for a, b in zip(grads, expected, strict=True)) / largest
        for name, grads in found.items()
    }


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = "views" if func.is_view else "operations"
        self.counts[kind] += 1
        return func(*args, **(kwargs or {}))


def count(case: Case) -> dict[str, dict[str, int]]:
    """Tensor operations that compute, and autograd nodes that are evaluated, in a step."""
    found: dict[str, dict[str, int]] = {}
    for name, step in STEPS.items():
        with _Operations() as operations:
            step(case)
        with profile(activities=[ProfilerActivity.CPU]) as events:
            step(case)
        nodes = [e for e in events.events() or [] if e.name.startswith("autograd::engine::evaluate_function")]
        found[name] = {"operations": operations.counts["operations"], "autograd_nodes": len(nodes)}
    return {
        name: {kind: n - found["plain_sum"][kind] for kind, n in counts.items()}
        for name, counts in found.items()
        if name != "plain_sum"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="autocast the step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = differences(make(arguments.batch, arguments.size, device, torch.float64))
    case = make(arguments.batch, arguments.size, device, torch.float32)
    counts = count(case)

    def side(step: Callable[[Case], None], case: Case) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
                step(case)

        return run

    sides = compare({name: side(step, case) for name, step in STEPS.items()}, repeats=arguments.repeats)
    alone = replace(case, has_trunk=False)
    heads = {name: side(step, alone) for name, step in STEPS.items() if name != "backward_per_loss"}
    key = "wall_s" if device.type == "cuda" else "least_processor_s"  # the differences are small
    ratios = {f"{name} / plain_sum": sides[name][key] / sides["plain_sum"][key] for name in WAYS}
    ratios["backward_per_loss / ours"] = sides["backward_per_loss"][key] / sides["ours"][key]
    alone_s = {name: figures[key] for name, figures in compare(heads, repeats=20 * arguments.repeats).items()}
    about = {"size": arguments.size, "batch": arguments.batch, "relative_gradient_difference": found}
    report("gradient_agreement", sides, ratios, **about, beyond_plain_sum=counts, heads_alone_s=alone_s)


if __name__ == "__main__":
    main()
