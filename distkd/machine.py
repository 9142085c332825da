"""What this machine, or this allocation of it, has."""

from __future__ import annotations

from pathlib import Path

__all__ = ["memory_bytes"]


def memory_bytes() -> int:
    """Available memory, or what the control group leaves of it."""
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        used = int((limit.parent / "memory.current").read_text())
        available = min(available, int(limit.read_text()) - used)
    return available
