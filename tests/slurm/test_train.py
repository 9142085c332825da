"""Training jobs on a cluster from their beginning to their end: done, refused, stopped by hand, cancelled."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distkd.allocation import read_jobs
from tests.launch import folders
from tests.launch.held import Hold
from tests.launch.runs import Finish, law_run, write_config
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import held, release, start, together, wait_for_words

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True, slots=True)
class Story:
    """What is left of a job when it is over."""

    record: dict[str, str]
    log: str
    folder: Path
    """Of the run."""
    files: Path
    """The job's own."""
    seen: dict[str, Any]
    """What was true in the middle."""


class Stories:
    """Jobs that run at the same time: most of what they do is waiting, for SLURM or for one another's ranks."""

    def __init__(self, cluster: Cluster, shards: Path, root: Path, finish: Finish, folder: Path):
        self.cluster, self.finish, self.folder = cluster, finish, folder
        self.config = law_run("dc_distill", shards, root, run={"epochs": 1}, engine={"precision": "fp64"})

    def whole(self) -> Path:
        """The uninterrupted run of one process."""
        return self.finish(self.config, self._root("whole"), 1)

    def two_nodes(self) -> Story:
        """A job of two nodes with two ranks each, where every path has blanks; submitted from a folder of its own."""
        root = self._root("two nodes") / "a root"
        root.mkdir()
        path, folder = write_config(self.config, root)
        python = root / "python of this site"
        python.write_text(f'#!/bin/bash\nprintf "%s " "$@" >>"${{0%/*}}/calls"\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        hold = Hold(root / "held", 3, ranks=4)
        environ = {"DISTKD_METRICS": "local", "DISTKD_PYTHON": str(python), **hold.environ}
        job = start(self.cluster, path.name, nodes=2, ranks=2, environ=environ, cwd=root)
        pids = held(self.cluster, job, hold)
        targets = [json.loads(path.read_text()) for path in sorted((folder / "prometheus").glob("rank-*.json"))]
        release(pids.values())
        story = self._end(job, folder, root / "runs", "COMPLETED", targets=targets)
        story.seen["calls"] = (root / "calls").read_text()
        return story

    def stopped_by_hand(self) -> Story:
        root = self._root("stopped")
        path, folder = write_config(self.config, root)
        hold = Hold(root / "held", 3, ranks=1)
        job = start(self.cluster, path, "--run.root", root, environ=hold.environ)
        pids = held(self.cluster, job, hold)
        (root / "slurm" / job / "stop.0").write_text("stop\n")
        release(pids.values())
        return self._end(job, folder, root, "FAILED")

    def cancelled(self) -> Story:
        """In the middle of a step; then the run is brought to its end without SLURM."""
        root = self._root("cancelled")
        path, folder = write_config(self.config, root)
        hold = Hold(root / "held", 3, ranks=1)
        job = start(self.cluster, path, "--run.root", root, environ=hold.environ)
        pids = held(self.cluster, job, hold)
        self.cluster.scancel(job)
        wait_for_words(self.cluster, job, "asks the ranks to stop: TERM")
        release(pids.values())
        story = self._end(job, folder, root, "CANCELLED")
        story.seen.update(outcome=folders.outcome(folder), newest=folders.newest_step(folder))
        self.finish(self.config, root, 1)
        return story

    def unknown_key(self) -> Story:
        root = self._root("unknown key")
        path, folder = write_config(self.config | {"optim": {"learning_rate": 1.0}}, root)
        return self._end(start(self.cluster, path, "--run.root", root, nodes=2), folder, root, "FAILED")

    def no_shards(self) -> Story:
        root = self._root("no shards")
        path, folder = write_config(self.config | {"data": {"shards": str(root / "nowhere")}}, root)
        return self._end(start(self.cluster, path, "--run.root", root, ranks=2), folder, root, "FAILED")

    def deepspeed(self) -> Story:
        root = self._root("deepspeed")
        config = self.config | {"batch": {"global_batch": 40}, "engine": {"precision": "fp32", "device": "cpu"}}
        path, folder = write_config(config, root)
        job = start(self.cluster, path, "--run.root", root, script="deepspeed.sbatch", ranks=2)
        return self._end(job, folder, root, "COMPLETED")

    def _root(self, name: str) -> Path:
        root = self.folder / name
        root.mkdir()
        return root

    def _end(self, job: str, folder: Path, root: Path, state: str, **seen: Any) -> Story:
        (record,) = self.cluster.wait(job, state)
        return Story(record, self.cluster.log(job), folder, root / "slurm" / job, seen)


@pytest.fixture(scope="module")
def stories(
    cluster: Cluster, shards: Path, root: Path, finish: Finish, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[Any]]:
    """Every story, over."""
    told = Stories(cluster, shards, root, finish, tmp_path_factory.mktemp("stories"))
    return together(
        told.two_nodes,
        told.stopped_by_hand,
        told.cancelled,
        told.whole,
        told.deepspeed,
        told.unknown_key,
        told.no_shards,
    )


def test_two_nodes_of_two_ranks_train_as_one_process_does(stories: dict[str, Future[Any]]):
    story, whole = stories["two_nodes"].result(), stories["whole"].result()
    assert (story.record["ExitCode"], story.record["NumNodes"], story.record["Restarts"]) == ("0:0", "2", "0")
    assert folders.starts(story.folder)[0]["world_size"] == 4
    folders.assert_close(story.folder, whole, tolerance=1e-9)
    losses = [[line["loss"] for line in folders.metrics(folder) if "loss" in line] for folder in (story.folder, whole)]
    assert len(losses[0]) == 30
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


def test_log_tells_node_and_rank_and_each_rank_has_one_of_its_own(stories: dict[str, Future[Any]]):
    story = stories["two_nodes"].result()
    said = [
        line for line in story.log.splitlines()[1:] if not re.match(r"\[[^]]* job \d+ attempt 0\]|no requeue", line)
    ]
    assert [line for line in said if not re.match(r"[01]: \[rank [0-3]\] ", line)] == []
    assert sum(" test: accuracy " in line for line in said) == 1
    outputs = {path.relative_to(story.files / "logs.0") for path in story.files.glob("logs.0/**/std*.log")}
    ranks = {(path.parts[0], path.parts[-2], path.name) for path in outputs}
    nodes, locals_, streams = ("node-0", "node-1"), ("0", "1"), ("stdout.log", "stderr.log")
    assert ranks == {(node, rank, stream) for node in nodes for rank in locals_ for stream in streams}


def test_run_and_job_know_each_other(stories: dict[str, Future[Any]]):
    story = stories["two_nodes"].result()
    (started,) = read_jobs(story.folder)
    job = story.record["JobId"]
    expected = {"event": "started", "job": job, "restart": 0, "nodes": story.record["NodeList"], "attempt": 1}
    assert {name: started[name] for name in expected} == expected
    about = json.loads((story.folder / "environment.json").read_text())
    assert (about["job"], about["n_steps"]) == (job, 30)
    assert f"job {job} attempt 0] nodes {story.record['NodeList']}, interface " in story.log


def test_ranks_announce_themselves_to_prometheus_while_they_run(stories: dict[str, Future[Any]]):
    story = stories["two_nodes"].result()
    (groups,) = zip(*story.seen["targets"], strict=True)
    labels = [(group["labels"]["rank"], group["labels"]["slurm_job"], group["labels"]["node"]) for group in groups]
    job = story.record["JobId"]
    assert labels == [("0", job, "n1"), ("1", job, "n1"), ("2", job, "n2"), ("3", job, "n2")]
    assert len({group["targets"][0] for group in groups}) == 4
    left = [*story.folder.glob("prometheus/*.json"), *story.folder.parent.glob("prometheus/*")]
    assert left == []


def test_interpreter_of_the_site_starts_the_ranks(stories: dict[str, Future[Any]]):
    calls = stories["two_nodes"].result().seen["calls"]
    assert calls.count("launch/agent.py") == 2
    assert calls.count("-m distkd.slurm.requeue") == 1


def test_stop_by_hand_leaves_a_checkpoint_and_ends_the_job(stories: dict[str, Future[Any]]):
    story = stories["stopped_by_hand"].result()
    assert (story.record["ExitCode"], story.record["Restarts"]) == ("3:0", "0")
    assert "no requeue: stopped as asked" in story.log
    outcome = folders.outcome(story.folder)
    assert outcome["state"] == "interrupted"
    assert folders.newest_step(story.folder) == outcome["step"] < 30


def test_cancelled_job_leaves_a_checkpoint_and_does_not_come_back(cluster: Cluster, stories: dict[str, Future[Any]]):
    story = stories["cancelled"].result()
    assert story.seen["outcome"]["state"] == "interrupted"
    assert story.seen["newest"] == story.seen["outcome"]["step"] < 30
    assert [start["step"] for start in folders.starts(story.folder)] == [0, story.seen["newest"]]
    assert folders.differences(story.folder, stories["whole"].result()) == []
    now = cluster.show(story.record["JobId"])
    assert (now["JobState"], now["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown_key", r"config .*config\.yaml has 1 problem:?\s.*optim\.learning_rate"),
        ("no_shards", r"no manifest\.json in '.*/nowhere'"),
    ],
)
def test_users_mistake_is_told_once_and_not_repeated(stories: dict[str, Future[Any]], name: str, message: str):
    story = stories[name].result()
    assert (story.record["ExitCode"], story.record["Restarts"]) == ("2:0", "0")
    assert len(re.findall(message, story.log)) == 1, story.log
    assert "Traceback" not in story.log
    assert "no requeue: the mistake is in config, data or arguments" in story.log
    assert not story.folder.exists()


def test_deepspeed_job_trains_to_its_end(stories: dict[str, Future[Any]]):
    story = stories["deepspeed"].result()
    assert story.record["ExitCode"] == "0:0"
    assert folders.outcome(story.folder)["state"] == "done"
    about = json.loads((story.folder / "environment.json").read_text())
    assert folders.starts(story.folder)[0]["world_size"] == 2
    assert about["job"] == story.record["JobId"]
