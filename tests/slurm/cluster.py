"""A real SLURM cluster on this machine for tests: slurmctld and some slurmd on loopback, as any user, in a second.

Scheduling, pre-emption, requeueing and lost nodes are SLURM's own. Not real are: resources, of which more are declared
than there are and nothing is enforced; GPUs, which are names of /dev/null; authentication; the network.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from tests.launch.processes import environment
from tests.require import program_path
from tests.slurm.members import Member, find_members, send, started

__all__ = ["FINAL", "PATIENCE_S", "PROGRAMS", "Cluster"]

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
FINAL = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
)
"""States that a job does not leave by itself."""
_COMMAND_TIMEOUT_S = 240.0
PATIENCE_S = 600.0
"""How long anything may take: a job that goes back to the queue waits for several of SLURM's own times."""
_POLL_S = 0.2
_PORTS = range(30000, 32000)
"""Below the ephemeral ports, which anybody may be given at any time, and above those that jobs take."""
_PREFIX = "distkd-slurm-"
_Value = TypeVar("_Value")

# Waits of SLURM that every test would feel are short here; each still has every phase of a real site's. Those in which
# a node has to answer, or a run to write its checkpoint, are as long as at one: processes of a busy machine are slow.
_CONF = """\
ClusterName=distkd
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
# the ports of a job follow from its id: several clusters of one machine must not give out the same ones
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={state}/state
# how long the controller and the nodes may be busy with something else before a command or a node is given up
MessageTimeout=60
SlurmdSpoolDir={state}/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/%n.pid
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/%n.log
PlugStackConfig={state}/plugstack.conf
JobCompType=jobcomp/filetxt
JobCompLoc={state}/log/jobs.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,sched_interval=1,preempt_reorder_count=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
# a requeued job waits until its credential has ended: 5 s is the least that SLURM takes, 120 s is usual
AuthInfo=cred_expire=5
# a node is down after so long without an answer; 300 s is usual
SlurmdTimeout={node_timeout_s}
# between SIGTERM and SIGKILL of a job that is cancelled or out of time; 30 s is usual
KillWait={kill_wait_s}
# what scontrol says of jobs that ended is kept
MinJobAge=86400
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Nodes `n1`, `n2`, .. in the partitions `main` and `urgent`, whose jobs pre-empt those of `main`.

    Logs are in `folder`, and so are the jobs' own where a script does not say otherwise. What is left at the end of the
    block, jobs and their processes included, is ended.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 4,
        cpus: int = 4,
        gpus: int = 2,
        memory_mb: int = 64000,
        node_timeout_s: int = 30,
        kill_wait_s: int = 30,
        grace_s: int = 180,
    ):
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._node = f"CPUs={cpus} RealMemory={memory_mb} Gres=gpu:{gpus}" if gpus else f"CPUs={cpus}"
        self._gpus = gpus
        self._times = {"node_timeout_s": node_timeout_s, "kill_wait_s": kill_wait_s, "grace_s": grace_s}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # ---- a command, as a user would give it

    @property
    def environ(self) -> dict[str, str]:
        """For a process that uses this cluster, and knows of no other, nor of settings of who runs the tests."""
        foreign = ("DISTKD_", "SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SINFO", "SCONTROL", "SCANCEL", "SACCT")
        kept = {name: value for name, value in environment().items() if not name.startswith(foreign)}
        return {**kept, "PATH": program_path(), "SLURM_CONF": str(self._conf)}

    def call(
        self, *command: str | Path, environ: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The command's end, whatever it is. `environ` comes on top of the cluster's."""
        return subprocess.run(
            [str(word) for word in command],
            env={**self.environ, **(environ or {})},
            cwd=cwd or self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
        )

    def run(self, *command: str | Path, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """What the command says, which has to succeed."""
        done = self.call(*command, environ=environ, cwd=cwd)
        words = " ".join(map(str, command))
        assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(
        self,
        script: Path,
        *arguments: str | Path,
        options: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """Hand a batch script over. Its id; of an array that of the whole."""
        said = self.run("sbatch", "--parsable", *options, script, *arguments, environ=environ, cwd=cwd)
        return said.strip().partition(";")[0]

    def scancel(self, *words: str) -> None:
        """`scancel` with these options and jobs."""
        self.run("scancel", *words)

    # ---- what SLURM says

    def records(self, job: str) -> list[dict[str, str]]:
        """All that is known of a job, one record for each task of an array that has started; also long after its end.

        `job` is an id as people see it: `17`, or `17_3` for a task.
        """
        lines = self.run("scontrol", "show", "job", "--oneliner", job).splitlines()
        return [_fields(line) for line in lines if line.strip()]

    def show(self, job: str) -> dict[str, str]:
        """All that is known of a job or one task of an array, by SLURM's names: `JobState`, `Restarts`, `NodeList`."""
        records = self.records(job)
        assert len(records) == 1, f"{job} is not one job, but {len(records)}"
        return records[0]

    def state(self, job: str) -> str:
        """For example `PENDING`, `RUNNING`, `COMPLETING`, or one of `FINAL`."""
        return self.show(job)["JobState"]

    def jobs(self) -> dict[str, str]:
        """State of each job that waits or runs, by id; an array's tasks one by one."""
        lines = self.run("squeue", "--noheader", "--array", "--states=all", "--format=%i %T").splitlines()
        return {job: state for job, _, state in (line.partition(" ") for line in lines) if state not in FINAL}

    def node_states(self) -> dict[str, str]:
        """State of each node, such as `IDLE`, `MIXED`, `DOWN+NOT_RESPONDING`."""
        records = map(_fields, self.run("scontrol", "show", "node", "--oneliner").splitlines())
        return {record["NodeName"]: record["State"] for record in records if record}

    def log(self, job: str) -> str:
        """What the job, or all tasks of an array, wrote so far."""
        paths = {record["StdOut"] for record in self.records(job) if "StdOut" in record}
        texts = [f"--- {path}\n{_text(Path(path))}" for path in sorted(paths)]
        return "\n".join(texts)

    # ---- waiting

    def wait(
        self, job: str, states: str | Collection[str] = "COMPLETED", *, restart: int = 0, patience_s: float = PATIENCE_S
    ) -> list[dict[str, str]]:
        """Until the job, or every task of an array, is in one of the states after so many requeues, or more.

        Returns:
            Its records.

        Raises:
            AssertionError: it does not get there, or ended otherwise, with its log and the controller's.
        """
        wanted = {states} if isinstance(states, str) else set(states)

        def arrived() -> list[dict[str, str]]:
            records = self.records(job)
            now = {record["JobState"] for record in records}
            if now <= wanted and min(int(record.get("Restarts", 0)) for record in records) >= restart:
                return records
            assert not now <= FINAL, f"job {job} ended as {sorted(now)}, not {sorted(wanted)}\n{self.report(job)}"
            return []

        return self.until(arrived, f"job {job} in {sorted(wanted)} after {restart} requeues", job, patience_s)

    def until(
        self, condition: Callable[[], _Value], what: str, job: str = "", patience_s: float = PATIENCE_S
    ) -> _Value:
        """Poll until the condition holds; its value.

        Raises:
            AssertionError: it does not, with the log of the job and what the cluster says.
        """
        end = time.monotonic() + patience_s
        while not (value := condition()):
            assert time.monotonic() < end, f"no {what} within {patience_s:.0f} s\n{self.report(job)}"
            time.sleep(_POLL_S)  # polling other processes, not waiting for luck
        return value

    def report(self, job: str = "") -> str:
        """What somebody needs who looks for the reason of a failed test."""
        parts = []
        if job:
            parts += [self.call("scontrol", "show", "job", job).stdout, self.log(job)[-8000:]]
        parts += [self.call("squeue", "--array", "--long").stdout, self.call("sinfo", "--long", "--Node").stdout]
        parts += [f"--- {path.name}\n{_text(path)[-2500:]}" for path in sorted(self._logs.glob("*.log"))]
        return "\n".join(parts)

    # ---- what happens to nodes

    def members(self, node: str | None = None) -> list[Member]:
        """Living processes of the cluster, or of a node, oldest first."""
        found = find_members(self._conf, self._logs)
        return [member for member in found if node is None or member.node == node]

    def lose(self, node: str) -> None:
        """SIGKILL to slurmd alone: its ranks go on, also when SLURM, after some time, takes the node for dead."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()

    def crash(self, node: str) -> None:
        """SIGKILL to all that runs on it: connections close, so other ranks see it at once and SLURM later."""
        self.lose(node)
        _kill_all(lambda: self.members(node))

    def hang(self, node: str) -> None:
        """SIGSTOP to all that runs on it: connections stay open and nobody answers, as when power or a cable is gone.

        SLURM takes the node for dead after some time. Where it ran the batch script, another minute goes by until the
        steps on the other nodes give up telling its srun of their end.
        """
        send((member.pid for member in self.members(node)), signal.SIGSTOP)

    def resume(self, node: str) -> None:
        """All that hung goes on, as if nothing had been."""
        send((member.pid for member in self.members(node)), signal.SIGCONT)

    def give_up(self, node: str) -> None:
        """Take the node for dead at once: what SLURM does by itself some time after it was lost, crashed or hung."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        # an answer of its slurmd that was still on its way would bring it back
        self.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")

    def up(self, *nodes: str) -> None:
        """Bring nodes back that were lost, crashed, hung or given up; SLURM ends what it no longer knows on them."""
        for node in nodes:
            self.resume(node)
            if node not in self._daemons:
                self._start("slurmd", "-N", node, name=node)
        self.until(lambda: self._back(nodes), f"answer of {' and '.join(nodes)}")

    def tidy(self) -> None:
        """End all jobs and bring all nodes back: for the next test the cluster is as new, but for the job ids."""
        send((member.pid for member in self.members()), signal.SIGCONT)
        if lost := [node for node in self.nodes if node not in self._daemons]:
            self.up(*lost)
        self.until(
            lambda: self._no_jobs() and self._back(self.nodes) and self._are(self.nodes, {"IDLE"}), "idle cluster"
        )

    def _back(self, nodes: Iterable[str]) -> bool:
        """Whether they can run jobs; asks for it where they answer, but SLURM does not want them."""
        states = self.node_states()
        for node in nodes:
            flags = states[node].split("+")
            if "NOT_RESPONDING" not in flags and not {"DOWN", "DRAIN"}.isdisjoint(flags):
                self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")  # may fail: it is back meanwhile
        return self._are(nodes, {"IDLE", "MIXED", "ALLOCATED"})

    def _are(self, nodes: Iterable[str], states: Collection[str]) -> bool:
        now = self.node_states()
        return all(now[node] in states for node in nodes)

    def _no_jobs(self) -> bool:
        """Whether all jobs are gone; cancels those that are not, and what has come back to the queue meanwhile."""
        jobs = self.jobs()
        if alive := [job for job, state in jobs.items() if state != "COMPLETING"]:
            self.call("scancel", *alive)  # may fail: some end by themselves meanwhile
        return not jobs

    # ---- begin and end

    def __enter__(self) -> Self:
        _end_abandoned()
        self._state = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))  # short: paths of sockets have 108 bytes
        (self._state / "owner").write_text(f"{os.getpid()} {started(os.getpid())}")
        self._conf, self._logs = self._state / "slurm.conf", self._state / "log"
        try:
            self._boot()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _boot(self) -> None:
        for folder in [self.folder, self._state / "state", self._logs, *(self._state / node for node in self.nodes)]:
            folder.mkdir(parents=True, exist_ok=True)
        port, *ports = _free_ports(1 + len(self.nodes))
        lines = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} {self._node}"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        first_job = random.SystemRandom().randrange(1, 1_000_000)
        conf = _CONF.format(port=port, first_job=first_job, user=_user(), state=self._state, **self._times)
        self._conf.write_text(conf + "\n".join(lines) + "\n")
        (self._state / "plugstack.conf").touch()
        # never used, but loaded; the default dies where /sys/fs/cgroup is not mounted
        (self._state / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        devices = []
        for node in self.nodes if self._gpus else []:
            for gpu in range(self._gpus):  # SLURM wants a character device, under a name of its own
                (self._state / f"gpu-{node}-{gpu}").symlink_to(os.devnull)
            devices.append(f"NodeName={node} Name=gpu File={self._state}/gpu-{node}-[0-{self._gpus - 1}]\n")
        (self._state / "gres.conf").write_text("".join(devices))

        self._start("slurmctld", name="slurmctld")
        for node in self.nodes:
            self._start("slurmd", "-N", node, name=node)
        self.until(self._booted, "idle cluster")

    def _booted(self) -> bool:
        dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
        said = "\n".join(_text(self._logs / f"{name}.err") for name in dead)
        assert not dead, f"{', '.join(dead)} ended at once:\n{said}"
        answer = self.call("scontrol", "show", "node", "--oneliner").stdout
        return answer.count(" State=IDLE ") == len(self.nodes)

    def _start(self, *command: str, name: str) -> None:
        with (self._logs / f"{name}.err").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [command[0], "-D", *command[1:]],
                env=self.environ,
                cwd=self._state,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # a signal to the tests' group is none to the cluster
            )

    def _end(self) -> None:
        if "slurmctld" in self._daemons:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):  # they end below in any case
                send((member.pid for member in self.members()), signal.SIGCONT)
                self.until(self._no_jobs, "end of the jobs", patience_s=2.0 * self._times["kill_wait_s"])
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        self._daemons.clear()
        _kill_all(self.members)
        if self._logs.is_dir():
            shutil.copytree(self._logs, self.folder / "slurm", dirs_exist_ok=True)
        shutil.rmtree(self._state)


def _kill_all(members: Callable[[], list[Member]]) -> None:
    """SIGKILL to all of them, until none is left that one of them started meanwhile."""
    end = time.monotonic() + PATIENCE_S
    while found := members():
        assert time.monotonic() < end, f"still there: {[(member.pid, member.node) for member in found]}"
        send((member.pid for member in found), signal.SIGKILL)
        time.sleep(0.01)  # polling: killed processes leave when the kernel is done with them


def _end_abandoned() -> None:
    """End the clusters of this user whose tests were killed before they could."""
    for state in Path("/tmp").glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):  # another ends it right now, or it is just being made
            pid, begin = (state / "owner").read_text().split()
            if state.stat().st_uid == os.getuid() and started(int(pid)) != begin:
                _kill_all(lambda state=state: find_members(state / "slurm.conf", state / "log"))
                shutil.rmtree(state)


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} free ports in {_PORTS}")


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _fields(line: str) -> dict[str, str]:
    """`Name=value` of a line of scontrol; values may have blanks."""
    return dict(re.findall(r"(?:^|\s)([A-Z][\w/:]*)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)", line))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        return f"({path}: {error.strerror})"
