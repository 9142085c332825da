"""Law 2 with real processes: SIGKILL of a rank in mid-step, of everything in the middle of a save, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch import folders
from tests.launch.held import Hold, go_on, held
from tests.launch.processes import Launched, environment, ranks_command
from tests.launch.runs import Finish, law_run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def config(shards: Path, root: Path) -> dict[str, Any]:
    return law_run("dc_distill", shards, root)


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run on two ranks."""
    return finish(config, tmp_path_factory.mktemp("whole"), 2)


def test_killing_everything_in_the_middle_of_a_save_leaves_the_older_checkpoint(
    config: dict[str, Any], whole: Path, finish: Finish, tmp_path: Path
):
    path, folder = write_config(config, tmp_path)
    # the third checkpoint dies with its files half written
    program = f"""
import os, signal, sys
from distkd.train import saver
from distkd.cli import main
original, calls = saver.save_file, []
def dying(tensors, path):
    calls.append(path)
    if len(calls) == 3:
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    original(tensors, path)
saver.save_file = dying
sys.exit(main(["train", {str(path)!r}]))
"""
    script = tmp_path / "dying.py"
    script.write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with Launched([*torchrun, str(script)], tmp_path / "log") as run:
        assert run.wait() != 0
    assert len(folders.partials(folder)) == 1
    assert folders.partials(folder)[0].startswith(".step-00000018.")
    assert folders.newest_step(folder) == 12
    finish(config, tmp_path, 2)
    assert folders.differences(folder, whole) == []


def test_ctrl_c_leaves_a_whole_checkpoint_and_exit_code_3(config: dict[str, Any], finish: Finish, tmp_path: Path):
    path, folder = write_config(config, tmp_path)
    hold = Hold(tmp_path / "held", 4, ranks=1)
    with Launched(ranks_command(path, ranks=1), tmp_path / "log", environment(**hold.environ)) as run:
        ranks = held(hold, run)
        assert ranks == {0: run.process.pid}
        os.kill(run.process.pid, signal.SIGINT)
        go_on(ranks.values())
        assert run.wait() == 3
        text = run.said()
    assert "stopped as asked after step" in text
    assert "Traceback" not in text
    outcome = folders.outcome(folder)
    assert outcome["state"] == "interrupted"
    assert folders.newest_step(folder) == outcome["step"]
    finish(config, tmp_path, 1)
    assert folders.outcome(folder)["state"] == "done"
