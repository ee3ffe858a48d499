"""The way to the coordinator across a renewal: a connection with the new certificate beside the one in use.

A session uses the roster's certificate to its end, and only the coordinator knows when the next roster is made. So the
connection with the older certificate stays, and another with the newer one stands beside it; the coordinator ends the
older once no session of it is open, and speaks on the newer. Whichever of the two is noticed first, the older is given
up then, and the driver goes by the new certificate.

To the driver this is one link. It carries events in their order and decides nothing about sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import structlog

from maskwork.net.loaded import LoadedIdentity
from maskwork.participant.client import LinkDown, LinkEvent, LinkUp
from maskwork.wire.codec import Request

log = structlog.get_logger("maskwork.participant")


class Line(Protocol):
    """One connection, kept up under one certificate; a `maskwork.participant.client.CoordinatorLink` in a service."""

    async def run(self) -> None:
        """Connect, serve, reconnect, until cancelled."""
        ...

    def send(self, session: bytes, message: Request) -> None:
        """Send a message if connected."""
        ...

    def redial(self) -> None:
        """End the connection and make another."""
        ...

    async def hang_up(self) -> None:
        """End the connection after what is queued."""
        ...

    async def download(self, digest: bytes, size: int, path: Path) -> bytes:
        """Fetch something content-addressed."""
        ...

    async def upload(self, session: bytes, update: BinaryIO, statistics: bytes, offsets: tuple[int, int]) -> int:
        """Stream both segments from their offsets."""
        ...


@dataclass(eq=False, slots=True)
class Placed:
    """A line, the certificate that it uses, and what it reports.

    Attributes:
        identity: what it was made with.
        events: what happened on it, in order.
        up: the last `LinkUp`, while it is connected.
        line: the line itself; it reports into `events`.
        tasks: the line's own, and the one that carries its events.
    """

    identity: LoadedIdentity
    events: asyncio.Queue[object] = field(default_factory=asyncio.Queue, repr=False)
    up: LinkUp | None = None
    line: Line | None = None
    tasks: tuple[asyncio.Task[None], ...] = ()


MakeLine = Callable[[LoadedIdentity, "asyncio.Queue[object]", Callable[[], bytes], Callable[[], bool]], Line]
"""A line for an identity; it reports into the queue, and asks which session it is in and if it succeeds another."""


class RenewableLink:
    """One link to the coordinator, whatever certificate it uses."""

    def __init__(
        self,
        first: LoadedIdentity,
        *,
        make_line: MakeLine,
        inbox: asyncio.Queue[object],
        active_session: Callable[[], bytes],
        take_up: Callable[[LoadedIdentity], None],
    ) -> None:
        """Begin with one line.

        Args:
            first: The certificate that the service was started with.
            make_line: Makes a line.
            inbox: The driver's.
            active_session: The session that the driver is in; empty for none.
            take_up: Has the driver go by another certificate.
        """
        self._make_line = make_line
        self._inbox = inbox
        self._active_session = active_session
        self._take_up = take_up
        self._failed: asyncio.Future[None] | None = None
        self._current = self._placed(first)
        self._next: Placed | None = None

    # --- to the driver, a link ------------------------------------------------------------------------------------

    def send(self, session: bytes, message: Request) -> None:
        """Send a message if connected; if not, the coordinator asks again once we are back."""
        self._line.send(session, message)

    def redial(self) -> None:
        """End the control stream; it is taken up again."""
        self._line.redial()

    async def download(self, digest: bytes, size: int, path: Path) -> bytes:
        """Fetch something content-addressed into `path`; returns its digest; raises TransferError."""
        return await self._line.download(digest, size, path)

    async def upload(self, session: bytes, update: BinaryIO, statistics: bytes, offsets: tuple[int, int]) -> int:
        """Stream both segments from their offsets; raises TransferError."""
        return await self._line.upload(session, update, statistics, offsets)

    # --- to the process -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the line up until cancelled."""
        self._failed = asyncio.get_running_loop().create_future()
        self._start(self._current)
        try:
            await self._failed
        finally:
            for placed in (self._current, self._next):
                if placed is not None:
                    self._retire(placed)

    async def renew(self, identity: LoadedIdentity) -> None:
        """Stand by with a new certificate; it counts once the coordinator has no session open for the older one."""
        if self._next is not None:
            self._retire(self._next)
        self._next = self._placed(identity)
        if self._failed is not None:
            self._start(self._next)

    async def hang_up(self) -> None:
        """End the connections after what is queued already."""
        if self._next is not None:
            self._retire(self._next)
            self._next = None
        await self._line.hang_up()

    @property
    def _line(self) -> Line:
        assert self._current.line is not None
        return self._current.line

    def _placed(self, identity: LoadedIdentity) -> Placed:
        placed = Placed(identity)
        placed.line = self._make_line(
            identity,
            placed.events,
            lambda: self._active_session() if placed is self._current else b"",
            lambda: placed is self._next,
        )
        return placed

    def _start(self, placed: Placed) -> None:
        assert placed.line is not None
        placed.tasks = (
            asyncio.create_task(placed.line.run()),
            asyncio.create_task(self._carry_all(placed)),
        )
        for task in placed.tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._failed is None or self._failed.done():
            return
        if (error := task.exception()) is not None:
            self._failed.set_exception(error)

    def _retire(self, placed: Placed) -> None:
        for task in placed.tasks:
            if task is not asyncio.current_task():
                task.cancel()

    # --- events ---------------------------------------------------------------------------------------------------

    async def _carry_all(self, placed: Placed) -> None:
        while placed is self._current or placed is self._next:
            event: LinkEvent = await placed.events.get()  # type: ignore[assignment]  # lines put nothing else there
            try:
                await self._carry(placed, event)
            finally:
                placed.events.task_done()

    async def _carry(self, placed: Placed, event: LinkEvent) -> None:
        if isinstance(event, LinkUp):
            placed.up = event
        elif isinstance(event, LinkDown):
            placed.up = None
        if placed is self._current:
            await self._tell(event)
        elif not isinstance(event, LinkUp | LinkDown):  # the coordinator speaks on the newer line: the older is over
            await self._succeed()
            await self._tell(event)
            return
        if self._next is not None and self._next.up and not self._current.up and not self._active_session():
            await self._succeed()

    async def _succeed(self) -> None:
        older, newer = self._current, self._next
        assert newer is not None
        self._current, self._next = newer, None
        self._take_up(newer.identity)
        self._retire(older)
        log.info("the new certificate counts", fingerprint=newer.identity.certificate.fingerprint.hex())
        if newer.up is not None:
            await self._tell(newer.up)

    async def _tell(self, event: LinkEvent) -> None:
        await self._inbox.put(event)
        await self._inbox.join()  # one at a time, as the line itself waits for what it put here
