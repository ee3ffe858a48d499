"""Memory of processes: the peak of this one, and of others with all their children, from /proc (Linux).

PSS counts a page that several processes share once among them, so sums over processes mean something.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20


def peak_rss_bytes() -> int:
    """The largest resident set that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def tree(pid: int) -> list[int]:
    """A process and all its descendants, as far as they are still there."""
    found = [pid]
    for parent in found:
        for thread in Path(f"/proc/{parent}/task").glob("*/children"):  # a child belongs to the thread that started it
            with suppress(OSError):
                found += [int(child) for child in thread.read_text().split()]
    return found


def pss_bytes(pid: int) -> int:
    """Proportional set size of a process; 0 if it is gone or its memory may not be read."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


@dataclass(slots=True)
class PeakMemory:
    """Watches process trees; the peak of each is that of the sum over the tree."""

    roots: dict[str, int]
    peaks: dict[str, int] = field(default_factory=dict)

    def look(self) -> None:
        """Read it once."""
        for name, root in self.roots.items():
            total = sum(pss_bytes(pid) for pid in tree(root))
            self.peaks[name] = max(self.peaks.get(name, 0), total)

    def forget(self) -> None:
        """Begin anew, from what there is now."""
        self.peaks.clear()
        self.look()

    async def watch(self, every_s: float = 0.05) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(every_s)
