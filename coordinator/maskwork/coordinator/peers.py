"""A connected participant, as the driver sees it: who it is, and a bounded queue of what is to be sent to it.

The service fills these in from the TLS connection and empties the queue; the driver decides what goes in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from maskwork.coordinator.rounds import PresentSite
from maskwork.wire.v1 import federation_pb2

OUTBOX_LIMIT = 64
"""A session puts fewer than ten messages in a row to one participant; a reader that far behind is gone."""
UNHANDLED_LIMIT = 8
"""Messages of one participant that wait for the driver: the rest of a flood waits at its sender, not before others."""


Outgoing: TypeAlias = Callable[[], federation_pb2.ConnectResponse]
"""A message that is put together when its turn has come: a stage of a large cohort opens for everybody at once, and all
messages together would be as large as the cohort times its degree."""


@dataclass(eq=False, slots=True)
class Peer:
    """One control stream of one participant.

    Attributes:
        site: name, fingerprint and tasks.
        certificate: DER, as verified on this connection.
        active_session: the session that the participant says it is still in; empty for none.
        audit_size: how many records are under the head of our audit chain that it keeps; by its word.
        succeeds_another: it has an older certificate, and another connection, for the session that it is in.
        welcomed_by: the coordinator's certificate, DER, that this connection was told of; empty: whichever is in use.
        displaced: another connection with the same certificate took its place.
    """

    site: PresentSite
    certificate: bytes = field(repr=False)
    active_session: bytes = b""
    audit_size: int = 0
    succeeds_another: bool = False
    welcomed_by: bytes = field(default=b"", repr=False)
    displaced: bool = False
    _outbox: asyncio.Queue[Outgoing | None] = field(default_factory=lambda: asyncio.Queue(OUTBOX_LIMIT + 1), repr=False)
    _room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(UNHANDLED_LIMIT), repr=False)
    _closed: bool = False

    @property
    def name(self) -> str:
        """The participant's name."""
        return self.site.name

    def send(self, response: Outgoing) -> None:
        """Queue a message; a peer that does not read its messages is closed."""
        if self._closed:
            return
        if self._outbox.qsize() >= OUTBOX_LIMIT:
            self.close()
            return
        self._outbox.put_nowait(response)

    def close(self) -> None:
        """End the stream after what is queued already."""
        if not self._closed:
            self._closed = True
            self._outbox.put_nowait(None)

    async def room(self) -> None:
        """Wait until one more message of this participant may be put to the driver; `handled` must follow."""
        await self._room.acquire()

    def handled(self) -> None:
        """The driver is done with one of its messages."""
        self._room.release()

    async def next_response(self) -> federation_pb2.ConnectResponse | None:
        """What to send next; None: end the stream."""
        outgoing = await self._outbox.get()
        return None if outgoing is None else outgoing()
