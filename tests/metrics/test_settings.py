"""The section `metrics` of the config: what would not be as safe as it looks is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from distkd.config import load
from distkd.errors import ConfigError
from distkd.metrics.exporter import check_files
from distkd.metrics.settings import MetricsConfig
from tests.small import Small


def _written(small: Small, folder: Path, **metrics: Any) -> Callable[..., Any]:
    path = small.write(folder, "alone")
    path.write_text(path.read_text() + yaml.safe_dump({"metrics": metrics}).replace("'off'", "off"))
    return lambda **overrides: load(path, {name.replace("__", "."): value for name, value in overrides.items()})


def test_off_may_be_written_without_quotes(small: Small, tmp_path: Path):
    read = _written(small, tmp_path, export="off")
    assert "export: off\n" in (tmp_path / "alone.yaml").read_text()
    assert read().metrics == MetricsConfig(export="off", port=0)
    assert read(metrics__export=False).metrics.export == "off"  # `--metrics.export off`, as YAML reads it
    with pytest.raises(ConfigError, match=r"metrics.export: input should be 'off', 'local' or 'network', found True"):
        read(metrics__export=True)
    with pytest.raises(ConfigError, match=r"metrics.port: input should be less than or equal to 65535"):
        read(metrics__port=65536)


@pytest.mark.parametrize(
    "given, refused",
    [
        ({"export": "local", "tls_key": "k"}, r"metrics.tls_key needs the certificate it belongs to; set"),
        ({"password_file": "p"}, r"metrics.password_file would guard nothing, since metrics.export is off; set it"),
        ({"tls_cert": "c", "password_file": "p"}, r"metrics.tls_cert and metrics.password_file would guard nothing"),
        ({"export": "network", "password_file": "p"}, r"in the clear; set metrics.tls_cert \(and tls_key\)"),
    ],
)
def test_guards_that_would_not_guard_are_refused(small: Small, tmp_path: Path, given: dict[str, str], refused: str):
    with pytest.raises(ConfigError, match=refused):
        _written(small, tmp_path, **given)()


def test_guards_that_do_are_taken(small: Small, tmp_path: Path):
    safe = {"export": "network", "tls_cert": "c", "tls_key": "k", "password_file": "p"}
    assert _written(small, tmp_path, **safe)().metrics.tls_cert == Path("c")
    assert MetricsConfig(export="local", password_file=Path("p")).tls_cert is None  # of this machine, over loopback


def test_files_that_are_missing_are_told_before_a_run_begins(tmp_path: Path):
    for name in ("tls_cert", "password_file"):
        with pytest.raises(ConfigError, match=rf"metrics.{name}=\S*absent cannot be read: No such file or directory"):
            check_files(MetricsConfig.model_validate({"export": "local", name: tmp_path / "absent"}))
    with pytest.raises(ConfigError, match=r"metrics.textfile=\S*absent is no folder of this machine; name one that"):
        check_files(MetricsConfig(textfile=tmp_path / "absent"))
    check_files(MetricsConfig(export="local", textfile=tmp_path))


def test_a_port_that_nobody_opens_is_refused():
    with pytest.raises(ValidationError, match=r"metrics.port does nothing, since metrics.export is off"):
        MetricsConfig(port=9100)
