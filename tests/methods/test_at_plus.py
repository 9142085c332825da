"""AT+ as a method: the card's step, every reading of it against a slow one, what it keeps, what it refuses."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from distkd import methods
from distkd.base import UNLABELLED, Batch, InputSpec, Outputs, World
from distkd.errors import ConfigError
from distkd.methods import Setup
from distkd.methods.at_plus import ATPlus, Config
from distkd.models.build import Classifier, ModelConfig, build
from distkd.models.trunk import ImageEncoder, Stage, Trunk
from distkd.train.job import assemble
from tests.golden_numbers import golden, tensor
from tests.laws.common import equal_up_to, law_config, run_steps, settings_of
from tests.methods.common import batch_of, gradients, make

CARD = golden("inter-resolution-at-plus")
INPUTS, LOSS, GRAD, NATIVE = (CARD[name] for name in ("inputs", "loss", "grad", "native_resolution_extension"))
WEIGHTS = CARD["config"]["weights"]
ALL_WEIGHTS = {"alpha_at": WEIGHTS["la"], **{f"alpha_{name}": WEIGHTS[name] for name in ("fm", "kd", "sr")}}
EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 0.0}
GROUP: dict[str, Any] = {"modalities": ["coarse"], "norm": "group", "feature_dim": 6, "dropout": 0.0}


def pooled(*widths: int) -> dict[str, Any]:
    return {"name": "cnn", "widths": widths, "head": "pooled"}


def model_of(*modalities: str, n_classes: int = 3, channels: int = 2, **settings: Any) -> Classifier:
    """A teacher of a vector and of images of 12 x 12 pixels."""
    image = InputSpec("image", (channels, 12, 12))
    specs = {"fine": image, "other": image, "gene": InputSpec("vector", (5,))}
    config = ModelConfig.model_validate({**GROUP, "modalities": list(modalities), **settings})
    return build(config, specs, n_classes, seed=9).double().eval().requires_grad_(False)


def small(n_classes: int = 3, channels: int = 2, **settings: Any) -> Classifier:
    """A teacher of one image."""
    encoders = settings.pop("encoders", {"fine": pooled(4, 6)})
    return model_of("fine", n_classes=n_classes, channels=channels, encoders=encoders, **settings)


def at_plus(teacher: Classifier, *, side: int = 12, model: dict[str, Any] | None = None, **config: Any) -> ATPlus:
    """A student of `side` x `side` pixels beside a teacher."""
    channels, n_classes = teacher.specs["fine"].shape[0], teacher.n_classes
    setup = Setup(
        model=ModelConfig.model_validate({**GROUP, "encoders": {"coarse": pooled(4, 6)}, **(model or {})}),
        specs={"coarse": InputSpec("image", (channels, side, side)), "gene": InputSpec("vector", (5,))},
        n_classes=n_classes,
        train_label_N=torch.arange(12) % n_classes,
        seed=3,
        world=World(),
        teacher=teacher,
        dtype=torch.float64,
    )
    method = methods.build(Config.model_validate(config), setup)
    assert isinstance(method, ATPlus)
    method.trainable.train()
    return method


def images(label_B: Tensor, **views: Tensor) -> Batch:
    number = torch.arange(len(label_B))
    present = {name: torch.ones(len(label_B), dtype=torch.bool) for name in views}
    return Batch((views,), present, label_B, index_B=number, sample_B=number, key_B=number)


def pair(side: int = 12, *, unlabelled: tuple[int, ...] = ()) -> Batch:
    """Four images in two resolutions."""
    generator = torch.Generator().manual_seed(side)
    fine, coarse = (torch.randn(4, 2, n, n, generator=generator, dtype=torch.float64) for n in (12, side))
    label = torch.tensor([UNLABELLED if number in unlabelled else number % 3 for number in range(4)])
    return images(label, fine=fine, coarse=coarse)


# the card's step: networks whose map is the image that they are given


class Given(Trunk):
    width = 3

    def stages(self) -> list[Stage]:
        return [torch.clone]


def given(model: Classifier, side: str) -> None:
    branch = model.mapped
    assert branch is not None
    assert isinstance(branch.encoder, ImageEncoder)
    branch.encoder.trunk = Given()
    branch.classifier.weight.data = tensor(INPUTS[f"W_{side}"])
    branch.classifier.bias.data = tensor(INPUTS[f"b_{side}"])


def of_the_card(**config: Any) -> ATPlus:
    method = at_plus(small(4, 3, encoders={"fine": pooled(3)}), model={"encoders": {"coarse": pooled(3)}}, **config)
    given(method.student, "student")
    given(method.teacher, "teacher")
    return method


def card_batch(label: list[int] | None = None, of: dict[str, Any] = INPUTS) -> Batch:
    labels = torch.tensor(CARD["config"]["labels"] if label is None else label)
    return images(labels, coarse=tensor(of["A_student"], grad=True), fine=tensor(of["A_teacher"]))


@pytest.mark.parametrize(
    "config, total", [({}, "total_readme_weights_fm0p1_la10"), (ALL_WEIGHTS, "total_with_all_weights")]
)
def test_a_step_is_golden(config: dict[str, float], total: str):
    method, batch = of_the_card(**config), card_batch()
    out = method.step(method.trainable, batch, World())
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), tensor(LOSS[total]), **EXACT)
    names = {
        "task": "cross_entropy",
        "attention": "attention",
        "features": "feature_matching",
        "kd_teacher": "kd",
        "regression": "softmax_regression",
    }
    assert out.parts.keys() == (names.keys() if config else {"task", "attention", "features"})
    for name, part in out.parts.items():
        torch.testing.assert_close(part, tensor(LOSS[names[name]]), **EXACT, msg=name)
    if config:
        head = method.student.classifier
        torch.testing.assert_close(batch.inputs["coarse"].grad, tensor(GRAD["total_wrt_A_student"]), **EXACT)
        torch.testing.assert_close(head.weight.grad, tensor(GRAD["total_wrt_W_student"]), **EXACT)
        torch.testing.assert_close(head.bias.grad, tensor(GRAD["total_wrt_b_student"]), **EXACT)
    assert gradients(method.frozen) == {}


def test_the_bias_learns_nothing_from_attention():
    (alone, both), batch = (of_the_card(alpha_at=alpha, alpha_fm=0, alpha_kd=1) for alpha in (0.0, 10.0)), card_batch()
    for method in (alone, both):
        method.step(method.trainable, batch, World()).loss.backward()
    torch.testing.assert_close(both.student.classifier.bias.grad, alone.student.classifier.bias.grad, **EXACT)
    assert (both.student.classifier.weight.grad - alone.student.classifier.weight.grad).abs().max() > 0.1  # type: ignore[operator]


def test_a_small_student_is_golden():
    method, batch = of_the_card(), card_batch(of=NATIVE)
    parts = method.step(method.trainable, batch, World()).parts
    torch.testing.assert_close(parts["attention"], tensor(NATIVE["attention"]), **EXACT)
    torch.testing.assert_close(parts["features"], tensor(NATIVE["feature_matching"]), **EXACT)


def test_the_target_class_is_the_label_and_else_the_teachers_prediction():
    contrast = CARD["contrast_do_not_confuse"]
    method = of_the_card(classes="target")
    parts = [method.step(method.trainable, card_batch(label), World()).parts for label in ([2, 0], [-1, -1], [1, 0])]
    assert parts[0]["attention"].item() == pytest.approx(contrast["attention_loss_target_class_only"], abs=1e-12)
    assert tensor(CARD["logits"]["teacher"]).argmax(dim=1).tolist() == [1, 0]
    assert parts[1]["attention"].item() == parts[2]["attention"].item() != parts[0]["attention"].item()
    assert parts[1]["task"] == 0


# every reading against a slow one: a backward with a graph for each class, at any stage


def slow_maps(out: Outputs, config: Config, class_B: Tensor | None) -> Tensor:
    map_BKHW = out.map_BKHW if config.level_attention == -1 else out.inner_BKHW
    assert map_BKHW is not None
    if config.attention == "at":
        return map_BKHW.square().mean(dim=1, keepdim=True)
    found: list[Tensor] = []
    for c in range(out.logits_BC.shape[1]):
        (slope,) = torch.autograd.grad(out.logits_BC[:, c].sum(), map_BKHW, create_graph=True)
        shares = slope.mean(dim=(2, 3), keepdim=True) * map_BKHW
        found.append(shares.relu().sum(dim=1) if config.attention == "at+" else shares.sum(dim=1))
    maps = torch.stack(found, dim=1)
    if class_B is not None:
        maps = torch.stack([image[c : c + 1] for image, c in zip(maps, class_B.tolist(), strict=True)])
    return maps.relu() if config.attention == "gradcam" else maps


def slow_attention(student: Outputs, teacher: Outputs, label_B: Tensor, config: Config) -> Tensor:
    class_B = None
    if config.classes == "target":
        predicted = teacher.logits_BC.argmax(dim=1)
        class_B = torch.where(label_B >= 0, label_B, predicted)
    pair = [slow_maps(out, config, class_B) for out in (student, teacher)]
    if config.attention == "cat":
        pair = [F.adaptive_avg_pool2d(maps, config.areas) for maps in pair]
    size = pair[1].shape[2:]
    pair = [F.interpolate(maps, size=list(size), mode="bilinear", align_corners=True) for maps in pair]
    if config.attention in ("cat", "at"):
        pair = [F.normalize(maps.flatten(2), dim=2) for maps in pair]
        return (pair[0] - pair[1].detach()).square().mean()
    flat = [maps.flatten(1) for maps in pair]
    low_high = [(x.min(dim=1, keepdim=True).values, x.max(dim=1, keepdim=True).values) for x in flat]
    ranges = [torch.where(high > low, high - low, 1.0) for low, high in low_high]  # of a class no place speaks for
    scaled = [(x - low) / width for x, (low, _), width in zip(flat, low_high, ranges, strict=True)]
    return (scaled[0] - scaled[1].detach()).square().mean(dim=1).sqrt().mean()


def by_slow_form(method: ATPlus, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a copy of the method, whose teacher has a graph through all of it."""
    config, model, teacher = method.config, deepcopy(method.student), deepcopy(method.teacher).requires_grad_()
    for network in (model, teacher):
        network.zero_grad()
    student, seen = model(batch), teacher.mapped_outputs(teacher(batch))
    known = batch.label_B >= 0
    loss = F.cross_entropy(student.logits_BC[known], batch.label_B[known], reduction="sum") / len(batch)
    loss = loss + config.alpha_at * slow_attention(student, seen, batch.label_B, config)
    assert seen.map_BKHW is not None
    target = seen.map_BKHW.detach()
    coarse = F.interpolate(student.map_BKHW, size=list(target.shape[2:]), mode="bilinear", align_corners=True)
    loss = loss + config.alpha_fm * (coarse - target).square().mean().sqrt()
    loss.backward()
    return loss.detach(), gradients(model)


