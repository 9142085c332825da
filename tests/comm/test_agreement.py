"""Rules at work: the cards' steps end to end, the same gradients on any ranks, what travels, what is remembered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distkd.base import World
from distkd.comm import agreement as module
from distkd.comm import world as comm
from distkd.comm.agreement import Agreement, Rule, agree, leaf_of
from distkd.methods._agreement import AgreementConfig, make_rule
from distkd.ops.agreement import (
    agreement_counts,
    conflict_averse_weights,
    cosine_matrix,
    minimum_norm_weights,
    projected_weights,
    row_sum_weights,
)
from distkd.ops.kd import kl_at_temperature
from tests.golden_numbers import golden, tensor

GK_REFINE = golden("dc-distill-gk-refine")["gradient_agreement"]
GKM = golden("m3lr-dscd-gkm")["gradient_modulation"]
CONTRAST = golden("m3lr-dscd-gkm")["dscd_inputs"]
CLOSE: dict[str, Any] = {"atol": 1e-8, "rtol": 0.0}
ON_LOSSES = ("gk_refine", "gkm")
ON_TRUNK = ("gate", "pcgrad", "mgda", "cagrad")
every_rule = pytest.mark.parametrize("name", [*ON_LOSSES, *ON_TRUNK])
NAMES = ["kl", "near", "constant", "detached"]


def _rule(name: str, names: list[str] | None = None, **options: Any) -> Rule:
    rule = make_rule(TypeAdapter(AgreementConfig).validate_python({"rule": name, **options}), names or NAMES)
    assert rule is not None
    return rule


# golden steps


def _agree(rule: Rule, task: Tensor, distillation: dict[str, Tensor], feature: Tensor, leaf: Tensor) -> Agreement:
    return agree(task, distillation, feature_BD=feature, leaf_BD=leaf, heads=[], weigh=rule, world=World())


def test_a_step_of_gk_refine_is_golden():
    feature = tensor(GK_REFINE["feat_student"], grad=True)
    leaf = leaf_of(feature)
    losses = dict(zip(GK_REFINE["order"], tensor(GK_REFINE["losses"]), strict=True))
    slopes = tensor(GK_REFINE["gradients_wrt_feat"])
    around = (leaf - leaf.detach()).flatten()
    *distillation, task = (value + around @ slope for value, slope in zip(losses.values(), slopes, strict=True))
    names = GK_REFINE["order"][:4]
    found = _agree(_rule("gk_refine"), task, dict(zip(names, distillation, strict=True)), feature, leaf)
    found.loss.backward()
    torch.testing.assert_close(found.decision.cosines, tensor(GK_REFINE["cosine_matrix"]), **CLOSE)
    weights = torch.stack([found.gauges()[f"weight/{name}"] for name in names])
    torch.testing.assert_close(weights, tensor(GK_REFINE["weights_released"])[:4], **CLOSE)
    torch.testing.assert_close(found.loss.detach(), tensor(GK_REFINE["total_loss"]), **CLOSE)
    torch.testing.assert_close(feature.grad, tensor(GK_REFINE["total_grad_wrt_feat"]), **CLOSE)


class _Contrast:
    """The card's DSCD, as slow and as plain as its formulas: hard positives, every negative, Z of the first call."""

    def __init__(self) -> None:
        self.banks = [tensor(CONTRAST["bank_student_init"]), tensor(CONTRAST["bank_teacher_init"])]
        self.z: list[Tensor] = []

    def __call__(self, feature: Tensor, teacher_feature: Tensor) -> Tensor:
        v_s, v_t = (
            F.normalize(F.linear(x, tensor(CONTRAST[f"embed_{q}_weight"]), tensor(CONTRAST[f"embed_{q}_bias"])))
            for q, x in (("s", feature), ("t", teacher_feature))
        )
        rows = tensor(CONTRAST["candidate_rows"])
        own, other = (F.normalize(bank, dim=1)[rows] for bank in self.banks)
        further = torch.einsum("bd,bjd->bj", v_t, other) - torch.einsum("bd,bjd->bj", v_s, own)
        p, kept, n = CONTRAST["nce_p"], CONTRAST["nce_p2"], CONTRAST["n_data"]
        positive = further[:, :p].argsort(dim=1, descending=True)[:, :kept]
        positive[:, 0] = 0
        columns = torch.cat([positive, torch.arange(p, rows.shape[1]).expand(len(rows), -1)], dim=1)
        noise, eps, loss = (columns.shape[1] - kept) / n, CONTRAST["eps"], feature.new_zeros(())
        for side, (query, bank) in enumerate(zip((v_s, v_t), reversed(self.banks), strict=True)):
            o = torch.einsum("bd,bjd->bj", query, bank[rows]).div(CONTRAST["nce_t"]).exp().gather(1, columns)
            if len(self.z) == side:
                self.z.append(o.detach().mean() * n)
            o = o / self.z[side]
            loss = loss - (o[:, :kept] / (o[:, :kept] + noise + eps)).log().mean(dim=1).mean()
            loss = loss - (noise / (o[:, kept:] + noise + eps)).log().sum(dim=1).mean()
        index, m = tensor(CONTRAST["anchor_rows"]), CONTRAST["nce_m"]
        for bank, v in zip(self.banks, (v_s, v_t), strict=True):
            bank[index] = F.normalize(m * bank[index] + (1 - m) * v.detach(), dim=1)
        return loss


