"""Variables that a new job is given, also where somebody submits from inside another job."""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["foreign", "surroundings"]

_WHICH_CLUSTER = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_CONF_SERVER"}
"""Variables of SLURM that belong to no job."""

_OF_ATTEMPT = ("DISTKD_STOP_FILE", "DISTKD_NOTES", "DISTKD_LOGS")
"""The scripts set them for one attempt of one job: another one would be stopped with it."""

_OF_SLURM = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMIX_", "TORCHELASTIC_")
_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK")

_OF_SCRIPTS = (
    "FOLDS", "SEEDS", "NPROC", "NODES", "NODE_RANK", "RENDEZVOUS", "RDZV_ID", "LOG_DIR", "MASTER_ADDR", "MASTER_PORT",
    "OMP_NUM_THREADS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
)  # fmt: skip
"""What the scripts and torchrun export beside DISTKD_*."""


def foreign(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names of variables that belong to the job that this is called from; in a plain shell none.

    In a session of SLURM's (salloc, Jupyter) what SLURM has set is foreign, and DISTKD_* is the user's own. In a job of
    the scripts of `slurm/` they have set DISTKD_*, too, of which the site file alone is of use to another job.
    """
    in_ours = "DISTKD_STOP_FILE" in environ
    in_job = in_ours or "SLURM_JOB_ID" in environ

    def is_foreign(name: str) -> bool:
        if name in _OF_ATTEMPT:
            return True
        if in_job and (name.startswith(_OF_SLURM) or name in _DEVICES):
            return name not in _WHICH_CLUSTER
        return in_ours and name != "DISTKD_SITE" and (name.startswith("DISTKD_") or name in _OF_SCRIPTS)

    return sorted(name for name in environ if is_foreign(name))


def surroundings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables without the foreign ones."""
    left_out = set(foreign(environ))
    return {name: value for name, value in environ.items() if name not in left_out}