KINDS = ("at+", "gradcam", "cat", "at")


@pytest.mark.parametrize("level", [-1, -2])
@pytest.mark.parametrize(
    "kind, classes", [*((kind, "all") for kind in KINDS), *((kind, "target") for kind in KINDS if kind != "at")]
)
def test_loss_and_all_gradients_are_those_of_the_slow_form(kind: str, classes: str, level: int):
    method = at_plus(
        small(), side=7, attention=kind, classes=classes, level_attention=level, areas=3 if kind == "cat" else 2
    )
    batch = pair(side=7, unlabelled=(1,))
    out = method.step(method.trainable, batch, World())
    out.loss.backward()
    loss, expected = by_slow_form(method, batch)
    torch.testing.assert_close(out.loss.detach(), loss, **EXACT)
    found = gradients(method.trainable)
    assert found.keys() == expected.keys() == dict(method.student.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-9, msg=name)


@pytest.mark.parametrize("level", [-1, -2])
def test_a_teacher_of_several_modalities_shows_the_map_of_its_image(level: int):
    method = make("at_plus", level_attention=level)
    assert isinstance(method, ATPlus)
    assert method.teacher.modalities == ["gene", "scan"]
    batch = batch_of([0, 1, 2, 5])
    out = method.step(method.trainable, batch, World())
    out.loss.backward()
    loss, expected = by_slow_form(method, batch)
    torch.testing.assert_close(out.loss.detach(), loss, **EXACT)
    equal_up_to(gradients(method.trainable), expected, 1e-9)


