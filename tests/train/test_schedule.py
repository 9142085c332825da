"""Learning rates are functions of the step alone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from distkd.base import World
from distkd.engines import OptimConfig
from distkd.errors import ConfigError
from distkd.train.schedule import lr_scale
from distkd.train.settings import BatchConfig
from tests.golden_numbers import golden


def scales(steps_per_epoch: int, epochs: int, **settings: Any) -> list[float]:
    config = OptimConfig(**settings)
    steps = range(steps_per_epoch * epochs)
    return [lr_scale(config, step, steps_per_epoch=steps_per_epoch, epochs=epochs) for step in steps]


@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_linear_is_that_of_the_published_code(steps_per_epoch: int):
    expected = golden("dc-distill-gk-refine")["lr"]
    found = scales(steps_per_epoch, expected["epochs"], schedule="linear")
    rates = [expected["base"] * scale for scale in found]
    assert rates[::steps_per_epoch][:3] == pytest.approx(expected["first3"], abs=1e-14)
    assert rates[::steps_per_epoch][-3:] == pytest.approx(expected["last3"], abs=1e-14)


def test_linear_is_constant_within_an_epoch_and_the_default():
    assert OptimConfig().schedule == "linear"
    assert scales(3, 2) == pytest.approx([2 / 3] * 3 + [1 / 3] * 3)


def test_constant_is_constant():
    assert scales(4, 5, schedule="constant") == [1.0] * 20


def test_cosine_falls_from_one_towards_zero():
    found = scales(5, 4, schedule="cosine")
    assert found == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)])
    assert found[0] == 1.0
    assert found[10] == pytest.approx(0.5)
    assert all(before > after for before, after in pairwise(found))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup, steps", [(1, 4), (0.5, 2), (2, 8)])
def test_warmup_rises_to_the_schedule(schedule: str, warmup: float, steps: int):
    plain = scales(4, 5, schedule=schedule)
    warm = scales(4, 5, schedule=schedule, warmup_epochs=warmup)
    assert warm[:steps] == pytest.approx([scale * (step + 1) / steps for step, scale in enumerate(plain[:steps])])
    assert warm[steps - 1 :] == plain[steps - 1 :]
    assert min(warm) > 0


# how a step is divided


@pytest.mark.parametrize(
    "batch, micro, size, per_rank, passes",
    [
        (64, None, 1, 64, 1),
        (64, None, 4, 16, 1),
        (64, 8, 1, 8, 8),
        (64, 8, 4, 8, 2),
        (64, 16, 4, 16, 1),
        (1, None, 1, 1, 1),
    ],
)
def test_a_global_batch_is_passes_of_ranks(batch: int, micro: int | None, size: int, per_rank: int, passes: int):
    config = BatchConfig(global_batch=batch, micro_batch=micro)
    assert config.per_rank(World(0, size)) == per_rank
    assert config.passes(World(0, size)) == passes
    assert per_rank * passes * size == batch


@pytest.mark.parametrize(
    "batch, micro, size, words",
    [
        (65, None, 4, "batch.global_batch=65 is not a multiple of the world size 4; use 64 or another number of ranks"),
        (3, None, 4, "use 4 or another number"),
        (64, 24, 2, "is not a multiple of micro_batch x world size = 24 x 2 = 48; use 48, or leave micro_batch out"),
        (16, 32, 1, "= 32 x 1 = 32; use 32, or leave micro_batch out"),
    ],
)
def test_a_batch_that_does_not_divide_names_one_that_does(batch: int, micro: int | None, size: int, words: str):
    config = BatchConfig(global_batch=batch, micro_batch=micro)
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        config.passes(World(0, size))
