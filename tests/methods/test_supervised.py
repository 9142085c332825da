"""Cross entropy, of the fused head and of each modality's own; and the teacher's soft labels beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distkd.base import World
from tests.golden_numbers import golden, tensor
from tests.methods.common import ROWS, batch_of, gradients, make


def test_several_modalities_have_a_loss_each():
    method, batch = make("supervised", branch_weight=0.5), batch_of([0, 1, 2, 5])
    out = method.step(method.trainable, batch, World())
    answer = method.student(batch)
    assert out.parts.keys() == {"task", "task/gene", "task/cells"}
    assert out.parts["task"].item() == pytest.approx(F.cross_entropy(answer.logits_BC, batch.label_B).item())
    for name, branch in answer.branches.items():
        expected = F.cross_entropy(branch.logits_BC, batch.label_B)
        assert out.parts[f"task/{name}"].item() == pytest.approx(expected.item())
    parts = out.parts
    expected = parts["task"] + 0.5 * (parts["task/gene"] + parts["task/cells"])
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_one_modality_has_one_loss():
    method = make("supervised", model={"modalities": ["gene"]})
    out = method.step(method.trainable, batch_of([0, 1, 2, 5]), World())
    assert out.parts.keys() == {"task"}
    assert out.loss.item() == out.parts["task"].item()


def test_branches_without_weight_do_not_learn_from_their_own_heads():
    method = make("supervised", branch_weight=0.0)
    method.step(method.trainable, batch_of([0, 1, 2, 5]), World()).loss.backward()
    found = gradients(method.trainable)
    assert found["branches.gene.classifier.weight"].abs().max() == 0
    assert found["branches.gene.encoder.layers.0.weight"].abs().max() > 0  # the fused head still reaches the encoder


@pytest.mark.parametrize("name", ["supervised", "logit_kd", "dc_teacher"])
def test_unlabelled_samples_are_not_scored(name: str):
    labels = torch.arange(ROWS) % 3
    labels[[1, 5]] = -1
    method = make(name, labels=labels)
    batch = batch_of([0, 1, 2, 5], unlabelled=(1, 5))
    answer = method.student(batch)
    heads = [answer, *answer.branches.values()] if name == "dc_teacher" else [answer]
    expected = sum(
        F.cross_entropy(head.logits_BC[[0, 2]], batch.label_B[[0, 2]], reduction="sum").item() for head in heads
    )
    out = method.step(method.trainable, batch, World())
    assert out.parts["task"].item() == pytest.approx(expected / (4 * 22 / 24), rel=1e-6)


def test_soft_labels_reach_every_sample_and_labels_only_theirs():
    labels = torch.arange(ROWS) % 3
    labels[[1, 5]] = -1
    method = make("logit_kd", labels=labels, alpha=0.7, temperature=2.0)
    batch = batch_of([0, 1, 2, 5], unlabelled=(1, 5))
    feature = method.student(batch).feature_BD.detach().requires_grad_()
    logits = method.student.classifier(feature)
    task = F.cross_entropy(logits, batch.label_B, ignore_index=-1)
    teacher = method.frozen["teacher"](batch).logits_BC
    kl = 4.0 * F.kl_div((logits / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
    scored, taught = (torch.autograd.grad(loss, feature, retain_graph=True)[0].norm(dim=1) > 0 for loss in (task, kl))
    assert scored.tolist() == [True, False, True, False]
    assert taught.all()
    out = method.step(method.trainable, batch, World())
    assert out.parts["kl_teacher"].item() == pytest.approx(kl.item(), rel=1e-10)
    assert out.loss.item() == pytest.approx((out.parts["task"] + 0.7 * out.parts["kl_teacher"]).item(), rel=1e-12)


def test_soft_labels_without_weight_are_supervised_training():
    batch = batch_of([0, 1, 2, 5])
    plain = make("supervised", model={"modalities": ["cells"]})
    taught = make("logit_kd", alpha=0.0)
    for method in (plain, taught):
        method.step(method.trainable, batch, World()).loss.backward()
    for name, gradient in gradients(plain.trainable).items():
        torch.testing.assert_close(gradients(taught.trainable)[name], gradient, atol=1e-14, rtol=0, msg=name)


# stage 1 of DC-Distill


def test_the_teacher_has_three_heads_and_three_divergences():
    method, batch = make("dc_teacher", kd_weight=0.3, l1={}), batch_of([0, 1, 2, 5])
    method.trainable.train()
    out = method.step(method.trainable, batch, World())
    answer, mean = method.student(batch), method.state["mean_teacher"](batch.view(1))
    pairs = [(answer, mean), *((answer.branches[name], mean.branches[name]) for name in answer.branches)]
    task = sum(F.cross_entropy(own.logits_BC, batch.label_B).item() for own, _ in pairs)
    kl = sum(
        F.kl_div(own.logits_BC.log_softmax(1), other.logits_BC.softmax(1), reduction="batchmean").item()
        for own, other in pairs
    )
    assert len(pairs) == 3
    assert out.parts["task"].item() == pytest.approx(task, rel=1e-10)
    assert out.parts["kl_mean_teacher"].item() == pytest.approx(kl, rel=1e-10)
    assert out.loss.item() == pytest.approx(task + 0.3 * kl, rel=1e-10)


def test_the_teachers_divergence_is_golden():
    """On the card's logits, at temperature 1."""
    from distkd.ops.kd import kl_at_temperature

    case = golden("dc-distill-gk-refine")["distill_kl"]
    found = kl_at_temperature(tensor(case["student_logits"]), tensor(case["teacher_logits"]), 1.0)
    assert found.item() == pytest.approx(case["stage1_prediction_kd_same_inputs"], abs=1e-12)


