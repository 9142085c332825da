"""One machine: ranks that are brought back in place, signals that pass through torchrun, fewer ranks than before."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.launch import folders
from tests.launch.processes import Launched, ranks_command, wait_for
from tests.launch.runs import Finish, law_run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def config(shards: Path, root: Path) -> dict[str, Any]:
    """In float64, so that another number of ranks ends within 1e-9."""
    return law_run("dc_distill", shards, root, engine={"precision": "fp64"})


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run on two ranks."""
    return finish(config, tmp_path_factory.mktemp("whole"), 2)


def _past(folder: Path, step: int) -> bool:
    return folders.last_line(folder)["step"] >= step


def test_a_killed_rank_is_brought_back_in_place(config: dict[str, Any], whole: Path, tmp_path: Path):
    path, folder = write_config(config, tmp_path)
    with Launched(ranks_command(path, ranks=2, max_restarts=1), tmp_path / "log") as run:
        wait_for(lambda: _past(folder, 20), run)
        os.kill(run.ranks()[1], signal.SIGKILL)
        assert run.wait() == 0, run.said()
    assert folders.differences(folder, whole) == []
    assert folders.outcome(folder)["attempt"] == 2
    for rank in range(2):
        starts = folders.starts(folder, rank)
        assert [(start["attempt"], start["world_size"]) for start in starts] == [(1, 2), (2, 2)]
        assert starts[0]["step"] == 0 < starts[1]["step"]
    assert folders.events(folder)[-1]["event"] == "done"


def test_a_signal_to_the_launcher_stops_all_ranks_with_a_checkpoint(
    config: dict[str, Any], whole: Path, finish: Finish, tmp_path: Path
):
    path, folder = write_config(config, tmp_path)
    command = ranks_command(path, "--run.root", tmp_path, ranks=2, max_restarts=3)
    with Launched(command, tmp_path / "log") as run:
        wait_for(lambda: _past(folder, 8), run)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.wait() == 3, run.said()
        assert run.said().count("distkd: stopped as asked after step") == 1
    outcome = folders.outcome(folder)
    assert (outcome["state"], outcome["attempt"]) == ("interrupted", 1)
    assert folders.newest_step(folder) == outcome["step"] < folders.last_line(whole)["step"]
    assert "stopped as asked after step" in outcome["message"]
    finish(config, tmp_path, 2)
    assert folders.starts(folder)[-1]["step"] == outcome["step"]
    assert folders.differences(folder, whole) == []


def test_ranks_do_not_outlive_their_torchrun(config: dict[str, Any], whole: Path, finish: Finish, tmp_path: Path):
    path, folder = write_config(config, tmp_path)
    with Launched(ranks_command(path, ranks=2), tmp_path / "log") as run:
        wait_for(lambda: _past(folder, 8), run)
        ranks = run.ranks()
        assert len(ranks) == 2
        run.kill([run.process.pid])
        run.wait()
        run.wait_until_gone()
    outcome = folders.outcome(folder)
    assert outcome["state"] == "interrupted"
    assert folders.newest_step(folder) == outcome["step"]
    finish(config, tmp_path, 2)
    assert folders.differences(folder, whole) == []


def test_a_run_goes_on_with_fewer_ranks(config: dict[str, Any], whole: Path, finish: Finish, tmp_path: Path):
    path, folder = write_config(config, tmp_path)
    with Launched(ranks_command(path, ranks=2), tmp_path / "log") as run:
        wait_for(lambda: _past(folder, 40), run)
        run.kill()
    finish(config, tmp_path, 1)
    assert [start["world_size"] for start in folders.starts(folder)] == [2, 1]
    folders.assert_close(folder, whole, tolerance=1e-9)
    assert folders.outcome(folder)["state"] == "done"
