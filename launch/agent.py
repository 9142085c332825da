"""torchrun with its own arguments, and without its traceback: the ranks have said what is wrong.

A rank that died without a word, by a signal or the lack of memory, is named in one line; so is what keeps the nodes
from meeting.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from exit_code import noted_codes

__all__ = ["main"]

USER, INTERRUPTED = 2, 3
TAKEN = "EADDRINUSE"


def main() -> int:
    """Run torchrun on this process's arguments; its exit code, 1 for anything but success."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun

    for name in ("agent.server.api", "multiprocessing.api"):
        log = logging.getLogger(f"torch.distributed.elastic.{name}")
        log.setLevel(logging.ERROR)  # its warnings tell of every signal that it passes on
        log.addFilter(lambda _: not _ranks_have_spoken())
    try:
        torchrun(sys.argv[1:])
    except SignalException:
        return 1
    except ChildFailedError as error:
        if not _ranks_have_spoken():
            rank, failure = error.get_first_failure()
            how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
            print(f"rank {rank} (pid {failure.pid}) {how}; start again to resume", file=sys.stderr, flush=True)
        return 1
    except (DistError, RendezvousError) as error:
        print(_why_not_met(error, sys.argv[1:]), file=sys.stderr, flush=True)
        return 1
    return 0


def _why_not_met(error: BaseException, arguments: list[str]) -> str:
    """In words, for the nodes of a torchrun with these arguments."""
    given = dict(word.removeprefix("--").split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
    endpoint = given.get("rdzv-endpoint") or f"{given.get('master-addr')}:{given.get('master-port')}"
    host, _, port = endpoint.rpartition(":")
    cause = error.__cause__ or error  # that of c10d says no more than that there is one
    if TAKEN in str(cause):
        return (
            f"port {port} of {host} is taken, so the nodes cannot meet there; start again, when it is free or with "
            "another MASTER_PORT on all nodes"
        )
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    where = f" at {endpoint}" if "None" not in endpoint else ""
    return f"the nodes did not meet{where}: {lines[0].rstrip('.')}; see whether all of them run, and start again"


def _ranks_have_spoken() -> bool:
    """Whether a rank ended with a message of its own."""
    folder = os.environ.get("DISTKD_NOTES")
    return folder is not None and not noted_codes(Path(folder)).isdisjoint({USER, INTERRUPTED})


if __name__ == "__main__":
    sys.exit(main())