def test_l1_counts_encoder_and_head_of_its_modality():
    plain, sparse = make("dc_teacher", l1={}), make("dc_teacher", l1={"gene": 0.25})
    batch = batch_of([0, 1, 2, 5])
    outs = [method.step(method.trainable, batch, World()) for method in (plain, sparse)]
    branch = dict(sparse.student.branches["gene"].named_parameters())
    assert {name.split(".")[0] for name in branch} == {"encoder", "classifier"}
    expected = 0.25 * sum(p.abs().sum().item() for p in branch.values())
    assert outs[0].parts["l1"].item() == 0.0
    assert outs[1].parts["l1"].item() == pytest.approx(expected, rel=1e-12)
    assert (outs[1].loss - outs[0].loss).item() == pytest.approx(expected, rel=1e-10)
    for out in outs:
        out.loss.backward()
    before, after = gradients(plain.trainable), gradients(sparse.trainable)
    for name, p in sparse.trainable.named_parameters():
        slope = 0.25 * p.detach().sign() if name.startswith("branches.gene.") else torch.zeros_like(p)
        torch.testing.assert_close(after[name] - before[name], slope, atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize("name", ["dc_teacher", "supervised"])
def test_detached_branches_learn_from_their_own_heads_alone(name: str):
    """`cut_fuse_grad`: the fused loss trains fusion and fused head, and nothing before them."""
    batch = batch_of([0, 1, 2, 5])
    options = {"kd_weight": 0.0, "l1": {}} if name == "dc_teacher" else {}
    cut, joined = (make(name, model={"detach_branches": flag}, **options) for flag in (True, False))
    for method in (cut, joined):
        method.trainable.train()
        method.step(method.trainable, batch, World()).loss.backward()
    own = make(name, **options)
    answer = own.student(batch)
    sum(F.cross_entropy(branch.logits_BC, batch.label_B) for branch in answer.branches.values()).backward()  # type: ignore[union-attr]
    expected = gradients(own.trainable)
    found, other = gradients(cut.trainable), gradients(joined.trainable)
    assert found.keys() == other.keys()
    for key, gradient in found.items():
        if key.startswith("branches."):
            torch.testing.assert_close(gradient, expected[key], atol=1e-12, rtol=0, msg=key)
        else:
            torch.testing.assert_close(gradient, other[key], atol=1e-12, rtol=0, msg=key)
            assert gradient.abs().max() > 0, key
    key = "branches.gene.encoder.layers.0.weight"
    assert not torch.allclose(found[key], other[key])


def test_the_teachers_mean_teacher_starts_as_a_stranger_and_then_copies():
    method = make("dc_teacher")
    out = method.step(method.trainable, batch_of([0, 1, 2, 5]), World())
    assert out.parts["kl_mean_teacher"].item() > 0
    method.after_step(out, World())
    mean = dict(method.state["mean_teacher"].named_parameters())
    for name, p in method.student.named_parameters():
        assert torch.equal(mean[f"model.{name}"], p), name
