"""What a campaign counts: inputs, distinct errors and crashes by target; memory and open files of processes.

Not a test itself. A crash keeps its traceback and the seed that makes its input again.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskwork.bench.memory import MIB, pss_bytes, tree


@dataclass
class Tally:
    """Counts of one campaign."""

    inputs: Counter[str] = field(default_factory=Counter)
    errors: dict[str, Counter[str]] = field(default_factory=dict)
    crashes: list[dict[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def tried(self, target: str, outcome: str) -> None:
        """One input, and what came of it: "accepted", or the error's name."""
        self.inputs[target] += 1
        self.errors.setdefault(target, Counter())[outcome] += 1

    def crashed(self, target: str, seed: str, error: BaseException) -> None:
        """One input that got an error that nobody documented."""
        self.tried(target, f"CRASH {type(error).__name__}")
        same = [c for c in self.crashes if c["target"] == target and c["error"] == type(error).__name__]
        if len(same) < 2:
            told = "".join(traceback.format_exception(error)[-6:])
            self.crashes.append({"target": target, "seed": seed, "error": type(error).__name__, "traceback": told})

    def failed(self, what: str) -> None:
        """An expectation that did not hold: an unbounded figure, a job that did not complete, a line in a log."""
        self.broken.append(what)

    @property
    def clean(self) -> bool:
        return not self.crashes and not self.broken

    def report(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "inputs": sum(self.inputs.values()),
            "inputs_by_target": dict(self.inputs),
            "outcomes_by_target": {target: dict(counts) for target, counts in self.errors.items()},
            "distinct_errors": sorted(
                {f"{t}: {e}" for t, counts in self.errors.items() for e in counts if e != "accepted"}
            ),
            "crashes": self.crashes,
            "broken": self.broken,
            **self.figures,
        }


@dataclass
class Gauge:
    """Peak memory and open files of a process and its children, looked at whenever `look` is called."""

    pid: int
    peak_rss_mib: float = 0.0
    peak_pss_mib: float = 0.0
    most_files: int = 0
    first_rss_mib: float = 0.0
    last_rss_mib: float = 0.0
    last_files: int = 0

    def look(self) -> None:
        """Read it off /proc; a process that is gone leaves the figures as they are."""
        try:
            files = len(os.listdir(f"/proc/{self.pid}/fd"))
            rss = _kib(f"/proc/{self.pid}/status", "VmRSS:") / 1024
            pss = sum(pss_bytes(pid) for pid in tree(self.pid)) / MIB
        except OSError:
            return
        self.first_rss_mib = self.first_rss_mib or rss
        self.last_rss_mib, self.last_files = rss, files
        self.peak_rss_mib = max(self.peak_rss_mib, rss)
        self.peak_pss_mib = max(self.peak_pss_mib, pss)
        self.most_files = max(self.most_files, files)

    def figures(self) -> dict[str, float]:
        """For the report."""
        return {name: round(value, 1) for name, value in vars(self).items() if name != "pid"}


def connections_to(port: int) -> int:
    """Established connections to a port of this machine, seen from the callers' side."""
    found = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, _, remote, state, *_ = line.split()
            found += state == "01" and remote.endswith(f":{port:04X}")
    return found


def _kib(path: str, key: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    return 0