def test_soft_labels_are_those_of_the_whole_teacher():
    method = make("at_plus", alpha_at=0, alpha_fm=0, alpha_kd=0.7, temperature=2.0)
    batch = batch_of([0, 1, 2, 5])
    found = method.step(method.trainable, batch, World()).parts
    assert found.keys() == {"task", "kd_teacher"}
    target = (method.frozen["teacher"](batch).logits_BC / 2).softmax(dim=1)
    expected = F.cross_entropy(method.student(batch).logits_BC, target)
    torch.testing.assert_close(found["kd_teacher"], expected.detach(), **EXACT)


def test_everything_but_cross_entropy_reaches_unlabelled_samples():
    batch = pair(unlabelled=(0, 1, 2, 3))
    method = at_plus(small(), **{**ALL_WEIGHTS, "alpha_fm": 0.3})
    out = method.step(method.trainable, batch, World())
    assert out.parts["task"] == 0
    assert {name for name, part in out.parts.items() if part > 0} == out.parts.keys() - {"task"}
    assert len(out.parts) == 5


def test_a_student_that_is_its_teacher_learns_from_its_labels_alone():
    """The root of a mean of squares has a gradient of 0 there, where the released code's is not a number."""
    method = at_plus(small(), **{**ALL_WEIGHTS, "alpha_kd": 0.0})
    method.student.load_state_dict({k.replace("fine", "coarse"): v for k, v in method.teacher.state_dict().items()})
    fine = pair().inputs["fine"]
    batch = images(torch.tensor([0, 1, 2, 0]), fine=fine, coarse=fine)
    out = method.step(method.trainable, batch, World())
    out.loss.backward()
    found = gradients(method.trainable)
    method.student.zero_grad()
    F.cross_entropy(method.student(batch).logits_BC, batch.label_B).backward()
    assert {name: part.item() for name, part in out.parts.items() if name != "task"} == {
        "attention": 0, "features": 0, "regression": 0,
    }  # fmt: skip
    equal_up_to(found, gradients(method.trainable), 1e-12)


