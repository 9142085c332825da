"""launch/monitoring/picture.py as a user calls it, and how it writes numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from launch.monitoring.dashboard import FILE
from launch.monitoring.sheet import DARK, LIGHT, Sheet, human, scale_of
from tests.launch.processes import REPOSITORY
from tests.monitoring.made import RUN, MadeServer


def picture(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "launch/monitoring/picture.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def url(prometheus_programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with MadeServer([tmp_path_factory.mktemp("no targets")]) as server:
        yield server.url


@pytest.mark.prometheus
def test_the_whole_dashboard_is_drawn_dark_or_light(url, tmp_path):
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in json.loads(FILE.read_text())["panels"])
    for name, look, options in (("dark.png", DARK, []), ("light.png", LIGHT, ["--light"])):
        done = picture("--url", url, "--run", RUN, "--output", tmp_path / name, *options)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{tmp_path / name}: ")
        with Image.open(tmp_path / name) as drawn:
            assert drawn.width == 1600
            assert drawn.height > 30 * rows
            corner = drawn.convert("RGB").crop((2, 2, 3, 3)).tobytes()
            assert f"#{corner.hex()}" == look.page


@pytest.mark.prometheus
@pytest.mark.parametrize(
    "options, words",
    [
        (["--run", "other"], "knows no run 'other'; runs it knows: fold.1+(b)"),
        (["--run", RUN, "--minutes", "0"], "--minutes 0 is no time; expected more than 0"),
        (["--run", RUN, "--output", "a.txt"], "--output a.txt is of no known kind; expected .png, .svg or .pdf"),
        (["--run", RUN, "--output", "/no/such/folder/a.png"], "--output /no/such/folder/a.png cannot be written: "),
        (["--run", RUN, "--dashboard", "gone.json"], "dashboard gone.json cannot be read: "),
    ],
)
def test_a_users_mistake_is_said_in_one_line(url, options, words):
    done = picture("--url", url, *options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "value, unit, decimals, text",
    [
        (0.3725, "percentunit", None, "37.2 %"),
        (1.0, "percentunit", 1, "100.0 %"),
        (0.0031, "s", None, "3.1 ms"),
        (90, "s", 1, "1.5 min"),
        (7200, "s", None, "2 h"),
        (0, "s", None, "0 s"),
        (2.25 * 2**30, "bytes", 1, "2.2 GiB"),
        (12, "bytes", None, "12 B"),
        (1_600_000, "Bps", None, "1.6 MB/s"),
        (3.5e12, "flops", None, "3.5 TFLOP/s"),
        (256, "short", 1, "256.0"),
        (1234, "short", None, "1234"),
        (12345, "short", None, "12.3 k"),
        (-0.25, "short", None, "-0.25"),
        (0.0003, "short", None, "0.0003"),
        (2.5e-7, "sci", None, "2.5e-07"),
        (float("nan"), "s", None, "-"),
        (float("inf"), "short", 2, "-"),
    ],
)
def test_a_number_is_written_with_its_unit(value, unit, decimals, text):
    assert human(value, unit, decimals) == text


def test_numbers_of_one_axis_have_one_prefix():
    assert human(512 * 2**20, "bytes", like=2**31) == "0.5 GiB"
    assert scale_of(2**31, "bytes") == 2**30


def test_a_text_is_cut_to_its_room():
    sheet = Sheet(DARK, 400, 100)
    assert sheet.fitted("short", 12, 200) == "short"
    cut = sheet.fitted("a name that is too long for its column", 12, 100)
    assert cut.endswith("...")
    assert sheet.measured(cut, 12) <= 100