def test_three_steps_of_gkm_are_golden():
    rule = _rule("gkm", GKM["order"][:4], threshold=GKM["thresh"], momentum=GKM["grads_m"])
    contrasts = {"multimodal": _Contrast(), "mean_teacher": _Contrast()}
    for step in GKM["steps"]:
        feature = tensor(step["feat_student"], grad=True)
        leaf = leaf_of(feature)
        logits = F.linear(leaf, tensor(GKM["classifier_weight"]), tensor(GKM["classifier_bias"]))
        others = {"multimodal": tensor(step["multimodal_feat"]), "mean_teacher": tensor(GKM["mean_teacher_feat"])}
        distillation = {
            f"kl_{side}": GKM["alpha"] * kl_at_temperature(logits, tensor(GKM[f"{side}_logits"]), GKM["kd_T"])
            for side in others
        }
        for side, other in others.items():
            distillation[f"contrast_{side}"] = GKM["beta"] * contrasts[side](leaf, other)
        assert list(distillation) == GKM["order"][:4]
        task = F.cross_entropy(logits, tensor(GKM["labels"]))
        found = _agree(rule, task, distillation, feature, leaf)
        found.loss.backward()
        losses = torch.stack([*distillation.values(), task]).detach()
        torch.testing.assert_close(losses, tensor(step["losses"]), **CLOSE)
        torch.testing.assert_close(found.decision.cosines, tensor(step["cosine_matrix"]), **CLOSE)
        gauges = found.gauges()
        weights = torch.stack([gauges[f"weight/{name}"] for name in distillation])
        torch.testing.assert_close(weights, tensor(step["weights"])[:4], **CLOSE)
        torch.testing.assert_close(found.loss.detach(), tensor(step["total_loss"]), **CLOSE)
        torch.testing.assert_close(feature.grad, tensor(step["total_grad_wrt_feat"]), **CLOSE)
        rule.after_step(gauges)


def _projected(world: World, before_the_mean: bool) -> Tensor:
    """The task-priority projection of gradients at one shared weight, before or after they are averaged over ranks."""
    case = golden("beyond")["projection_does_not_commute"]
    pair = torch.stack([tensor(case["rank_kd"])[world.rank], tensor(case["rank_task"])[world.rank]])
    if not before_the_mean:
        pair = comm.all_reduce_sum(pair, world) / world.size
    combined = projected_weights(pair @ pair.T) @ pair
    return comm.all_reduce_sum(combined, world) / world.size


@pytest.mark.parametrize("before_the_mean, key", [(True, "mean_of_projected"), (False, "projected_mean")])
def test_projection_and_mean_over_ranks_do_not_commute(ranks, before_the_mean: bool, key: str):
    for found in ranks(2).run(_projected, before_the_mean=before_the_mean):
        torch.testing.assert_close(found, tensor(golden("beyond")["projection_does_not_commute"][key]), **CLOSE)


# the same gradients, whatever the ranks


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5))
        self.classifier = nn.Linear(5, 3)
        self.projector = nn.Linear(5, 4)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x)

    def heads(self) -> list[nn.Parameter]:
        return [*self.classifier.parameters(), *self.projector.parameters()]


