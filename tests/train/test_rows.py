"""Banks in checkpoints: any layout of rows is read into any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distkd.engines import Entry
from distkd.errors import CheckpointError
from distkd.memory.bank import MemoryBank
from distkd.train import rows
from distkd.train.rows import bank_rows, fill_rows, is_part, part_name, rows_entry
from distkd.train.saver import owners

N, D = 29, 4


def saved(parts: int, *, n_rows: int = N, dim: int = D) -> tuple[dict[str, Tensor], Tensor]:
    """A checkpoint of a bank laid out over `parts` ranks, and its rows in order."""
    whole = torch.randn(n_rows, dim, generator=torch.Generator().manual_seed(1))
    banks = [MemoryBank(n_rows, dim, seed=0, part=part, parts=parts) for part in range(parts)]
    return {part_name("state/b.rows_ND", bank): whole[bank.part :: parts].contiguous() for bank in banks}, whole


def reader(tensors: dict[str, Tensor]) -> Callable[[str, slice], Tensor]:
    return lambda name, part: tensors[name][part]


@pytest.mark.parametrize("now", [1, 2, 3, 4])
@pytest.mark.parametrize("then", [1, 2, 3, 4])
def test_rows_find_their_place_at_another_world_size(then: int, now: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "_CHUNK", 5)
    tensors, whole = saved(then)
    for part in range(now):
        bank = MemoryBank(N, D, seed=7, part=part, parts=now)
        fill_rows(bank, "state/b.rows_ND", list(tensors), reader(tensors))
        assert torch.equal(bank.rows_ND, whole[part::now])


def test_only_the_own_part_is_read_when_the_layout_has_not_changed():
    tensors, _ = saved(3)
    asked: list[str] = []

    def read(name: str, part: slice) -> Tensor:
        asked.append(name)
        return tensors[name][part]

    fill_rows(MemoryBank(N, D, seed=7, part=1, parts=3), "state/b.rows_ND", list(tensors), read)
    assert set(asked) == {"state/b.rows_ND/part-00001-of-00003"}


def test_a_precision_may_change():
    tensors, whole = saved(2)
    bank = MemoryBank(N, D, seed=7, dtype=torch.bfloat16)
    fill_rows(bank, "state/b.rows_ND", list(tensors), reader(tensors))
    assert torch.equal(bank.rows_ND, whole.bfloat16())


def test_rows_of_another_run_are_refused():
    bank = MemoryBank(N, D, seed=7)
    with pytest.raises(CheckpointError, match=r"the checkpoint has no rows 'state/b\.rows_ND'"):
        fill_rows(bank, "state/b.rows_ND", [], reader({}))
    tensors, _ = saved(2)
    del tensors["state/b.rows_ND/part-00001-of-00002"]
    with pytest.raises(CheckpointError, match=r"has 15 of the 29 rows .* a part of it is missing"):
        fill_rows(bank, "state/b.rows_ND", list(tensors), reader(tensors))
    for n_rows, dim, words in (
        (N + 1, D, "are more than the 29 training samples"),
        (N, D + 1, "width 5, the bank has 4"),
    ):
        tensors, _ = saved(1, n_rows=n_rows, dim=dim)
        with pytest.raises(CheckpointError, match=words):
            fill_rows(bank, "state/b.rows_ND", list(tensors), reader(tensors))


def test_banks_are_found_by_the_names_of_their_rows():
    inner = nn.ModuleDict({"a": MemoryBank(3, 2, seed=0), "b": nn.Linear(2, 2)})
    found = bank_rows(nn.ModuleDict({"x": inner}))
    assert list(found) == ["x.a.rows_ND"]
    assert is_part(part_name("x", MemoryBank(3, 2, seed=0, part=1, parts=2)))
    assert not is_part("x.rows_ND")


def test_rows_that_only_one_rank_has_are_written_by_it():
    sharded = rows_entry("a", MemoryBank(40, 2, seed=0, part=1, parts=2))
    common = Entry("b", 8, lambda: torch.zeros(2))
    assert sharded.local
    assert not rows_entry("a", MemoryBank(40, 2, seed=0)).local
    assert owners([sharded, common], 2) == {"b": 0}


def test_a_reader_reads_no_more_than_it_is_asked_for(tmp_path: Path):
    from distkd.files import write_json
    from distkd.train.checkpoint import META, Tensors

    save_file({"state/a": torch.arange(10.0).view(5, 2)}, tmp_path / "rank-00000.safetensors")
    write_json(tmp_path / META, {"format": 2})
    tensors = Tensors(tmp_path)
    assert tensors.rows("state/a", slice(3, 9)).tolist() == [[6, 7], [8, 9]]
    assert tensors.rows("state/a", slice(5, 9)).shape == (0, 2)
