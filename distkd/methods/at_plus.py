"""Inter-resolution distillation with AT+ (EUSIPCO 2023): a student of coarse images looks where its teacher looks.

Cross entropy, distances of features and of class-wise attention maps, and soft labels. The maps come from a head of
pool and linear layer in closed form; those of an earlier stage by differentiating the class scores. Source: card
`inter-resolution-at-plus`, section 4.
"""

# Shapes: B samples of this rank, C classes, K channels of a map of H x W places

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from distkd.base import UNLABELLED, Batch, Forward, Outputs, StepOutput, World
from distkd.comm.roots import global_roots
from distkd.errors import ConfigError
from distkd.methods._plain import PlainMethod, teacher_gauges
from distkd.methods._protocol import MethodConfig, Setup
from distkd.models.build import Branch, Classifier
from distkd.models.norm import SyncBatchNorm
from distkd.models.trunk import Trunk
from distkd.ops import attention
from distkd.ops.kd import labelled_cross_entropy, soft_cross_entropy

__all__ = ["ATPlus", "Config", "build"]

log = logging.getLogger(__name__)


class Config(MethodConfig):
    """Attention transfer between resolutions; weights as the source recommends."""

    needs_teacher: ClassVar[bool] = True
    needs_maps: ClassVar[bool] = True

    name: Literal["at_plus"] = "at_plus"
    alpha_at: NonNegativeFloat = 10.0
    """Weight of the attention loss."""
    alpha_fm: NonNegativeFloat = 0.1
    """Weight of feature matching: root of the mean squared difference of the two maps, over the global batch (with
    accumulation over that of a pass)."""
    alpha_kd: NonNegativeFloat = 0.0
    """Weight of the cross entropy with the teacher's soft labels."""
    alpha_sr: NonNegativeFloat = 0.0
    """Weight of softmax regression: root of the mean squared difference between the teacher's
    logits and those of the teacher's head on the student's feature; likewise."""
    temperature: PositiveFloat = 1.0
    """Divisor of the teacher's logits for its soft labels, unitless; the student's are not divided."""
    attention: Literal["at+", "gradcam", "cat", "at"] = "at+"
    """Maps that are compared. `at+`: sum over channels of the positive parts of weight x activation. `gradcam`: the
    positive part of their sum. Both scaled to 0..1 and compared by root mean square. `cat`: their signed sum (CAM),
    averaged over areas; `at`: the energy over channels, without classes. These two scaled to unit length and compared
    by mean square: losses far smaller than the others', give them a larger `alpha_at`."""
    classes: Literal["all", "target"] = "all"
    """`all`, or the map of the label's class alone; for samples without a label that of the teacher's prediction."""
    areas: PositiveInt = 2
    """Areas a side, over which `cat` averages."""
    level_attention: int = Field(default=-1, le=-1)
    """Stage of the trunk whose maps are compared, -1 the last. Earlier ones have no closed form: the class scores are
    differentiated, in the student with a graph."""

    @model_validator(mode="after")
    def _uses_all(self) -> Self:
        if self.attention == "at" and self.classes != "all":
            raise ConfigError("classes=target has no meaning for attention=at, whose map has no classes; leave it out")
        if self.attention != "cat" and self.areas != 2:
            raise ConfigError(f"areas is for attention=cat, not {self.attention}; leave it out")
        if self.temperature != 1 and not self.alpha_kd:
            raise ConfigError("temperature is for soft labels, but alpha_kd is 0; leave it out or set alpha_kd")
        if not (self.alpha_at or self.alpha_fm or self.alpha_kd or self.alpha_sr):
            raise ConfigError(
                "alpha_at, alpha_fm, alpha_kd and alpha_sr are all 0, so nothing is distilled; set one of them, or use "
                "method supervised"
            )
        return self

    @property
    def inner(self) -> bool:
        """Whether the maps are those of an earlier stage."""
        return self.alpha_at > 0 and self.level_attention < -1

    @property
    def second_order(self) -> bool:
        return self.inner and self.attention != "at"


