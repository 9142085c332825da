"""What can be configured of a method's banks: where rows lie, in which precision, how much memory they may take."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from distkd.base import World
from distkd.errors import ConfigError
from distkd.memory.candidates import Candidates
from distkd.memory.placement import Replicated, Sharded
from distkd.methods import Setup
from distkd.methods._banks import BankConfig, Banks
from tests.methods.common import N_CLASSES, ROWS, SPECS, model_config


def banks(world: World = World(), *, memory: int = 2**40, labels: Any = None, **options: Any) -> Banks:  # noqa: B008
    label_N = torch.arange(ROWS) % N_CLASSES if labels is None else labels
    setup = Setup(model_config("crd"), SPECS, N_CLASSES, label_N, seed=3, world=world, memory_bytes=memory)
    return Banks(BankConfig(**options), ("teacher", "mean_teacher"), 8, setup, momentum=0.5)


def test_rows_are_sharded_where_there_is_more_than_one_rank():
    assert isinstance(banks(placement="sharded").placement, Replicated)
    sharded = banks(World(rank=1, size=4), placement="sharded")
    assert isinstance(sharded.placement, Sharded)
    assert {(bank.part, bank.parts) for bank in sharded.named_banks().values()} == {(1, 4)}
    assert isinstance(banks(World(rank=1, size=4)).placement, Replicated)


def test_banks_are_named_as_their_embeddings_are():
    names = ["teacher.student", "teacher.teacher", "mean_teacher.student", "mean_teacher.teacher"]
    assert list(banks().named_banks()) == names
    rows = [bank.rows_ND for bank in banks().named_banks().values()]
    assert len({rows_ND[0, 0].item() for rows_ND in rows}) == 4


@pytest.mark.parametrize(("name", "dtype"), [("run", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_rows_have_the_precision_of_the_config(name: str, dtype: torch.dtype):
    assert {bank.rows_ND.dtype for bank in banks(dtype=name).named_banks().values()} == {dtype}


def test_columns_are_set_aside_for_the_worst_class():
    """Labels that count up in step with the ranks: all rows of a class lie on one of them."""
    placement = banks(World(rank=0, size=2), labels=torch.arange(24) % 2, placement="sharded").placement
    assert isinstance(placement, Sharded)
    assert placement.shares == (1.0, 1.0)
    placement = banks(World(rank=0, size=2), labels=torch.arange(24) // 12, placement="sharded").placement
    assert isinstance(placement, Sharded)
    assert placement.shares == (0.5, 0.5)


def test_an_anchor_without_a_label_has_all_its_positives_in_one_place():
    labels = (torch.arange(2000) // 2 % 3).where(torch.arange(2000) % 10 > 0, -1)
    placement = banks(World(rank=0, size=2), labels=labels, placement="sharded").placement
    assert isinstance(placement, Sharded)
    candidates = Candidates(labels, n_positive=300, n_negative=40)
    index = torch.tensor([0, 10, 1, 3])
    drawn = candidates(index, index)
    assert drawn[0, :300].unique().tolist() == [0]
    columns = placement.columns(drawn, 300, (300, 40))
    counted = torch.isfinite(columns.offset_AM).sum(dim=1)
    assert counted.tolist() == (drawn % 2 == 0).sum(dim=1).tolist()


def test_banks_beyond_their_share_of_the_memory_are_refused_with_every_way_out():
    labels = torch.arange(30_000) % 3
    words = (
        "4 memory banks of 30,000 rows x 8 take 0.00447 GiB on a rank and may take 0.00391 GiB "
        "(method.bank.memory_share=0.5 of 0.00781 GiB); use --method.bank.placement sharded, "
        "or --method.bank.dtype bf16, or sharded banks on more ranks, or a larger --method.bank.memory_share"
    )
    with pytest.raises(ConfigError, match=re.escape(words)):
        banks(World(size=4), memory=2**23, labels=labels)
    banks(World(size=4), memory=2**23, labels=labels, memory_share=0.9)
    banks(World(size=4), memory=2**23, labels=labels, placement="sharded")
    banks(World(size=4), memory=2**23, labels=labels, dtype="bf16")
    with pytest.raises(ConfigError, match="use more ranks, or a larger"):
        banks(World(size=2), memory=2**20, labels=labels, placement="sharded", dtype="fp16")


@pytest.mark.parametrize(
    "wrong", [{"placement": "everywhere"}, {"dtype": "int8"}, {"memory_share": 0}, {"check_every": -1}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        BankConfig(**wrong)