# what is kept


def watched_step(method: ATPlus, batch: Batch) -> tuple[Outputs, Tensor]:
    """The teacher's outputs and the loss."""
    seen: list[Any] = []
    handle = method.teacher.register_forward_hook(lambda module, args, out: seen.append(out))
    loss = method.step(method.trainable, batch, World()).loss
    handle.remove()
    [out] = seen
    return out, loss


@pytest.mark.parametrize(
    "config", [{}, {"level_attention": -2, "attention": "at"}, {"level_attention": -2, "alpha_at": 0}]
)
def test_a_teacher_whose_maps_need_no_backward_keeps_no_graph(config: dict[str, Any]):
    out, _ = watched_step(at_plus(small(), **ALL_WEIGHTS | config), pair())
    kept = [out.feature_BD, out.logits_BC, out.map_BKHW, out.inner_BKHW]
    assert not [x for x in kept if x is not None and x.requires_grad]
    assert (out.inner_BKHW is None) == (config.get("attention") != "at")


def test_a_teacher_of_an_earlier_stage_has_a_graph_from_there_and_gets_no_gradient():
    method = at_plus(small(), **ALL_WEIGHTS, level_attention=-2)
    out, loss = watched_step(method, pair())
    assert out.inner_BKHW is not None
    assert out.inner_BKHW.is_leaf
    with pytest.raises(RuntimeError, match="a second time"):  # it has been used up
        out.logits_BC.sum().backward()
    loss.backward()
    assert gradients(method.frozen) == {}
    assert out.inner_BKHW.grad is None


def test_nothing_more_is_kept_when_it_predicts():
    method = at_plus(small(), level_attention=-2)
    with torch.no_grad():
        assert not method.predict(pair()).requires_grad


