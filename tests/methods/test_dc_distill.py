"""DC-Distill + GK-Refine as a whole: its numbers, its two readings, its weights, its unlabelled samples."""

from __future__ import annotations

import logging
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from distkd.base import Batch, Outputs, World
from distkd.comm.agreement import LossRule
from distkd.comm.packed import Gathering
from distkd.errors import ConfigError
from distkd.methods import dc_distill
from distkd.methods.dc_distill import SIDES, DCDistill
from distkd.models.heads import Projector
from distkd.ops.agreement import cosine_matrix, row_sum_weights
from tests.golden_numbers import golden, tensor
from tests.methods.common import ROWS, batch_of, gradients, make

CARD = golden("dc-distill-gk-refine")
CLOSE: dict[str, Any] = {"atol": 1e-8, "rtol": 0.0}
LOSSES = ("kl_teacher", "kl_mean_teacher", "contrast_teacher", "contrast_mean_teacher")
Reading = Literal["paper", "released"]


def student_of(**options: Any) -> DCDistill:
    method = make("dc_distill", **options)
    assert isinstance(method, DCDistill)
    method.trainable.train()
    return method


def losses_on(method: DCDistill, feature: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.no_grad():
        teacher, mean = method.frozen["teacher"](batch), method.mean_teacher(batch.view(1))
    task, distillation, _ = method.losses(feature, teacher, mean, batch, World())
    return task, distillation


# golden numbers


class Fixed(nn.Module):
    """A network that answers what the card says."""

    def __init__(self, feature: Tensor, logits: Tensor):
        super().__init__()
        self.out = Outputs(feature, logits)

    def forward(self, batch: Batch) -> Outputs:
        return self.out


def projector(name: str, width: int) -> Projector:
    inputs = CARD["contrast_inputs"]
    made = Projector(width, inputs["feat_dim"]).double()
    made.linear.load_state_dict({part: tensor(inputs[f"{name}_{part}"]) for part in ("weight", "bias")})
    return made


def test_a_step_is_that_of_the_released_code(monkeypatch: pytest.MonkeyPatch):
    """Losses, cosines, weights, total and the gradient at the feature, through `step` itself."""
    case, inputs = CARD["gradient_agreement"], CARD["contrast_inputs"]
    method = student_of(
        labels=tensor(inputs["labels"]), model={"feature_dim": inputs["s_dim"]}, embedding_dim=inputs["feat_dim"],
        alpha=case["alpha"], beta=case["beta"], temperature=case["kd_T"], contrast_temperature=inputs["nce_t"],
        positives=3, negatives=inputs["nce_k"], keep_positive=3, keep_negative=inputs["nce_k2"],
        select="hard", direction="released",
    )  # fmt: skip
    method.n_positive, method.n_kept = inputs["nce_p"], inputs["nce_p2"]  # the card draws with replacement
    weights = {"weight": tensor(case["classifier_weight"]), "bias": tensor(case["classifier_bias"])}
    method.student.classifier.load_state_dict(weights)
    for side in SIDES:
        method.model.own[side] = projector("embed_s", inputs["s_dim"])
        method.model.other[side] = projector("embed_t", inputs["t_dim"])
        for bank, name in (
            (method.contrast.pair(side).student, "student"),
            (method.contrast.pair(side).teacher, "teacher"),
        ):
            bank.rows_ND = tensor(inputs[f"bank_{name}_init"])
            bank.norm_N = bank.rows_ND.norm(dim=1)
    method.frozen["teacher"] = Fixed(tensor(case["multimodal_feat"]), tensor(case["multimodal_logits"]))
    method.mean_teacher = Fixed(tensor(case["mean_teacher_feat"]), tensor(case["mean_teacher_logits"]))  # type: ignore[assignment]
    monkeypatch.setattr(method.candidates, "forward", lambda *_: tensor(inputs["candidate_rows"]))
    feature = tensor(case["feat_student"], grad=True)
    batch = batch_of(inputs["anchor_rows"])
    assert batch.label_B.tolist() == case["labels"]
    out = method.step(lambda batch: Outputs(feature, feature), batch, World())
    out.loss.backward()
    assert list(out.parts) == ["task", *LOSSES]
    found = torch.stack([*(out.parts[name] for name in LOSSES), out.parts["task"]])
    torch.testing.assert_close(found, tensor(case["losses"]), **CLOSE)
    weight = torch.stack([out.gauges[f"weight/{name}"] for name in LOSSES])
    torch.testing.assert_close(weight, tensor(case["weights_released"])[:4], **CLOSE)
    names = [*LOSSES, "task"]
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            expected = case["cosine_matrix"][i][j]
            assert out.gauges[f"cosine/{first}|{names[j]}"].item() == pytest.approx(expected, abs=1e-8)
    assert out.loss.item() == pytest.approx(case["total_loss"], abs=1e-8)
    torch.testing.assert_close(feature.grad, tensor(case["total_grad_wrt_feat"]), **CLOSE)


# weights


def test_without_weights_it_is_the_plain_sum():
    method, batch = student_of(agreement={"rule": "none"}), batch_of([0, 1, 2, 5])
    out = method.step(method.trainable, batch, World())
    out.loss.backward()
    found = gradients(method.trainable)
    plain = student_of()
    task, distillation = losses_on(plain, plain.student(batch).feature_BD, batch)
    total = task + sum(distillation.values())
    total.backward()
    assert out.loss.item() == pytest.approx(total.item(), abs=1e-12)
    assert list(out.gauges) == ["teacher/task"]
    expected = gradients(plain.trainable)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=0, msg=name)


