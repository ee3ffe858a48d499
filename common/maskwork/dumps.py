"""No core dumps: what a process has in memory is written nowhere when it crashes.

Both services and their workers hold keys, shares and updates. The limit of zero keeps the kernel from writing a core
file; a handler behind a pipe (systemd-coredump, apport) is called whatever the limit, and only a process that is not
dumpable is left alone by it (core(5), prctl(2) PR_SET_DUMPABLE). That also keeps other processes of the same user from
reading this one's memory and environment (ptrace, /proc/PID/mem, /proc/PID/environ): debuggers and profilers too.

It is NOT a lock on memory: pages may still be swapped out; use encrypted swap, or none.

The limit is inherited by every process started from here. "Not dumpable" ends with an exec, so each worker says it
again. Whoever has to debug a process sets MASKWORK_DEBUGGABLE=1 in its environment: then there is only the limit.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from typing import Final

DEBUGGABLE: Final = "MASKWORK_DEBUGGABLE"
_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4


def forbid_core_dumps() -> None:
    """See to it that nothing of this process's memory is written to a disk when it crashes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.environ.get(DEBUGGABLE) != "1" and sys.platform.startswith("linux"):
        _prctl(_PR_SET_DUMPABLE)


def dumpable() -> bool:
    """Whether the kernel would dump this process, as far as it says."""
    return not sys.platform.startswith("linux") or _prctl(_PR_GET_DUMPABLE) != 0


def _prctl(option: int) -> int:
    zeros = (ctypes.c_ulong(0),) * 4
    return int(ctypes.CDLL(None).prctl(option, *zeros))
