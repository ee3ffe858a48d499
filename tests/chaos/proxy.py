"""What lies between a site and its coordinator: a TCP relay on loopback that can be cut and held.

It looks at nothing that it carries. A cut ends every connection with a reset and takes no new one until it heals; held,
connections stay open and nothing passes, in either direction, which is what a dead link looks like at first.
Not a test itself.
"""

import asyncio
import contextlib
import socket
import struct

PIECE_BYTES = 1 << 16


class Proxy:
    """One site's way to one port of this machine."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self._cut = False
        self.carried = 0

    async def open(self) -> str:
        """Its address."""
        self._server = await asyncio.start_server(self._arrived, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self._cut = True
        for writer in tuple(self._writers):
            _reset(writer)

    def heal(self) -> None:
        self._cut = False

    def hold(self) -> None:
        self._passing.clear()

    def let_go(self) -> None:
        self._passing.set()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        self.let_go()
        await asyncio.gather(*self._handlers)

    async def _arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)
        if self._cut:
            _reset(writer)
            return
        self._writers.add(writer)
        try:
            there, onward = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:  # nobody listens there: so it is told on this side too
            _reset(writer)
            self._writers.discard(writer)
            return
        self._writers.add(onward)
        if self._is_cut():  # while it was being made
            _reset(writer)
            _reset(onward)
        await asyncio.gather(self._carry(reader, onward), self._carry(there, writer))
        self._writers -= {writer, onward}

    def _is_cut(self) -> bool:
        return self._cut

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                await self._passing.wait()
                writer.write(piece)
                await writer.drain()
                self.carried += len(piece)
        if self._cut:
            _reset(writer)
        else:
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection at once and let the other side know: what is not sent is not sent."""
    with contextlib.suppress(OSError):  # it has ended already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
