"""The cluster of the tests is a real one: it runs jobs, notices lost nodes, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.processes import REPOSITORY
from tests.slurm.cluster import Cluster
from tests.slurm.members import find_members, state_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


def _script(folder: Path, body: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    return path


def test_step_runs_once_on_each_of_its_nodes(cluster: Cluster, tmp_path: Path):
    script = _script(tmp_path, 'srun --label bash -c \'echo "$SLURMD_NODENAME of $SLURM_JOB_NODELIST $1"\' _ "$1"')
    job = cluster.submit(script, "a  b", options=["--nodes=2"])
    (record,) = cluster.wait(job)
    assert (record["ExitCode"], record["NumNodes"], record["Partition"]) == ("0:0", "2", "main")
    assert {"0: n1 of n[1-2] a  b", "1: n2 of n[1-2] a  b"} <= set(cluster.log(job).splitlines())


def test_gpus_are_given_by_number(cluster: Cluster, tmp_path: Path):
    job = cluster.submit(
        _script(tmp_path, "srun bash -c 'echo \"$SLURM_GPUS_ON_NODE: $CUDA_VISIBLE_DEVICES\"'"),
        options=["--gpus-per-node=2"],
    )
    cluster.wait(job)
    assert "2: 0,1" in cluster.log(job).splitlines()
    refused = cluster.call("sbatch", "--gpus-per-node=3", "--wrap=true")
    assert refused.returncode != 0
    assert "Requested node configuration is not available" in refused.stderr


def test_tasks_of_an_array_have_states_of_their_own(cluster: Cluster, tmp_path: Path):
    job = cluster.submit(_script(tmp_path, "exit $((SLURM_ARRAY_TASK_ID == 2))"), options=["--array=1-2"])
    records = cluster.wait(job, {"COMPLETED", "FAILED"})
    assert len(records) == 2
    assert (cluster.state(f"{job}_1"), cluster.state(f"{job}_2")) == ("COMPLETED", "FAILED")
    with pytest.raises(AssertionError, match=rf"job {job} ended as \['COMPLETED', 'FAILED'\], not \['COMPLETED'\]"):
        cluster.wait(job)


def test_job_that_ends_otherwise_is_told_with_its_log(cluster: Cluster, tmp_path: Path):
    job = cluster.submit(_script(tmp_path, "echo the reason is here; exit 3"))
    with pytest.raises(AssertionError, match=r"(?s)ended as \['FAILED'\].*ExitCode=3:0.*the reason is here.*slurmctld"):
        cluster.wait(job)


def test_environment_of_another_cluster_is_not_inherited(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_CONF", "/nowhere/slurm.conf")
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    monkeypatch.setenv("SBATCH_PARTITION", "theirs")
    names = {name for name in cluster.environ if name.startswith(("SLURM", "SBATCH"))}
    assert names == {"SLURM_CONF"}
    assert cluster.environ["SLURM_CONF"] != "/nowhere/slurm.conf"


def test_urgent_job_takes_the_nodes_of_others_which_begin_again(cluster: Cluster, tmp_path: Path):
    body = """
    #SBATCH --nodes=4 --exclusive --requeue --open-mode=append --signal=B:USR1@60
    stop() { echo "warned"; kill "$step"; wait; scontrol requeue "$SLURM_JOB_ID"; }
    trap stop USR1
    if [ -n "${SLURM_RESTART_COUNT:-}" ]; then echo "again"; exit 0; fi
    srun sleep 600 & step=$!
    echo "ready"
    wait
    """
    job = cluster.submit(_script(tmp_path, body.replace("\n    ", "\n").lstrip()))
    cluster.until(lambda: "ready" in cluster.log(job), "start of the step", job)
    urgent = cluster.submit(_script(tmp_path, "true"), options=["--partition=urgent", "--nodes=1"])
    cluster.wait(urgent)
    cluster.wait(job, restart=1)
    words = [line for line in cluster.log(job).splitlines() if line in ("ready", "warned", "again")]
    assert words == ["ready", "warned", "again"]


@pytest.mark.slow
def test_job_of_a_crashed_node_goes_back_to_the_queue(cluster: Cluster, tmp_path: Path):
    script = _script(tmp_path, 'srun bash -c "echo ready; sleep 600"')
    job = cluster.submit(script, options=["--nodes=2", "--requeue"])
    cluster.until(lambda: cluster.log(job).count("ready") == 2, "start of both ranks", job)
    assert cluster.show(job)["NodeList"] == "n[1-2]"
    cluster.crash("n2")
    assert not cluster.members("n2")
    cluster.wait(job, {"PENDING", "RUNNING"}, restart=1)  # two nodes are left for it
    assert {"DOWN", "NOT_RESPONDING"} <= set(cluster.node_states()["n2"].split("+"))
    cluster.up("n2")
    assert cluster.node_states()["n2"] in {"IDLE", "MIXED"}


def test_job_of_a_node_given_up_begins_again_on_others(cluster: Cluster, tmp_path: Path):
    body = '[ -n "${SLURM_RESTART_COUNT:-}" ] || srun bash -c "echo ready; sleep 600"'
    job = cluster.submit(_script(tmp_path, body), options=["--nodes=2", "--requeue", "--open-mode=append"])
    cluster.until(lambda: cluster.log(job).count("ready") == 2, "start of both ranks", job)
    cluster.lose("n2")
    orphans = [member for member in cluster.members("n2") if not member.daemon]
    assert orphans
    cluster.give_up("n2")
    (record,) = cluster.wait(job, restart=1)
    assert "n2" not in cluster.run("scontrol", "show", "hostnames", record["NodeList"]).split()
    assert "DRAIN" in cluster.node_states()["n2"]
    cluster.up("n2")
    cluster.until(lambda: not [member for member in cluster.members("n2") if not member.daemon], "end of the orphans")


def test_node_that_hung_for_a_moment_goes_on(cluster: Cluster, tmp_path: Path):
    job = cluster.submit(_script(tmp_path, 'srun bash -c "echo ready; sleep 1"'), options=["--nodelist=n3"])
    cluster.until(lambda: "ready" in cluster.log(job), "start of the step", job)
    cluster.hang("n3")
    # a process stops when the kernel gets to it
    cluster.until(lambda: {state_of(member.pid) for member in cluster.members("n3")} <= {"T", ""}, "standstill", job)
    cluster.resume("n3")
    (record,) = cluster.wait(job)
    assert record["Restarts"] == "0"


def test_nothing_is_left_of_a_cluster(cluster: Cluster, tmp_path: Path):
    """Not of a job that ignores signals, and not of daemons whose tests were killed."""
    killed = f"""
        import signal, sys
        from pathlib import Path
        from tests.slurm.cluster import Cluster
        folder = Path({str(tmp_path)!r})
        with Cluster(folder, nodes=1, gpus=0) as cluster:
            job = cluster.submit(folder / "job.sh")
            cluster.until(lambda: "ready" in cluster.log(job), "start", job)
            print(cluster.environ["SLURM_CONF"], flush=True)
            signal.raise_signal(signal.SIGKILL)
    """
    _script(tmp_path, "trap '' TERM; echo ready; while :; do sleep 600; done")
    code = "\n".join(line.removeprefix("        ") for line in killed.splitlines())
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr
    conf = Path(done.stdout.strip())
    left = find_members(conf, conf.parent / "log")
    assert {member.node for member in left if member.daemon} == {"", "n1"}
    assert [member for member in left if not member.daemon]
    with Cluster(tmp_path / "next", nodes=1, gpus=0, kill_wait_s=1) as after:
        assert not find_members(conf, conf.parent / "log")
        assert not conf.parent.exists()
        job = after.submit(tmp_path / "job.sh")
        after.until(lambda: "ready" in after.log(job), "start", job)
        state = Path(after.environ["SLURM_CONF"]).parent
    assert not after.members()
    assert not state.exists()
    assert "_slurm_rpc_submit_batch_job" in (tmp_path / "next" / "slurm" / "slurmctld.log").read_text()
    assert cluster.node_states(), "the other cluster lives on"
