"""Nodes that are lost under a job: it comes back by SLURM, or goes on without them, and what is left behind does no harm."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distkd.allocation import read_jobs
from tests.launch import folders
from tests.launch.processes import REPOSITORY
from tests.launch.runs import law_run, run_to_the_end, write_config
from tests.slurm.cluster import Cluster
from tests.slurm.members import Member, send

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

EARLY = 12
"""Step from which on a node may be lost: there is a checkpoint, and much left to do."""


@dataclass
class Lost:
    """A job whose node is lost, and its run."""

    cluster: Cluster
    root: Path
    folder: Path
    job: str

    @classmethod
    def submit(
        cls, cluster: Cluster, config: dict[str, Any], root: Path, nodes: str, *, options: tuple[str, ...] = (), **environ: str
    ) -> Lost:
        """Train on these nodes, one rank on each; any others will do when it comes back."""
        root.mkdir()
        path, folder = write_config(config, root)
        words = [f"--nodelist={nodes}", f"--nodes={nodes.count(',') + 1}", f"--output={root}/%x-%j.out", *options]
        jobs = {"DISTKD_JOBS": str(root / "slurm"), "DISTKD_RANKS_PER_NODE": "1"}
        job = cluster.submit(REPOSITORY / "slurm" / "train.sbatch", path, options=words, environ={**jobs, **environ})
        return cls(cluster, root, folder, job)

    def until_step(self, step: int) -> None:
        self.cluster.until(lambda: folders.last_line(self.folder)["step"] >= step, f"step {step}", self.job)

    def ranks(self, node: str) -> list[Member]:
        """Those of this job, whoever watches them."""
        return [
            member
            for member in self.cluster.members(node)
            if member.environ.get("SLURM_JOB_ID") == self.job and "RANK" in member.environ
        ]
