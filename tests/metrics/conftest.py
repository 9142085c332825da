"""Fixtures of the tests of metrics."""

from __future__ import annotations

import itertools
import subprocess
import types
from pathlib import Path

import pytest

from tests.metrics.exporters import be_patient
from tests.require import require


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that vouches for itself, and its key."""
    require("openssl", ["openssl"])
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    about = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-days", "2"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command = ["openssl", "req", *kind, *about, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.fixture(autouse=True)
def _disk_may_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of a disk that hangs shorten their patience themselves."""
    be_patient(monkeypatch)


@pytest.fixture
def seconds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files are read in the order of their names, which hold the second; attempts of one test may share it."""
    clock = types.SimpleNamespace(time=itertools.count(1_700_000_000).__next__)
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", clock)
