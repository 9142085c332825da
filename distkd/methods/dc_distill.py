"""DC-Distill + GK-Refine (MICCAI 2022): two teachers, logits and features, weighted by how their gradients agree.

A frozen multi-modal teacher and the student's own mean teacher each give a divergence of logits and a contrast of
features on the candidates they disagree on. Source: card `dc-distill-gk-refine`, section 4.
"""

# Shapes: B samples of this rank, C classes, D feature width, N training rows, J candidates, R kept positives

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from distkd.base import Arriving, Batch, Forward, Outputs, StepOutput, World
from distkd.comm.agreement import agree, leaf_of
from distkd.errors import ConfigError
from distkd.memory.candidates import Candidates
from distkd.memory.contrast import choose
from distkd.methods._agreement import AgreementConfig, GKRefine, make_rule
from distkd.methods._banks import BankConfig, Banks
from distkd.methods._plain import PlainMethod, teacher_gauges
from distkd.methods._protocol import MethodConfig, Setup
from distkd.models.build import Classifier
from distkd.models.ema import MeanTeacher
from distkd.models.heads import Projector
from distkd.ops.draws import fold_in, integer_key, text_key
from distkd.ops.kd import kl_at_temperature, labelled_cross_entropy
from distkd.ops.selection import Mode, kept_ranks

__all__ = ["Config", "DCDistill", "build"]

log = logging.getLogger(__name__)

SIDES = ("teacher", "mean_teacher")
LOSSES = ("kl_teacher", "kl_mean_teacher", "contrast_teacher", "contrast_mean_teacher")


