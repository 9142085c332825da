"""`distkd top` as it is called where there is no terminal, and by scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distkd.cli import USER, main
from distkd.slurm import queue
from distkd.top.look import Looker, for_scripts
from distkd.top.run import run
from tests.small import Small
from tests.top.folders import NOW, made, ranks_of, write_ranks

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_asked", lambda *_: None)


def test_not_on_a_terminal_it_is_text_once(small: Small, capsys: Capture):
    assert main(["top", str(small.root / "student")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("student  logit_kd")
    assert "\x1b" not in text


def test_scripts_get_an_object_for_each_run(tmp_path: Path, capsys: Capture):
    folder = made(tmp_path / "kd")
    write_ranks(folder, ranks_of(4, slow=2))
    assert run([tmp_path], as_json=True) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert (found["name"], found["step"], found["method"], found["attempt"]) == ("kd", 600, "dc_distill", 2)
    assert found["parts"]["nce"] == 2.0
    assert (found["skipped"], found["replaced"]) == (0, 0)
    assert found["ranks"]["ranks"][0]["rank"] == 2
    facts = Looker([tmp_path], clock=lambda: NOW).look().facts
    assert for_scripts(facts)["samples_per_s_now"] == pytest.approx(640)
    assert for_scripts(facts)["wrong"][0].startswith("rank 2 makes a step 1.80x")


@pytest.mark.parametrize(
    "name, message",
    [
        ("absent", "absent does not exist; name a run folder, or a folder of run folders such as runs/"),
        ("empty", "empty; `distkd submit` and `distkd train CONFIG` make one"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"], ["--once"]])
def test_a_path_without_runs_is_refused(tmp_path: Path, name: str, message: str, options: list[str], capsys: Capture):
    (tmp_path / "empty").mkdir()
    assert main(["top", str(tmp_path / name), *options]) == USER
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "x", "nan", "-1", "1e9"])
def test_an_interval_is_seconds(text: str, capsys: Capture):
    with pytest.raises(SystemExit) as end:
        main(["top", "--interval", text])
    assert end.value.code == USER
    assert f"cannot read {text!r}; expected seconds from 0.1 to 3600" in capsys.readouterr().err


def test_looking_needs_no_torch():
    code = "import sys, distkd.cli, distkd.top.run; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
