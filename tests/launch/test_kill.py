"""Law 2 with real processes: SIGKILL of a rank in mid-step, of everything in the middle of a save, and Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.laws.common import law_config

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 200


def _command(config: Path, ranks: int) -> list[str]:
    train = ["launch/train.py", str(config)]
    if ranks == 1:
        return [sys.executable, *train]
    # one attempt: the test itself starts the run again
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *train]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _run(config: Path, ranks: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(config, ranks), cwd=REPOSITORY, env=_environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )


def _start(config: Path, ranks: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(config, ranks),
        cwd=REPOSITORY,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, f"the run ended early: {process.stderr.read() if process.stderr else ''}"
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.01)  # polling another process, not waiting for luck


def _ranks_of(agent: int) -> list[int]:
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent)], capture_output=True, text=True, check=True)
    return [int(word) for word in listing.stdout.split()]


def _write(tmp_path: Path, shards: Path, root: Path, name: str) -> tuple[Path, Path]:
    """A config file and the folder of its run: long enough that a signal always meets it at work."""
    config = law_config(
        "dc_distill",
        shards,
        root,
        run={"name": f"kill-{name}", "epochs": 3, "log_every": 1, "checkpoint_every": 6},
        engine={"precision": "fp32"},
        batch={"global_batch": 8},
    )
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, root / f"kill-{name}"


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step-*"))
    return {f"{path.name}/{name}": t for path in newest.glob("*.safetensors") for name, t in load_file(path).items()}


def _assert_equal_ends(folder: Path, whole: Path) -> None:
    assert json.loads((folder / "outcome.json").read_text())["state"] == "done"
    expected, found = _weights(whole), _weights(folder)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert (folder / "eval" / "test.json").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: Path, root: Path) -> Path:
    """The uninterrupted run on two ranks."""
    config, folder = _write(tmp_path_factory.mktemp("whole"), shards, root, "whole")
    done = _run(config, 2)
    assert done.returncode == 0, done.stderr
    return folder


def test_killing_one_rank_in_mid_run_changes_nothing(tmp_path: Path, shards: Path, root: Path, whole: Path):
    config, folder = _write(tmp_path, shards, root, "rank")
    agent = _start(config, 2)
    try:
        metrics = folder / "metrics.jsonl"
        _wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 9, agent)
        os.kill(_ranks_of(agent.pid)[1], signal.SIGKILL)
        agent.wait(PATIENCE_S)
    finally:
        _end(agent)
    assert not (folder / "export").exists()
    assert (done := _run(config, 2)).returncode == 0, done.stderr
    _assert_equal_ends(folder, whole)


def test_killing_everything_in_the_middle_of_a_save_leaves_the_older_checkpoint(
    tmp_path: Path, shards: Path, root: Path, whole: Path
):
    config, folder = _write(tmp_path, shards, root, "save")
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
sys.exit(main(["train", {str(config)!r}]))
"""
    script = tmp_path / "dying.py"
    script.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    died = subprocess.run(
        command, cwd=REPOSITORY, env=_environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert died.returncode != 0
    assert list((folder / "checkpoints").glob(".step-00000018.*.partial"))
    assert max(path.name for path in (folder / "checkpoints").glob("step-*")) == "step-00000012"
    assert (done := _run(config, 2)).returncode == 0, done.stderr
    assert not list((folder / "checkpoints").glob(".*.partial"))
    _assert_equal_ends(folder, whole)


def test_ctrl_c_leaves_a_whole_checkpoint_and_exit_code_3(tmp_path: Path, shards: Path, root: Path):
    config, folder = _write(tmp_path, shards, root, "interrupt")
    process = _start(config, 1)
    try:
        metrics = folder / "metrics.jsonl"
        _wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 3
        assert process.stderr is not None
        text = process.stderr.read()
    finally:
        _end(process)
    assert "stopped by a signal after step" in text
    assert "Traceback" not in text
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["state"] == "interrupted"
    assert (folder / "checkpoints" / f"step-{outcome['step']:08d}" / "meta.json").exists()
    done = _run(config, 1)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "outcome.json").read_text())["state"] == "done"


def _end(process: subprocess.Popen[str]) -> None:
    """Whatever is left of a run that this test started; it has a process group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr is not None:
        process.stderr.close()