def test_agreement_with_equal_weights_is_the_plain_sum(monkeypatch: pytest.MonkeyPatch):
    """The road through the leaf and the injected gradient changes nothing by itself."""
    plain, agreed, batch = student_of(agreement={"rule": "none"}), student_of(), batch_of([0, 1, 2, 5])
    agreed.rule = LossRule(lambda cosines: torch.ones(4, dtype=cosines.dtype))
    outs = [method.step(method.trainable, batch, World()) for method in (plain, agreed)]
    for out in outs:
        out.loss.backward()
    assert outs[0].loss.item() == pytest.approx(outs[1].loss.item(), abs=1e-12)
    for name, gradient in gradients(plain.trainable).items():
        torch.testing.assert_close(gradients(agreed.trainable)[name], gradient, atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize(
    "options", [{}, {"clamp_min": 0.0}, {"normalise": True}, {"clamp_min": 0.0, "normalise": True}], ids=str
)
def test_gradients_are_those_of_the_weighted_sum_with_constant_weights(options: dict[str, Any]):
    """The obvious way: a backward of each loss to the feature for the weights, then one of the sum; heads included."""
    method, batch = student_of(agreement={"rule": "gk_refine", **options}), batch_of([0, 1, 2, 5])
    out = method.step(method.trainable, batch, World())
    out.loss.backward()
    slow = student_of()
    feature = slow.student(batch).feature_BD
    task, distillation = losses_on(slow, feature, batch)
    each = [
        torch.autograd.grad(loss, feature, retain_graph=True)[0].flatten() for loss in (*distillation.values(), task)
    ]
    flat = torch.stack(each)
    weights = row_sum_weights(
        cosine_matrix(flat @ flat.T),
        clamp_min=options.get("clamp_min"),
        normalise=options.get("normalise", False),
    )
    for name, weight in zip(LOSSES, weights, strict=True):
        assert out.gauges[f"weight/{name}"].item() == pytest.approx(weight.item(), abs=1e-10)
    (task + sum(w * loss for w, loss in zip(weights, distillation.values(), strict=True))).backward()
    for name, gradient in gradients(slow.trainable).items():
        torch.testing.assert_close(gradients(method.trainable)[name], gradient, atol=1e-11, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({}, {"rule": "gk_refine", "clamp_min": None, "normalise": False}),
        ({"weights": "none"}, {"rule": "none"}),
        ({"weights": "agreement", "normalise": True}, {"rule": "gk_refine", "clamp_min": None, "normalise": True}),
        ({"clamp_min": 0.0}, {"rule": "gk_refine", "clamp_min": 0.0, "normalise": False}),
        ({"agreement": {"clamp_min": 0.5}}, {"rule": "gk_refine", "clamp_min": 0.5, "normalise": False}),
        ({"weights": "none", "agreement": {"rule": "mgda"}}, {"rule": "mgda"}),
    ],
)
def test_the_rule_is_the_published_one_and_older_names_are_read(written: dict[str, Any], expected: dict[str, Any]):
    config = dc_distill.Config.model_validate({"name": "dc_distill", **written})
    assert config.agreement.model_dump() == expected
    assert dc_distill.Config.model_validate(config.model_dump()) == config


