"""How the demo speaks: live on a terminal, else a plain line for each thing that happens.

It is NOT the view of the job: that is `maskwork.watch_view`'s, to which the demo's own notes are added.

Rule it upholds: one thread writes to the terminal. (rich's own refreshing thread and a line printed above the live
view can get in each other's way, and leave half a line behind.)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from maskwork.job_events import WatchEvent
from maskwork.watch_state import WatchState
from maskwork.watch_view import REFRESH_PER_S, WatchScreen, follow


@dataclass(slots=True)
class DemoScreen:
    """The live view of the job under the demo's notes."""

    job: WatchScreen
    notes: list[str] = field(default_factory=list)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw both in the room that there is."""
        notes = [Text(note, "bold", overflow="ellipsis", no_wrap=True) for note in self.notes]
        yield from notes
        height = (options.height or console.height) - len(notes)
        yield from self.job.__rich_console__(console, options.update(height=max(1, height)))


class Display:
    """Where the demo shows what it does."""

    def __init__(self, console: Console) -> None:
        """Write to `console`."""
        self._console = console
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._screen: DemoScreen | None = None

    def say(self, text: str) -> None:
        """One line; while a job is shown live, it stays in view above the job."""
        if self._screen is None:
            self._console.print(Text(text), soft_wrap=True)
        else:
            self._screen.notes.append(text)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Say what is being done for as long as it takes."""
        if not self._live:
            self.say(text)
            yield
            return
        with self._console.status(Text(text)):
            yield

    async def show_job(self, events: AsyncIterator[WatchEvent]) -> WatchState:
        """Show a job until its events end; returns what is known of it then."""
        if not self._live:
            return await follow(events, self._console)
        screen = self._screen = DemoScreen(WatchScreen(WatchState()))
        with Live(screen, console=self._console, auto_refresh=False, vertical_overflow="crop") as live:
            refreshing = asyncio.create_task(_refresh(live))
            try:
                async for event in events:
                    screen.job.take(event)
            finally:
                self._screen = None
                refreshing.cancel()
        return screen.job.state


async def _refresh(live: Live) -> None:
    while True:
        live.refresh()
        await asyncio.sleep(1 / REFRESH_PER_S)
