"""torchrun with its own arguments, and without its traceback: the ranks have said what is wrong.

A rank that died without a word, by a signal or the lack of memory, is named in one line.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from exit_code import noted_codes

__all__ = ["main"]

USER, INTERRUPTED = 2, 3


def main() -> int:
    """Run torchrun on this process's arguments; its exit code, 1 for anything but success."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
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
    return 0


def _ranks_have_spoken() -> bool:
    """Whether a rank ended with a message of its own."""
    folder = os.environ.get("DISTKD_NOTES")
    return folder is not None and not noted_codes(Path(folder)).isdisjoint({USER, INTERRUPTED})


if __name__ == "__main__":
    sys.exit(main())
