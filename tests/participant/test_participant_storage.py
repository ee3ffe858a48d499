"""A site's disk fills up at every step of a session: it says so, keeps its ledger, and is asked again by itself."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog
from tests.participant.local_site import Table
from tests.small_disk import SmallDisk, small_disk

from maskwork.errors import StorageUnavailable
from maskwork.participant import room
from maskwork.secagg import server_states as core
from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.messages import AdvertiseKeys, Decline, Withdraw

PATIENCE_S = 20.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "site" / "scratch") as mounted:
        yield mounted


class Pauses:
    """Lets a waiting site look again, once for each `look`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._looks: asyncio.Queue[None] = asyncio.Queue()

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await self._looks.get()

    def look(self) -> None:
        self._looks.put_nowait(None)


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest_asyncio.fixture
async def table(tmp_path: Path, disk: SmallDisk, pauses: Pauses) -> AsyncIterator[Table]:
    started = await Table(tmp_path / "site", pause=pauses).start()
    yield started
    await started.close()


async def told_again_when_there_is_room(table: Table, disk: SmallDisk, pauses: Pauses) -> None:
    for _ in range(7):
        pauses.look()
        await table.settle()
    assert table.link.redials == 0
    assert pauses.seconds == [1, 2, 4, 8, 16, 30, 30, 30]
    disk.empty()
    pauses.look()
    async with asyncio.timeout(PATIENCE_S):
        await table.link.redialled.wait()
    assert table.link.redials == 1
    await table.connect()
    session = await table.play(table.offer(attempt=2))
    assert isinstance(table.state, core.Completed), session.hex()


async def test_a_site_without_room_declines_before_it_fetches_and_connects_anew_when_there_is_room(
    table: Table, disk: SmallDisk, pauses: Pauses
) -> None:
    disk.fill()
    with structlog.testing.capture_logs() as logged:
        session = await table.propose(table.offer())
    (declined,) = table.answers(session, Decline)
    assert declined == Decline(
        DeclineCode.PAUSED, "the scratch directory cannot take a session now: the disk is full; its log says more"
    )
    (line,) = [e for e in logged if e["event"] == "no room for a session"]
    assert "the disk is full" in line["detail"]
    assert str(disk.root) in line["detail"]
    assert "Free some space" in line["detail"]
    assert table.ledger.plans("test") == ()  # this attempt may still be taken up: nothing was promised
    await told_again_when_there_is_room(table, disk, pauses)


async def test_a_read_only_scratch_is_said_to_be_so(table: Table, disk: SmallDisk) -> None:
    disk.remount("ro")
    session = await table.propose(table.offer())
    (declined,) = table.answers(session, Decline)
    assert declined.detail == "the scratch directory cannot take a session now: is read-only; its log says more"
    disk.remount("rw")


async def test_a_disk_that_fills_up_while_the_model_is_fetched_is_not_told_as_a_wrong_model(
    table: Table, disk: SmallDisk, pauses: Pauses
) -> None:
    table.link.held_downloads = True
    session = await table.propose(table.offer())
    disk.fill()
    table.link.held_downloads = False
    table.link.go.set()
    await table.settle()
    (declined,) = table.answers(session, Decline)
    assert declined.code is DeclineCode.PAUSED
    assert "disk cannot take the session" in declined.detail
    await told_again_when_there_is_room(table, disk, pauses)


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EMFILE, errno.EROFS])
async def test_a_masked_update_that_cannot_be_written_is_a_withdrawal_with_that_reason(table: Table, full: int) -> None:
    table.worker.failures["mask"] = OSError(full, "as the worker says")
    with structlog.testing.capture_logs() as logged:
        session = await table.play(table.offer())
    assert table.answers(session, Withdraw) == [Withdraw(AbortReason.STORAGE_FAILED)]
    (line,) = [e for e in logged if e["event"] == "session aborted"]
    assert any(remedy in line["detail"] for remedy in ("Free some space", "LimitNOFILE", "file system writable"))
    await table.play(table.offer(attempt=2))  # asked again at once, and able to: nothing of the failure stays
    assert isinstance(table.state, core.Completed)


async def test_what_a_site_promised_is_still_there_after_its_disk_was_full(table: Table, disk: SmallDisk) -> None:
    await table.play(table.offer())
    before = table.ledger.plans("test"), table.ledger.releases("test", table.offer().proposal.plan.model_digest)
    disk.fill()
    await table.propose(table.offer(attempt=2))
    after = table.ledger.plans("test"), table.ledger.releases("test", table.offer().proposal.plan.model_digest)
    assert after == before
    assert not [m for _, m in table.link.sent[-1:] if isinstance(m, AdvertiseKeys)]


async def test_room_is_asked_for_with_the_figures(tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match=r"a session needs \d{16} bytes, \d+ are free"):
        room.make_room(tmp_path / "session", 10**15)
    assert list(tmp_path.iterdir()) == []
