"""The command line: arguments in, one message for a user's error, exit codes that scripts can rely on."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr

from distkd.arguments import parser
from distkd.commands import DONE, say
from distkd.errors import DiskError, DistkdError, DivergedError, Interrupted, LostRankError
from distkd.world import World

__all__ = ["DONE", "INTERNAL", "INTERRUPTED", "USER", "main"]

INTERNAL, USER, INTERRUPTED = 1, 2, 3
PIPE = 141
"""As a shell says it of a tool that SIGPIPE ended."""

_MAIN_RANK_SPEAKS_S = 20.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Heavy imports happen inside the commands."""
    world = World.from_environment()
    words, overrides = _overrides_apart(sys.argv[1:] if argv is None else argv)
    try:
        with nullcontext() if world.is_main else redirect_stderr(io.StringIO()):  # a wrong argument is said once
            arguments, unknown = parser().parse_known_args(words)
    except SystemExit as end:
        if end.code:
            _let_main_speak(world)
        raise
    rest = unknown + overrides
    logging.basicConfig(level=logging.WARNING, format="distkd: %(message)s", stream=sys.stderr)
    logging.getLogger("distkd").setLevel(logging.WARNING if world.is_main else logging.ERROR)
    command: Callable[[argparse.Namespace, list[str], World], int] = arguments.command
    try:
        code = command(arguments, rest, world)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return PIPE
    except Interrupted as stop:
        say(world, str(stop))
        return INTERRUPTED
    except KeyboardInterrupt:
        say(world, "stopped at once; the last checkpoint is whole")
        return INTERRUPTED
    except DistkdError as error:
        if arguments.debug:
            traceback.print_exc()
        lost = isinstance(error, LostRankError) and world.local_rank == 0  # the main rank may be the one that is gone
        if world.is_main or error.local or lost:
            prefix = "" if world.is_main else f"rank {world.rank}: "
            print(f"distkd: {prefix}{error}", file=sys.stderr, flush=True)
        else:
            _let_main_speak(world)
        # neither a rank that is gone nor a full disk is in the command: the same one may be started again
        return INTERNAL if isinstance(error, LostRankError | DivergedError | DiskError) else USER


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output, as behind `| head`; then what is left of it goes nowhere."""
    watch = select.poll()
    try:
        watch.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # not a file of the system's
        return False
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _overrides_apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Other words, and the `--section.field VALUE` pairs, wherever they stand; argparse would take VALUE for a file."""
    words: list[str] = []
    overrides: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not re.match(r"--\w+\.", word):
            words.append(word)
            continue
        overrides.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return words, overrides


def _let_main_speak(world: World) -> None:
    """torchrun ends all ranks when the first one ends: the main rank, which has the message, must be that one."""
    if not world.is_main and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(_MAIN_RANK_SPEAKS_S)


if __name__ == "__main__":
    # after a lost rank or a second Ctrl-C other threads may hang in a collective; the outcome is on disk
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if code else sys.exit(code)
