"""What the loop may rely on, for every method that there is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distkd import methods
from distkd.base import World
from distkd.errors import ConfigError
from distkd.methods import MethodConfig
from tests.methods.common import N_CLASSES, batch_of, gradients, make

every_method = pytest.mark.parametrize("name", methods.available())


def test_the_folder_is_the_registry():
    assert {"dc_distill", "dc_teacher", "logit_kd", "supervised"} <= set(methods.available())
    assert not [name for name in methods.available() if name.startswith("_")]


@pytest.mark.parametrize("name, hint", [("dc_distil", "; did you mean 'dc_distill'?"), ("xyzzy", "")])
def test_an_unknown_method_names_those_there_are(name: str, hint: str):
    with pytest.raises(ConfigError) as caught:
        methods.config_class(name)
    assert str(caught.value) == f"unknown method {name!r}; available: {', '.join(methods.available())}{hint}"


@pytest.mark.parametrize("name", ["_plain", "__init__", "os"])
def test_only_methods_are_methods(name: str):
    with pytest.raises(ConfigError, match="unknown method"):
        methods.config_class(name)


@every_method
def test_a_config_knows_its_name_and_explains_its_fields(name: str):
    kind = methods.config_class(name)
    assert issubclass(kind, MethodConfig)
    assert kind().name == name  # pyright: ignore[reportCallIssue]
    assert [field for field, info in kind.model_fields.items() if field != "name" and not info.description] == []


@every_method
def test_what_learns_and_what_does_not_is_told_apart(name: str):
    method = make(name)
    grouped = [p for group in method.groups() for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {id(p) for p in method.trainable.parameters() if p.requires_grad}
    assert {id(p) for p in method.student.parameters()} <= {id(p) for p in method.trainable.parameters()}
    for part in (method.frozen, method.state):
        assert [n for n, p in part.named_parameters() if p.requires_grad] == []
        assert not {id(p) for p in part.parameters()} & {id(p) for p in grouped}
    assert ("teacher" in method.frozen) == methods.config_class(name).needs_teacher
    for part in (method.trainable, method.frozen, method.state):
        assert {t.dtype for t in part.state_dict().values() if t.is_floating_point()} <= {torch.float64}


@every_method
def test_a_step_is_one_scalar_and_its_named_parts(name: str):
    method = make(name)
    method.trainable.train()
    before = {key: tensor.clone() for key, tensor in method.frozen.state_dict().items()}
    out = method.step(method.trainable, batch_of([0, 1, 2, 5], step=4), World())
    assert out.loss.shape == ()
    assert out.loss.requires_grad
    assert "task" in out.parts
    assert out.step == 4
    for value in (*out.parts.values(), *out.gauges.values()):
        assert not value.requires_grad
    for arriving in out.rows:
        assert not any(rows.requires_grad for rows in arriving.wait().values())
    out.loss.backward()
    found = gradients(method.trainable)
    assert found.keys() == {key for key, p in method.trainable.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert gradients(method.frozen) == gradients(method.state) == {}
    for key, tensor in method.frozen.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@every_method
def test_the_same_seed_is_the_same_method(name: str):
    losses: list[float] = []
    for seed in (3, 3, 4):
        method = make(name, seed=seed)
        method.trainable.train()
        out = method.step(method.trainable, batch_of([0, 1, 2, 5]), World())
        losses.append(out.loss.item())
    assert losses[0] == losses[1] != losses[2]


@every_method
def test_the_global_generator_is_left_alone(name: str):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    method = make(name, model={"dropout": 0.3})
    method.trainable.train()
    out = method.step(method.trainable, batch_of([0, 1]), World())
    method.after_step(out, World())
    assert torch.equal(torch.rand(3), expected)


@every_method
def test_predictions_are_the_students_logits(name: str):
    method = make(name)
    method.trainable.eval()
    batch = batch_of([0, 1, 2, 5])
    logits = method.predict(batch)
    assert logits.shape == (4, N_CLASSES)
    assert torch.equal(logits, method.student(batch).logits_BC)
    method.after_eval({"accuracy": 1.0}, World())


@every_method
def test_what_follows_a_step_changes_the_state_alone(name: str):
    method = make(name)
    method.trainable.train()
    out = method.step(method.trainable, batch_of([0, 1, 2, 5]), World())
    before = {key: tensor.clone() for key, tensor in method.trainable.state_dict().items()}
    method.after_step(out, World())
    for key, tensor in method.trainable.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@every_method
def test_the_state_is_all_that_the_next_step_depends_on(name: str):
    """Weights and state of one method put into a newly built one: the same next step, bit for bit."""
    one, other = make(name), make(name)
    for step in range(2):
        out = one.step(one.trainable, batch_of([0, 1, 2, 5], step=step), World())
        one.after_step(out, World())
    other.trainable.load_state_dict(one.trainable.state_dict())
    other.state.load_state_dict(one.state.state_dict())
    batch = batch_of([3, 1, 4, 5], step=2)
    outs = [method.step(method.trainable, batch, World()) for method in (one, other)]
    assert outs[0].loss.item() == outs[1].loss.item()
    for method, out in zip((one, other), outs, strict=True):
        out.loss.backward()
        method.after_step(out, World())
    for key, tensor in one.state.state_dict().items():
        assert torch.equal(tensor, other.state.state_dict()[key]), key
    for key, gradient in gradients(one.trainable).items():
        assert torch.equal(gradient, gradients(other.trainable)[key]), key


@every_method
def test_the_student_is_exported_without_what_only_training_needs(name: str):
    """Weights of the exported student are those of a plain classifier."""
    method = make(name)
    assert isinstance(method.student, nn.Module)
    assert not [key for key in method.student.state_dict() if "own" in key or "other" in key or "teacher" in key]
