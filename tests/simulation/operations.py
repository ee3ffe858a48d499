"""What can be done to a federation, as data: the operations that a seed, or a test, drives a simulation with.

A run is a list of these. One that is not possible when its turn comes (the message is not there any more, the process
is not running) does nothing, so that a list stays meaningful when parts of it are taken out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

COORDINATOR = "coordinator"
LIE_VARIANTS = 4


class Kind(StrEnum):
    """The operations."""

    DELIVER = "deliver"
    """Hand over the first message of a channel."""
    DROP = "drop"
    """Lose it."""
    DUPLICATE = "duplicate"
    """Let it arrive twice."""
    REORDER = "reorder"
    """Let the second message of a channel go first."""
    DELAY = "delay"
    """Hold a channel back for a while."""
    TRANSFER = "transfer"
    """Move the next piece of an upload or download."""
    BREAK_TRANSFER = "break-transfer"
    """Break an upload or download, and nothing else."""
    WORK = "work"
    """Let a worker finish what it is at."""
    FAIL_WORK = "fail-work"
    """Let a worker die instead."""
    CRASH = "crash"
    """Kill a process: now, or `after` so many of its durable writes, sends and calls, wherever in the code that is."""
    STOP = "stop"
    """Ask a process to end in good order (SIGTERM)."""
    RESTART = "restart"
    """Start it again."""
    CUT = "cut"
    """Break a site's connection; each side notices when a notice is delivered to it."""
    HEAL = "heal"
    """Let a site connect."""
    ADVANCE = "advance"
    """Move the clock: to the next timer, or part of the way."""
    LIE_UP = "lie-up"
    """Alter what a dishonest site says, or let it say something."""
    LIE_DOWN = "lie-down"
    """Alter what the coordinator says to a site, or say something of an earlier session again."""


FAULTS = frozenset(Kind) - {Kind.DELIVER, Kind.TRANSFER, Kind.WORK, Kind.HEAL, Kind.RESTART, Kind.ADVANCE}
"""What never happens in a world without faults."""


class Channel(StrEnum):
    """The two directions of a control stream, and what each end will notice of its end."""

    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Attributes:
        kind: which.
        target: a site's name, or `COORDINATOR`.
        channel: of the site's control stream, where the kind needs one.
        number: how much, which, or after how many: what the kind makes of it.
    """

    kind: Kind
    target: str = COORDINATOR
    channel: Channel | None = None
    number: int = 0