def test_a_rule_that_is_unknown_or_an_option_of_another_is_named():
    for wrong, words in (
        ({"rule": "median"}, "gk_refine"),
        ({"rule": "gkm", "clamp_min": 0}, "agreement.gkm.clamp_min"),
    ):
        with pytest.raises(ValidationError, match=words):
            dc_distill.Config.model_validate({"name": "dc_distill", "agreement": wrong})


@pytest.mark.parametrize("rule", ["gk_refine", "gkm", "gate", "pcgrad", "mgda", "cagrad", "none"])
def test_a_step_under_every_rule_is_finite_and_moves_what_the_rule_remembers_afterwards(rule: str):
    method = student_of(agreement={"rule": rule})
    before = {name: value.nan_to_num(-1.0) for name, value in method.state.state_dict().items()}
    out = method.step(method.trainable, batch_of([0, 1, 2, 5]), World())
    for name, value in method.state.state_dict().items():
        assert torch.equal(value.nan_to_num(-1.0), before[name]) or name.endswith("log_z"), name
    out.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(method.trainable).values())
    method.after_step(out, World())
    moved = [name for name, value in method.state.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.startswith("agreement.") for name in moved) == (rule == "gkm")


def test_alpha_and_beta_scale_their_losses():
    plain, scaled = student_of(), student_of(alpha=0.5, beta=0.1)
    batch = batch_of([0, 1, 2, 5])
    parts = [method.step(method.trainable, batch, World()).parts for method in (plain, scaled)]
    for name in LOSSES:
        factor = 0.5 if name.startswith("kl") else 0.1 / 0.02
        assert parts[1][name].item() == pytest.approx(factor * parts[0][name].item(), rel=1e-12), name
    assert parts[0]["task"] == parts[1]["task"]


def test_the_gather_of_rows_is_waited_for_after_the_update(monkeypatch: pytest.MonkeyPatch):
    """So that it runs beside the backward."""
    waited: list[str] = []
    original = Gathering.wait
    monkeypatch.setattr(Gathering, "wait", lambda self: waited.append("wait") or original(self))
    method = student_of()
    out = method.step(method.trainable, batch_of([0, 1, 2, 5]), World())
    out.loss.backward()
    assert waited == []
    method.after_step(out, World())
    assert waited == ["wait"]


# the two readings


@pytest.mark.parametrize("direction", ["paper", "released"])
def test_both_contrasts_use_the_direction_of_the_config(direction: Reading, monkeypatch: pytest.MonkeyPatch):
    method, seen = student_of(direction=direction), list[str]()
    original = dc_distill.choose

    def choose(*arguments: Any, **options: Any) -> Any:
        seen.append(options["direction"])
        return original(*arguments, **options)

    monkeypatch.setattr(dc_distill, "choose", choose)
    method.step(method.trainable, batch_of([0, 1, 2, 5]), World())
    assert seen == [direction, direction]


def test_the_readings_differ_in_the_contrasts_alone():
    batch = batch_of([0, 1, 2, 5, 9, 13])
    paper, released = (
        method.step(method.trainable, batch, World()).parts
        for method in (student_of(direction="paper"), student_of(direction="released"))
    )
    for name, value in paper.items():
        assert (value == released[name]) != name.startswith("contrast"), name


