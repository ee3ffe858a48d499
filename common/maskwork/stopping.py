"""How a service is asked to stop, and that it does: SIGTERM and SIGINT, and a bound on what follows.

The first signal sets `Stop.asked`; the service drains. Further ones change nothing. If the process is still there after
`STOP_WITHIN_S` (a loop that is busy, a thread that nobody can cancel, a peer that does not let go), it ends then and
there, with 0 as well: whatever was committed is on the disk, and the next start goes on as after a kill.

It does NOT drain anything: what is told to whom, and in which order things are closed, is each service's own.
"""

import asyncio
import os
import signal
import sys
import threading
from types import FrameType
from typing import Final

import structlog

log = structlog.get_logger("maskwork")

STOP_WITHIN_S: Final = 15.0


class Stop:
    """Listens for the signals that end a service; made in the main thread, in the service's loop."""

    def __init__(self, *, within_s: float = STOP_WITHIN_S) -> None:
        self.asked = asyncio.Event()
        self._within_s = within_s
        self._loop = asyncio.get_running_loop()
        self._watchdog: threading.Timer | None = None
        # Not the loop's own handlers: those are called by a loop that is not busy, and the bound is for one that is.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        if self._watchdog is None:
            self._watchdog = threading.Timer(self._within_s, self._overdue)
            self._watchdog.daemon = True
            self._watchdog.start()
            self._loop.call_soon_threadsafe(self.asked.set)

    def _overdue(self) -> None:
        log.warning("stopped without waiting any longer", after_s=self._within_s)
        sys.stderr.flush()
        os._exit(0)
