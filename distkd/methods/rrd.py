"""Relational distillation (RRD, arXiv 2407.12073): the student relates a sample to a queue as the teacher does.

The queue holds the teacher's latest keys of the global batch and is written after the step. The teacher's side, its
projection included, never learns, as in the released code: no gradient reaches it there. So keys are never stale.
Source: card `beyond`, section 1.5.
"""

# Shapes: B samples of this rank, F feature width

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from distkd.base import Batch, Forward, StepOutput, World
from distkd.comm.packed import start_gather
from distkd.memory.queue import Queue
from distkd.methods._plain import teacher_gauges
from distkd.methods._projected import ProjectedMethod
from distkd.methods._protocol import MethodConfig, Setup
from distkd.ops.kd import kl_at_temperature, labelled_cross_entropy
from distkd.ops.relational import relational_cross_entropy

__all__ = ["RRD", "Config", "build"]


class Config(MethodConfig):
    """Relations to a queue of teacher keys; temperatures and width as published."""

    needs_teacher: ClassVar[bool] = True

    name: Literal["rrd"] = "rrd"
    beta: NonNegativeFloat = 1.0
    """Weight of the relational loss."""
    alpha: NonNegativeFloat = 0.0
    """Weight of the divergence of logits, which the method can be used with."""
    temperature: PositiveFloat = 4.0
    """Divisor of both sides' logits, unitless; the divergence is multiplied by its square."""
    queue_length: PositiveInt = 4096
    """Keys that are remembered. Beyond the number of training samples they come again, as other augmented views."""
    embedding_dim: PositiveInt = 128
    """Width of the projected embeddings and of the queue."""
    student_temperature: PositiveFloat = 0.02
    """Divisor of the student's cosines, unitless."""
    teacher_temperature: PositiveFloat = 0.1
    """Divisor of the teacher's cosines, unitless."""
    own_key: bool = False
    """Count the sample's own teacher key as one more row. The released code has it, with the rest of its batch, because
    it enqueues before it scores; here a sample is compared with earlier ones, and no rank waits for others' keys."""


class RRD(ProjectedMethod):
    """Cross entropy where there is a label, relations to the queue everywhere."""

    def __init__(self, config: Config, setup: Setup):
        super().__init__(config, setup, fixed_key=True)
        self.state["queue"] = self.queue = Queue(config.queue_length, config.embedding_dim)

    def step(self, model: Forward, batch: Batch, world: World) -> StepOutput:
        c = self.config
        student = model(batch)
        with torch.no_grad():
            teacher = self.frozen["teacher"](batch)
            key_BD = self.state["key"](teacher.feature_BD)
        arriving = start_gather({"key": key_BD}, world)
        filled = self.queue.filled()
        parts = {
            "task": labelled_cross_entropy(student.logits_BC, batch.label_B, self.labelled_share),
            "kl_teacher": kl_at_temperature(student.logits_BC, teacher.logits_BC, c.temperature),
            "relation": relational_cross_entropy(
                self.model.own(student.feature_BD),
                key_BD,
                self.queue.rows_QD,
                filled,
                student_temperature=c.student_temperature,
                teacher_temperature=c.teacher_temperature,
                with_own=c.own_key,
            ),
        }
        loss = parts["task"] + c.alpha * parts["kl_teacher"] + c.beta * parts["relation"]
        detached = {name: part.detach() for name, part in parts.items()}
        gauges = teacher_gauges(teacher, batch, self.labelled_share)
        gauges["queue/filled"] = filled / c.queue_length
        return StepOutput(loss, detached, gauges, (arriving,), step=batch.step)

    def after_step(self, out: StepOutput, world: World) -> None:
        for arriving in out.rows:
            self.queue.push(arriving.wait()["key"])


def build(config: Config, setup: Setup) -> RRD:
    return RRD(config, setup)
