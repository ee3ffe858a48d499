"""The watch over an identity directory: a good new pair is handed over once; anything else is said once and left."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from maskwork.net.authority import Authority, IssuedIdentity
from maskwork.net.identity import IdentityError, Role
from maskwork.net.loaded import LOOK_S, IdentityWatch, LoadedIdentity

NOW = 1_800_000_000.0
DAY = 86400.0
AUTHORITY = Authority.create("ward", now=NOW)


class Looks:
    """The pause between two looks: each one is let go by the test."""

    def __init__(self) -> None:
        self.now = NOW
        self.pauses: list[float] = []
        self._waiting, self._go = asyncio.Event(), asyncio.Event()

    def clock(self) -> float:
        return self.now

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self._waiting.set()
        await self._go.wait()
        self._go.clear()

    async def settled(self) -> None:
        """The look is over."""
        await self._waiting.wait()

    async def again(self) -> None:
        self._waiting.clear()
        self._go.set()
        await self._waiting.wait()


class Site:
    def __init__(self, home: Path) -> None:
        self.files = issued().write(home / "site")
        self.looks, self.taken = Looks(), list[LoadedIdentity]()
        self.revoked: set[bytes] = set()
        self.lines: list[Any] = []
        own = LoadedIdentity.load(self.files, now=NOW, role=Role.PARTICIPANT, roots=AUTHORITY.roots)
        self.watch = IdentityWatch(
            self.files, own, roots=AUTHORITY.roots, remedy="mend it", is_revoked=self.revoked,
            clock=self.looks.clock, pause=self.looks.pause,
        )  # fmt: skip

    async def take(self, identity: LoadedIdentity) -> None:
        self.taken.append(identity)

    def put(self, new: IssuedIdentity) -> None:
        new.write(self.files.cert.parent, overwrite=True)


def issued(
    name: str = "site-a", *, role: Role = Role.PARTICIPANT, by: Authority = AUTHORITY, **more: Any
) -> IssuedIdentity:
    return by.issue(role, name, **{"now": NOW, **more})


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    with capture_logs() as lines:
        site.lines = lines
        running = asyncio.create_task(site.watch.run(site.take))
        await site.looks.settled()
        yield site
        running.cancel()


async def test_a_new_pair_is_handed_over_once(site: Site) -> None:
    await site.looks.again()
    assert site.taken == []
    site.put(new := issued())
    await site.looks.again()
    await site.looks.again()
    (taken,) = site.taken
    assert (taken.cert_pem, taken.key_pem) == (new.cert_pem, new.key_pem)
    assert site.watch.current is taken
    assert set(site.looks.pauses) == {LOOK_S}


async def test_between_two_renames_nothing_is_taken_up_and_nothing_said(site: Site) -> None:
    new = issued()
    site.files.key.write_bytes(new.key_pem)
    await site.looks.again()
    assert site.taken == []
    site.files.cert.write_bytes(new.cert_pem)
    await site.looks.again()
    assert len(site.taken) == 1
    assert not [line for line in site.lines if line["log_level"] == "error"]


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (issued("site-b"), "names spiffe://ward/participant/site-b"),
        (issued(role=Role.OPERATOR), "the role operator"),
        (issued(by=Authority.create("ward", now=NOW)), "not signed by the CA"),
        (issued(now=NOW - 100 * DAY, days=50, by=Authority.create("ward", now=NOW)), "not signed by"),
    ],
    ids=["another-name", "another-role", "another-ca", "another-ca-and-expired"],
)
async def test_what_is_not_good_for_this_service_is_said_once_and_left(
    site: Site, new: IssuedIdentity, why: str
) -> None:
    before = site.watch.current
    site.files.key.write_bytes(new.key_pem)
    site.files.cert.write_bytes(new.cert_pem)
    for _ in range(4):
        await site.looks.again()
    assert site.taken == []
    assert site.watch.current is before
    (said,) = [line for line in site.lines if line["log_level"] == "error"]
    assert why in said["detail"]
    site.put(issued())
    await site.looks.again()
    assert len(site.taken) == 1


async def test_a_new_key_that_others_can_read_is_taken_up_once_they_cannot(site: Site) -> None:
    site.put(issued())
    site.files.key.chmod(0o644)
    for _ in range(3):
        await site.looks.again()
    assert site.taken == []
    (said,) = [line for line in site.lines if line["log_level"] == "error"]
    assert f"chmod 600 {site.files.key}" in said["detail"]
    site.files.key.chmod(0o600)
    await site.looks.again()
    assert len(site.taken) == 1


async def test_a_revoked_pair_is_not_taken_up(site: Site) -> None:
    new = issued()
    loaded = LoadedIdentity.load(
        new.write(site.files.cert.parent.parent / "new"), now=NOW, role=Role.PARTICIPANT, roots=AUTHORITY.roots
    )
    site.revoked.add(loaded.certificate.fingerprint)
    site.put(new)
    await site.looks.again()
    await site.looks.again()
    assert site.taken == []
    assert "revoked" in next(line["detail"] for line in site.lines if line["log_level"] == "error")


async def test_files_that_are_gone_for_a_while_change_nothing(site: Site) -> None:
    right = site.files.cert.read_bytes()
    site.files.cert.unlink()
    await site.looks.again()
    site.files.cert.write_bytes(right)
    await site.looks.again()
    assert site.taken == []
    assert not [line for line in site.lines if line["log_level"] == "error"]


async def test_an_expiry_is_told_a_month_ahead_then_daily_with_the_remedy(site: Site) -> None:
    def told() -> list[tuple[str, float]]:
        return [(line["event"], line["days"]) for line in site.lines if line.get("remedy") == "mend it"]

    await site.looks.again()
    assert told() == []
    site.looks.now = NOW + 334 * DAY
    await site.looks.again()
    assert told() == []
    site.looks.now = NOW + 335 * DAY + 60
    for _ in range(3):
        await site.looks.again()
    assert told() == [("this certificate expires soon", 30.0)]
    site.looks.now += DAY
    await site.looks.again()
    assert told()[1:] == [("this certificate expires soon", 29.0)]
    site.looks.now = NOW + 366 * DAY
    await site.looks.again()
    assert told()[2:] == [("this certificate has expired", -1.0)]
    site.put(issued(now=site.looks.now))
    await site.looks.again()
    site.looks.now += DAY
    await site.looks.again()
    assert len(told()) == 3


def test_a_pair_of_two_pairs_is_refused(tmp_path: Path) -> None:
    files = issued().write(tmp_path)
    files.key.write_bytes(issued().key_pem)
    with pytest.raises(IdentityError, match="not the key"):
        LoadedIdentity.load(files, now=NOW, role=Role.PARTICIPANT, roots=AUTHORITY.roots)