def test_the_frozen_teacher_is_quiet_by_default():
    method = student_of(teacher_dropout=0.5)
    assert not [name for name, module in method.frozen.named_modules() if name and module.training]
    first, again = (method.frozen["teacher"](batch_of([0, 1, 2], step=step)) for step in (0, 0))
    assert torch.equal(first.logits_BC, again.logits_BC)


def test_the_released_code_leaves_the_teachers_dropout_on():
    """And a draw of it is a function of the sample's key, as everything random is."""
    method = student_of(teacher_mode="train", teacher_dropout=0.5)
    teacher = method.frozen["teacher"]
    assert teacher.training
    quiet = student_of(teacher_dropout=0.5).frozen["teacher"]
    batch = batch_of([0, 1, 2])
    with torch.no_grad():
        noisy = teacher(batch).logits_BC
        assert not torch.equal(noisy, quiet(batch).logits_BC)
        assert torch.equal(noisy, teacher(batch).logits_BC)
    method.trainable.eval()  # an evaluation between two steps
    method.trainable.train()
    assert teacher.training


# unlabelled samples


HIDDEN = (1, 5)


def hidden_labels() -> Tensor:
    labels = torch.arange(ROWS) % 3
    labels[list(HIDDEN)] = -1
    return labels


def test_an_unlabelled_sample_is_distilled_but_not_scored():
    method = student_of(labels=hidden_labels())
    batch = batch_of([0, 1, 2, 5], unlabelled=HIDDEN)
    feature = method.student(batch).feature_BD.detach().requires_grad_()
    task, distillation = losses_on(method, feature, batch)
    scored = torch.autograd.grad(task, feature, retain_graph=True)[0].norm(dim=1) > 0
    assert scored.tolist() == [True, False, True, False]
    for name, loss in distillation.items():
        taught = torch.autograd.grad(loss, feature, retain_graph=True)[0].norm(dim=1) > 0
        assert taught.all(), name


def test_the_cross_entropy_is_over_the_labels_to_expect():
    method = student_of(labels=hidden_labels())
    batch = batch_of([0, 1, 2, 5], unlabelled=HIDDEN)
    logits = method.student(batch).logits_BC
    expected = nn.functional.cross_entropy(logits[[0, 2]], batch.label_B[[0, 2]], reduction="sum")
    out = method.step(method.trainable, batch, World())
    assert method.labelled_share == pytest.approx(22 / 24)
    assert out.parts["task"].item() == pytest.approx(expected.item() / (4 * 22 / 24), rel=1e-6)


def test_a_batch_without_a_label_still_teaches():
    method = student_of(labels=hidden_labels())
    out = method.step(method.trainable, batch_of(list(HIDDEN), unlabelled=HIDDEN), World())
    assert out.parts["task"].item() == 0.0
    assert out.loss.item() > 0
    out.loss.backward()
    found = gradients(method.trainable)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert any(gradient.abs().sum() > 0 for name, gradient in found.items() if "encoder" in name)


def test_a_hidden_label_chooses_no_candidates(monkeypatch: pytest.MonkeyPatch):
    """The bank's rows have the labels of training: a label that is hidden must not come in through the candidates."""
    seen: list[Tensor] = []
    method = student_of(labels=hidden_labels())
    original = method.candidates.forward

    def rows(*arguments: Tensor) -> Tensor:
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(method.candidates, "forward", rows)
    # the batch claims to know all labels: the method must not believe it
    method.step(method.trainable, batch_of([0, 1, 2, 5]), World())
    [candidates] = seen
    assert set(candidates[1, : method.n_positive].tolist()) == {1}
    assert not set(candidates[[0, 2]].flatten().tolist()) & set(HIDDEN)


# candidates


def warned(caplog: pytest.LogCaptureFixture, labels: Tensor, **options: Any) -> tuple[DCDistill, list[str]]:
    with caplog.at_level(logging.WARNING, logger="distkd"):
        method = student_of(labels=labels, **options)
    return method, [record.getMessage() for record in caplog.records]


