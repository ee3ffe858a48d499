"""Hostile connections: junk before TLS, TLS that is not ours, junk after it, a thousand at once. Not a test itself."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from contextlib import suppress
from functools import cache

from tests.fuzz.hostile_calls import Arena, Attack

from maskwork.net.authority import Authority
from maskwork.net.identity import IdentityFiles, Role

CONNECTIONS = 1000
HOLD_S = 3.0
FIRST_BYTES = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    bytes.fromhex("16030100ff010000fb0303") + bytes(32),  # the beginning of a ClientHello
    bytes.fromhex("1603ffffff") + b"\xff" * 4000,
    b"\x80\x2e\x01\x00\x02",  # SSL 2
    b"SSH-2.0-x\r\n",
    b"\0" * 5000,
)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes.fromhex("000000040000000000")


async def junk_before_tls(arena: Arena, rng: random.Random) -> None:
    """Something else than TLS."""
    data = rng.choice((*FIRST_BYTES, rng.randbytes(rng.randrange(1, 3000))))
    await _say(arena, "junk before TLS", data, None)


async def junk_after_tls(arena: Arena, rng: random.Random) -> None:
    """A good handshake, then frames that are none, or that promise sixteen megabytes."""
    frame = rng.choice(
        (
            b"\xff\xff\xff" + bytes((rng.randrange(12), 0)) + bytes(4),
            b"\x00\x00\x04\x08\x00" + bytes(4) + b"\xff\xff\xff\xff",
            bytes.fromhex("000006040000000000000400000000") * 500,  # SETTINGS: a window of nothing, 500 times
            bytes.fromhex("000008060000000000") + bytes(8),  # PING
            bytes.fromhex("000004010000000001") + b"\x82\x86\x84\xff",
            rng.randbytes(rng.randrange(9, 2000)),
        )
    )
    many = frame * rng.choice((1, 1, 200))
    files = arena.world.identity(Role.PARTICIPANT, f"evil-{rng.randrange(4)}")
    await _say(arena, "junk after TLS", PREFACE + SETTINGS + many, _tls(files))


async def stranger(arena: Arena, _: random.Random) -> None:
    """A certificate of another federation's CA, with the same name; and none at all."""
    files = _strangers(arena)
    await _say(arena, "stranger's certificate", PREFACE + SETTINGS, _tls(files))
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
    nobody.set_alpn_protocols(["h2"])
    await _say(arena, "no certificate", PREFACE + SETTINGS, nobody)


async def a_thousand_connections(arena: Arena, rng: random.Random) -> None:
    """A thousand at a time: silent, or with a few bytes, or with a whole handshake."""
    held: list[asyncio.StreamWriter] = []
    files = arena.world.identity(Role.PARTICIPANT, "evil-0")

    async def one(number: int) -> None:
        with suppress(OSError, TimeoutError, ssl.SSLError):
            context = _tls(files) if number % 20 == 0 else None
            async with asyncio.timeout(10):
                _reader, writer = await asyncio.open_connection("127.0.0.1", arena.world.port, ssl=context)
            held.append(writer)
            writer.write(rng.choice((b"", b"\x16", FIRST_BYTES[2])))

    for first in range(0, CONNECTIONS, 100):
        await asyncio.gather(*(one(first + i) for i in range(100)))
    arena.tally.figures["most_connections"] = max(arena.tally.figures.get("most_connections", 0), len(held))
    arena.tally.inputs["a thousand connections"] += len(held)
    await asyncio.sleep(HOLD_S)
    for writer in held:
        writer.transport.abort()
    arena.tally.tried("a thousand connections", "closed by us")


async def _say(arena: Arena, target: str, data: bytes, context: ssl.SSLContext | None) -> None:
    outcome = "closed"
    try:
        async with asyncio.timeout(12):
            reader, writer = await asyncio.open_connection("127.0.0.1", arena.world.port, ssl=context)
            try:
                writer.write(data)
                await writer.drain()
                while await reader.read(65536):
                    if context is not None:
                        break  # it answers frames as HTTP/2 asks
            finally:
                writer.transport.abort()
    except (OSError, ssl.SSLError) as error:
        outcome = type(error).__name__
    except TimeoutError:
        outcome = "silence"
    arena.tally.tried(target, outcome)


def _tls(files: IdentityFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(files.cert, files.key)
    context.set_alpn_protocols(["h2"])
    return context


@cache
def _stranger_authority() -> Authority:
    return Authority.create("ward", now=time.time())


def _strangers(arena: Arena) -> IdentityFiles:
    directory = arena.world.home / "stranger"
    if not directory.exists():
        _stranger_authority().issue(Role.PARTICIPANT, "honest-a", now=time.time()).write(directory)
    return IdentityFiles.in_directory(directory)


SOCKETS: tuple[Attack, ...] = (junk_before_tls, junk_before_tls, junk_after_tls, junk_after_tls, stranger)
