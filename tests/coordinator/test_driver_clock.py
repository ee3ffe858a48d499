"""A wall clock that jumps while a job runs, back or ahead, neither hangs it nor cuts a wait short."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.coordinator.local_federation import NOW, SITES, connect_all, federation

from maskwork import job_events as events
from maskwork.coordinator import happenings
from maskwork.coordinator.records import JobState
from maskwork.job import Cohort
from maskwork.secagg.errors import AbortReason
from maskwork.secagg.messages import AdvertiseKeys, Withdraw
from maskwork.wire.codec import OpenSession, UploadReady

HOUR = 3600.0


class WallClock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("jump", [-100 * HOUR, 100 * HOUR])
async def test_a_clock_that_jumps_during_the_pause_before_a_retry_hangs_nothing(tmp_path: Path, jump: float) -> None:
    clock = WallClock()
    async with federation(tmp_path, SITES[:3], clock=clock) as (coordinator, sites):
        coordinator.add_job()
        sites["site-c"].silent = {AdvertiseKeys}
        await connect_all(coordinator, sites)
        await sites["site-c"].until_heard(OpenSession)
        sites["site-c"].silent = set()
        await sites["site-c"].say(Withdraw(AbortReason.TRAINING_FAILED))  # two are too few
        await coordinator.until(lambda e: isinstance(e, events.AttemptAborted))
        clock.now += jump
        assert (await coordinator.until_ended()).state is JobState.COMPLETED


@pytest.mark.parametrize("jump", [-100 * HOUR, 100 * HOUR])
async def test_a_clock_that_jumps_while_more_sites_are_waited_for_changes_no_wait(tmp_path: Path, jump: float) -> None:
    clock, ticks = WallClock(), WallClock()
    async with federation(tmp_path, SITES[:3], clock=clock, ticks=ticks) as (coordinator, sites):
        coordinator.add_job(cohort=Cohort(min_participants=3, max_participants=4, wait_s=60))
        await connect_all(coordinator, sites)
        await coordinator.until(lambda e: isinstance(e, events.Waiting) and "waiting for more" in e.detail)
        clock.now += jump
        await coordinator.driver.post(happenings.Look())
        await coordinator.settled()
        assert coordinator.driver._jobs.runner is None  # not a second of the wait has passed
        ticks.now += 60
        await coordinator.driver.post(happenings.Look())
        assert (await coordinator.until_ended()).state is JobState.COMPLETED


@pytest.mark.parametrize("jump", [-100 * HOUR, 100 * HOUR])
async def test_durations_of_a_round_are_right_though_the_clock_jumped_in_it(tmp_path: Path, jump: float) -> None:
    clock, ticks = WallClock(), WallClock()
    async with federation(tmp_path, SITES[:3], clock=clock, ticks=ticks) as (coordinator, sites):
        coordinator.add_job()
        sites["site-c"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await coordinator.until_stage("masked-update")
        await coordinator.settled()
        clock.now += jump
        ticks.now += 7
        with coordinator.driver.board.subscribe("job-1") as subscription:
            sites["site-c"].silent = set()
            await sites["site-c"].say(UploadReady())
            committed = await coordinator._until(subscription, lambda e: isinstance(e, events.RoundCommitted), "job-1")
    assert isinstance(committed, events.RoundCommitted)
    assert committed.seconds == pytest.approx(7)
    assert committed.stage_seconds["masked-update"] == pytest.approx(7)