def test_a_small_class_lowers_the_candidates_and_says_so(caplog: pytest.LogCaptureFixture):
    labels = torch.tensor([0] * 11 + [1] * 11 + [2] * 2)
    method, messages = warned(caplog, labels)
    assert (method.n_positive, method.n_kept) == (2, 2)
    assert messages == [
        "the smallest class has 2 labelled training samples: drawing 2 positives instead of 6 and keeping 2 of 3"
    ]
    out = method.step(method.trainable, batch_of([0, 12, 23]), World())
    assert out.loss.isfinite()


def test_classes_that_are_large_enough_say_nothing(caplog: pytest.LogCaptureFixture):
    method, messages = warned(caplog, torch.arange(ROWS) % 3)
    assert (method.n_positive, method.n_kept, messages) == (6, 3, [])


def test_hidden_labels_do_not_count(caplog: pytest.LogCaptureFixture):
    labels = torch.arange(ROWS) % 3
    labels[6:] = -1
    method, messages = warned(caplog, labels)
    assert method.n_positive == 2
    assert "the smallest class has 2 labelled training samples" in messages[0]


def test_more_kept_than_drawn_is_refused():
    with pytest.raises(ConfigError, match=r"method\.keep_negative=9 is more than method\.negatives=8"):
        student_of(keep_negative=9)
    assert student_of(keep_negative=None).config.keep_negative is None


@pytest.mark.parametrize("select", ["hard", "mid", "random", "curriculum"])
def test_every_selection_takes_a_step(select: str):
    method = student_of(select=select)
    assert method.step(method.trainable, batch_of([0, 1, 2, 5]), World()).loss.isfinite()


# views, banks, mean teacher


def test_the_mean_teacher_sees_the_other_view(monkeypatch: pytest.MonkeyPatch):
    method, batch = student_of(), batch_of([0, 1, 2, 5])
    seen: dict[str, Tensor] = {}
    originals = {"teacher": method.frozen["teacher"].forward, "mean_teacher": method.mean_teacher.forward}

    def watch(name: str) -> Any:
        def forward(given: Batch) -> Outputs:
            seen[name] = given.inputs["cells"]
            return originals[name](given)

        return forward

    monkeypatch.setattr(method.frozen["teacher"], "forward", watch("teacher"))
    monkeypatch.setattr(method.mean_teacher, "forward", watch("mean_teacher"))
    method.step(method.trainable, batch, World())
    assert torch.equal(seen["teacher"], batch.views[0]["cells"])
    assert torch.equal(seen["mean_teacher"], batch.views[1]["cells"])


def test_only_the_rows_of_the_step_are_written_and_only_after_it():
    method, batch = student_of(), batch_of([0, 1, 2, 5])
    before = {key: rows.clone() for key, rows in method.state["contrast"].state_dict().items()}
    out = method.step(method.trainable, batch, World())
    banks = {key: rows for key, rows in method.state["contrast"].state_dict().items() if "rows" in key}
    assert len(banks) == 4
    for key, rows in banks.items():
        assert torch.equal(rows, before[key]), key
    method.after_step(out, World())
    for key, rows in method.state["contrast"].state_dict().items():
        if "rows" in key:
            changed = (rows != before[key]).any(dim=1)
            assert changed.nonzero().flatten().tolist() == [0, 1, 2, 5], key


def test_the_first_update_of_the_mean_teacher_copies_the_student():
    method = student_of()
    out = method.step(method.trainable, batch_of([0, 1, 2, 5], step=0), World())
    own = dict(method.student.named_parameters())
    stranger = dict(method.mean_teacher.model.named_parameters())
    assert not torch.equal(stranger["branches.cells.classifier.weight"], own["branches.cells.classifier.weight"])
    method.after_step(out, World())
    for name, p in method.mean_teacher.model.named_parameters():
        assert torch.equal(p, own[name]), name
