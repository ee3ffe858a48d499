"""Processor time of process trees, from /proc (Linux)."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from maskwork.bench.memory import tree


def cpu_seconds(pid: int) -> float:
    """User and system time that a process, its threads and its living descendants have used, in seconds."""
    ticks = 0
    for each in tree(pid):
        with suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14])  # and of children that ended
    return ticks / os.sysconf("SC_CLK_TCK")
