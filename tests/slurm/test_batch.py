"""The batch scripts on a cluster, over a distkd that does what a test tells it: who is started, warned, requeued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.launch.processes import REPOSITORY
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import start, together

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800)]

# `end=CODE` ends with that code. In the first attempt of a job `stop` waits until a stop is asked for and ends as
# interrupted, `evaluate` waits likewise and ends as done; later attempts are done at once
_STAND_IN = """
import json, os, pathlib, sys, time

def main(argv):
    first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    names = ("RANK", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID", "OMP_NUM_THREADS", "FOO", "DISTKD_SCRATCH")
    call = {"argv": argv, **{name: os.environ.get(name) for name in names}}
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(json.dumps(call) + "\\n")
    words = dict(word.partition("=")[::2] for word in argv)
    if "end" in words:
        return int(words["end"])
    waits = first and not words.keys().isdisjoint({"stop", "evaluate"})
    while waits and not pathlib.Path(os.environ["DISTKD_STOP_FILE"]).read_text():
        time.sleep(0.05)
    return 3 if waits and "stop" in words else 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


class Batch:
    """Jobs of the stand-in, one folder each."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        package = folder / "stand in" / "distkd"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "cli.py").write_text(_STAND_IN)
        for name in ("slurm", "metrics", "files.py", "errors.py", "allocation.py"):
            (package / name).symlink_to(REPOSITORY / "distkd" / name)

    def start(self, name: str, *arguments: str, environ: Mapping[str, str] | None = None, **more: Any) -> str:
        place = self.folder / name
        place.mkdir()
        for word in arguments:
            if word.endswith(".yaml"):
                (place / word).touch()
        mine = {"PYTHONPATH": str(self.folder / "stand in"), "CALLS": str(place / "calls")}
        return start(self.cluster, *arguments, environ=mine | dict(environ or {}), cwd=place, **more)

    def calls(self, name: str) -> list[dict[str, Any]]:
        """What the stand-in was called with, in order."""
        path = self.folder / name / "calls"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # a last one may be on its way
        return [json.loads(line) for line in lines]

    def warn(self, name: str, job: str, number: int = 1) -> None:
        """SLURM's warning, once so many calls were made."""
        self.cluster.until(lambda: len(self.calls(name)) >= number, f"{number} calls", job)
        self.cluster.scancel("--batch", "--signal=USR1", job)

    # ---- one job each, all at the same time

    def array(self) -> list[dict[str, str]]:
        """Of three tasks the last one is warned: the one that SLURM gives the number of the array."""
        job = self.start(
            "array", "a.yaml", "stop", script="folds.sbatch", environ={"SEEDS": "5,1337,42"}, options=["--array=0-2"]
        )
        last = next(record for record in self._records(job, 3) if record["JobId"] == job)["ArrayTaskId"]
        self.warn("array", f"{job}_{last}", 3)
        self.cluster.wait(f"{job}_{last}", "COMPLETED", restart=1)
        others = [task for task in ("0", "1", "2") if task != last]
        for task in others:
            self.cluster.scancel("--batch", "--signal=USR1", f"{job}_{task}")
            self.cluster.wait(f"{job}_{task}", "COMPLETED", restart=1)
        return self._records(job, 3)

    def _records(self, job: str, number: int) -> list[dict[str, str]]:
        self.cluster.until(lambda: len(self.cluster.records(job)) == number, f"{number} tasks", job)
        return self.cluster.records(job)

    def stages(self) -> dict[str, str]:
        """The warning comes while the teacher is in its final evaluation."""
        job = self.start("stages", "evaluate.yaml", "student.yaml", "--x", "evaluate", script="stages.sbatch")
        self.warn("stages", job)
        [record] = self.cluster.wait(job, "COMPLETED", restart=1)
        return record

    def early(self) -> dict[str, str]:
        """The warning comes while the site's setup is loaded."""
        setup = self.folder / "setup.sh"
        setup.write_text(f"touch '{self.folder}/loading'; sleep 2\n")
        job = self.start("early", "a.yaml", "stop", environ={"DISTKD_SETUP": str(setup)})
        self.cluster.until((self.folder / "loading").exists, "setup", job)
        self.cluster.scancel("--batch", "--signal=USR1", job)
        [record] = self.cluster.wait(job, "COMPLETED", restart=1)
        return record

    def no_python(self) -> dict[str, str]:
        broken = {"DISTKD_PYTHON": "/no/such/python", "DISTKD_MAX_FAILURES": "1"}
        job = self.start("no_python", "a.yaml", environ=broken)
        [record] = self.cluster.wait(job, "FAILED", restart=1)
        return record | {"log": self.cluster.log(job)}

    def settings(self) -> dict[str, str]:
        """Words of the site, of the environment and of the command line; a site that hands no variables on."""
        site = self.folder / "site.env"
        site.write_text(
            "DISTKD_CONTAINER=\"env FOO='a b'\"\nDISTKD_SCRATCH='/site/$USER'\nDISTKD_METRICS=local\n"
            f"DISTKD_PYTHON={REPOSITORY}/.venv/bin/python\n"
        )
        job = self.start(
            "settings",
            "a.yaml",
            "--metrics.export",
            "off",
            environ={"DISTKD_SITE": str(site), "DISTKD_SCRATCH": "/mine/$USER", "SLURM_EXPORT_ENV": "NONE"},
            options=["--cpus-per-task=4"],
            ranks=2,
            nodes=2,
        )
        [record] = self.cluster.wait(job, "COMPLETED")
        return record | {"log": self.cluster.log(job)}

    def wrong_folds(self) -> dict[str, str]:
        job = self.start("wrong", "a.yaml", script="folds.sbatch", environ={"FOLDS": "1-3,x5"}, options=["--array=0"])
        [record] = self.cluster.wait(f"{job}_0", "FAILED")
        return record

    def beyond(self) -> dict[str, str]:
        job = self.start("beyond", "a.yaml", script="folds.sbatch", environ={"FOLDS": "1-3"}, options=["--array=3"])
        [record] = self.cluster.wait(f"{job}_3", "FAILED")
        return record


@pytest.fixture(scope="module")
def batch(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return Batch(cluster, tmp_path_factory.mktemp("a batch"))


@pytest.fixture(scope="module")
def ended(batch: Batch) -> dict[str, Future[Any]]:
    return together(
        batch.array, batch.stages, batch.early, batch.no_python, batch.settings, batch.wrong_folds, batch.beyond
    )


def test_one_task_of_an_array_goes_back_to_the_queue_and_no_other(batch: Batch, ended: dict[str, Future[Any]]):
    """Each task is begun twice, also those that were running when the one with the array's number went back."""
    assert [record["Restarts"] for record in ended["array"].result()] == ["1"] * 3
    begun = sorted((call["SLURM_ARRAY_TASK_ID"], call["SLURM_RESTART_COUNT"]) for call in batch.calls("array"))
    assert begun == [(task, restart) for task in "012" for restart in "01"]


def test_task_is_a_place_in_the_list_of_seeds(batch: Batch, ended: dict[str, Future[Any]]):
    ended["array"].result()
    seeds = {call["SLURM_ARRAY_TASK_ID"]: call["argv"][-2:] for call in batch.calls("array")}
    assert seeds == {"0": ["--seeds", "5"], "1": ["--seeds", "1337"], "2": ["--seeds", "42"]}


def test_stage_that_was_not_begun_in_time_is_trained_in_the_next_attempt(batch: Batch, ended: dict[str, Future[Any]]):
    ended["stages"].result()
    calls = [(call["SLURM_RESTART_COUNT"], call["argv"][1]) for call in batch.calls("stages")]
    assert calls == [("0", "evaluate.yaml"), ("1", "evaluate.yaml"), ("1", "student.yaml")]


def test_warning_before_the_ranks_are_started_is_not_lost(batch: Batch, ended: dict[str, Future[Any]]):
    assert ended["early"].result()["Restarts"] == "1"


def test_node_that_cannot_run_python_is_not_the_users_mistake(batch: Batch, ended: dict[str, Future[Any]]):
    record = ended["no_python"].result()
    assert (record["ExitCode"], record["Restarts"]) == ("1:0", "1")
    assert "is no Python 3.11 on" in record["log"]
    assert batch.calls("no_python") == []


def test_command_line_wins_over_the_environment_and_that_over_the_site(batch: Batch, ended: dict[str, Future[Any]]):
    ended["settings"].result()
    ranks = [call for call in batch.calls("settings") if call["RANK"] is not None]
    assert sorted(call["RANK"] for call in ranks) == ["0", "1", "2", "3"]
    given = ["--data.scratch", "/mine/$USER", "--metrics.export", "local"]
    assert all(call["argv"] == ["train", *given, "a.yaml", "--metrics.export", "off"] for call in ranks)
    assert {call["FOO"] for call in ranks} == {"a b"}
    assert {call["OMP_NUM_THREADS"] for call in ranks} == {"1"}  # as the tests' environment says


def test_shards_are_copied_on_each_node_before_the_ranks_are_started(batch: Batch, ended: dict[str, Future[Any]]):
    ended["settings"].result()
    calls = batch.calls("settings")
    assert ["--stage-in" in call["argv"] for call in calls] == [True, True, False, False, False, False]


@pytest.mark.parametrize("name", ["wrong_folds", "beyond"])
def test_units_that_are_none_end_a_task_before_it_trains(batch: Batch, ended: dict[str, Future[Any]], name: str):
    assert ended[name].result()["ExitCode"] == "2:0"
    assert batch.calls("wrong") == batch.calls("beyond") == []
