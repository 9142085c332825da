"""The words that all layers share."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from distkd import errors
from distkd.base import UNLABELLED, Batch, StepOutput, StrictConfig, World
from distkd.errors import ConfigError, DistkdError, Interrupted


def batch(n: int = 3, views: int = 2) -> Batch:
    index = torch.arange(n)
    return Batch(
        views=tuple(
            {"gene": torch.full((n, 2), float(view)), "slide": torch.ones(n, 1, 2, 2)} for view in range(views)
        ),
        present={"gene": torch.tensor([True] * n), "slide": torch.tensor([True] * n)},
        label_B=torch.tensor([0, UNLABELLED, 1][:n]),
        index_B=index,
        sample_B=index + 10,
        key_B=index + 100,
        step=7,
        epoch=2,
        progress=0.25,
    )


# the layout of processes


def test_a_process_alone_is_the_main_rank():
    world = World()
    assert (world.rank, world.size, world.local_rank, world.is_main) == (0, 1, 0, True)


def test_the_layout_is_read_from_the_launcher(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    assert (world.rank, world.size, world.local_rank, world.is_main) == (5, 8, 1, False)
    assert world.local_size == 4


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World()


def test_a_layout_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        World().rank = 1  # pyright: ignore[reportAttributeAccessIssue]


# batches


def test_inputs_are_those_of_the_first_view():
    assert torch.equal(batch().inputs["gene"], torch.zeros(3, 2))
    assert len(batch()) == 3


@pytest.mark.parametrize("number, value", [(0, 0.0), (1, 1.0), (5, 1.0)])
def test_another_view_shows_the_same_samples(number: int, value: float):
    """The last view stands in where fewer were made, so that a method for two views runs on one."""
    made = batch()
    seen = made.view(number)
    assert torch.equal(seen.inputs["gene"], torch.full((3, 2), value))
    assert len(seen.views) == 1
    assert seen.key_B is made.key_B
    assert (seen.step, seen.epoch, seen.progress) == (7, 2, 0.25)


def test_moving_casts_values_and_keeps_numbers():
    moved = batch().to(torch.device("cpu"), torch.float64)
    for view in moved.views:
        assert {values.dtype for values in view.values()} == {torch.float64}
    assert moved.label_B.dtype == moved.index_B.dtype == moved.sample_B.dtype == moved.key_B.dtype == torch.int64
    assert moved.present["gene"].dtype == torch.bool
    assert (moved.step, moved.epoch, moved.progress) == (7, 2, 0.25)


# what a step returns


class Arrived:
    """Rows of a pass that have come."""

    def __init__(self, value: float):
        self.value = value

    def wait(self) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor([int(self.value)])}


def output(value: float, step: int = 4) -> StepOutput:
    return StepOutput(
        loss=torch.tensor(value, requires_grad=True),
        parts={"task": torch.tensor(value)},
        gauges={"weight/a": torch.tensor(2 * value)},
        rows=(Arrived(value),),
        step=step,
    )


def test_one_pass_is_the_step():
    out = output(3.0)
    assert StepOutput.merge([out]) is out


def test_passes_are_averaged_and_their_rows_kept_in_order():
    out = StepOutput.merge([output(1.0), output(3.0), output(8.0)])
    assert out.loss.item() == out.parts["task"].item() == 4.0
    assert not out.loss.requires_grad
    assert out.gauges["weight/a"].item() == 8.0
    assert [arriving.wait()["index"].item() for arriving in out.rows] == [1, 3, 8]
    assert out.step == 4


# sections of a config


class Section(StrictConfig):
    size: int = 1
    """How many."""


def test_a_section_is_frozen_and_takes_known_keys_only():
    with pytest.raises(ValidationError, match="frozen"):
        Section().size = 2
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Section.model_validate({"sizes": 2})


def test_docstrings_of_fields_explain_the_schema():
    assert Section.model_json_schema()["properties"]["size"]["description"] == "How many."


def test_a_wrong_default_is_refused_too():
    class Wrong(StrictConfig):
        size: int = "many"  # pyright: ignore[reportAssignmentType]

    with pytest.raises(ValidationError, match="valid integer"):
        Wrong()


# errors


def test_every_error_of_a_user_has_its_own_kind():
    kinds = {name: getattr(errors, name).kind for name in errors.__all__ if name not in ("DistkdError", "Interrupted")}
    assert kinds["SampleError"] == kinds["DataError"]  # scripts need not know the one from the other
    assert len(set(kinds.values())) == len(kinds) - 1
    for name in kinds:
        assert issubclass(getattr(errors, name), DistkdError)
        assert not getattr(errors, name).local  # until a rank finds that it is alone with it


def test_validators_collect_config_errors():
    assert issubclass(ConfigError, ValueError)


def test_an_interruption_is_no_error_of_the_user():
    assert not issubclass(Interrupted, DistkdError)


def test_errors_travel_between_ranks():
    error = ConfigError("what is wrong")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (ConfigError, "what is wrong")


def test_no_source_line_asks_for_a_pickle():
    """Weights are safetensors: nothing that we read from disk may run code."""
    found: list[str] = []
    for path in (Path(errors.__file__).parent).rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"\btorch\.load\(|\bpickle\.loads?\(|allow_pickle=True", line):
                found.append(f"{path.name}:{number}: {line.strip()}")
    assert [line for line in found if "weights_only=True" not in line] == []