def test_one_traversal_of_the_trunk_at_any_level():
    for level in (-1, -2):
        method, arrivals = at_plus(small(), level_attention=level), [0]

        def count(_: Tensor, arrivals: list[int] = arrivals) -> None:
            arrivals[0] += 1

        next(method.student.parameters()).register_post_accumulate_grad_hook(count)
        method.step(method.trainable, pair(), World()).loss.backward()
        assert arrivals == [1]


# what is refused


def test_what_cannot_be_compared_is_refused_with_what_can():
    def message(teacher: Classifier | None = None, model: dict[str, Any] | None = None, **config: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            at_plus(small() if teacher is None else teacher, model=model, **config)
        return str(caught.value)

    assert message(model={"modalities": ["coarse", "gene"]}) == (
        "method 'at_plus' takes a student of one image, model.modalities has coarse, gene; name the coarse image alone"
    )
    assert message(model={"encoders": {"coarse": {"name": "cnn", "widths": [4, 6]}}}) == (
        "method 'at_plus' compares maps of one image, the student (coarse) hands out none or several; train it with a "
        "pooled head for one image alone, by model.encoders.coarse.head=pooled or vgg16"
    )
    assert "the student (gene) hands out none or several; give it an image" in message(
        model={"modalities": ["gene"], "encoders": {}}
    )
    blind = small(encoders={"fine": {"name": "cnn", "widths": [4, 6]}})
    assert "the teacher (fine) hands out none or several" in message(blind)
    both = model_of("gene", "fine", "other", encoders={"fine": pooled(4, 6), "other": pooled(4, 6)})
    assert "the teacher (gene, fine, other) hands out none or several" in message(both)
    assert "model.encoders.fine.head=pooled" in message(both)
    assert message(small(encoders={"fine": pooled(4, 5)})) == (
        "maps of student and teacher have 6 and 5 channels, which method.alpha_fm and method.alpha_sr cannot compare; "
        "use the same encoder for both, or set both to 0"
    )
    assert "6 and 5 channels" in message(small(encoders={"fine": pooled(4, 5)}), alpha_fm=0, alpha_sr=1)
    assert message(level_attention=-3) == (
        "method.level_attention=-3 counts back further than the trunks have stages (2); use at least -2"
    )
    assert "have stages (1)" in message(small(encoders={"fine": pooled(6)}), level_attention=-2)
    assert message(model={"norm": "sync"}, level_attention=-2) == (
        "method.level_attention=-2 differentiates the student twice, which its batch statistics do not allow; use "
        "vgg16, model.norm=group, or level_attention -1"
    )


@pytest.mark.parametrize(
    "side, teacher, level, who",
    [
        (4, pooled(4, 6), -1, "student (maps: student 1 x 1, teacher 3 x 3)"),
        (2, pooled(4, 6), -2, "student (maps: student 1 x 1, teacher 6 x 6)"),
        (12, pooled(4, 4, 4, 6), -1, "teacher (maps: student 3 x 3, teacher 1 x 1)"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_map_of_a_single_place_is_pointed_out(
    caplog: pytest.LogCaptureFixture, side: int, teacher: dict[str, Any], level: int, who: str, kind: str
):
    sharp = small(encoders={"fine": teacher})
    at_plus(sharp, side=side, attention=kind, level_attention=level)
    name, sizes = who.split(" ", 1)
    expected = (
        f"the map of the {name} has a single place, in which there is nowhere to look {sizes}, and method.alpha_at "
        "weighs the comparison all the same; a larger data.augment.crop, a smaller data.degraded factor or an "
        "encoder with fewer strides leaves more places"
    )
    assert [record.getMessage() for record in caplog.records] == [expected]
    caplog.clear()
    at_plus(sharp, side=side, alpha_at=0)
    assert not caplog.records


def test_a_run_says_how_large_its_maps_are(shards: Path, root: Path):
    for level, words in ((-1, "student 8 x 8, teacher 8 x 8"), (-2, "student 16 x 16, teacher 16 x 16")):
        config = law_config("at_plus", shards, root, model={"norm": "group"})
        config["method"]["level_attention"] = level
        assert assemble(settings_of(config), World()).maps == words


def test_looking_at_map_sizes_leaves_model_and_generator_as_they_were():
    before = torch.get_rng_state()
    method = at_plus(small(norm="sync"), model={"norm": "sync"}, side=7)
    assert method.student.map_size == (2, 2)
    assert method.student.training
    assert torch.equal(torch.get_rng_state(), before)
    fresh = at_plus(small(norm="sync"), model={"norm": "sync"}, side=7, alpha_at=0)  # nobody looked
    expected = fresh.student.state_dict()
    assert all(torch.equal(found, expected[name]) for name, found in method.student.state_dict().items())


@pytest.mark.parametrize(
    "teacher, model, config",
    [
        (pooled(4, 5), {}, {"alpha_fm": 0}),
        (pooled(4, 6), {"norm": "sync"}, {"level_attention": -2, "attention": "at"}),
        (pooled(4, 6), {"norm": "sync"}, {"level_attention": -9, "alpha_at": 0}),
        (pooled(3, 4, 6), {"encoders": {"coarse": pooled(9, 6)}}, {"level_attention": -2}),
    ],
)
def test_what_is_not_in_the_way_is_not_refused(teacher: dict[str, Any], model: dict[str, Any], config: dict[str, Any]):
    method = at_plus(small(encoders={"fine": teacher}), model=model, **config)
    assert method.step(method.trainable, pair(), World()).loss.isfinite()


@pytest.mark.parametrize(
    "engine",
    [{"name": "fsdp"}, {"name": "deepspeed"}, {"precision": "bf16"}, {"precision": "fp16"}, {"compile": True}],
)
def test_differentiating_twice_is_for_the_plain_engine(engine: dict[str, Any], tmp_path: Path):
    def read(**method: Any) -> Any:
        config = law_config("at_plus", tmp_path, tmp_path, engine={"precision": "fp32", **engine})
        return settings_of(config | {"method": {"name": "at_plus", **method}})

    words = (
        "method 'at_plus' as configured differentiates the student's outputs within the step, which is available with "
        "engine.name ddp, precision fp32 or fp64, without compile; use these, or maps that need no backward pass "
        "(method.level_attention -1)"
    )
    with pytest.raises((ValidationError, ConfigError), match=re.escape(words)):
        read(level_attention=-2)
    for method in ({}, {"level_attention": -2, "attention": "at"}, {"level_attention": -2, "alpha_at": 0}):
        assert not read(**method).method.second_order


@pytest.mark.parametrize(
    "wrong", [{"level_attention": 0}, {"alpha_at": -1}, {"temperature": 0}, {"areas": 0}, {"attention": "cam"}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Config(**wrong)


# several ranks


def test_two_ranks_differentiate_twice_as_one_does(ranks: Any, shards: Path, root: Path):
    config = law_config("at_plus", shards, root, model={"norm": "group"})
    config["method"]["level_attention"] = -2
    [alone] = ranks(1).run(run_steps, config=config, steps=6)
    for trace in ranks(2).run(run_steps, config=config, steps=6):
        assert trace.losses == pytest.approx(alone.losses, abs=1e-9)
        assert trace.backwards == [1] * 6
        equal_up_to(trace.weights, alone.weights, 1e-9)


def test_labels_may_be_missing_in_any_rank(ranks: Any, shards: Path, root: Path):
    config = law_config("at_plus", shards, root, data={"labelled": 20})
    config["method"]["classes"] = "target"
    [alone] = ranks(1).run(run_steps, config=config, steps=4)
    for trace in ranks(2).run(run_steps, config=config, steps=4):
        assert trace.losses == pytest.approx(alone.losses, abs=1e-9)
        equal_up_to(trace.weights, alone.weights, 1e-9)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"attention": "at", "classes": "target"}, "classes=target has no meaning for attention=at"),
        ({"temperature": 4}, "temperature is for soft labels, but alpha_kd is 0; leave it out or set alpha_kd"),
        (
            {"alpha_at": 0, "alpha_fm": 0},
            "alpha_at, alpha_fm, alpha_kd and alpha_sr are all 0, so nothing is distilled; set one of them, or use",
        ),
        ({"areas": 3}, r"areas is for attention=cat, not at\+; leave it out"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        Config(**settings)
