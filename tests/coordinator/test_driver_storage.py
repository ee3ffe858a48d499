"""The coordinator's disk fills up at every step of a round: the job waits, says why, and goes on by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import pytest
from tests.coordinator.local_federation import (
    NOW,
    SITES,
    InlineWorker,
    LocalSite,
    connect_all,
    federation,
    mean_update,
    model_of,
)
from tests.small_disk import SmallDisk, small_disk

from maskwork import job_events as events
from maskwork.coordinator import happenings
from maskwork.coordinator.records import AttemptOutcome, JobState
from maskwork.errors import StoreError

P = ParamSpec("P")
R = TypeVar("R")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """The disk of sessions and models; the database has one of its own here, so that each failure is met alone."""
    with small_disk(tmp_path / "disk") as mounted:
        for name in ("sessions", "models"):
            (mounted.root / name).mkdir()
            (tmp_path / name).symlink_to(mounted.root / name)
        yield mounted


class Ticks:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("times", [1, 30])
async def test_no_attempt_is_opened_while_there_is_no_room_for_its_round(
    tmp_path: Path, disk: SmallDisk, times: int
) -> None:
    ticks = Ticks()
    async with federation(tmp_path, SITES[:3], ticks=ticks) as (coordinator, sites):
        coordinator.add_job(max_attempts=2)
        disk.fill()
        await connect_all(coordinator, sites)
        waiting = await coordinator.until(lambda e: isinstance(e, events.Waiting) and "the disk is full" in e.detail)
        assert isinstance(waiting, events.Waiting)
        assert waiting.detail.startswith("round 1 goes on by itself once the coordinator can store it: ")
        assert "sessions" in waiting.detail
        assert "Free some space" in waiting.detail
        for _ in range(times):  # however long it takes: this is nobody's failed attempt
            ticks.now += 60
            await coordinator.driver.post(happenings.Look())
            await coordinator.settled()
        assert coordinator.store.attempts("job-1") == ()
        assert list((tmp_path / "sessions").iterdir()) == []
        disk.empty()
        ticks.now += 60
        await coordinator.driver.post(happenings.Look())
        assert (await coordinator.until_ended()).state is JobState.COMPLETED
        assert [a.attempt for a in coordinator.store.attempts("job-1")] == [1]


async def test_room_is_asked_for_the_whole_round_before_any_site_trains_for_it(tmp_path: Path, disk: SmallDisk) -> None:
    async with federation(tmp_path, SITES[:3]) as (coordinator, sites):
        coordinator.add_job()
        disk.fill_but(1 << 20)  # the accumulator of this small model would still fit
        await connect_all(coordinator, sites)
        waiting = await coordinator.until(lambda e: isinstance(e, events.Waiting) and "a round needs" in e.detail)
        assert isinstance(waiting, events.Waiting)
        assert "bytes more" in waiting.detail
        assert coordinator.store.attempts("job-1") == ()
        assert all(site.heard == [] for site in sites.values())


async def test_a_read_only_disk_is_waited_for_too(tmp_path: Path, disk: SmallDisk) -> None:
    ticks = Ticks()
    async with federation(tmp_path, SITES[:3], ticks=ticks) as (coordinator, sites):
        coordinator.add_job()
        disk.remount("ro")
        await connect_all(coordinator, sites)
        waiting = await coordinator.until(lambda e: isinstance(e, events.Waiting) and "is read-only" in e.detail)
        assert isinstance(waiting, events.Waiting)
        assert "mount its file system writable" in waiting.detail
        disk.remount("rw")
        ticks.now += 60
        await coordinator.driver.post(happenings.Look())
        assert (await coordinator.until_ended()).state is JobState.COMPLETED


class Uploader(LocalSite):
    """A site whose upload meets the full disk; what the service does then is done here."""

    disk: SmallDisk
    full = True

    async def upload(self, offsets: tuple[int, int] = (0, 0)) -> bool:
        assert self._driver is not None
        if self.full:
            self.disk.fill()
        try:
            return await super().upload(offsets)
        except OSError as error:
            failure = StoreError.from_cause(error, file="upload")
            await self._driver.post(happenings.StorageFailed(self.session, failure))
            return False


async def test_a_disk_full_in_an_upload_ends_that_attempt_alone_and_costs_no_try(
    tmp_path: Path, disk: SmallDisk
) -> None:
    ticks = Ticks()
    async with federation(tmp_path, SITES[:2], ticks=ticks) as (coordinator, sites):
        coordinator.add_job(max_attempts=1)
        uploader = sites["site-c"] = Uploader("site-c")
        uploader.disk = disk
        await connect_all(coordinator, sites)
        aborted = await coordinator.until(lambda e: isinstance(e, events.AttemptAborted))
        assert isinstance(aborted, events.AttemptAborted)
        assert (aborted.reason, "the disk is full" in aborted.detail) == ("storage-failed", True)
        await coordinator.settled()
        assert list((tmp_path / "sessions").iterdir()) == []  # which may itself have made the room that was missing
        assert coordinator.store.drops("job-1") == ()  # it was no site's fault
        disk.empty()
        uploader.full = False
        ticks.now += 60
        await coordinator.driver.post(happenings.Look())
        record = await coordinator.until_ended()
        assert record.state is JobState.COMPLETED
        outcomes = [a.outcome for a in coordinator.store.attempts("job-1")]
        assert outcomes == [AttemptOutcome.ABORTED, AttemptOutcome.COMMITTED]


class FillingWorker(InlineWorker):
    """Fills the disk right before a function runs."""

    def __init__(self, disk: SmallDisk, before: str) -> None:
        super().__init__()
        self._disk, self._before = disk, before

    async def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if function.__name__ == self._before:
            self._before = ""
            self._disk.fill()
        return await super().call(function, *args, **kwargs)


async def test_a_disk_full_when_the_next_model_is_written_is_waited_for_and_the_same_session_commits(
    tmp_path: Path, disk: SmallDisk
) -> None:
    paused: list[float] = []

    async def pause(seconds: float) -> None:
        paused.append(seconds)
        await asyncio.sleep(0)
        if len(paused) == 12:  # the operator came back
            disk.empty()

    worker = FillingWorker(disk, "release")
    async with federation(tmp_path, SITES[:3], pause=pause, worker=worker) as (coordinator, sites):
        coordinator.add_job(max_attempts=1)
        with coordinator.driver.board.subscribe("job-1") as subscription:
            await connect_all(coordinator, sites)
            waiting = await coordinator._until(
                subscription, lambda e: isinstance(e, events.Waiting) and "the disk is full" in e.detail, "job-1"
            )
            assert isinstance(waiting, events.Waiting)
            assert waiting.detail.startswith("round 1 is complete but for its model")
            assert coordinator.store.resume_record("job-1") is not None  # a kill now would lose nothing either
        record = await coordinator.until_ended()
        assert record.state is JobState.COMPLETED
        (attempt,) = coordinator.store.attempts("job-1")
        assert attempt.outcome is AttemptOutcome.COMMITTED
        assert paused == [1, 2, 4, 8, 16, 32, *[60] * 6]
        np.testing.assert_allclose(model_of(coordinator, record.current_model), mean_update(SITES[:3]), atol=1e-5)
        models = [p.name for p in (tmp_path / "models").iterdir()]
        assert not [name for name in models if name.startswith(".incoming-")]  # nothing half-written is left


async def test_a_job_aborted_while_its_model_waits_for_room_ends_at_once(tmp_path: Path, disk: SmallDisk) -> None:
    forever = asyncio.Event()

    async def pause(_: float) -> None:
        await forever.wait()

    worker = FillingWorker(disk, "release")
    async with federation(tmp_path, SITES[:3], pause=pause, worker=worker) as (coordinator, sites):
        coordinator.add_job()
        await connect_all(coordinator, sites)
        await coordinator.until(lambda e: isinstance(e, events.Waiting) and "the disk is full" in e.detail)
        done = asyncio.get_running_loop().create_future()
        await coordinator.driver.post(happenings.JobAborted("job-1", "rosa", done))
        await done
        assert coordinator.record().state is JobState.ABORTED
        forever.set()
