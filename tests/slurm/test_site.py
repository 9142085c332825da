"""Settings of a cluster: what bash makes of the file, what is refused and what is said then."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from distkd.errors import ConfigError
from distkd.slurm.site import Site, find_site, limit_seconds, read_site

EXAMPLE = Path(__file__).parents[2] / "slurm" / "site.env.example"


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DISTKD_")]:
        monkeypatch.delenv(name)


def written(folder: Path, *lines: str) -> Path:
    path = folder / "my site.env"
    path.write_text("\n".join([*lines, ""]))
    return path


def refusal(folder: Path, *lines: str) -> str:
    with pytest.raises(ConfigError) as error:
        read_site(written(folder, *lines))
    return str(error.value)


def test_nothing_is_set_without_a_file_and_by_an_empty_one(tmp_path: Path):
    assert read_site(None) == read_site(written(tmp_path)) == read_site(written(tmp_path, "DISTKD_QOS=")) == Site()


def test_every_setting_is_read(tmp_path: Path):
    site = read_site(
        written(
            tmp_path,
            "# a comment",
            "DISTKD_PARTITION=gpu,preempt  # and another",
            "export DISTKD_ACCOUNT=med DISTKD_QOS='long'",
            'DISTKD_CONSTRAINT="a100|h100"',
            "DISTKD_RESERVATION=trial",
            "DISTKD_GPU_TYPE=a100",
            "DISTKD_GPUS_PER_NODE=4",
            "DISTKD_CPUS_PER_TASK=$((8 * DISTKD_GPUS_PER_NODE))",
            "DISTKD_MEM=200G",
            "DISTKD_TIME=1-12",
            "DISTKD_EXCLUSIVE=1",
            "DISTKD_THROTTLE=8",
            "DISTKD_SBATCH_OPTIONS=\"--mail-type=FAIL --comment='my study'\"",
        )
    )
    assert site == Site(
        partition="gpu,preempt", account="med", qos="long", constraint="a100|h100", reservation="trial",
        gpu_type="a100", gpus_per_node=4, cpus_per_task=32, mem="200G", time="1-12", exclusive=True, throttle=8,
        sbatch_options=("--mail-type=FAIL", "--comment=my study"),
    )  # fmt: skip


def test_settings_for_the_job_are_known_and_left_to_it(tmp_path: Path):
    site = read_site(
        written(tmp_path, "DISTKD_SCRATCH='/scratch/$SLURM_JOB_ID'", "DISTKD_PYTHON=/opt/python", "NCCL_DEBUG=INFO")
    )
    assert site == Site(scratch="/scratch/$SLURM_JOB_ID", at_run_time=frozenset({"DISTKD_SCRATCH", "DISTKD_PYTHON"}))


@pytest.mark.parametrize("left_out", ["DISTKD_MEM", "DISTKD_MEM_PER_GPU"])
def test_all_settings_of_the_example_are_known(left_out: str, tmp_path: Path):
    lines = re.findall(r"^#(DISTKD_\w+=.*)$", EXAMPLE.read_text(), re.MULTILINE)
    assert len(lines) > 15
    site = read_site(written(tmp_path, *(line for line in lines if not line.startswith(f"{left_out}="))))
    assert site.gpus_per_node == 4
    assert (site.mem is None) == (left_out == "DISTKD_MEM")
    assert site.at_run_time >= {"DISTKD_MAX_FAILURES", "DISTKD_MAX_REQUEUES", "DISTKD_SCRATCH", "DISTKD_METRICS"}


def test_defaults_of_options_and_limits_of_requeues_are_read(tmp_path: Path):
    lines = ["DISTKD_RANKS_PER_NODE=2", "DISTKD_ELASTIC=1", "DISTKD_MAX_REQUEUES=0", "DISTKD_MAX_FAILURES=5"]
    site = read_site(written(tmp_path, *lines))
    assert (site.ranks_per_node, site.elastic) == (2, 1)
    assert site.at_run_time == {line.partition("=")[0] for line in lines}


# the environment


def test_the_environment_wins_over_the_file_and_takes_away_what_is_empty_there(tmp_path: Path):
    path = written(tmp_path, "DISTKD_PARTITION=gpu", "DISTKD_QOS=long", "DISTKD_SCRATCH=/local", "DISTKD_ACCOUNT=med")
    environ = {"DISTKD_PARTITION": "debug", "DISTKD_SCRATCH": "", "DISTKD_QOS": " ", "DISTKD_ELASTIC": "1"}
    expected = Site(partition="debug", account="med", elastic=1, at_run_time=frozenset({"DISTKD_ELASTIC"}))
    assert read_site(path, environ) == expected
    assert read_site(None, {"DISTKD_TIME": "1:00:00"}) == Site(time="1:00:00")


def test_memory_of_the_environment_replaces_that_of_the_file_in_either_form(tmp_path: Path):
    path = written(tmp_path, "DISTKD_MEM=100G")
    assert read_site(path, {"DISTKD_MEM_PER_GPU": "20G"}) == Site(mem_per_gpu="20G")
    assert read_site(path, {"DISTKD_MEM_PER_GPU": ""}) == Site(mem="100G")


def test_other_names_of_the_environment_are_none_of_the_sites(tmp_path: Path):
    environ = {"DISTKD_HOME": "/a", "DISTKD_JOBS": "/b", "DISTKD_NONSENSE": "1", "ACCOUNT": "x"}
    assert read_site(written(tmp_path, "DISTKD_ACCOUNT=med"), environ) == Site(account="med")


def test_a_mistake_in_the_environment_is_told_as_one_of_it(tmp_path: Path):
    path = written(tmp_path, "DISTKD_ACCOUNT=med")
    with pytest.raises(ConfigError) as error:
        read_site(path, {"DISTKD_TIME": "soon"})
    assert str(error.value).startswith(f"site file {path} with DISTKD_TIME of the environment has 1 problem:\n")
    with pytest.raises(ConfigError, match=r"^DISTKD_TIME of the environment has 1 problem:\n  DISTKD_TIME='soon'"):
        read_site(None, {"DISTKD_TIME": "soon"})


def test_all_mistakes_are_told_at_once(tmp_path: Path):
    text = refusal(
        tmp_path,
        "DISTKD_PARTITON=gpu",
        "ACCOUNT=med",
        "DISTKD_WHATEVER=1",
        "DISTKD_GPUS_PER_NODE=four",
        "DISTKD_TIME=soon",
        "DISTKD_MEM=2GB",
        "DISTKD_EXCLUSIVE=yes",
        "DISTKD_METRICS=everywhere",
        "DISTKD_MAX_FAILURES=-1",
    )
    assert text.startswith(f"site file {tmp_path / 'my site.env'} has 9 problems:\n")
    assert "DISTKD_PARTITON is no setting; did you mean DISTKD_PARTITION?" in text
    assert "ACCOUNT is no setting; did you mean DISTKD_ACCOUNT?" in text
    assert "DISTKD_WHATEVER is no setting; known are DISTKD_PARTITION, " in text
    assert "DISTKD_GPUS_PER_NODE='four': expected a whole number of 1 or more" in text
    assert "DISTKD_TIME='soon': expected a time limit such as 4:00:00" in text
    assert "DISTKD_MEM='2GB': expected a size such as 120G" in text
    assert "DISTKD_EXCLUSIVE='yes': expected 1, or nothing" in text
    assert "DISTKD_METRICS='everywhere': expected off, local or network" in text
    assert "DISTKD_MAX_FAILURES='-1': expected a whole number of 0 or more" in text


@pytest.mark.parametrize(
    "lines, message",
    [
        (["DISTKD_MEM=1G", "DISTKD_MEM_PER_GPU=1G"], "DISTKD_MEM and DISTKD_MEM_PER_GPU exclude each other"),
        (["DISTKD_GPU_TYPE=a100"], "DISTKD_GPU_TYPE needs DISTKD_GPUS_PER_NODE"),
        (["DISTKD_SBATCH_OPTIONS='-t 5'"], "DISTKD_SBATCH_OPTIONS='-t 5': -t is not taken here: use DISTKD_TIME"),
        (['DISTKD_SBATCH_OPTIONS="--comment=\'a"'], "No closing quotation; close the quotes"),
        (["DISTKD_PARTITION = gpu"], "DISTKD_PARTITION: command not found; write NAME=value without spaces around ="),
        (["DISTKD_PARTITION='gpu"], "unexpected EOF while looking for matching"),
        (["DISTKD_QOS=a", "exit 3"], "cannot be read: exit 3"),
    ],
)
def test_what_is_no_good_is_named_with_what_to_do(lines: list[str], message: str, tmp_path: Path):
    assert message in refusal(tmp_path, *lines)


# which file


def test_the_named_file_wins_over_the_environments_and_that_over_the_clones(tmp_path: Path):
    (tmp_path / "slurm").mkdir()
    default, other, named = tmp_path / "slurm" / "site.env", tmp_path / "other.env", tmp_path / "named.env"
    assert find_site(None, tmp_path, {}) is None
    for path in (default, other, named):
        path.touch()
    assert find_site(None, tmp_path, {"DISTKD_SITE": ""}) == default
    assert find_site(None, tmp_path, {"DISTKD_SITE": str(other)}) == other
    assert find_site(named, tmp_path, {"DISTKD_SITE": str(other)}) == named


def test_a_file_that_is_named_must_be_there(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--site names no file: .*/absent\.env; copy .*/slurm/site\.env\.example"):
        find_site(tmp_path / "absent.env", tmp_path, {})
    with pytest.raises(ConfigError, match="DISTKD_SITE names no file"):
        find_site(None, tmp_path, {"DISTKD_SITE": str(tmp_path)})


# time limits


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("90", 5400), ("90:30", 5430), ("4:00:00", 14400), ("100:00:01", 360001), ("1-12", 129600), ("1-0:30", 88200),
        ("2-01:02:03", 176523), ("0", None), ("unlimited", None), ("INFINITE", None),
    ],
)  # fmt: skip
def test_time_limits_are_those_of_sbatch(text: str, seconds: int | None):
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "1-", "-1", "4:00:00 "])
def test_other_times_are_refused(text: str):
    with pytest.raises(ValueError, match="expected a time limit such as"):
        limit_seconds(text)


@pytest.mark.parametrize("value", ["bob/foo", "'~/foo'", "./scratch"])
def test_a_scratch_folder_has_a_whole_path_or_begins_with_a_variable_of_the_node(value: str, tmp_path: Path):
    message = refusal(tmp_path, f"DISTKD_SCRATCH={value}")
    assert "expected a whole path, or one that begins with a $NAME (in single quotes) of the node" in message
    assert read_site(written(tmp_path, "DISTKD_SCRATCH='${TMPDIR}/x'")).scratch == "${TMPDIR}/x"


def test_a_file_with_windows_line_ends_is_named_with_the_cure(tmp_path: Path):
    assert refusal(tmp_path, "DISTKD_QOS=long\r", "DISTKD_TIME=60\r").endswith(
        f"has Windows line ends; dos2unix '{tmp_path}/my site.env'"
    )
