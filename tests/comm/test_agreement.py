from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distkd.base import World
from distkd.comm import world as comm
from distkd.comm.agreement import Agreement, agree, leaf_of
from distkd.ops.agreement import cosine_matrix, row_sum_weights
from distkd.ops.kd import kl_at_temperature
from tests.golden_numbers import golden, tensor
from tests.memory.test_contrast import CLOSE, INPUTS, contrast_of, project

CASE = golden("dc-distill-gk-refine")["gradient_agreement"]


def _golden_losses(feature: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = F.linear(feature, tensor(CASE["classifier_weight"]), tensor(CASE["classifier_bias"]))
    distillation = {
        "kl_multimodal": kl_at_temperature(logits, tensor(CASE["multimodal_logits"]), CASE["kd_T"]),
        "kl_mean_teacher": kl_at_temperature(logits, tensor(CASE["mean_teacher_logits"]), CASE["kd_T"]),
    }
    for name, other in (("contrast_multimodal", "multimodal_feat"), ("contrast_mean_teacher", "mean_teacher_feat")):
        contrast = contrast_of(tensor(INPUTS["bank_student_init"]), tensor(INPUTS["bank_teacher_init"]))
        loss = contrast(
            project(feature, tensor(INPUTS["embed_s_weight"]), tensor(INPUTS["embed_s_bias"])),
            project(tensor(CASE[other]), tensor(INPUTS["embed_t_weight"]), tensor(INPUTS["embed_t_bias"])),
            tensor(INPUTS["candidate_rows"]),
            torch.tensor([0, 1, 2]),
            n_positive=INPUTS["nce_p"],
            keep_negative=INPUTS["nce_k2"],
            temperature=INPUTS["nce_t"],
            direction="released",
            world=World(),
        )
        distillation[name] = CASE["beta"] * loss
    return F.cross_entropy(logits, tensor(CASE["labels"])), distillation


def test_weights_total_and_gradient_at_the_feature_are_golden():
    feature = tensor(CASE["feat_student"], grad=True)
    leaf = leaf_of(feature)
    task, distillation = _golden_losses(leaf)
    assert list(distillation) == CASE["order"][:4]
    found = agree(task, distillation, feature_BD=feature, leaf_BD=leaf, heads=[], weigh=row_sum_weights, world=World())
    found.loss.backward()
    losses = torch.stack([*distillation.values(), task]).detach()
    torch.testing.assert_close(losses, tensor(CASE["losses"]), **CLOSE)
    torch.testing.assert_close(found.cosines, tensor(CASE["cosine_matrix"]), **CLOSE)
    torch.testing.assert_close(torch.stack(list(found.weights.values())), tensor(CASE["weights_released"])[:4], **CLOSE)
    torch.testing.assert_close(found.loss.detach(), tensor(CASE["total_loss"]), **CLOSE)
    torch.testing.assert_close(feature.grad, tensor(CASE["total_grad_wrt_feat"]), **CLOSE)


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5))
        self.classifier = nn.Linear(5, 3)
        self.projector = nn.Linear(5, 4)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5


def _losses(heads: _Heads, feature: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = heads.classifier(feature)
    target = torch.roll(x[:, :3], 1, 1)
    near = F.normalize(heads.projector(feature), dim=1) - F.normalize(x[:, :4], dim=1)
    return F.cross_entropy(logits, y), {
        "kl": kl_at_temperature(logits, target, 2.0),
        "near": near.square().sum(1).mean(),
        "constant": (x[:, 0] ** 2).mean() + 0 * feature.sum(),
    }


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.randint(0, 3, (8,), generator=generator)


def _by_agree(world: World, scale: float = 1.0) -> tuple[dict[str, Tensor], Agreement, int]:
    heads, (x, y) = _Heads(), _data()
    per_rank = 8 // world.size
    mine = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    model = heads
    if world.size > 1:
        from torch.nn.parallel import DistributedDataParallel

        class Trunk(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.heads = heads

            def forward(self, x: Tensor) -> Tensor:
                return self.heads.trunk(x)

        model = DistributedDataParallel(Trunk())
        feature = model(x[mine])
    else:
        feature = heads.trunk(x[mine])
    leaf = leaf_of(feature)
    task, distillation = _losses(heads, leaf, x[mine], y[mine])
    before = comm.counts["all_reduce_sum"]
    found = agree(
        task,
        distillation,
        feature_BD=feature,
        leaf_BD=leaf,
        heads=[*heads.classifier.parameters(), *heads.projector.parameters()],
        weigh=row_sum_weights,
        world=world,
    )
    (found.loss * scale).backward()
    grads = {name: p.grad.clone() for name, p in heads.named_parameters()}
    detached = Agreement(found.loss.detach(), {k: v.detach() for k, v in found.weights.items()}, found.cosines)
    return grads, detached, comm.counts["all_reduce_sum"] - before


def _by_autograd() -> tuple[dict[str, Tensor], Tensor]:
    """The obvious way: one full backward of each loss to the feature, then the weighted sum as one loss."""
    heads, (x, y) = _Heads(), _data()
    feature = heads.trunk(x)
    task, distillation = _losses(heads, feature, x, y)
    losses = [*distillation.values(), task]
    g = torch.stack([torch.autograd.grad(loss, feature, retain_graph=True)[0].flatten() for loss in losses])
    weights = row_sum_weights(cosine_matrix(g @ g.T))
    (task + sum(w * loss for w, loss in zip(weights, distillation.values(), strict=True))).backward()
    return {name: p.grad for name, p in heads.named_parameters()}, weights


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_equal_those_of_the_weighted_sum_on_any_ranks(ranks, size: int):
    expected, weights = _by_autograd()
    for grads, found, reduces in ranks(size).run(_by_agree):
        torch.testing.assert_close(torch.stack(list(found.weights.values())), weights, atol=1e-11, rtol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(grads[name], gradient, atol=1e-11, rtol=0, msg=name)
        assert reduces == (size > 1)


def test_a_scaled_loss_scales_every_gradient():
    plain, _, _ = _by_agree(World())
    scaled, _, _ = _by_agree(World(), scale=1024.0)
    for name, gradient in plain.items():
        torch.testing.assert_close(scaled[name], gradient * 1024)


def test_a_loss_without_a_gradient_counts_for_itself_alone():
    _, found, _ = _by_agree(World())
    assert found.weights["constant"] == 3
    assert found.cosines[2].tolist() == [0, 0, 1, 0]


def test_gauges_name_every_weight_and_every_pair_once():
    _, found, _ = _by_agree(World())
    names = sorted(found.gauges())
    assert [name for name in names if name.startswith("weight/")] == ["weight/constant", "weight/kl", "weight/near"]
    assert "cosine/kl|task" in names
    assert len([name for name in names if name.startswith("cosine/")]) == 6
