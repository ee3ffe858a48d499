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
        self._connections: set[asyncio.Future[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, 0, limit=_PIECE)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._pass_on(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        with suppress(asyncio.CancelledError):
            await connection

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back: asyncio.StreamWriter | None = None
        try:
            there, back = await asyncio.open_connection(HOST, self._target, limit=_PIECE)
            await asyncio.gather(self._pump(reader, back, up=True), self._pump(there, writer, up=False))
        except OSError:
            pass  # one end is gone: the other is told so by the close
        finally:
            for end in (writer, back):
                if end is not None:
                    end.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, up: bool) -> None:
        while piece := await source.read(_PIECE):
            if up:
                self.up += len(piece)
            else:
                self.down += len(piece)
            sink.write(piece)
            await sink.drain()
        sink.write_eof()
