"""`distkd doctor`: what it says of machines that are not this one, and that it runs on this one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from distkd import doctor

GIB = 1024**3


def test_this_machine_is_fit_for_the_tests():
    found = doctor.checks()
    assert [check for check in found if check.state == "fail"] == []
    assert len({check.name for check in found}) == len(found)


def test_whatever_is_not_in_order_comes_with_a_way_to_mend_it():
    assert [check for check in doctor.checks() if check.state != "ok" and not check.fix] == []


def test_the_table_has_a_line_per_check_and_the_code_is_0_when_nothing_failed(monkeypatch, capsys):
    lines = [doctor.Check("one", "ok", "fine"), doctor.Check("two", "warn", "so so", "pip install -e '.[onnx]'")]
    monkeypatch.setattr(doctor, "checks", lambda: lines)
    assert doctor.run() == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok    one  fine",
        "warn  two  so so  ->  pip install -e '.[onnx]'",
        "1 ok, 1 to look at, 0 failed",
    ]


def test_the_code_is_1_when_something_failed(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "checks", lambda: [doctor.Check("one", "fail", "broken", "mend it")])
    assert doctor.run() == 1
    assert "1 failed" in capsys.readouterr().out


def test_the_table_of_a_terminal_shows_brackets_as_they_are(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(doctor, "checks", lambda: [doctor.Check("onnx", "ok", "absent", "pip install '.[onnx]'")])
    assert doctor.run() == 0
    out = capsys.readouterr().out
    assert "found, and what mends it" in out
    assert ".[onnx]" in out


@pytest.mark.parametrize(("version", "state"), [((3, 10, 4), "fail"), ((3, 11, 0), "ok"), ((3, 13, 1), "ok")])
def test_python_below_3_11_fails(version, state):
    assert doctor.check_python(version).state == state


def test_a_cpu_build_of_torch_beside_an_nvidia_driver_is_reported():
    check = doctor.check_torch("2.13.0+cpu", None, driver=True, gpus=0)
    assert check.state == "warn"
    assert "built for CPU, but this machine has an NVIDIA driver" in check.found


def test_gpus_that_a_variable_hides_are_explained(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check = doctor.check_torch("2.13.0", "13.0", driver=True, gpus=0)
    assert check.state == "warn"
    assert "CUDA_VISIBLE_DEVICES='' hides them" in check.found


def test_gpus_that_torch_cannot_see_point_at_the_driver(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "driver may be too old" in doctor.check_torch("2.13.0", "13.0", driver=True, gpus=0).found


@pytest.mark.parametrize(("major", "state", "words"), [(7, "warn", "no bf16"), (9, "ok", "bf16")])
def test_a_gpu_is_listed_with_its_memory_and_precision(major, state, words):
    check = doctor.check_gpu(0, SimpleNamespace(name="A card", total_memory=80 * GIB, major=major, minor=0))
    assert check.state == state
    assert "A card, 80 GiB" in check.found
    assert words in check.found


@pytest.mark.parametrize(
    ("backends", "gpus", "state"),
    [({"gloo": True, "nccl": False}, 0, "ok"), ({"gloo": True, "nccl": False}, 1, "fail"), ({}, 0, "fail")],
)
def test_ranks_need_gloo_and_on_gpus_nccl(backends, gpus, state):
    assert doctor.check_backends(backends, gpus).state == state


@pytest.mark.parametrize(
    ("value", "state", "words"),
    [
        (None, "ok", "unset"),
        ("2", "ok", "8 cores, OMP_NUM_THREADS=2"),
        ("16", "warn", "OMP_NUM_THREADS=16 on 8 cores"),
        ("all", "warn", "not a positive whole number"),
    ],
)
def test_threads_beyond_the_cores_are_reported(value, state, words):
    check = doctor.check_threads(8, {} if value is None else {"OMP_NUM_THREADS": value}, ranks=4)
    assert check.state == state
    assert words in check.found
    assert check.fix == ("" if state == "ok" else "export OMP_NUM_THREADS=2")


@pytest.mark.parametrize(
    ("free", "gpus", "state"),
    [(None, 0, "warn"), (64 * 2**20, 0, "warn"), (64 * 2**20, 2, "fail"), (8 * GIB, 2, "ok")],
)
def test_the_shared_memory_of_a_container_is_too_small_for_several_gpus(free, gpus, state):
    assert doctor.check_shared_memory(free, gpus).state == state


def test_little_memory_is_reported():
    assert doctor.check_memory(GIB).state == "warn"
    assert doctor.check_memory(16 * GIB).state == "ok"


@pytest.mark.parametrize(
    ("free", "writable", "state"),
    [(50 * GIB, True, "ok"), (GIB // 2, True, "warn"), (2**20, True, "fail"), (50 * GIB, False, "fail")],
)
def test_a_full_or_locked_disk_is_reported(tmp_path, free, writable, state):
    check = doctor.check_disk("disk", tmp_path, free, writable)
    assert check.state == state
    assert str(tmp_path) in check.found
    assert ("--run.root" in check.fix) == (state != "ok")


@pytest.mark.parametrize(
    ("limits", "state", "fix"),
    [((256, 4096), "warn", "ulimit -n 4096"), ((256, 1000), "warn", "ulimit -n 1000"), ((-1, -1), "ok", "")],
)
def test_a_low_limit_of_open_files_is_reported_with_what_may_be_set(limits, state, fix):
    check = doctor.check_open_files(limits)
    assert (check.state, check.fix) == (state, fix)


@pytest.mark.parametrize(
    ("address", "environ", "state", "words"),
    [
        ("127.0.1.1", {}, "warn", "loopback"),
        (None, {}, "warn", "does not resolve"),
        ("10.1.2.3", {}, "ok", "10.1.2.3"),
        ("127.0.1.1", {"GLOO_SOCKET_IFNAME": "lo"}, "ok", "gloo uses lo"),
        ("10.1.2.3", {"GLOO_SOCKET_IFNAME": "eth99"}, "fail", "is no interface here: lo"),
    ],
)
def test_a_host_name_that_is_loopback_is_reported_with_the_variable_for_gloo(address, environ, state, words):
    check = doctor.check_hostname("node-a", address, environ)
    assert check.state == state
    assert words in check.found
    assert state == "ok" or "GLOO_SOCKET_IFNAME" in check.fix


def test_a_clock_before_this_file_was_made_is_wrong():
    assert "before this copy of distkd was made" in doctor.check_clock(0.0, 0.0).found


def test_a_file_server_with_another_clock_is_reported():
    now = 4e9
    assert doctor.check_clock(now, now + 60).found.endswith("files written here are +60 s away")
    assert doctor.check_clock(now, now + 1).state == "ok"
    assert doctor.check_clock(now, None).state == "ok"


def test_missing_tools_are_named():
    assert doctor.check_tools(["torchrun"]).found == "not beside this Python: torchrun"
    assert doctor.check_tools([]).state == "ok"


def test_a_missing_compiler_is_no_fault_but_says_what_needs_it():
    check = doctor.check_compiler(None, None)
    assert check.state == "ok"
    assert check.found.startswith("no g++ and no ninja")
    assert doctor.check_compiler("/usr/bin/g++", "1.13.2").fix == ""


def test_an_absent_optional_package_comes_with_its_extra():
    check = doctor.check_optional("onnx", None, "distkd export --format onnx")
    assert check.state == "ok"
    assert check.fix == "pip install -c constraints.txt -e '.[onnx]'"
    assert doctor.check_optional("onnx", "1.20", "").found == "1.20"


def test_the_web_toolkit_called_apex_is_told_from_nvidias():
    check = doctor.check_apex("0.9.10.dev0", real=False)
    assert check.state == "warn"
    assert "unrelated web toolkit" in check.found
    assert doctor.check_apex("0.1", real=True).state == "ok"
    assert doctor.check_apex(None, real=False).state == "ok"


@pytest.mark.parametrize(
    ("environ", "gpus", "state", "words"),
    [
        ({}, 0, "ok", "not a SLURM machine"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, 0, "ok", "job 7: 1 nodes, 2 tasks"),
        ({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}, 0, "fail", "the job was given GPUs 4"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "2"}, 4, "warn", "2 tasks a node"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "4"}, 4, "ok", "4 GPUs here"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "1"}, 4, "ok", "4 GPUs here"),
    ],
)
def test_an_allocation_has_a_task_per_gpu_or_one_per_node(environ, gpus, state, words):
    check = doctor.check_slurm(environ, sbatch=False, gpus=gpus)
    assert check.state == state
    assert words in check.found


def test_a_login_node_is_told_from_an_allocation():
    assert "this is no allocation" in doctor.check_slurm({}, sbatch=True, gpus=0).found
