"""How far long work is, for people who watch a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

__all__ = ["track"]

T = TypeVar("T")


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterable[T]:
    """The items, with a progress bar where standard error is a terminal."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    return rich_track(items, label, total=total, console=console, disable=not console.is_terminal, transient=True)
