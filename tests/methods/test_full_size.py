"""The published networks at their published size, on shards in the layout that they were published with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distkd.base import World
from distkd.config import load
from distkd.data.loader import train_batches
from distkd.metrics.meters import Stopwatch
from distkd.models.build import parameter_table
from distkd.train.export import write_export
from distkd.train.job import Job, assemble, split_digest
from distkd.train.loop import train_step
from shards.synthetic import main as make_synthetic

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs" / "glioma"
SIZE = {"batch.global_batch": 2, "run.epochs": 1, "eval.select": "last", "data.threads": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("full")
    arguments = [
        "--patients",
        "30",
        "--max-regions",
        "1",
        "--image-size",
        "512",
        "--omic-width",
        "80",
        "--missing",
        "0",
    ]
    assert make_synthetic(["--out", str(folder / "shards"), *arguments, "--folds", "3"]) == 0
    return {"run.root": str(folder / "runs"), "data.shards": str(folder / "shards")}


def _one_step(job: Job) -> None:
    job.method.trainable.train()
    batches = train_batches(job.dataset, job.plan, World(), 1, 0)
    out, update = train_step(job, next(batches)[1], Stopwatch())
    batches.close()
    assert torch.isfinite(out.loss)
    assert torch.isfinite(update.norm)


def test_teacher_and_student_are_those_of_the_paper_and_take_a_step(place: dict[str, str]):
    teacher = load(CONFIGS / "teacher.yaml", {**place, **SIZE})
    job = assemble(teacher, World())
    assert job.dataset.input_specs["path"].shape == (3, 512, 512)
    assert job.dataset.input_specs["omic"].shape == (80,)
    assert parameter_table(job.method.trainable)[-1] == ("all", 17_665_497)
    _one_step(job)
    about = {"split_digest": split_digest(job.dataset), "fold": 0, "shards": ""}
    weights = job.method.student.state_dict()
    write_export(teacher.folder / "export", weights, config=teacher.model, dataset=job.dataset, about=about)
    student = assemble(load(CONFIGS / "dc_distill.yaml", {**place, **SIZE}), World())
    assert parameter_table(student.method.student)[-1] == ("all", 11_242_819)
    # four projectors beside the student: 128 x 128 weights and 128 biases each
    learned = sum(p.numel() for p in student.method.trainable.parameters())
    assert learned == 11_242_819 + 4 * (128 * 128 + 128)
    _one_step(student)