class ATPlus(PlainMethod):
    """Cross entropy where there is a label; attention, features and soft labels everywhere."""

    def __init__(self, config: Config, setup: Setup):
        assert setup.teacher is not None
        super().__init__(setup.build_student())
        self.config = config
        self.labelled_share = setup.labelled_share
        self.teacher = setup.teacher
        self.frozen["teacher"] = setup.teacher
        _check(config, self.student, self.teacher)
        self.outside = list(_head(self.student).parameters())
        if config.inner:
            for model in (self.student, self.teacher):
                _trunk(model).inner = config.level_attention
        if config.alpha_at and setup.world.is_main:
            _warn_of_single_places(self.student, self.teacher)

    def step(self, model: Forward, batch: Batch, world: World) -> StepOutput:
        c = self.config
        student = model(batch)
        with nullcontext() if c.second_order else torch.no_grad():
            teacher = self.teacher(batch)
        seen = self.teacher.mapped_outputs(teacher)
        parts = {"task": labelled_cross_entropy(student.logits_BC, batch.label_B, self.labelled_share)}
        if c.alpha_at:
            parts["attention"] = self._attention(student, seen, batch.label_B)
        if c.alpha_kd:
            parts["kd_teacher"] = soft_cross_entropy(student.logits_BC, teacher.logits_BC.detach(), c.temperature)
        parts |= global_roots(self._squares(student, seen), world)
        weight = {"attention": c.alpha_at, "kd_teacher": c.alpha_kd, "features": c.alpha_fm, "regression": c.alpha_sr}
        loss = parts["task"]
        for name, part in parts.items():
            if name != "task":
                loss = loss + weight[name] * part
        gauges = teacher_gauges(teacher, batch, self.labelled_share)
        return StepOutput(loss, {name: part.detach() for name, part in parts.items()}, gauges, step=batch.step)

    def _squares(self, student: Outputs, teacher: Outputs) -> dict[str, tuple[Tensor, int]]:
        """Sums of squares whose roots are losses, and of how many values each."""
        found: dict[str, tuple[Tensor, int]] = {}
        if self.config.alpha_fm:
            student_BKHW, teacher_BKHW = attention.on_one_grid(_map(student), _map(teacher).detach())
            difference = student_BKHW - teacher_BKHW
            found["features"] = difference.square().sum(), difference.numel()
        if self.config.alpha_sr:
            head = _head(self.teacher)
            difference = F.linear(student.feature_BD, head.weight, head.bias) - teacher.logits_BC.detach()
            found["regression"] = difference.square().sum(), difference.numel()
        return found

    def _attention(self, student: Outputs, teacher: Outputs, label_B: Tensor) -> Tensor:
        """Of the maps that the config asks for, the teacher's as constants."""
        c = self.config
        class_B = None
        if c.classes == "target":
            class_B = torch.where(label_B == UNLABELLED, teacher.logits_BC.argmax(dim=1), label_B)
        student_BCHW = self._maps(student, self.student, class_B)
        teacher_BCHW = self._maps(teacher, self.teacher, class_B).detach()
        if c.attention == "cat":
            student_BCHW, teacher_BCHW = (attention.pooled_to(x, c.areas) for x in (student_BCHW, teacher_BCHW))
        student_BCHW, teacher_BCHW = attention.on_one_grid(student_BCHW, teacher_BCHW)
        if c.attention in ("cat", "at"):
            return attention.unit_map_distance(student_BCHW, teacher_BCHW)
        return attention.map_distance(attention.normalised(student_BCHW), attention.normalised(teacher_BCHW))

    def _maps(self, out: Outputs, model: Classifier, class_B: Tensor | None) -> Tensor:
        c = self.config
        map_BKHW = out.inner_BKHW if c.inner else out.map_BKHW
        assert map_BKHW is not None
        if c.attention == "at":
            return attention.attention_energy(map_BKHW)
        weight = _head(model).weight
        if c.second_order:
            weight = attention.class_slopes(out.logits_BC, map_BKHW, create_graph=model is self.student)
        if class_B is not None:
            weight = attention.of_class(weight, class_B)
        if c.attention == "at+":
            return attention.class_maps(map_BKHW, weight)
        maps = attention.class_activation_maps(map_BKHW, weight)
        return maps.relu() if c.attention == "gradcam" else maps


def _mapped(model: Classifier) -> Branch:
    branch = model.mapped
    assert branch is not None
    return branch


def _head(model: Classifier) -> nn.Linear:
    """The linear layer on the pooled map."""
    return _mapped(model).classifier


def _trunk(model: Classifier) -> Trunk:
    trunk = _mapped(model).trunk
    assert trunk is not None
    return trunk


def _map(out: Outputs) -> Tensor:
    assert out.map_BKHW is not None
    return out.map_BKHW


def _check(config: Config, student: Classifier, teacher: Classifier) -> None:
    """Both have one map, and maps that can be compared as the config asks.

    Raises:
        ConfigError: they do not.
    """
    if len(student.modalities) > 1:
        raise ConfigError(
            f"method 'at_plus' takes a student of one image, model.modalities has {', '.join(student.modalities)}; "
            "name the coarse image alone"
        )
    for who, model in (("student", student), ("teacher", teacher)):
        if model.mapped is None:
            images = [name for name in model.modalities if model.specs[name].kind == "image"]
            advice = (
                f"train it with a pooled head for one image alone, by model.encoders.{images[0]}.head=pooled or vgg16"
                if images
                else "give it an image"
            )
            raise ConfigError(
                f"method 'at_plus' compares maps of one image, the {who} ({', '.join(model.modalities)}) hands out "
                f"none or several; {advice}"
            )
    widths = [_trunk(model).width for model in (student, teacher)]
    if (config.alpha_fm or config.alpha_sr) and widths[0] != widths[1]:
        raise ConfigError(
            f"maps of student and teacher have {widths[0]} and {widths[1]} channels, which method.alpha_fm and "
            "method.alpha_sr cannot compare; use the same encoder for both, or set both to 0"
        )
    if config.inner:
        _check_stages(config, student, teacher)


def _check_stages(config: Config, student: Classifier, teacher: Classifier) -> None:
    level = config.level_attention
    stages = min(len(_trunk(model).stages()) for model in (student, teacher))
    if -level > stages:
        raise ConfigError(
            f"method.level_attention={level} counts back further than the trunks have stages ({stages}); use at least "
            f"-{stages}"
        )
    if config.second_order and any(isinstance(layer, SyncBatchNorm) for layer in student.modules()):
        raise ConfigError(
            f"method.level_attention={level} differentiates the student twice, which its batch statistics do not "
            "allow; use vgg16, model.norm=group, or level_attention -1"
        )


def _warn_of_single_places(student: Classifier, teacher: Classifier) -> None:
    """A map of one place says how much each class has of it, and nothing of where its network looks."""
    sizes = {"student": student.map_size, "teacher": teacher.map_size}
    who = next((who for who, size in sizes.items() if size == (1, 1)), None)
    if who is not None:
        both = ", ".join(f"{who} {height} x {width}" for who, (height, width) in sizes.items())
        log.warning(
            "the map of the %s has a single place, in which there is nowhere to look (maps: %s), and method.alpha_at "
            "weighs the comparison all the same; a larger data.augment.crop, a smaller data.degraded factor or an "
            "encoder with fewer strides leaves more places",
            who,
            both,
        )


def build(config: Config, setup: Setup) -> ATPlus:
    return ATPlus(config, setup)
