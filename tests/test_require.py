"""A test whose programs are missing is skipped with the reason, or fails where it has to run."""

from __future__ import annotations

import pytest

from tests.require import require

ABSENT = "no-such-program-of-distkd"


def test_programs_that_are_there_are_no_obstacle(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DISTKD_REQUIRE", "shells")
    require("shells", ["sh"])


@pytest.mark.parametrize("required", ["", "other,more", "shells-2"])
def test_missing_programs_skip_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch, required: str):
    monkeypatch.setenv("DISTKD_REQUIRE", required)
    with pytest.raises(pytest.skip.Exception) as skipped:
        require("shells", ["sh", ABSENT])
    reason = f"shells needs {ABSENT}: sudo apt-get install --no-install-recommends shells"
    assert str(skipped.value) == reason


@pytest.mark.parametrize("required", ["shells", "other,shells", "other, shells"])
def test_they_fail_where_the_list_has_their_name(monkeypatch: pytest.MonkeyPatch, required: str):
    monkeypatch.setenv("DISTKD_REQUIRE", required)
    with pytest.raises(pytest.fail.Exception, match=f"shells needs {ABSENT}: make it; or take shells out of"):
        require("shells", [ABSENT], install="make it")