def _losses(heads: _Heads, feature: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = heads.classifier(feature)
    target = torch.roll(x[:, :3], 1, 1)
    near = F.normalize(heads.projector(feature), dim=1) - F.normalize(x[:, :4], dim=1)
    return F.cross_entropy(logits, y, ignore_index=-1, reduction="sum") / len(y), {
        "kl": kl_at_temperature(logits, target, 2.0),
        "near": near.square().sum(1).mean(),
        "constant": (x[:, 0] ** 2).mean() + 0 * feature.sum(),
        "detached": (x[:, 1] ** 2).mean(),
    }


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.randint(0, 3, (8,), generator=generator)
    y[5] = -1  # no label, no task gradient
    return x, y


def _by_agree(
    world: World, name: str, scale: float = 1.0, steps: int = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int], int]:
    """Gradients, gauges, numbers in each all-reduce, and all counted collectives of the last step."""
    heads, (x, y) = _Heads(), _data()
    per_rank = 8 // world.size
    mine = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    model = DistributedDataParallel(heads) if world.size > 1 else heads
    rule = _rule(name)
    sizes: list[int] = []
    original = module.all_reduce_sum

    def watched(tensor: Tensor, world: World) -> Tensor:
        sizes.append(tensor.numel())
        return original(tensor, world)

    module.all_reduce_sum = watched
    try:
        for _ in range(steps):
            sizes.clear()
            heads.zero_grad()
            feature = model(x[mine])
            leaf = leaf_of(feature)
            task, distillation = _losses(heads, leaf, x[mine], y[mine])
            before = sum(comm.counts.values())
            found = agree(
                task, distillation, feature_BD=feature, leaf_BD=leaf, heads=heads.heads(), weigh=rule, world=world
            )
            (found.loss * scale).backward()
            collectives = sum(comm.counts.values()) - before
            gauges = {key: value.clone() for key, value in found.gauges().items()}
            rule.after_step(gauges)
    finally:
        module.all_reduce_sum = original
    grads = {key: p.grad.clone() for key, p in heads.named_parameters() if p.grad is not None}
    return grads, gauges, sizes, collectives


def _entering(name: str, gradients: Tensor) -> Tensor:
    """What enters the trunk, (8, 5), as the rules' names say, from gradients (M, 8, 5) with the task last."""
    flat = gradients.flatten(1)
    gram = flat @ flat.T
    if name == "gate":
        task = gradients[-1]
        total = task.clone()
        for gradient in gradients[:-1]:
            for b in range(8):
                enters = not task[b].any() or F.cosine_similarity(gradient[b], task[b], dim=0) > 0
                total[b] += gradient[b] * enters
        return total
    combine = {"pcgrad": projected_weights, "mgda": minimum_norm_weights, "cagrad": conflict_averse_weights}[name]
    return (combine(gram) @ flat).view(8, 5)


def _by_autograd(name: str) -> dict[str, Tensor]:
    """The obvious way: each loss to the feature, then what the rule says as plain losses."""
    heads, (x, y) = _Heads(), _data()
    feature = heads.trunk(x)
    task, distillation = _losses(heads, feature, x, y)
    losses = [loss + 0 * feature.sum() for loss in (*distillation.values(), task)]
    gradients = torch.stack([torch.autograd.grad(loss, feature, retain_graph=True)[0] for loss in losses])
    if name in ON_LOSSES:
        cosines = cosine_matrix(gradients.flatten(1) @ gradients.flatten(1).T)
        weights = {"gk_refine": row_sum_weights, "gkm": agreement_counts}[name](cosines)
        torch.stack([w * loss for w, loss in zip([*weights, 1.0], losses, strict=True)]).sum().backward()
        return {key: p.grad for key, p in heads.named_parameters() if p.grad is not None}
    feature.backward(_entering(name, gradients), inputs=list(heads.trunk.parameters()), retain_graph=True)
    sum(losses).backward(inputs=heads.heads())
    return {key: p.grad for key, p in heads.named_parameters() if p.grad is not None}


@every_rule
@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_are_those_of_the_obvious_form_on_any_ranks(ranks, size: int, name: str):
    expected = _by_autograd(name)
    _, whole, _, _ = _by_agree(World(), name)
    for grads, gauges, _, _ in ranks(size).run(_by_agree, name=name):
        assert grads.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(grads[key], gradient, atol=1e-11, rtol=0, msg=key)
        if name != "gate":  # its gauges are those of a rank's own samples, averaged when metrics are
            for key, value in whole.items():
                torch.testing.assert_close(gauges[key], value, atol=1e-11, rtol=0, msg=key)


