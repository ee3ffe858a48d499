"""The proxy passes on what it is given, and does not when it is cut or held."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from tests.chaos.proxy import Proxy

pytestmark = pytest.mark.e2e
PATIENCE_S = 10.0


@pytest_asyncio.fixture
async def way() -> AsyncIterator[tuple[Proxy, int]]:
    """A proxy to somebody who repeats every line, and its port."""

    async def repeat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    echo = await asyncio.start_server(repeat, "127.0.0.1", 0)
    proxy = Proxy(echo.sockets[0].getsockname()[1])
    address = await proxy.open()
    yield proxy, int(address.rpartition(":")[2])
    await proxy.close()
    echo.close()


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def heard_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(b"hello\n")
    async with asyncio.timeout(PATIENCE_S):
        return await reader.readexactly(6)


async def test_what_is_said_comes_through(way: tuple[Proxy, int]) -> None:
    async with connected(way[1]) as (reader, writer):
        assert await heard_back(reader, writer) == b"hello\n"


async def test_a_cut_ends_open_connections_and_refuses_new_ones_until_it_heals(way: tuple[Proxy, int]) -> None:
    proxy, port = way
    async with connected(port) as (reader, writer):
        assert await heard_back(reader, writer) == b"hello\n"
        proxy.cut()
        with pytest.raises(ConnectionError):
            await heard_back(reader, writer)
    async with connected(port) as (reader, writer):
        with pytest.raises(ConnectionError):
            await heard_back(reader, writer)
    proxy.heal()
    async with connected(port) as (reader, writer):
        assert await heard_back(reader, writer) == b"hello\n"


async def test_held_connections_stay_and_go_on_where_they_were(way: tuple[Proxy, int]) -> None:
    proxy, port = way
    async with connected(port) as (reader, writer):
        assert await heard_back(reader, writer) == b"hello\n"
        carried = proxy.carried
        proxy.hold()
        waiting = asyncio.create_task(heard_back(reader, writer))
        await asyncio.wait({waiting}, timeout=0.1)
        assert not waiting.done()
        assert proxy.carried == carried
        proxy.let_go()
        assert await waiting == b"hello\n"


async def test_where_nobody_listens_the_site_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        proxy = Proxy(taken.getsockname()[1])
        address = await proxy.open()
        async with connected(int(address.rpartition(":")[2])) as (reader, writer):
            with pytest.raises(ConnectionError):
                await heard_back(reader, writer)
        await proxy.close()
