"""An asyncio loop without time and without files: when nothing in it is ready, it asks what is to happen next.

Production's drivers run on it unchanged. Its clock stands still until somebody moves it, its selector watches nothing,
and the moment in which a real loop would sleep is the moment in which the simulation performs its next operation.

Known nondeterminism: asyncio keeps some tasks in sets, so several tasks that are cancelled at once may end in another
order from run to run. Nothing else depends on the process: entropy, time and every choice come from the seed.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Mapping
from typing import Any


class _IdleSelector(selectors.BaseSelector):
    """Watches nothing. To be asked to wait is to be idle."""

    def __init__(self) -> None:
        self.idle: Callable[[float | None], None] = lambda _: None
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = selectors.SelectorKey(fileobj, fileobj if isinstance(fileobj, int) else fileobj.fileno(), events, data)
        self._keys[fileobj] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self.idle(timeout)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose clock is moved by hand.

    `on_idle(seconds)` is called whenever nothing is ready; `seconds` is how far off the next timer is, None without
    one. It may make something ready, move the clock, or raise, which ends the run.
    """

    def __init__(self, on_idle: Callable[[float | None], None]) -> None:
        self._now = 0.0
        selector = _IdleSelector()
        super().__init__(selector)
        selector.idle = on_idle

    def time(self) -> float:
        """Seconds since the run began."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock; timers that are due then fire in the order of their times."""
        if seconds < 0:
            raise ValueError(f"time does not go back: {seconds}")
        self._now += seconds
