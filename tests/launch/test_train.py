"""The scripts over the real `distkd train`: what a user sees of a mistake, whatever the number of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [("method: {name: supervised}\nbatch: {global_bach: 8}\n", "global_bach"), (None, "mistake.yaml")],
    ids=["unknown key", "no file"],
)
def test_a_mistake_in_a_config_is_one_message_code_2_and_no_run_folder(tmp_path, text, words):
    config = tmp_path / "mistake.yaml"
    if text is not None:
        config.write_text(text)
    done = subprocess.run(
        [ROOT / "launch" / "workstation.sh", "--nproc", "2", config, "--run.root", tmp_path / "runs"],
        cwd=tmp_path,
        env=os.environ | {"VIRTUAL_ENV": sys.prefix},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert sum(words in line for line in done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "runs").exists()
