"""The shell scripts of launch/: what they start, what they refuse, what they return."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    [*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.sbatch"), ROOT / ".ci" / "run"]
)
COMMANDS = ["coarse_study.sh", "demo.sh", "multinode.sh", "stages.sh", "venv.sh", "workstation.sh"]
NODES = {"MASTER_ADDR": "127.0.0.1", "NODES": "2", "NODE_RANK": "1"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_every_script(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False).stderr == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    found = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout == ""


@pytest.mark.parametrize("script", COMMANDS)
def test_help_says_how_it_is_called(launch, script):
    done = launch.run(script, "--help")
    assert done.returncode == 0
    assert f"launch/{script}" in done.stdout.splitlines()[0]
    assert done.stderr == ""


def test_workstation_starts_the_ranks_and_passes_the_rest_on(launch):
    done = launch.run(
        "workstation.sh",
        "--nproc",
        "3",
        "a b.yaml",
        "--print",
        "--optim.lr",
        "1e-3",
        "--max-restarts=2",
        OMP_NUM_THREADS="5",
    )
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:2] == ["OMP_NUM_THREADS=5", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    assert words[2:5] == [f"{sys.prefix}/bin/python", "-m", "torch.distributed.run"]
    assert {"--standalone", "--nproc-per-node=3", "--max-restarts=2"} < set(words)
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1" in words
    assert words[-4:] == [str(launch.folder / "launch" / "train.py"), "a b.yaml", "--optim.lr", "1e-3"]
    assert launch.calls() == []


def test_workstation_gives_each_rank_its_share_of_the_cores(launch):
    done = launch.run("workstation.sh", "--nproc=1000", "--print", "a.yaml")
    assert done.stdout.startswith("OMP_NUM_THREADS=1 ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "workstation.sh: no config given; for example: launch/workstation.sh configs/tiny/teacher.yaml"),
        (["--nproc", "many", "a.yaml"], "workstation.sh: --nproc needs a whole number, found 'many'"),
        (["a.yaml", "--nproc"], "workstation.sh: --nproc needs a whole number, found ''"),
        (["--nproc=0", "a.yaml"], "workstation.sh: --nproc must be at least 1"),
    ],
)
def test_workstation_refuses_with_one_message(launch, arguments, message):
    done = launch.run("workstation.sh", *arguments)
    assert (done.returncode, done.stderr.strip()) == (2, message)


def test_multinode_meets_at_the_master_and_says_who_is_host(launch):
    first = launch.run("multinode.sh", "a.yaml", "--print", **NODES | {"NODE_RANK": "0", "NPROC": "4"})
    second = launch.run("multinode.sh", "a.yaml", "--print", **NODES | {"NODES": "1:2", "LOCAL_ADDR": "10.0.0.2"})
    assert first.returncode == second.returncode == 0
    host, other = shlex.split(first.stdout), shlex.split(second.stdout)
    assert host[0] == "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    assert {"--nnodes=2", "--nproc-per-node=4", "--local-addr=127.0.0.1"} < set(host)
    assert {"--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29500", "--max-restarts=3"} < set(host)
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1" in host
    assert {"--nnodes=1:2", "--local-addr=10.0.0.2"} < set(other)
    assert any(word.startswith("--rdzv-conf=is_host=1,") for word in host)
    assert any(word.startswith("--rdzv-conf=is_host=0,") for word in other)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set; see launch/multinode.sh --help"),
        ({"NODES": ""}, "NODES is not set; see launch/multinode.sh --help"),
        ({"NODES": "two"}, "NODES is 'two', expected a number such as 2, or MIN:MAX such as 1:2"),
        ({"NODE_RANK": "2"}, "NODE_RANK is '2', expected 0 to 1"),
        ({"NODES": "1:4", "NODE_RANK": "4"}, "NODE_RANK is '4', expected 0 to 3"),
        ({"MASTER_ADDR": "no such host"}, "this node knows no way to MASTER_ADDR 'no such host'"),
    ],
)
def test_multinode_refuses_a_wrong_environment_with_one_message(launch, environ, message):
    done = launch.run("multinode.sh", "a.yaml", "--print", **NODES | environ)
    assert done.returncode == 2
    assert done.stderr.startswith(f"multinode.sh: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_multinode_needs_a_config(launch):
    done = launch.run("multinode.sh", "--print", **NODES)
    assert (done.returncode, done.stderr) == (2, "multinode.sh: no config given; see launch/multinode.sh --help\n")


@pytest.mark.parametrize("arguments", [[], ["a.yaml"], ["a.yaml", "--nproc", "b.yaml"]])
def test_stages_needs_two_configs(launch, arguments):
    done = launch.run("stages.sh", *arguments)
    assert done.returncode == 2
    assert done.stderr == "stages.sh: two config files come first: TEACHER.yaml STUDENT.yaml\n"


def test_stages_prints_one_launch_per_config(launch):
    done = launch.run("stages.sh", "a.yaml", "b.yaml", "--nproc", "2", "--print", "--run.root", "r")
    assert [shlex.split(line)[-3:] for line in done.stdout.splitlines()] == [
        ["a.yaml", "--run.root", "r"],
        ["b.yaml", "--run.root", "r"],
    ]


def test_stages_uses_multinode_where_nodes_are_named(launch):
    done = launch.run("stages.sh", "a.yaml", "b.yaml", "--print", **NODES)
    assert done.stdout.count("--nnodes=2 ") == 2


def test_the_student_is_launched_after_the_teacher_and_its_code_is_returned(launch):
    done = launch.run("stages.sh", "a.yaml", "b.yaml", "--nproc", "1", "--optim.lr", "1")
    assert done.returncode == 0, done.stderr
    assert launch.calls() == ["0 train a.yaml --optim.lr 1", "0 train b.yaml --optim.lr 1"]


def test_a_teacher_that_fails_leaves_the_student_alone(launch):
    done = launch.run("stages.sh", "a.yaml", "b.yaml", "--nproc", "1", "end=1")
    assert done.returncode == 1
    assert launch.calls() == ["0 train a.yaml end=1"]


def test_a_users_error_is_code_2_and_is_not_tried_again(launch):
    done = launch.run("workstation.sh", "--nproc", "2", "--max-restarts", "2", "a.yaml", "end=2")
    assert done.returncode == 2
    calls = launch.calls()  # torchrun may stop a rank before it has begun, because the other one has ended
    assert calls
    assert len(set(calls)) == len(calls)


def test_what_a_rank_says_of_a_users_error_is_not_buried(launch):
    done = launch.run("workstation.sh", "--nproc", "1", "a.yaml", "end=2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_rank_that_dies_without_a_word_is_named(launch):
    done = launch.run("workstation.sh", "--nproc", "1", "a.yaml", "die")
    assert done.returncode == 1
    assert re.search(r"^rank 0 \(pid \d+\) was killed by SIGKILL; start again to resume$", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_two_nodes_meet_and_share_out_the_ranks(launch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [
        subprocess.Popen(
            launch.command("multinode.sh", "a.yaml"),
            env=launch.environ
            | NODES
            | {"NODE_RANK": str(rank), "NPROC": "2", "MASTER_PORT": port, "MAX_RESTARTS": "0"},
            cwd=launch.folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert launch.calls() == [f"{rank} train a.yaml" for rank in range(4)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_the_script_reaches_the_ranks_and_the_code_is_3(launch, number):
    process = subprocess.Popen(
        launch.command("workstation.sh", "--nproc", "2", "a.yaml", "wait"),
        cwd=launch.folder,
        env=launch.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    process.send_signal(number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 3
    assert out == f"stopped by {number.name}\n" * 2
    assert err == ""


def test_the_coarse_study_needs_a_folder_and_says_how_it_is_called(launch):
    done = launch.run("coarse_study.sh")
    assert (done.returncode, done.stdout.splitlines()[0]) == (2, "usage: launch/coarse_study.sh RAW [ROOT]")
    done = launch.run("coarse_study.sh", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "coarse_study.sh: no folder 'nowhere'; see launch/coarse_study.sh --help\n"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PROTOCOL": "both"}, "PROTOCOL is 'both', expected native or reference"),
        ({"PIXELS": "56 32"}, "PIXELS has '32', expected 56, 28, 14 or 7"),
        ({"PIXELS": "28px"}, "PIXELS has '28px', expected 56, 28, 14 or 7"),
    ],
)
def test_the_coarse_study_refuses_before_it_trains(launch, environ, message):
    done = launch.run("coarse_study.sh", "launch", **environ)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"coarse_study.sh: {message}\n")
    assert launch.calls() == []


@pytest.mark.parametrize(("protocol", "restore"), [("", "false"), ("native", "false"), ("reference", "true")])
def test_the_coarse_study_trains_a_teacher_and_students_of_its_labels_at_each_size(launch, protocol, restore):
    root = launch.folder / "root"
    (root / "shards").mkdir(parents=True)
    (root / "shards" / "manifest.json").touch()  # shards that are there are not made again
    narrow = {"LABELS": "null 60", "PIXELS": "56 14", "SEEDS": "3", "PROTOCOL": protocol}
    done = launch.run("coarse_study.sh", "launch", "root", **narrow)
    assert (done.returncode, done.stderr) == (0, "")
    expected = []
    configs = "configs/lc25000_coarse"
    methods = ("student_alone", "logit_kd", "features", "cat", "at_plus")
    assert {path.stem for path in (ROOT / configs).glob("*.yaml")} == {"teacher", *methods}
    files = " ".join(f"{configs}/{name}.yaml" for name in methods)
    for labels in ("null", "60"):
        place = f"{root}/labels-{labels}"
        common = f"--data.shards {root}/shards --data.labelled {labels} --seeds 3 --run.root {place}"
        expected.append(f"0 train {configs}/teacher.yaml {common}/teacher")
        for pixels, factor in ((56, 2), (14, 8)):
            students = f"{pixels}-px-{protocol or 'native'}"
            teacher = f"--teacher.export {place}/teacher/lc25000_coarse-teacher-seed{{seed}}"
            coarse = f"--data.degraded.coarse.factor {factor} --data.degraded.coarse.restore {restore}"
            if restore == "false" and pixels < 28:  # so that a map of several places is left
                coarse += " --model.encoders.coarse.widths [32, 64, 128]"
            expected.append(f"0 train {files} {common}/{students} {teacher} {coarse}")
            expected.append(f"0 report {place}/teacher {place}/{students} --output {place}/{students}/report")
    assert launch.calls() == sorted(expected)


@pytest.mark.parametrize(("arguments", "code"), [(["end=0"], 0), (["end=2"], 2), (["raise=2"], 2), (["raise=0"], 0)])
def test_train_ends_with_the_code_of_the_command_and_notes_it(launch, arguments, code):
    notes = launch.folder / "notes"
    notes.mkdir()
    environ = launch.environ | {"DISTKD_NOTES": str(notes), "RANK": "5"}
    train = [sys.executable, launch.folder / "launch" / "train.py", "a.yaml", *arguments]
    assert subprocess.run(train, env=environ, check=False).returncode == code
    assert (notes / "code-5").read_text() == str(code)
    assert launch.calls() == [" ".join(["5 train a.yaml", *arguments])]


def test_train_needs_no_launcher(launch):
    train = [sys.executable, launch.folder / "launch" / "train.py", "a.yaml", "end=3"]
    assert subprocess.run(train, env=launch.environ, check=False).returncode == 3


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_a_port_that_is_taken_is_said_in_a_sentence(launch, rendezvous):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = str(held.getsockname()[1])
        node = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODES": "1", "NODE_RANK": "0", "NPROC": "1"}
        done = launch.run("multinode.sh", "a.yaml", **node, RENDEZVOUS=rendezvous)
    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1 is taken, so the nodes cannot meet there; start again" in done.stderr
    assert "Traceback" not in done.stderr
    assert launch.calls() == []
