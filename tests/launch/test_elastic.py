"""One machine: ranks that are brought back in place, signals that pass through torchrun, fewer ranks than before."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.launch import folders
from tests.launch.held import Hold, go_on, held, is_pending
from tests.launch.processes import Launched, environment, ranks_command, wait_for
from tests.launch.runs import Finish, law_run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def config(shards: Path, root: Path) -> dict[str, Any]:
    """In float64, so that another number of ranks ends within 1e-9."""
    return law_run("dc_distill", shards, root, engine={"precision": "fp64"})


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run on two ranks."""
    return finish(config, tmp_path_factory.mktemp("whole"), 2)


def test_a_killed_rank_is_brought_back_in_place(config: dict[str, Any], whole: Path, tmp_path: Path):
    path, folder = write_config(config, tmp_path)
    hold = Hold(tmp_path / "held", 20, ranks=2)
    command = ranks_command(path, ranks=2, max_restarts=1)
    with Launched(command, tmp_path / "log", environment(**hold.environ)) as run:
        ranks = held(hold, run)
        os.kill(ranks[1], signal.SIGKILL)
        go_on([ranks[0]])
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
    hold = Hold(tmp_path / "held", 8, ranks=2)
    with Launched(command, tmp_path / "log", environment(**hold.environ)) as run:
        ranks = held(hold, run).values()
        os.kill(run.process.pid, signal.SIGTERM)
        wait_for(lambda: all(is_pending(pid, signal.SIGTERM) for pid in ranks), run)
        go_on(ranks)
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
    hold = Hold(tmp_path / "held", 8, ranks=2)
    with Launched(ranks_command(path, ranks=2), tmp_path / "log", environment(**hold.environ)) as run:
        ranks = held(hold, run)
        run.kill([run.process.pid])
        run.wait()
        go_on(ranks.values())
        run.wait_until_gone()
    outcome = folders.outcome(folder)
    assert outcome["state"] == "interrupted"
    assert folders.newest_step(folder) == outcome["step"]
    finish(config, tmp_path, 2)
    assert folders.differences(folder, whole) == []


def test_a_run_goes_on_with_fewer_ranks(config: dict[str, Any], whole: Path, finish: Finish, tmp_path: Path):
    path, folder = write_config(config, tmp_path)
    hold = Hold(tmp_path / "held", 40, ranks=2)
    with Launched(ranks_command(path, ranks=2), tmp_path / "log", environment(**hold.environ)) as run:
        held(hold, run)
        run.kill()
    finish(config, tmp_path, 1)
    assert [start["world_size"] for start in folders.starts(folder)] == [2, 1]
    folders.assert_close(folder, whole, tolerance=1e-9)
    assert folders.outcome(folder)["state"] == "done"
