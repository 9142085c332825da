"""The command: on a screen, as text once, or for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from distkd.top.look import Looker, for_scripts
from distkd.top.screen import lines_of, live

__all__ = ["run"]


def run(paths: Sequence[Path], *, once: bool = False, as_json: bool = False, every_s: float = 2.0) -> int:
    """Show the newest run that goes on among and below `paths`; once, where standard output is no terminal.

    Raises:
        DataError: there is no run at or below any of the paths.
    """
    looker = Looker(paths)
    if as_json:
        print(json.dumps([for_scripts(facts) for facts in looker.everything()], indent=1))
        return 0
    console = Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal and not once:
        return live(paths, every_s, console)
    for line in lines_of(looker.look(), console, None):
        if console.is_terminal:
            console.print(line, no_wrap=True, crop=False)
        else:
            print(line.plain, file=sys.stdout)
    return 0