@every_rule
def test_one_gram_matrix_travels_and_nothing_for_the_gate(ranks, name: str):
    for _, _, sizes, collectives in ranks(2).run(_by_agree, name=name, steps=2):
        n = len(NAMES)
        assert sizes == ([] if name == "gate" else [(n + 1) * (n + 2) // 2])
        assert collectives == len(sizes)


def test_gauges_of_the_gate_average_to_those_of_the_whole_batch(ranks):
    _, whole, _, _ = _by_agree(World(), "gate")
    parts = [gauges for _, gauges, _, _ in ranks(2).run(_by_agree, name="gate")]
    for key, value in whole.items():
        torch.testing.assert_close(torch.stack([part[key] for part in parts]).mean(), value, atol=1e-11, rtol=0)
    assert 0 < whole["gated/kl"] < 1


# precision, missing gradients


@every_rule
def test_a_scaled_loss_scales_every_gradient(name: str):
    plain, *_ = _by_agree(World(), name)
    scaled, *_ = _by_agree(World(), name, scale=1024.0)
    for key, gradient in plain.items():
        torch.testing.assert_close(scaled[key], gradient * 1024, atol=1e-11, rtol=1e-12)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_compared_in_float32(name: str, dtype: torch.dtype):
    """In float16 these gradients would be zero: they are of size 1e-9 before the loss is scaled."""
    generator = torch.Generator().manual_seed(2)
    slopes = torch.randn(2, 4, 5, generator=generator) * 1e-9
    scale = 2.0**24

    def step(feature: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        leaf = leaf_of(feature)
        with torch.autocast("cpu", torch.bfloat16):
            found = _agree(
                _rule(name, ["kd"]), (leaf * slopes[1]).sum(), {"kd": (leaf * slopes[0]).sum()}, feature, leaf
            )
        (found.loss * scale).backward()
        assert feature.grad is not None
        return feature.grad, found.gauges()

    grad, gauges = step(torch.ones(4, 5, dtype=dtype, requires_grad=True), scale)
    expected, reference = step(torch.ones(4, 5, dtype=torch.float64, requires_grad=True), scale)
    assert grad.dtype == dtype
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(grad.double(), expected, atol=2e-4, rtol=1e-2)
    for key, value in reference.items():
        assert gauges[key].dtype == torch.float32
        torch.testing.assert_close(gauges[key].double(), value, atol=1e-5, rtol=1e-5)


@every_rule
def test_without_any_distillation_gradient_the_task_goes_on_alone(name: str):
    x, y = _data()
    found: list[Tensor] = []
    for alone in (True, False):
        heads = _Heads()
        feature = heads.trunk(x)
        leaf = leaf_of(feature)
        task, distillation = _losses(heads, leaf, x, y)
        if alone:
            task.backward()
            feature.backward(leaf.grad)
        else:
            still = {key: distillation[key] for key in ("constant", "detached")}
            rule = _rule(name, list(still))
            total = agree(task, still, feature_BD=feature, leaf_BD=leaf, heads=heads.heads(), weigh=rule, world=World())
            total.loss.backward()
            assert all(value.isfinite() for value in total.gauges().values())
        found.append(torch.cat([p.grad.flatten() for p in heads.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)


@every_rule
def test_one_distillation_loss_is_enough(name: str):
    feature = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    leaf = leaf_of(feature)
    rule = _rule(name, ["kd"])
    found = _agree(rule, leaf[0, 0], {"kd": leaf[0, 1] - leaf[0, 0]}, feature, leaf)
    found.loss.backward()
    # g_task = (1, 0), g_kd = (-1, 1): cosine -1/sqrt(2)
    mean = torch.tensor([[0.0, 0.5]])
    expected = {
        "gk_refine": torch.tensor([[0.5**0.5, 1 - 0.5**0.5]]),
        "gkm": torch.tensor([[0.0, 1.0]]),
        "gate": torch.tensor([[1.0, 0.0]]),
        "pcgrad": torch.tensor([[1.0, 1.0]]),
        "mgda": torch.tensor([[0.2, 0.4]]),
    }
    if name == "cagrad":
        assert feature.grad is not None
        torch.testing.assert_close((feature.grad - mean).norm().item(), 0.25)
    else:
        torch.testing.assert_close(feature.grad, expected[name].double())


# what is remembered


def _gauges(*weights: float) -> dict[str, Tensor]:
    return {f"weight/{name}": torch.tensor(weight) for name, weight in zip("ab", weights, strict=True)}


def _two_passes(rule: Rule, steps: int, applied: Mapping[int, bool]) -> list[Tensor]:
    """Weights of steps of two passes each; a step that is left out has no `after_step`."""
    generator = torch.Generator().manual_seed(3)
    found: list[Tensor] = []
    for step in range(steps):
        passes: list[dict[str, Tensor]] = []
        for _ in range(2):
            feature = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
            leaf = leaf_of(feature)
            slopes = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
            a, b, task = ((leaf * slope).sum() for slope in slopes)
            passes.append(_agree(rule, task, {"a": a, "b": b}, feature, leaf).gauges())
        merged = {key: torch.stack([gauges[key] for gauges in passes]).mean() for key in passes[0]}
        found.append(torch.stack([merged["weight/a"], merged["weight/b"]]))
        if applied.get(step, True):
            rule.after_step(merged)
    return found


@pytest.mark.parametrize("options", [{}, {"weigh": "cosines"}, {"momentum": 0.9, "count_self": False}])
def test_the_running_weights_move_once_per_step_by_the_mean_of_its_passes(options: dict[str, Any]):
    momentum = options.get("momentum", 0.5)
    fresh = _two_passes(_rule("gkm", ["a", "b"], **(options | {"momentum": 0.0})), 4, {})
    expected = fresh[0]
    found = _two_passes(_rule("gkm", ["a", "b"], **options), 4, {})
    for step in range(4):
        if step:
            expected = momentum * expected + (1 - momentum) * fresh[step]
        torch.testing.assert_close(found[step], expected)
    assert not torch.equal(fresh[1], fresh[2])


def test_a_step_that_is_left_out_is_not_remembered():
    rule = _rule("gkm", ["a", "b"])
    _two_passes(rule, 1, {0: False})
    assert rule.state_dict()["running_L"].isnan().all()
    rule.after_step(_gauges(2.0, 3.0))
    _two_passes(rule, 2, {0: False, 1: False})
    assert rule.state_dict()["running_L"].tolist() == [2, 3]


def test_running_weights_come_back_from_a_checkpoint_bit_for_bit():
    rule, other = (_rule("gkm", ["a", "b"]) for _ in range(2))
    _two_passes(rule, 3, {})
    other.load_state_dict(rule.state_dict())
    for left, right in zip(_two_passes(rule, 2, {}), _two_passes(other, 2, {}), strict=True):
        assert torch.equal(left, right)


# names, and the host


@every_rule
def test_gauges_name_every_loss_and_every_pair_once(name: str):
    _, gauges, _, _ = _by_agree(World(), name)
    kinds = {"gate": ["cosine_with_task", "gated"]}.get(name, ["weight"] if name in ON_LOSSES else ["trunk_weight"])
    losses = [*NAMES, "task"] if kinds == ["trunk_weight"] else NAMES
    pairs = [] if name == "gate" else [key for key in gauges if key.startswith("cosine/")]
    assert sorted(gauges) == sorted([f"{kind}/{loss}" for kind in kinds for loss in losses] + pairs)
    assert len(pairs) == (0 if name == "gate" else 10)
    assert name == "gate" or "cosine/kl|task" in pairs
    assert all(value.shape == () and not value.requires_grad for value in gauges.values())


@every_rule
def test_the_host_does_not_wait(name: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the host asks the device")

    rule, feature = _rule(name, ["kd"]), torch.ones(2, 3, requires_grad=True)
    leaf = leaf_of(feature)
    task, kd = leaf.square().sum(), leaf.sum()
    with monkeypatch.context() as patch:
        for asked in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
            patch.setattr(Tensor, asked, refuse)
        found = _agree(rule, task, {"kd": kd}, feature, leaf)
        found.loss.backward()
        rule.after_step(found.gauges())
    assert feature.grad is not None


@every_rule
def test_the_reported_loss_is_the_sum_that_the_heads_learn_from(name: str):
    feature = torch.ones(2, 3, requires_grad=True)
    leaf = leaf_of(feature)
    found = _agree(_rule(name, ["a", "b"]), leaf.square().sum(), {"a": leaf.sum(), "b": -leaf.sum() / 2}, feature, leaf)
    gauges = found.gauges()
    weights = [gauges[f"weight/{loss}"].item() if name in ON_LOSSES else 1.0 for loss in "ab"]
    torch.testing.assert_close(found.loss.item(), 6.0 + 6.0 * weights[0] - 3.0 * weights[1])
    assert name not in ON_LOSSES or weights[0] != weights[1]


def test_a_function_of_the_cosines_stands_for_its_rule():
    feature = torch.ones(2, 3, requires_grad=True)
    leaf = leaf_of(feature)
    found = agree(
        leaf.square().sum(),
        {"kd": leaf.sum()},
        feature_BD=feature,
        leaf_BD=leaf,
        heads=[],
        weigh=lambda cosines: cosines[:1, 1] + 6,
        world=World(),
    )
    torch.testing.assert_close(found.gauges()["weight/kd"], torch.tensor(7.0))
