"""A student and a frozen teacher whose features meet as unit embeddings: the parts that such methods share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distkd.base import Batch, Outputs
from distkd.methods._plain import PlainMethod
from distkd.methods._protocol import Setup
from distkd.models.build import Classifier
from distkd.models.heads import Projector
from distkd.ops.draws import integer_key, text_key

__all__ = ["ProjectedMethod", "ProjectedStudent"]


class ProjectedStudent(nn.Module):
    """The student, and the heads that only training needs: its own projection and that of the teacher's feature."""

    def __init__(self, student: Classifier, teacher_dim: int, embedding_dim: int):
        super().__init__()
        self.student = student
        self.own = Projector(student.feature_dim, embedding_dim)
        self.other = Projector(teacher_dim, embedding_dim)

    def forward(self, batch: Batch) -> Outputs:
        return self.student(batch)


class ProjectedMethod(PlainMethod):
    """Both projections learn; the teacher does not."""

    def __init__(self, config: Any, setup: Setup):
        assert setup.teacher is not None
        student = setup.build_student()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer_key(setup.seed, text_key("projectors")))
            trainable = ProjectedStudent(student, setup.teacher.feature_dim, config.embedding_dim)
        super().__init__(student, trainable)
        self.model: ProjectedStudent = trainable
        self.outside = [*trainable.own.parameters(), *trainable.other.parameters()]
        self.config = config
        self.labelled_share = setup.labelled_share
        self.frozen["teacher"] = setup.teacher
