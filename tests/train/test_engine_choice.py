"""What an engine can not do is refused when the config is read, with what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from distkd.cli import USER, main
from distkd.config import load
from distkd.errors import ConfigError
from tests.small import Small


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            {"engine.name": "deepspeed", "engine.precision": "fp16"},
            "engine.precision=fp16 is not available under deepspeed; use bf16, or engine.name ddp",
        ),
        (
            {"engine.name": "deepspeed", "engine.precision": "fp64"},
            "engine.precision=fp64 is not available under deepspeed; use fp32, or engine.name ddp",
        ),
        (
            {"engine.name": "fsdp", "engine.precision": "fp16"},
            "engine.precision=fp16 is not available under fsdp; use bf16, or engine.name ddp",
        ),
        (
            {"engine.name": "deepspeed", "engine.compile": True},
            "engine.compile is not available under deepspeed; use engine.name ddp, or do without",
        ),
        (
            {"engine.name": "fsdp", "engine.compile": True},
            "engine.compile is not available under fsdp; use engine.name ddp, or do without",
        ),
        (
            {"engine.name": "fsdp", "optim.fused": "apex"},
            "optim.fused=apex is not available under fsdp; use optim.fused torch",
        ),
    ],
)
def test_combinations_that_can_not_keep_the_laws_are_refused(
    small: Small, tmp_path: Path, overrides: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
):
    path = small.write(tmp_path, "alone")
    with pytest.raises(ConfigError) as refused:
        load(path, overrides)
    assert words in str(refused.value)
    typed = [word for key, value in overrides.items() for word in (f"--{key}", str(value).lower())]
    assert main(["train", str(path), *typed]) == USER
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs" / "alone").exists()


def test_a_stage_that_does_not_exist_is_refused(small: Small, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"engine\.zero_stage"):
        load(small.write(tmp_path, "alone"), {"engine.zero_stage": 4})
