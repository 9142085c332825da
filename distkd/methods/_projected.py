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

    def __init__(self, student: Classifier, own: Projector, other: Projector | None):
        super().__init__()
        self.student, self.own = student, own
        if other is not None:
            self.other = other

    def forward(self, batch: Batch) -> Outputs:
        return self.student(batch)


class ProjectedMethod(PlainMethod):
    """Both projections learn; the teacher does not. With `fixed_key` its projection does not either: `state["key"]`."""

    def __init__(self, config: Any, setup: Setup, *, fixed_key: bool = False):
        assert setup.teacher is not None
        student = setup.build_student()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer_key(setup.seed, text_key("projectors")))
            own = Projector(student.feature_dim, config.embedding_dim)
            other = Projector(setup.teacher.feature_dim, config.embedding_dim)
        self.model = ProjectedStudent(student, own, None if fixed_key else other)
        super().__init__(student, self.model)
        if fixed_key:
            self.state["key"] = other.requires_grad_(False)
        self.outside = [p for head in (own, other) for p in head.parameters() if p.requires_grad]
        self.config = config
        self.labelled_share = setup.labelled_share
        self.frozen["teacher"] = setup.teacher
