"""A site that declined for a while connects anew when it can take a session: that is how a coordinator learns of it.

It waits for one thing at a time: whoever has connected anew is asked again, and declines again for what still holds.
It decides nothing: whether there is room is `room`'s, whether the hours have begun the policy's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path

from maskwork.participant import room
from maskwork.participant.policy import Policy


class ComingBack:
    """Waits beside the loop, and then redials."""

    def __init__(
        self,
        *,
        scratch: Path,
        policy: Policy,
        clock: Callable[[], float],
        pause: room.Pause,
        redial: Callable[[], None],
    ) -> None:
        self._scratch = scratch
        self._policy = policy
        self._clock = clock
        self._pause = pause
        self._redial = redial
        self._waiting: asyncio.Task[None] | None = None

    def when_there_is_room(self, needed: int) -> None:
        """Connect anew when the disk can take a session of so many bytes."""
        self._after(lambda: room.wait_for_room(self._scratch / "room", needed, pause=self._pause))

    def when_hours_begin(self) -> None:
        """Connect anew when the policy's hours let a session begin."""
        self._after(lambda: room.wait_for_hours(self._policy.open_at, clock=self._clock, pause=self._pause))

    def cancel(self) -> None:
        """Wait no more."""
        if self._waiting is not None:
            self._waiting.cancel()

    def _after(self, able: Callable[[], Coroutine[None, None, None]]) -> None:
        async def later() -> None:
            await able()
            self._redial()

        if self._waiting is None or self._waiting.done():
            self._waiting = asyncio.get_running_loop().create_task(later())
