"""Which processes belong to a SLURM cluster of the tests, and to which of its nodes.

All nodes are on this machine, so a node is a set of processes: its slurmd, the slurmstepd of each step, and the steps.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Member", "find_members", "send", "since", "started", "state_of"]


@dataclass(frozen=True, slots=True)
class Member:
    """A living process of a cluster."""

    pid: int
    node: str
    """Empty for what runs on no node: the controller, and commands of the test itself."""
    daemon: bool
    """SLURM's own: slurmctld, slurmd or slurmstepd."""
    environ: dict[str, str]
    """As it was at its start; of a daemon it may be incomplete."""


def find_members(conf: Path, logs: Path) -> list[Member]:
    """Living processes of the cluster with this slurm.conf, whose daemons log into this folder; oldest first.

    Zombies have no environment and no files, so they are dead here, whoever forgets to reap them.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            member = _member(folder, conf, logs)
            if member is not None and member.pid != os.getpid():
                found.append(member)
    return sorted(found, key=lambda member: since(member.pid))


def _member(folder: Path, conf: Path, logs: Path) -> Member | None:
    environ = _environ(folder)
    # slurmstepd writes its title over a part of its environment, so the open log tells whose it is
    if (folder / "comm").read_text().startswith("slurm"):
        for file in (folder / "fd").iterdir():
            log = Path(os.readlink(file))
            if log.parent == logs:
                node = "" if log.stem == "slurmctld" else log.stem
                return Member(int(folder.name), node, daemon=True, environ=environ)
    if environ.get("SLURM_CONF") != str(conf):
        return None
    return Member(int(folder.name), environ.get("SLURMD_NODENAME", ""), daemon=False, environ=environ)


def _environ(folder: Path) -> dict[str, str]:
    words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """The signal to each of them that still lives."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def started(pid: int) -> str:
    """When the process began, in clock ticks since the machine did; empty when it is dead, also when nobody reaped it.

    With it a process id stays the same process: ids are given out again.
    """
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else ""


def since(pid: int) -> tuple[int, int]:
    """What puts processes into the order in which they began: ids do not, where the largest has been given out."""
    return int(started(pid) or 0), pid


def state_of(pid: int) -> str:
    """The letter that the kernel has for it, `T` where it is stopped; empty when it is dead."""
    fields = _stat(pid)
    return fields[0].strip("ZX") if fields else ""


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
