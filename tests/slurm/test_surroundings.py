"""What new jobs are given of the environment: nothing that belongs to a job that somebody submits from."""

from __future__ import annotations

from distkd.slurm.surroundings import foreign, surroundings

ANYWHERE = {"HOME": "/home/a", "SLURM_CONF": "/c", "DISTKD_PARTITION": "debug", "NCCL_DEBUG": "INFO"}
OF_SLURM = {
    "SLURM_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1", "SLURM_EXPORT_ENV": "NONE", "SLURMD_NODENAME": "n1",
    "SRUN_CPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0",
}  # fmt: skip


def test_all_goes_on_from_a_plain_shell():
    environ = {**ANYWHERE, "CUDA_VISIBLE_DEVICES": "1", "SRUN_DEBUG": "1", "OMP_NUM_THREADS": "4"}
    assert surroundings(environ) == environ


def test_what_slurm_has_set_stays_in_its_session_and_the_users_own_does_not():
    assert surroundings({**ANYWHERE, **OF_SLURM, "OMP_NUM_THREADS": "4"}) == {**ANYWHERE, "OMP_NUM_THREADS": "4"}


def test_what_the_scripts_have_set_stays_in_their_job_but_for_the_site_file():
    of_scripts = {
        "DISTKD_STOP_FILE": "/s", "DISTKD_NOTES": "/n", "DISTKD_LOGS": "/l", "DISTKD_JOBS": "/j", "DISTKD_PYTHON": "/p",
        "DISTKD_ELASTIC": "1", "FOLDS": "1-5", "SEEDS": "", "OMP_NUM_THREADS": "1", "MASTER_PORT": "1", "RANK": "0",
        "TORCHELASTIC_RUN_ID": "x", "DISTKD_SITE": "/site.env",
    }  # fmt: skip
    left = surroundings({**ANYWHERE, **OF_SLURM, **of_scripts})
    assert left == {"HOME": "/home/a", "SLURM_CONF": "/c", "NCCL_DEBUG": "INFO", "DISTKD_SITE": "/site.env"}


def test_the_names_are_those_that_are_missing():
    environ = {**ANYWHERE, **OF_SLURM}
    assert foreign(environ) == sorted(OF_SLURM)
