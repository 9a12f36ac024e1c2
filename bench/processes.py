"""What processes cost."""

from __future__ import annotations

from typing import Final

import psutil

MB: Final = 1_000_000


def family(pid: int) -> tuple[int, ...]:
    """A process, and all that it has started."""
    return (pid, *(child.pid for child in psutil.Process(pid).children(recursive=True)))


def resident(*pids: int) -> float:
    """Their memory in MB; what they share counts for each."""
    return float(sum(psutil.Process(pid).memory_info().rss for pid in pids)) / MB


def cpu(*pids: int) -> float:
    """Seconds of CPU that they have used."""
    used = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(times.user + times.system for times in used))
