"""The coordinator's end, orderly or not, at every stage, and how the next process goes on."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
from tests.coordinator.local_federation import (
    FOUR,
    PATIENCE_S,
    SITES,
    LocalCoordinator,
    LocalSite,
    connect_all,
    federation,
    mean_update,
    model_of,
)

from maskwork import job_events as events
from maskwork.coordinator.happenings import JobAborted
from maskwork.coordinator.records import AttemptOutcome, JobRecord, JobState
from maskwork.errors import StoreError
from maskwork.net.status import Refused
from maskwork.secagg.messages import (
    AdvertiseKeys,
    ConsistencyCheck,
    DeliveredShares,
    SessionClosed,
    SurvivorSignatures,
    Unmask,
)
from maskwork.wire.codec import OpenSession, UploadGrant, UploadReady


async def stopped_at(
    folder: Path, silent: type, heard: type, *, orderly: bool
) -> tuple[LocalCoordinator, dict[str, LocalSite]]:
    """A federation of three whose site-c withholds one kind of message, and whose coordinator ends then."""
    coordinator, sites = LocalCoordinator(folder), {name: LocalSite(name) for name in SITES[:3]}
    coordinator.start()
    coordinator.add_job()
    sites["site-c"].silent = {silent}
    await connect_all(coordinator, sites)
    await sites["site-c"].until_heard(heard)
    await coordinator.settled()
    if orderly:
        assert coordinator.loop is not None
        coordinator.loop.cancel()
        await asyncio.wait({coordinator.loop})
        await coordinator.driver.stop()
        await asyncio.wait({site._pump for site in sites.values() if site._pump is not None})
    await coordinator.crash()
    for site in sites.values():
        assert site._pump is not None
        site._pump.cancel()
        site.silent = set()
    return coordinator, sites


@pytest.mark.parametrize("orderly", [True, False])
@pytest.mark.parametrize(
    ("silent", "heard"), [(AdvertiseKeys, OpenSession), (UploadReady, DeliveredShares), (ConsistencyCheck, UploadGrant)]
)
async def test_before_unmasking_a_restart_opens_a_new_attempt(
    tmp_path: Path, silent: type, heard: type, orderly: bool
) -> None:
    _, sites = await stopped_at(tmp_path, silent, heard, orderly=orderly)
    if orderly:
        assert sites["site-a"].closing() == SessionClosed(False, "session ended: cancelled")
    (tmp_path / "sessions" / "left-over").mkdir()
    async with federation(tmp_path) as (restarted, _):
        for site in sites.values():
            await site.connect(restarted.driver, active=True)
        record = await restarted.until_ended()
        assert record.state is JobState.COMPLETED
        ended = AttemptOutcome.ABORTED if orderly else AttemptOutcome.ABANDONED
        outcomes = [(a.attempt, a.outcome) for a in restarted.store.attempts("job-1")]
        assert outcomes == [(1, ended), (2, AttemptOutcome.COMMITTED)]
        assert os.listdir(tmp_path / "sessions") == []
        if not orderly:
            assert SessionClosed(False, "that session is over") in [m for _, m in sites["site-a"].heard]


@pytest.mark.parametrize("orderly", [True, False])
async def test_after_unmasking_was_asked_for_a_restart_resumes_that_very_session(tmp_path: Path, orderly: bool) -> None:
    _, sites = await stopped_at(tmp_path, Unmask, SurvivorSignatures, orderly=orderly)
    session = sites["site-a"].session
    assert os.listdir(tmp_path / "sessions") == [session.hex()]
    answers = [m for m in sites["site-a"].said if isinstance(m, Unmask)]
    async with federation(tmp_path) as (restarted, _):
        for site in sites.values():
            await site.connect(restarted.driver, active=True)
        record = await restarted.until_ended()
        assert record.state is JobState.COMPLETED
        (attempt,) = restarted.store.attempts("job-1")
        assert (attempt.session_id, attempt.outcome) == (session, AttemptOutcome.COMMITTED)
        np.testing.assert_allclose(model_of(restarted, record.current_model), mean_update(SITES[:3]), atol=1e-5)
        again = [m for m in sites["site-a"].said if isinstance(m, Unmask)]
        assert again == [*answers, *answers]
        assert restarted.store.resume_record("job-1") is None


async def test_after_a_restart_nobody_waits_for_a_site_that_the_last_attempt_had_lost(tmp_path: Path) -> None:
    coordinator, sites = LocalCoordinator(tmp_path), {name: LocalSite(name) for name in SITES}
    coordinator.start()
    coordinator.add_job(cohort=FOUR.model_dump(), deadlines={"reconnect_s": 0.01})
    sites["site-c"].silent = {UploadReady}  # holds the attempt open
    await connect_all(coordinator, sites)
    await sites["site-c"].until_heard(DeliveredShares)
    await sites["site-d"].disconnect()
    await coordinator.until(lambda e: isinstance(e, events.Dropped) and e.participant == "site-d")
    await coordinator.crash()
    async with federation(tmp_path) as (restarted, _):
        for name in SITES[:3]:
            sites[name]._pump.cancel()  # type: ignore[union-attr]  # it was connected
            sites[name].silent = set()
            await sites[name].connect(restarted.driver, active=True)
        # The job would wait a minute for its fourth site if the last attempt were forgotten.
        assert (await restarted.until_ended()).state is JobState.COMPLETED
        assert [a.outcome for a in restarted.store.attempts("job-1")][-1] is AttemptOutcome.COMMITTED


async def test_a_resumed_session_is_found_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "state").mkdir()
    _, sites = await stopped_at(Path("state"), Unmask, SurvivorSignatures, orderly=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    async with federation(Path("../state")) as (restarted, _):
        for site in sites.values():
            await site.connect(restarted.driver, active=True)
        assert (await restarted.until_ended()).state is JobState.COMPLETED
        assert [a.attempt for a in restarted.store.attempts("job-1")] == [1]


async def test_a_resumed_session_whose_accumulator_is_gone_ends_instead_of_hanging(tmp_path: Path) -> None:
    _, sites = await stopped_at(tmp_path, Unmask, SurvivorSignatures, orderly=False)
    (tmp_path / "sessions" / sites["site-a"].session.hex() / "accumulator").unlink()
    async with federation(tmp_path) as (restarted, _):
        for site in sites.values():
            await site.connect(restarted.driver, active=True)
        await restarted.until_ended()
        outcomes = [(a.attempt, a.outcome) for a in restarted.store.attempts("job-1")]
        assert outcomes == [(1, AttemptOutcome.ABORTED), (2, AttemptOutcome.COMMITTED)]


async def test_a_running_job_whose_model_is_damaged_at_the_start_fails(tmp_path: Path) -> None:
    await stopped_at(tmp_path, UploadReady, DeliveredShares, orderly=False)
    (path,) = (tmp_path / "models").glob("*.safetensors")
    path.write_bytes(b"")
    async with federation(tmp_path) as (restarted, _):
        record = await restarted.until_ended()
        assert (record.state, "is damaged" in record.reason) == (JobState.FAILED, True)
        (attempt,) = restarted.store.attempts("job-1")
        assert attempt.outcome is AttemptOutcome.ABORTED
        assert os.listdir(tmp_path / "sessions") == []


async def test_an_abort_that_was_asked_of_a_coordinator_that_ends_is_answered(tmp_path: Path) -> None:
    coordinator = LocalCoordinator(tmp_path)
    asked: asyncio.Future[JobRecord | None] = asyncio.get_running_loop().create_future()
    await coordinator.driver.post(JobAborted(coordinator.add_job(), "spiffe://ward/operator/olga", asked))
    coordinator.driver.hang_up()
    coordinator.store.close()
    with pytest.raises(Refused, match="the coordinator stops"):
        await asked


async def test_an_abort_that_ends_the_coordinator_is_answered(tmp_path: Path) -> None:
    coordinator = LocalCoordinator(tmp_path)
    coordinator.add_job()
    coordinator.start()
    await coordinator.settled()
    (tmp_path / "coordinator.sqlite").unlink()
    (tmp_path / "coordinator.sqlite").mkdir()
    coordinator.store._engine.dispose()
    asked: asyncio.Future[JobRecord | None] = asyncio.get_running_loop().create_future()
    await coordinator.driver.post(JobAborted("job-1", "spiffe://ward/operator/olga", asked))
    assert coordinator.loop is not None
    await asyncio.wait({coordinator.loop}, timeout=PATIENCE_S)
    assert isinstance(coordinator.loop.exception(), StoreError)
    coordinator.driver.hang_up()
    coordinator.store.close()
    with pytest.raises(Refused, match="the coordinator stops"):
        await asked
