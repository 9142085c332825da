"""Banks in checkpoints: any layout of rows, and of when they were written, is read into any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distkd.base import World
from distkd.engines import Entry
from distkd.errors import CheckpointError
from distkd.files import write_json
from distkd.memory.bank import MemoryBank
from distkd.train import rows
from distkd.train.checkpoint import META, Tensors, load, state_entries
from distkd.train.rows import Rows, bank_rows, fill_rows, has_rows, is_part, part_name, rows_entry
from distkd.train.saver import owners

N, D = 29, 4


def saved(parts: int, *, n_rows: int = N, dim: int = D) -> tuple[dict[str, Tensor], Tensor]:
    """A checkpoint of a bank laid out over `parts` ranks, and its rows in order."""
    whole = torch.randn(n_rows, dim, generator=torch.Generator().manual_seed(1))
    banks = [MemoryBank(n_rows, dim, seed=0, part=part, parts=parts) for part in range(parts)]
    return {part_name("state/b.rows_ND", bank): whole[bank.part :: parts].contiguous() for bank in banks}, whole


def rows_of(bank: MemoryBank) -> Rows:
    return Rows(bank, bank.rows_ND)


def reader(tensors: dict[str, Tensor]) -> Callable[[str, slice], Tensor]:
    return lambda name, part: tensors[name][part]


@pytest.mark.parametrize("now", [1, 2, 3, 4])
@pytest.mark.parametrize("then", [1, 2, 3, 4])
def test_rows_find_their_place_at_another_world_size(then: int, now: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "_CHUNK", 5)
    tensors, whole = saved(then)
    for part in range(now):
        bank = MemoryBank(N, D, seed=7, part=part, parts=now)
        fill_rows(rows_of(bank), "state/b.rows_ND", list(tensors), reader(tensors))
        assert torch.equal(bank.rows_ND, whole[part::now])


def test_only_the_own_part_is_read_when_the_layout_has_not_changed():
    tensors, _ = saved(3)
    asked: list[str] = []

    def read(name: str, part: slice) -> Tensor:
        asked.append(name)
        return tensors[name][part]

    fill_rows(rows_of(MemoryBank(N, D, seed=7, part=1, parts=3)), "state/b.rows_ND", list(tensors), read)
    assert set(asked) == {"state/b.rows_ND/part-00001-of-00003"}


def test_a_precision_may_change():
    tensors, whole = saved(2)
    bank = MemoryBank(N, D, seed=7, dtype=torch.bfloat16)
    fill_rows(rows_of(bank), "state/b.rows_ND", list(tensors), reader(tensors))
    assert torch.equal(bank.rows_ND, whole.bfloat16())


def test_rows_of_another_run_are_refused():
    bank = MemoryBank(N, D, seed=7)
    with pytest.raises(CheckpointError, match=r"the checkpoint has no rows 'state/b\.rows_ND'"):
        fill_rows(rows_of(bank), "state/b.rows_ND", [], reader({}))
    tensors, _ = saved(2)
    del tensors["state/b.rows_ND/part-00001-of-00002"]
    with pytest.raises(CheckpointError, match=r"has 15 of the 29 rows .* a part of it is missing"):
        fill_rows(rows_of(bank), "state/b.rows_ND", list(tensors), reader(tensors))
    for n_rows, dim, words in (
        (N + 1, D, "are more than the 29 training samples"),
        (N, D + 1, "width 5, the bank has 4"),
    ):
        tensors, _ = saved(1, n_rows=n_rows, dim=dim)
        with pytest.raises(CheckpointError, match=words):
            fill_rows(rows_of(bank), "state/b.rows_ND", list(tensors), reader(tensors))


def test_banks_are_found_by_the_names_of_their_rows():
    inner = nn.ModuleDict({"a": MemoryBank(3, 2, seed=0), "b": nn.Linear(2, 2)})
    found = bank_rows(nn.ModuleDict({"x": inner}))
    assert list(found) == ["x.a.rows_ND", "x.a.written_N"]
    assert is_part(part_name("x", MemoryBank(3, 2, seed=0, part=1, parts=2)))
    assert not is_part("x.rows_ND")


def test_rows_that_only_one_rank_has_are_written_by_it():
    sharded = rows_entry("a", rows_of(MemoryBank(40, 2, seed=0, part=1, parts=2)))
    common = Entry("b", 8, lambda: torch.zeros(2))
    assert sharded.local
    assert not rows_entry("a", rows_of(MemoryBank(40, 2, seed=0))).local
    assert owners([sharded, common], 2) == {"b": 0}


def test_a_reader_reads_no_more_than_it_is_asked_for(tmp_path: Path):
    save_file({"state/a": torch.arange(10.0).view(5, 2)}, tmp_path / "rank-00000.safetensors")
    write_json(tmp_path / META, {"format": 2})
    tensors = Tensors(tmp_path)
    assert tensors.rows("state/a", slice(3, 9)).tolist() == [[6, 7], [8, 9]]
    assert tensors.rows("state/a", slice(5, 9)).shape == (0, 2)


# when rows were written


def written(part: int, parts: int) -> nn.ModuleDict:
    """A state whose bank was written four times."""
    bank = MemoryBank(N, D, seed=0, part=part, parts=parts)
    for step in range(4):
        index = torch.tensor([step, 3 * step, 7 * step])
        bank.write(index, nn.functional.normalize(torch.ones(3, D), dim=1), momentum=0.5)
    return nn.ModuleDict({"b": bank})


def write_checkpoint(folder: Path, parts: int, *, ages: bool) -> None:
    """What the ranks of a run would write; without ages as before they were kept."""
    entries = {entry.name: entry.read() for part in range(parts) for entry in state_entries(written(part, parts))}
    kept = {name: tensor for name, tensor in entries.items() if ages or "rows_ND" in name}
    save_file(kept, folder / "rank-00000.safetensors")
    write_json(folder / META, {"format": 2, "best": None})


def loaded(folder: Path, part: int, parts: int) -> MemoryBank:
    bank = MemoryBank(N, D, seed=7, part=part, parts=parts)
    engine: Any = SimpleNamespace(load=lambda _: None)
    load(folder, engine=engine, state=nn.ModuleDict({"b": bank}), world=World(part, parts))
    return bank


@pytest.mark.parametrize("now", [1, 2, 3])
@pytest.mark.parametrize("then", [1, 2, 3])
def test_when_rows_were_written_goes_where_they_go(tmp_path: Path, then: int, now: int):
    write_checkpoint(tmp_path, then, ages=True)
    expected = written(0, 1)["b"]
    assert isinstance(expected, MemoryBank)
    for part in range(now):
        bank = loaded(tmp_path, part, now)
        assert torch.equal(bank.rows_ND, expected.rows_ND[part::now])
        assert torch.equal(bank.written_N, expected.written_N[part::now])
        assert bank.writes == 4


@pytest.mark.parametrize("now", [1, 2])
@pytest.mark.parametrize("then", [1, 2])
def test_rows_of_a_checkpoint_without_ages_count_as_written_at_the_restart(tmp_path: Path, then: int, now: int):
    write_checkpoint(tmp_path, then, ages=False)
    assert not has_rows("state/b.written_N", list(Tensors(tmp_path)))
    for part in range(now):
        bank = loaded(tmp_path, part, now)
        assert bank.written_N.eq(bank.writes).all()


def test_a_checkpoint_that_lacks_the_ages_of_one_rank_is_refused(tmp_path: Path):
    write_checkpoint(tmp_path, 2, ages=True)
    path = tmp_path / "rank-00000.safetensors"
    tensors = dict(Tensors(tmp_path))
    del tensors["state/b.written_N/part-00001-of-00002"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"has 15 of the 29 rows of 'state/b\.written_N'"):
        loaded(tmp_path, 0, 1)
