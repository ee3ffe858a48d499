"""A relay on loopback that counts the bytes of every connection, each way: what goes over the wire, TLS and all."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self

from maskwork.participant.local.files import HOST

_PIECE = 1 << 18


class CountingRelay:
    """Passes connections on to the coordinator; an async context manager.

    Attributes:
        port: Where it listens.
        up: Bytes from participants to the coordinator.
        down: Bytes from the coordinator to participants.
    """

    def __init__(self, target: int) -> None:
        """Pass on to the port `target` of this machine."""
        self._target = target
        self.up = self.down = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, 0, limit=_PIECE)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            there, back = await asyncio.open_connection(HOST, self._target, limit=_PIECE)
            await asyncio.gather(self._pump(reader, back, up=True), self._pump(there, writer, up=False))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, up: bool) -> None:
        with suppress(OSError):
            while piece := await source.read(_PIECE):
                if up:
                    self.up += len(piece)
                else:
                    self.down += len(piece)
                sink.write(piece)
                await sink.drain()
        sink.close()
