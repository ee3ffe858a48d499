"""Two lines for a while: which one counts, in which order the driver hears, and what is given up when."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from maskwork.net.authority import Authority
from maskwork.net.identity import Role, VerifiedCertificate, to_der
from maskwork.net.loaded import LoadedIdentity
from maskwork.participant.client import LinkDown, LinkUp, Said
from maskwork.participant.succession import RenewableLink
from maskwork.wire.codec import UploadReady
from maskwork.wire.v1 import federation_pb2

NOW = 1_800_000_000.0
PATIENCE_S = 10.0
AUTHORITY = Authority.create("ward", now=NOW)


def verified(role: Role, name: str, **more: Any) -> VerifiedCertificate:
    issued = AUTHORITY.issue(role, name, now=NOW, **more)
    from cryptography import x509

    return AUTHORITY.roots.verify(to_der(x509.load_pem_x509_certificate(issued.cert_pem)), now=NOW)


COORDINATOR = verified(Role.COORDINATOR, "main", dns_names=["hub"])
UP, DOWN = LinkUp(COORDINATOR), LinkDown()
OFFER = Said(federation_pb2.ConnectResponse(session_id=b"s" * 32))


def loaded(tmp_path: Path, number: int) -> LoadedIdentity:
    files = AUTHORITY.issue(Role.PARTICIPANT, "site-a", now=NOW).write(tmp_path / str(number))
    return LoadedIdentity.load(files, now=NOW, role=Role.PARTICIPANT, roots=AUTHORITY.roots)


class FakeLine:
    """A line that says what the test has it say."""

    def __init__(
        self, events: "asyncio.Queue[object]", session: Callable[[], bytes], succeeds: Callable[[], bool]
    ) -> None:
        self.events, self.session, self.succeeds = events, session, succeeds
        self.running, self.ended = asyncio.Event(), asyncio.Event()
        self.sent: list[object] = []

    async def run(self) -> None:
        self.running.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def say(self, *events: object) -> None:
        for event in events:
            self.events.put_nowait(event)
        async with asyncio.timeout(PATIENCE_S):
            await self.events.join()

    def send(self, session: bytes, message: object) -> None:
        self.sent.append(message)

    def redial(self) -> None:
        self.sent.append("redial")

    async def hang_up(self) -> None:
        self.sent.append("hang up")

    async def download(self, digest: bytes, size: int, path: Path) -> bytes:
        raise NotImplementedError

    async def upload(self, session: bytes, update: BinaryIO, statistics: bytes, offsets: tuple[int, int]) -> int:
        raise NotImplementedError


class Site:
    """A driver that keeps what it hears, and its link."""

    def __init__(self, first: LoadedIdentity) -> None:
        self.inbox: asyncio.Queue[object] = asyncio.Queue()
        self.heard: list[object] = []
        self.session = b""
        self.lines: list[FakeLine] = []
        self.link = RenewableLink(
            first,
            make_line=self._make,
            inbox=self.inbox,
            active_session=lambda: self.session,
            take_up=lambda identity: self.heard.append(identity.certificate.fingerprint),
        )

    def _make(self, _: LoadedIdentity, events: "asyncio.Queue[object]", session: Any, succeeds: Any) -> FakeLine:
        self.lines.append(FakeLine(events, session, succeeds))
        return self.lines[-1]

    async def drive(self) -> None:
        while True:
            self.heard.append(await self.inbox.get())
            self.inbox.task_done()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(loaded(tmp_path, 0))
    tasks = [asyncio.create_task(site.drive()), asyncio.create_task(site.link.run())]
    async with asyncio.timeout(PATIENCE_S):
        await site.lines[0].running.wait()
    await site.lines[0].say(UP)
    yield site
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(line.ended.wait() for line in site.lines if line.running.is_set()))


async def renewed(site: Site, tmp_path: Path, number: int = 1) -> LoadedIdentity:
    new = loaded(tmp_path, number)
    await site.link.renew(new)
    async with asyncio.timeout(PATIENCE_S):
        await site.lines[-1].running.wait()
    return new


async def test_during_a_session_the_older_line_goes_on_and_the_newer_says_that_it_succeeds(
    site: Site, tmp_path: Path
) -> None:
    site.session = b"s" * 32
    await renewed(site, tmp_path)
    older, newer = site.lines
    await newer.say(UP)
    site.link.send(site.session, UploadReady())
    await older.say(OFFER)
    assert site.heard == [UP, OFFER]
    assert older.sent == [UploadReady()]
    assert (older.session(), older.succeeds()) == (site.session, False)
    assert (newer.session(), newer.succeeds()) == (b"", True)
    assert not older.ended.is_set()


async def test_a_break_during_a_session_is_mended_by_the_older_line(site: Site, tmp_path: Path) -> None:
    site.session = b"s" * 32
    await renewed(site, tmp_path)
    older, newer = site.lines
    await newer.say(UP)
    await older.say(DOWN)
    await newer.say(DOWN, UP)
    await older.say(UP)
    assert site.heard == [UP, DOWN, UP]
    assert not older.ended.is_set()


async def test_when_the_coordinator_ends_the_older_line_the_newer_counts(site: Site, tmp_path: Path) -> None:
    new = await renewed(site, tmp_path)
    older, newer = site.lines
    await newer.say(UP)
    assert site.heard == [UP]  # nobody said anything yet: the coordinator may be opening a session with the older one
    await older.say(DOWN)
    assert site.heard == [UP, DOWN, new.certificate.fingerprint, UP]
    async with asyncio.timeout(PATIENCE_S):
        await older.ended.wait()
    assert newer.succeeds() is False
    site.link.send(b"", UploadReady())
    assert newer.sent == [UploadReady()]
    await newer.say(OFFER)
    assert site.heard[-1] == OFFER


async def test_what_is_said_on_the_newer_line_comes_after_the_certificate_that_it_is_about(
    site: Site, tmp_path: Path
) -> None:
    site.session = b"s" * 32  # its end has not been heard yet
    new = await renewed(site, tmp_path)
    older, newer = site.lines
    await newer.say(UP, OFFER)
    assert site.heard == [UP, new.certificate.fingerprint, UP, OFFER]
    older.events.put_nowait(OFFER)  # too late
    await newer.say(DOWN)
    assert site.heard[4:] == [DOWN]


async def test_an_older_line_that_is_down_gives_way_as_soon_as_the_newer_is_up(site: Site, tmp_path: Path) -> None:
    await site.lines[0].say(DOWN)
    new = await renewed(site, tmp_path)
    await site.lines[1].say(UP)
    assert site.heard == [UP, DOWN, new.certificate.fingerprint, UP]


async def test_of_two_renewals_in_a_row_the_last_one_counts(site: Site, tmp_path: Path) -> None:
    await renewed(site, tmp_path, 1)
    last = await renewed(site, tmp_path, 2)
    first, skipped, newest = site.lines
    async with asyncio.timeout(PATIENCE_S):
        await skipped.ended.wait()
    await newest.say(UP)
    await first.say(DOWN)
    assert site.heard == [UP, DOWN, last.certificate.fingerprint, UP]


async def test_hanging_up_ends_both(site: Site, tmp_path: Path) -> None:
    await renewed(site, tmp_path)
    older, newer = site.lines
    await site.link.hang_up()
    assert older.sent == ["hang up"]
    async with asyncio.timeout(PATIENCE_S):
        await newer.ended.wait()
