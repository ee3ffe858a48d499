"""Ends the processes of a run when the run itself is gone, however it went: a small process at the end of a pipe.

The run tells it every process that it starts (``+PID``) and every one that has ended (``-PID``), a line each. The
run holds the only other end of the pipe, so the pipe ends when the run does, even by SIGKILL. Whoever is still on
the list is then asked to stop, and killed if it does not.

It is NOT how the run ends its processes as long as it lives (`maskwork.participant.local.children` is), and it starts
none. Signals that a terminal sends to everybody do not end it: it has to outlive the run by a moment.

Rule it upholds: where the system has process descriptors (Linux), a process is held by one from the start, so that a
number that was given to another process since is never signalled.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterable
from typing import Final

GRACE_S: Final = 5.0
_PAUSE_S: Final = 0.05


class Ward:
    """One process that may have to be ended."""

    def __init__(self, pid: int) -> None:
        """Hold the process.

        Raises:
            ProcessLookupError: It has ended.
        """
        self._pid = pid
        self._descriptor: int | None = None
        if sys.platform == "linux":
            self._descriptor = os.pidfd_open(pid)

    def signal(self, number: int) -> bool:
        """Send a signal (0: none); False when the process is gone."""
        try:
            if sys.platform == "linux" and self._descriptor is not None:
                signal.pidfd_send_signal(self._descriptor, number)
            else:
                os.kill(self._pid, number)
        except ProcessLookupError:
            return False
        return True

    def running(self) -> bool:
        """Whether it still runs; one that has ended but was not waited for does not."""
        if self._descriptor is None:
            return self.signal(0)
        ready, _, _ = select.select([self._descriptor], [], [], 0)
        return not ready

    def release(self) -> None:
        """Let go of it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def watch(lines: Iterable[bytes]) -> None:
    """Follow the run's list until it ends, then end whoever is left."""
    wards: dict[int, Ward] = {}
    for line in lines:
        pid = int(line[1:])
        if line.startswith(b"+"):
            with contextlib.suppress(ProcessLookupError):
                wards[pid] = Ward(pid)
        elif pid in wards:
            wards.pop(pid).release()
    end(list(wards.values()), grace_s=GRACE_S)


def end(wards: list[Ward], *, grace_s: float) -> None:
    """Ask each to stop; kill those that have not after `grace_s` seconds."""
    left = [ward for ward in wards if ward.signal(signal.SIGTERM)]
    deadline = time.monotonic() + grace_s
    while left and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
        left = [ward for ward in left if ward.running()]
    for ward in left:
        ward.signal(signal.SIGKILL)


def main() -> None:
    """What the guardian's process runs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watch(sys.stdin.buffer)


if __name__ == "__main__":
    main()
