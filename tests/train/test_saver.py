"""Checkpoints beside the training: one step each, whole or absent, by any number of writers, on any disk."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distkd.base import World
from distkd.comm.world import barrier
from distkd.engines import Entry
from distkd.errors import DiskError, TakenOverError
from distkd.train import saver as saver_module
from distkd.train.checkpoint import BEST, Best, Tensors, complete, find_latest, read_meta
from distkd.train.saver import Fate, Saver, owners

CPU = torch.device("cpu")


def entries_of(tensors: dict[str, Tensor]) -> list[Entry]:
    return [Entry(name, tensor.nbytes, lambda t=tensor: t) for name, tensor in tensors.items()]


def saver_of(folder: Path, world: World, **changes: Any) -> tuple[Saver, list[Fate]]:
    fates: list[Fate] = []
    options: dict[str, Any] = {"background": True, "keep_last": 2, "keep_best": False, "patience_s": 200.0}
    options |= {"attempt": "a1", "is_current": lambda: True}
    saver = Saver(folder / "checkpoints", world, CPU, report=fates.append, **{**options, **changes})
    if world.is_main:
        saver.checkpoints.mkdir(parents=True, exist_ok=True)
    return saver, fates


@contextmanager
def writing(replacement: Any) -> Iterator[None]:
    original = saver_module.save_file
    saver_module.save_file = replacement
    try:
        yield
    finally:
        saver_module.save_file = original


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@given(sizes=st.lists(st.integers(0, 10**9), max_size=40), writers=st.integers(1, 9))
def test_every_tensor_has_one_writer_and_none_writes_much_more(sizes: list[int], writers: int):
    entries = [Entry(f"t{number}", size, lambda: torch.empty(0)) for number, size in enumerate(sizes)]
    owner = owners(entries, writers)
    assert owner == owners(entries[::-1], writers)
    assert owner.keys() == {entry.name for entry in entries}
    load = [sum(entry.nbytes for entry in entries if owner[entry.name] == rank) for rank in range(writers)]
    assert max(load) - min(load) <= max(sizes, default=0)


def test_a_checkpoint_holds_the_step_at_which_it_was_asked_for(tmp_path: Path):
    """Weights change while the thread has not written a byte."""
    weights = torch.zeros(1000)
    go = threading.Event()
    original = saver_module.save_file

    def slow(*arguments: Any) -> None:
        assert go.wait(200)
        original(*arguments)

    saver, _ = saver_of(tmp_path, World(), keep_last=5)
    with writing(slow):
        saver.save(1, entries_of({"trainable/w": weights}), Best(), {})
        weights += 1
        assert complete(saver.checkpoints) == []
        go.set()
        saver.save(2, entries_of({"trainable/w": weights}), Best(), {})
        weights += 1
        saver.wait()
    for number, path in enumerate(complete(saver.checkpoints)):
        assert read_meta(path)["step"] == number + 1
        assert torch.equal(Tensors(path)["trainable/w"], torch.full((1000,), float(number)))
    assert (saver.checkpoints / "latest").read_text() == "step-00000002\n"


def test_what_changes_in_the_update_alone_is_copied_beside_the_next_forward(tmp_path: Path):
    steady, moving = torch.zeros(1000), torch.zeros(1000)
    saver, _ = saver_of(tmp_path, World())
    entries = [
        Entry("trainable/w", steady.nbytes, lambda: steady, steady=True),
        Entry("trainable/running_mean", moving.nbytes, lambda: moving),
    ]
    saver.save(1, entries, Best(), {})
    moving += 1  # a forward
    saver.before_update()
    steady += 1
    saver.wait()
    found = Tensors(complete(saver.checkpoints)[0])
    assert not found["trainable/w"].any()
    assert not found["trainable/running_mean"].any()


def test_an_update_waits_for_the_copy(tmp_path: Path):
    saver, _ = saver_of(tmp_path, World())
    taken = threading.Event()

    original = saver_module._Copy.fill

    def fill(copy: Any) -> None:
        taken.wait(0.2)  # nobody sets it: the main thread is held up meanwhile
        original(copy)

    weights = torch.zeros(10)
    saver_module._Copy.fill = fill  # type: ignore[method-assign]
    try:
        saver.save(1, [Entry("trainable/w", 40, lambda: weights, steady=True)], Best(), {})
        saver.before_update()
        weights += 1
        saver.wait()
    finally:
        saver_module._Copy.fill = original  # type: ignore[method-assign]
    assert not Tensors(complete(saver.checkpoints)[0])["trainable/w"].any()


def test_there_is_one_copy_on_the_host_and_it_is_reused(tmp_path: Path):
    weights = {"trainable/a": torch.randn(50), "optimizer/a/step": torch.tensor(3.0)}
    saver, _ = saver_of(tmp_path, World())
    saver.save(1, entries_of(weights), Best(), {})
    first = {name: tensor.data_ptr() for name, tensor in saver._buffers.items()}
    saver.save(2, entries_of(weights), Best(), {})
    saver.wait()
    assert {name: tensor.data_ptr() for name, tensor in saver._buffers.items()} == first
    assert first.keys() == weights.keys()


def _many_writers(world: World, folder: Path, background: bool) -> tuple[list[str], bool]:
    saver_module.SHARE_BYTES = 1000
    try:
        tensors = {f"trainable/{n}": torch.full((300 + n,), float(n)) for n in range(7)}
        saver, _ = saver_of(folder, world, background=background)
        best = Best(3, 0.5, {"w": torch.ones(2)} if world.is_main else {})
        saver.save(4, entries_of(tensors), best, {})
        saver.wait()
    finally:
        saver_module.SHARE_BYTES = 64 * 2**20
    [path] = complete(saver.checkpoints)
    found = Tensors(path)
    assert find_latest(saver.checkpoints, world) == path
    same = all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(found[f"{BEST}w"], torch.ones(2))
    assert len(found) == 8
    barrier(world)
    return sorted(file.name for file in path.iterdir()), same


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("background", [True, False])
def test_large_runs_are_written_by_several_ranks(ranks: Any, tmp_path: Path, size: int, background: bool):
    expected = ["meta.json", *(f"rank-{rank:05d}.safetensors" for rank in range(size))]
    assert ranks(size).run(_many_writers, folder=tmp_path, background=background) == [(expected, True)] * size


def test_small_runs_are_written_by_the_main_rank(tmp_path: Path):
    saver, _ = saver_of(tmp_path, World())
    saver.save(1, entries_of({"trainable/w": torch.ones(3)}), Best(), {})
    saver.wait()
    assert read_meta(complete(saver.checkpoints)[0])["files"].keys() == {"rank-00000.safetensors"}


def test_old_checkpoints_go_and_the_best_one_stays_on_demand(tmp_path: Path):
    for keep_best, kept in ((False, [4, 5]), (True, [2, 4, 5])):
        saver, _ = saver_of(tmp_path / str(keep_best), World(), keep_best=keep_best)
        for step in range(1, 6):
            best = Best(min(step, 2), 0.9, {"w": torch.ones(1)})
            saver.save(step, entries_of({"trainable/w": torch.ones(3)}), best, {})
        saver.wait()
        assert [read_meta(path)["step"] for path in complete(saver.checkpoints)] == kept


# what can go wrong


def _failing(world: World, folder: Path, rank: int) -> tuple[list[str | None], list[str], str]:
    """Two failures, a success, three failures: what each rank was told, what is on disk, and how it ended."""
    saver_module.SHARE_BYTES = 100
    saver, fates = saver_of(folder, world)
    entries = entries_of({f"trainable/{n}": torch.ones(100) for n in range(4)})
    end = ""
    try:
        for step, fails in enumerate([True, True, False, True, True, True]):
            broken = fails and world.rank == rank
            with writing(full_disk if broken else saver_module.save_file):
                saver.save(step, entries, Best(), {})
                saver.wait()
    except DiskError as error:
        end = str(error)
    finally:
        saver_module.SHARE_BYTES = 64 * 2**20
    barrier(world)
    return [fate.error for fate in fates], sorted(path.name for path in saver.checkpoints.iterdir()), end


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_is_survived_twice_and_agreed_on_by_all(ranks: Any, tmp_path: Path, rank: int):
    first, second = ranks(2).run(_failing, folder=tmp_path, rank=rank)
    assert first == second
    errors, files, end = first
    assert [error is None for error in errors] == [False, False, True, False, False, False]
    assert all("No space left on device" in error for error in errors if error is not None)
    assert files == ["latest", "step-00000002"]
    assert end.startswith("3 checkpoints in a row could not be written to ")
    assert "No space left on device; make room or choose another --run.root" in end


def test_a_failure_says_so_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    saver, fates = saver_of(tmp_path, World())
    with writing(full_disk):
        saver.save(7, entries_of({"trainable/w": torch.ones(3)}), Best(), {})
        saver.wait()
    said = (
        f"checkpoint of step 7 could not be written to {saver.checkpoints}: No space left on device; training goes on"
    )
    assert said in caplog.text
    assert [fate.error for fate in fates] == ["No space left on device"]
    assert list(saver.checkpoints.iterdir()) == []


def test_an_attempt_whose_run_was_taken_over_writes_nothing(tmp_path: Path):
    """Ranks may outlive their launcher and meet the next attempt in the same folder."""
    orphan, fates = saver_of(tmp_path, World(), is_current=lambda: False)
    newer, _ = saver_of(tmp_path, World(), attempt="a2")
    entries = entries_of({"trainable/w": torch.ones(3)})
    newer.save(1, entries, Best(), {})
    newer.wait()
    orphan.save(2, entries, Best(), {})
    with pytest.raises(TakenOverError, match="two jobs or terminals train it; this one ends, the other goes on"):
        orphan.wait()
    assert fates[0].error == "another attempt of this run has taken over"
    assert [path.name for path in complete(newer.checkpoints)] == ["step-00000001"]


def test_a_run_that_ends_with_an_error_finishes_its_checkpoint(tmp_path: Path):
    saver, _ = saver_of(tmp_path, World())
    saver.save(1, entries_of({"trainable/w": torch.ones(3)}), Best(), {})
    saver.abandon()
    assert [path.name for path in complete(saver.checkpoints)] == ["step-00000001"]
