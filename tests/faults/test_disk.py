"""Disks that are full, slow or read-only: training goes on where it can, and no checkpoint is ever half."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch import folders
from tests.launch.held import Hold, go_on, held
from tests.launch.processes import Launched, environment, ranks_command
from tests.launch.runs import Finish, law_run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Mount = Callable[..., Path]

WHOLE = 14
"""Step with which one checkpoint is on disk for certain: the one of step 12 has waited for it."""

SLOW_DISK = """
import os, sys, time
sync = os.fsync
def slow_sync(descriptor):
    time.sleep(0.1)
    sync(descriptor)
os.fsync = slow_sync
from distkd.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """`mount(folder, *options)`, undone at the end of the test, also of one that failed."""
    mounted: list[Path] = []

    def do(folder: Path, *arguments: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    if os.geteuid():
        pytest.skip("only root can mount")
    yield do
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def config(shards: Path, root: Path) -> dict[str, Any]:
    return law_run("supervised", shards, root)


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run on one rank."""
    return finish(config, tmp_path_factory.mktemp("whole"), 1)


def _fill(folder: Path) -> Path:
    """A file that leaves no room beside it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return ballast


def _failures(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [event for event in folders.events(folder, rank) if event["event"] == "checkpoint_failed"]


def _in_a_row(folder: Path) -> int:
    """Checkpoints that failed since the last one that did not."""
    fates = [event["event"] for event in folders.events(folder) if event["event"].startswith("checkpoint")]
    return len(fates) - max((n for n, fate in enumerate(fates, start=1) if fate == "checkpoint"), default=0)


def test_a_checkpoint_that_finds_no_room_is_told_and_training_goes_on(
    config: dict[str, Any], whole: Path, tmp_path: Path, mount: Mount
):
    path, folder = write_config({**config, "run": {**config["run"], "checkpoint_every": 15}}, tmp_path)
    checkpoints = mount(folder / "checkpoints", "-t", "tmpfs", "-o", "size=2m", "none")
    hold = Hold(tmp_path / "held", 8, 35, ranks=1)
    with Launched(ranks_command(path, ranks=1), tmp_path / "log", environment(**hold.environ)) as run:
        ranks = held(hold, run).values()
        ballast = _fill(checkpoints)
        go_on(ranks)
        held(hold, run, 1)
        assert [failure["step"] for failure in _failures(folder)] == [15]  # that of step 30 is looked at when 45 is due
        ballast.unlink()
        go_on(ranks)
        assert run.wait() == 0, run.said()
        said = run.said()
    assert "No space left on device" in _failures(folder)[0]["reason"]
    assert f"checkpoint of step {_failures(folder)[0]['step']} could not be written" in said
    assert str(checkpoints) in said
    assert "No space left on device" in said
    assert folders.differences(folder, whole) == []


def test_three_failures_in_a_row_stop_all_ranks_and_leave_the_older_checkpoint(
    config: dict[str, Any], finish: Finish, tmp_path: Path, mount: Mount
):
    path, folder = write_config(config, tmp_path)
    checkpoints = mount(folder / "checkpoints", "-t", "tmpfs", "-o", "size=2m", "none")
    hold = Hold(tmp_path / "held", WHOLE, ranks=2)
    with Launched(ranks_command(path, ranks=2), tmp_path / "log", environment(**hold.environ)) as run:
        ranks = held(hold, run).values()
        ballast = _fill(checkpoints)
        go_on(ranks)
        assert run.wait() == 1, run.said()
        said = run.said()
    assert _in_a_row(folder) == 3
    outcome = folders.outcome(folder)
    assert (outcome["state"], outcome["kind"]) == ("failed", "disk")
    assert "3 checkpoints in a row could not be written" in outcome["message"]
    assert str(checkpoints) in outcome["message"]
    assert said.count("3 checkpoints in a row could not be written") == 1
    assert folders.events(folder, 1)[-1]["kind"] == "disk"
    assert folders.newest_step(folder) > 0
    assert folders.partials(folder) == []
    ballast.unlink()
    finish(config, tmp_path, 2)
    assert folders.differences(folder, finish(config, tmp_path / "whole", 2)) == []


def test_a_run_whose_whole_disk_is_full_ends_in_words_and_goes_on_later(
    config: dict[str, Any], whole: Path, finish: Finish, tmp_path: Path, mount: Mount
):
    small = mount(tmp_path / "small", "-t", "tmpfs", "-o", "size=2m", "none")
    path, folder = write_config(config, small)
    hold = Hold(tmp_path / "held", WHOLE, ranks=1)
    with Launched(ranks_command(path, ranks=1), tmp_path / "log", environment(**hold.environ)) as run:
        ranks = held(hold, run).values()
        ballast = _fill(small)
        go_on(ranks)
        assert run.wait() == 1, run.said()
        said = run.said()
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert folders.newest_step(folder) > 0
    ballast.unlink()
    finish(config, small, 1)
    assert folders.differences(folder, whole) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_root_that_cannot_be_written_is_refused_at_the_start(
    config: dict[str, Any], tmp_path: Path, mount: Mount, ranks: int
):
    path, _ = write_config(config, tmp_path)
    sealed = mount(tmp_path / "sealed", "-t", "tmpfs", "-o", "size=1m,ro", "none")
    with Launched(ranks_command(path, "--run.root", sealed, ranks=ranks), tmp_path / "log") as run:
        code = run.wait()
        said = run.said()
    assert code == 1  # another node may have it mounted as it should be
    words = f"distkd: cannot write run folder {sealed / 'run'}: Read-only file system; choose another --run.root"
    assert said.count(words) == 1, said
    if ranks == 1:
        assert said.strip() == words
    assert list(sealed.iterdir()) == []


def test_a_slow_disk_changes_nothing(config: dict[str, Any], whole: Path, tmp_path: Path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW_DISK)
    path, folder = write_config({**config, "run": {**config["run"], "keep_last": 30}}, tmp_path)
    with Launched([sys.executable, str(script), str(path)], tmp_path / "log") as run:
        assert run.wait() == 0, run.said()
    every = [f"step-{step:08d}" for step in range(6, 91, 6)]
    assert [found.name for found in folders.checkpoints(folder)] == every
    assert folders.differences(folder, whole) == []
