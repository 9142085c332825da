"""Two nodes, as network namespaces with a cable between them: one is killed, the cable is cut, one goes on alone."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launch import folders
from tests.launch.held import Hold, go_on, held
from tests.launch.processes import REPOSITORY, Launched, environment, wait_for
from tests.launch.runs import Finish, law_run, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TIMEOUT_S = 15
"""How long a collective may wait: the link is cut for longer than that."""


@dataclass(frozen=True, slots=True)
class Network:
    """Two namespaces by name and their ends of the cable; node 0 has address 10.77.0.1, node 1 has 10.77.0.2."""

    names: tuple[str, str]
    devices: tuple[str, str]

    def link(self, state: str) -> None:
        """`up` or `down`, at both ends."""
        for name, device in zip(self.names, self.devices, strict=True):
            _ip("-n", name, "link", "set", device, state)

    def start(self, node: int, config: Path, log: Path, *, nodes: str = "2", hold: Hold | None = None) -> Launched:
        """multinode.sh with one rank on a node."""
        environ = environment(
            **(hold.environ if hold else {}),
            MASTER_ADDR="10.77.0.1",
            NODES=nodes,
            NODE_RANK=str(node),
            NPROC="1",
            GLOO_SOCKET_IFNAME=self.devices[node],
        )
        script = str(REPOSITORY / "launch" / "multinode.sh")
        command = ["ip", "netns", "exec", self.names[node], script, str(config)]
        return Launched([*command, "--engine.timeout_s", str(TIMEOUT_S)], log, environ)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    mark = uuid.uuid4().hex[:8]
    names, devices = (f"distkd-{mark}-0", f"distkd-{mark}-1"), (f"dk{mark}0", f"dk{mark}1")
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", devices[0], "netns", names[0], "type", "veth", "peer", devices[1], "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot make network namespaces here: {error.stderr.strip()}")
        for number, (name, device) in enumerate(zip(names, devices, strict=True), start=1):
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", device)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", device, "up")
        yield Network(names, devices)
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)


@pytest.fixture(scope="module")
def config(shards: Path, root: Path) -> dict[str, Any]:
    """In float64, so that fewer nodes end within 1e-9."""
    return law_run("dc_distill", shards, root, engine={"precision": "fp64"})


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run with two ranks on one machine."""
    return finish(config, tmp_path_factory.mktemp("whole"), 2)


def _says_who_and_where(message: str, rank: int) -> None:
    where = r"(collective '\w+' number \d+|the exchange of gradients) failed: .+"
    advice = "another rank died or stopped answering, start the run again to resume"
    record = rf"its last collectives are in \S+/events/flight-rank-{rank}"
    assert re.fullmatch(rf"rank {rank} of 2: {where}; {advice}; {record}", message, re.DOTALL), message
    assert Path(message.rpartition(" ")[2]).stat().st_size > 0


def _lost(folder: Path, rank: int) -> dict[str, Any] | None:
    """The event of a rank that has noticed the loss of another one."""
    return next((event for event in folders.events(folder, rank) if event.get("kind") == "lost_rank"), None)


def test_two_nodes_train_as_one_machine_does(network: Network, config: dict[str, Any], whole: Path, tmp_path: Path):
    path, folder = write_config(config, tmp_path)
    with (
        network.start(0, path, tmp_path / "log-0") as first,
        network.start(1, path, tmp_path / "log-1") as second,
    ):
        assert (first.wait(), second.wait()) == (0, 0), first.said() + second.said()
    assert folders.starts(folder)[0]["world_size"] == 2
    assert folders.differences(folder, whole) == []


def test_a_killed_node_is_noticed_in_words_and_can_come_back(
    network: Network, config: dict[str, Any], whole: Path, tmp_path: Path
):
    path, folder = write_config(config, tmp_path)
    hold = Hold(tmp_path / "held", 15, ranks=2)
    with network.start(0, path, tmp_path / "log-0", hold=hold) as first:
        with network.start(1, path, tmp_path / "log-1", hold=hold) as second:
            ranks = held(hold, first)
            second.kill()
            go_on(ranks.values())
        wait_for(lambda: folders.outcome(folder).get("kind") == "lost_rank", first)
        outcome = folders.outcome(folder)
        assert outcome["state"] == "failed"
        _says_who_and_where(outcome["message"], rank=0)
        wait_for(lambda: outcome["message"].splitlines()[0] in first.said(), first)
        # the other node's torchrun waits for it
        with network.start(1, path, tmp_path / "log-1-again") as second:
            assert (first.wait(), second.wait()) == (0, 0), first.said() + second.said()
    starts = folders.starts(folder)
    assert [start["world_size"] for start in starts] == [2] * len(starts)
    assert starts[-1]["step"] > 0
    assert folders.differences(folder, whole) == []


def test_a_cut_link_is_an_error_in_words_and_both_nodes_resume_when_it_is_back(
    network: Network, config: dict[str, Any], whole: Path, tmp_path: Path
):
    path, folder = write_config(config, tmp_path)
    hold = Hold(tmp_path / "held", 15, ranks=2)
    with (
        network.start(0, path, tmp_path / "log-0", hold=hold) as first,
        network.start(1, path, tmp_path / "log-1", hold=hold) as second,
    ):
        ranks = held(hold, first)
        network.link("down")
        go_on(ranks.values())
        wait_for(lambda: all(_lost(folder, rank) for rank in range(2)), first)
        network.link("up")
        for rank in range(2):
            event = _lost(folder, rank)
            assert event is not None
            _says_who_and_where(event["message"], rank)
        assert (first.wait(), second.wait()) == (0, 0), first.said() + second.said()
    assert folders.starts(folder)[-1]["step"] > 0
    assert folders.differences(folder, whole) == []


def test_one_node_goes_on_alone_where_that_is_allowed(
    network: Network, config: dict[str, Any], whole: Path, tmp_path: Path
):
    path, folder = write_config(config, tmp_path)
    hold = Hold(tmp_path / "held", 15, ranks=2)
    with network.start(0, path, tmp_path / "log-0", nodes="1:2", hold=hold) as first:
        with network.start(1, path, tmp_path / "log-1", nodes="1:2", hold=hold) as second:
            ranks = held(hold, first)
            second.kill()
            go_on(ranks.values())
        assert first.wait() == 0, first.said()
    last = folders.starts(folder)[-1]
    assert last["world_size"] == 1
    assert last["step"] > 0
    folders.assert_close(folder, whole, tolerance=1e-9)