class Config(MethodConfig):
    """The student of DC-Distill; defaults are the published command, with the card's recommendations."""

    needs_teacher: ClassVar[bool] = True
    views: ClassVar[int] = 2

    name: Literal["dc_distill"] = "dc_distill"
    alpha: NonNegativeFloat = 1.0
    """Weight of each divergence of logits."""
    beta: NonNegativeFloat = 0.02
    """Weight of each contrast of features."""
    temperature: PositiveFloat = 1.0
    """Divisor of the logits, unitless."""
    agreement: AgreementConfig = GKRefine()
    """What is done where the gradients of the losses disagree: GK-Refine, or another rule."""
    contrast_temperature: PositiveFloat = 0.07
    """Divisor of the cosines, unitless."""
    bank_momentum: float = Field(default=0.5, ge=0, lt=1)
    """Share of the old row when a bank row is updated."""
    bank: BankConfig = BankConfig()
    """Where the rows of the banks lie, and in which precision."""
    embedding_dim: PositiveInt = 128
    """Width of the projected embeddings and of the banks."""
    positives: PositiveInt = 300
    """Candidates of the anchor's class; at most as many as the smallest class has."""
    negatives: PositiveInt = 700
    """Candidates of other classes."""
    keep_positive: PositiveInt = 20
    """Positives that are kept by discrepancy, the anchor's own row included."""
    keep_negative: PositiveInt | None = 512
    """Negatives that are kept by discrepancy; null keeps all."""
    select: Mode = "mid"
    """Which places in the order of discrepancy the kept positives have."""
    direction: Literal["paper", "released"] = "paper"
    """Sign of the discrepancy; the released code has it the other way round than the paper's figure."""
    reweight_negatives: bool = False
    """Multiply a negative's exponentiated score by 1 - discrepancy, an option of DSCD; off as published."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Upper bound of the mean teacher's memory; it starts at 0 and grows as 1 - 1 / (step + 1)."""
    teacher_mode: Literal["eval", "train"] = "eval"
    """`train` leaves dropout and batch statistics of the frozen teacher on, as the released code does."""

    @model_validator(mode="before")
    @classmethod
    def _rule(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The published rule where none is named; and the names that version 0.1 had for its options."""
        values = dict(values)
        older = {key: values.pop(key) for key in ("weights", "clamp_min", "normalise") if key in values}
        given = values.get("agreement", {})
        if isinstance(given, dict):
            none = older.pop("weights", "agreement") == "none"
            rule = {"rule": "none"} if none else {"rule": "gk_refine", **older}
            values["agreement"] = {**rule, **given} if given.get("rule", rule["rule"]) == rule["rule"] else given
        return values


class DistilledStudent(nn.Module):
    """The student and the heads that only training needs."""

    def __init__(self, student: Classifier, teacher_dim: int, embedding_dim: int):
        super().__init__()
        self.student = student
        widths = {"teacher": teacher_dim, "mean_teacher": student.feature_dim}
        self.own = nn.ModuleDict({side: Projector(student.feature_dim, embedding_dim) for side in SIDES})
        self.other = nn.ModuleDict({side: Projector(widths[side], embedding_dim) for side in SIDES})

    def forward(self, batch: Batch) -> Outputs:
        return self.student(batch)

    def heads(self) -> list[nn.Parameter]:
        """Everything beyond the student's trunk."""
        modules = (self.student.classifier, self.own, self.other)
        return [p for module in modules for p in module.parameters()]


class DCDistill(PlainMethod):
    """Two teachers, four distillation losses, one backward."""

    def __init__(self, config: Config, setup: Setup):
        assert setup.teacher is not None
        student = setup.build_student()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer_key(setup.seed, text_key("projectors")))
            trainable = DistilledStudent(student, setup.teacher.feature_dim, config.embedding_dim)
        super().__init__(student, trainable)
        self.model: DistilledStudent = trainable
        self.outside = trainable.heads()
        self.follows_weights = True
        self.config = config
        self.labelled_share = setup.labelled_share
        self.frozen["teacher"] = setup.teacher
        if config.teacher_mode == "train":
            setup.teacher.train()
        self.mean_teacher = MeanTeacher(setup.build_student("mean_teacher"), decay=config.ema_decay)
        self.contrast = Banks(config.bank, SIDES, config.embedding_dim, setup, momentum=config.bank_momentum)
        self.n_positive, self.n_kept = _candidate_counts(config, setup.train_label_N, setup.n_classes)
        self.candidates = Candidates(setup.train_label_N, n_positive=self.n_positive, n_negative=config.negatives)
        self.rule = make_rule(config.agreement, LOSSES)
        self.state = nn.ModuleDict(
            {"mean_teacher": self.mean_teacher, "contrast": self.contrast, "candidates": self.candidates}
        )
        if self.rule is not None:
            self.state["agreement"] = self.rule
        if config.keep_negative is not None and config.keep_negative > config.negatives:
            raise ConfigError(
                f"method.keep_negative={config.keep_negative} is more than method.negatives={config.negatives}"
            )

    def step(self, model: Forward, batch: Batch, world: World) -> StepOutput:
        student = model(batch)
        with torch.no_grad():
            teacher = self.frozen["teacher"](batch)
            mean_teacher = self.mean_teacher(batch.view(1))
        if self.rule is None:
            task, distillation, rows = self.losses(student.feature_BD, teacher, mean_teacher, batch, world)
            loss, gauges = task + torch.stack(list(distillation.values())).sum(), {}
        else:
            leaf_BD = leaf_of(student.feature_BD)
            task, distillation, rows = self.losses(leaf_BD, teacher, mean_teacher, batch, world)
            agreement = agree(
                task,
                distillation,
                feature_BD=student.feature_BD,
                leaf_BD=leaf_BD,
                heads=self.model.heads(),
                weigh=self.rule,
                world=world,
            )
            loss, gauges = agreement.loss, agreement.gauges()
        gauges |= teacher_gauges(teacher, batch, self.labelled_share)
        parts = {"task": task.detach(), **{name: part.detach() for name, part in distillation.items()}}
        return StepOutput(loss, parts, gauges, (rows,), step=batch.step)

    def losses(
        self, feature_BD: Tensor, teacher: Outputs, mean_teacher: Outputs, batch: Batch, world: World
    ) -> tuple[Tensor, dict[str, Tensor], Arriving]:
        """The task loss, the four distillation losses with alpha and beta in them, and the rows for the banks."""
        c = self.config
        logits_BC = self.student.classifier(feature_BD)
        task = labelled_cross_entropy(logits_BC, batch.label_B, self.labelled_share)
        contrast, rows = self._contrasts(feature_BD, {"teacher": teacher, "mean_teacher": mean_teacher}, batch, world)
        distillation = {
            "kl_teacher": c.alpha * kl_at_temperature(logits_BC, teacher.logits_BC, c.temperature),
            "kl_mean_teacher": c.alpha * kl_at_temperature(logits_BC, mean_teacher.logits_BC, c.temperature),
            "contrast_teacher": c.beta * contrast["teacher"],
            "contrast_mean_teacher": c.beta * contrast["mean_teacher"],
        }
        return task, distillation, rows

    def _contrasts(
        self, feature_BD: Tensor, others: dict[str, Outputs], batch: Batch, world: World
    ) -> tuple[dict[str, Tensor], Arriving]:
        """Loss against each teacher, and the embeddings that go into the banks after the step."""
        c = self.config
        own_BD = {side: self.model.own[side](feature_BD) for side in SIDES}
        other_BD = {side: self.model.other[side](others[side].feature_BD.detach()) for side in SIDES}
        rows = {"index": batch.index_B}
        for side in SIDES:
            rows[f"{side}.student"], rows[f"{side}.teacher"] = own_BD[side], other_BD[side]
        arriving, anchors = self.contrast.placement.meet(rows, fold_in(batch.key_B, batch.step), world)
        candidate_AJ = self.candidates(anchors["key"], anchors["index"])
        losses: dict[str, Tensor] = {}
        for side in SIDES:
            key = torch.full((), integer_key(batch.seed, batch.step, text_key(side)), device=feature_BD.device)
            ranks_R = kept_ranks(c.select, key, n_positive=self.n_positive, keep=self.n_kept, progress=batch.progress)
            pair = self.contrast.pair(side)
            both = (anchors[f"{side}.student"], anchors[f"{side}.teacher"])
            choice = choose(
                pair,
                both,
                candidate_AJ,
                ranks_R,
                n_positive=self.n_positive,
                keep_negative=c.keep_negative,
                direction=c.direction,
                reweight=c.reweight_negatives,
            )
            losses[side] = pair(
                own_BD[side], other_BD[side], both, choice, temperature=c.contrast_temperature, world=world
            )
        return losses, arriving

    def after_step(self, out: StepOutput, world: World) -> None:
        self.contrast.after_step(out, world)
        if self.rule is not None:
            self.rule.after_step(out.gauges)
        self.mean_teacher.update(self.student, out.step)


def _candidate_counts(config: Config, train_label_N: Tensor, n_classes: int) -> tuple[int, int]:
    """Positives to draw and to keep, given what the smallest class has."""
    smallest = int(torch.bincount(train_label_N[train_label_N >= 0], minlength=n_classes).min())
    drawn = min(config.positives, smallest)
    kept = min(config.keep_positive, drawn)
    if drawn < config.positives or kept < config.keep_positive:
        log.warning(
            "the smallest class has %d labelled training samples: "
            "drawing %d positives instead of %d and keeping %d of %d",
            smallest, drawn, config.positives, kept, config.keep_positive,
        )  # fmt: skip
    return drawn, kept


def build(config: Config, setup: Setup) -> DCDistill:
    return DCDistill(config, setup)
