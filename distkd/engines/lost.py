"""What an engine's own communication raises when a rank is gone, in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distkd.base import World
from distkd.comm.world import DISAGREEMENT, failure

__all__ = ["transport"]

_TRANSPORTS = ("gloo", "NCCL", "ncclComm", DISAGREEMENT)


@contextmanager
def transport(what: str, world: World) -> Iterator[None]:
    """Around what an engine exchanges by itself; `what` is what failed, as in "the exchange of gradients".

    Raises:
        LostRankError: another rank was gone when it was needed.
        DivergedError: in debug mode, another rank was in another collective.
    """
    try:
        yield
    except RuntimeError as error:
        # failures of a transport have no type of their own
        if world.size > 1 and any(word in str(error) for word in _TRANSPORTS):
            raise failure(what, error, world) from error
        raise
