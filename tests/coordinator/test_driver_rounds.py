"""Whole rounds through the coordinator's driver, with the participants' protocol half in process."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
from tests.coordinator.local_federation import (
    FOUR,
    PARAMETERS,
    SITES,
    answered,
    connect_all,
    federation,
    mean_update,
    model_of,
)

from maskwork import job_events as events
from maskwork.coordinator import happenings
from maskwork.coordinator.records import AttemptOutcome, JobRecord, JobState
from maskwork.errors import StoreError
from maskwork.secagg import keys
from maskwork.secagg import server_states as core
from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Complaint,
    Decline,
    DeliveredShares,
    SessionClosed,
    Withdraw,
)
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession, UploadReady
from maskwork.worker import WorkerDied


async def test_two_rounds_give_the_mean_of_the_updates_and_leave_no_files(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(rounds=2, cohort=FOUR)
        await connect_all(coordinator, sites)
        record = await coordinator.until_ended()
        assert record.state is JobState.COMPLETED
        np.testing.assert_allclose(model_of(coordinator, record.current_model), 2 * mean_update(SITES), atol=1e-5)
        first, second = coordinator.store.rounds("job-1")
        assert first.survivors == second.survivors == SITES
        assert first.statistics == {"examples": 40.0, "train.loss": 0.5}
        assert set(first.stage_seconds) == {s.value for s in core.Stage}
        assert first.uplink_bytes == 4 * (PARAMETERS * 26 // 8 + 1 + 16)
        await asyncio.gather(*(site.until_heard(SessionClosed, count=2) for site in sites.values()))
        assert all(site.closing().released for site in sites.values())
        assert os.listdir(tmp_path / "sessions") == []
        assert not coordinator.driver._tasks


async def test_a_straggler_past_the_deadline_is_left_out_and_told(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        sites["site-d"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        for name in SITES[:3]:
            await coordinator.until(lambda e, n=name: answered(e, "masked-update", n))  # type: ignore[misc]
        session = sites["site-d"].session
        late = core.DeadlinePassed(core.Stage.MASKED_UPDATE)
        await coordinator.driver.post(happenings.SessionEvent(session, late))
        record = await coordinator.until_ended()
        assert record.state is JobState.COMPLETED
        (committed,) = coordinator.store.rounds("job-1")
        assert (committed.survivors, committed.dropouts) == (SITES[:3], ("site-d",))
        np.testing.assert_allclose(model_of(coordinator, record.current_model), mean_update(SITES[:3]), atol=1e-5)
        told = SessionClosed(False, "left out of this session: deadline")
        assert told in [m for _, m in sites["site-d"].heard]
        (drop,) = coordinator.store.drops("job-1")
        assert (drop.participant, drop.stage, drop.reason) == ("site-d", "masked-update", "deadline")


async def test_a_session_that_aborts_is_followed_by_a_new_attempt_with_another_session(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:3]) as (coordinator, sites):
        coordinator.add_job()
        sites["site-c"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-c"].until_heard(DeliveredShares)
        first = sites["site-c"].session
        sites["site-c"].silent = set()
        await sites["site-c"].say(Withdraw(AbortReason.TRAINING_FAILED))
        record = await coordinator.until_ended()
        assert record.state is JobState.COMPLETED
        assert sites["site-c"].session != first
        attempts = coordinator.store.attempts("job-1")
        assert [(a.attempt, a.outcome) for a in attempts] == [
            (1, AttemptOutcome.ABORTED),
            (2, AttemptOutcome.COMMITTED),
        ]
        assert attempts[0].reason.startswith("too-few-participants")
        assert (SessionClosed(False, "session ended: too-few-participants")) in [m for _, m in sites["site-a"].heard]


async def test_attempts_end_with_the_job_when_they_are_used_up(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:3]) as (coordinator, sites):
        coordinator.add_job(max_attempts=2)
        coordinator.worker.failures["make_durable"] = [WorkerDied("out of memory"), OSError(5, "Input/output error")]
        await connect_all(coordinator, sites)
        record = await coordinator.until_ended()
        assert record.state is JobState.FAILED
        assert record.reason.startswith("round 1 failed 2 times. The last time: aggregation-failed")
        assert [a.reason for a in coordinator.store.attempts("job-1")] == [
            "aggregation-failed: out of memory",
            "aggregation-failed: [Errno 5] Input/output error",
        ]


async def test_a_decline_is_recorded_and_its_site_asked_again_when_it_connects_anew(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(rounds=2, cohort=FOUR)
        declining = sites["site-d"]
        declining.silent = {AdvertiseKeys}
        await connect_all(coordinator, sites)
        await declining.until_heard(OpenSession)
        await declining.say(Decline(DeclineCode.COHORT_TOO_SMALL, "cohort 4 < 5"))
        await coordinator.until_ended()
        assert [r.dropouts for r in coordinator.store.rounds("job-1")] == [("site-d",), ()]
        assert len([m for _, m in declining.heard if isinstance(m, OpenSession)]) == 1
        (drop,) = coordinator.store.drops("job-1")
        assert (drop.reason, drop.detail) == ("declined", "cohort-too-small: cohort 4 < 5")
        declining.silent = set()
        coordinator.add_job("job-2", cohort=FOUR)
        await declining.disconnect()
        await declining.connect(coordinator.driver)
        assert (await coordinator.until_ended("job-2")).state is JobState.COMPLETED
        assert coordinator.store.rounds("job-2")[0].survivors == SITES


async def test_a_convicted_accuser_stays_out_however_often_it_reconnects(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(rounds=2)
        liar = sites["site-d"]
        liar.silent = {UploadReady}
        await connect_all(coordinator, sites)
        await liar.until_heard(DeliveredShares)
        assert liar.shared is not None
        # What was dealt to it is in order, so the very key that it would reveal shows that the accusation is false.
        secret = liar.shared.secrets.encryption_secret
        key = keys.share_key(
            secret,
            own=secret.public(),
            peer=liar.shared.peers[0].encryption_key,
            dealer=0,
            holder=3,
            own_index=3,
            session=liar.session,
        )
        await liar.say(Complaint(0, key))
        await coordinator.until(lambda e: isinstance(e, events.AttemptAborted))
        await liar.disconnect()
        liar.silent = set()
        await liar.connect(coordinator.driver)
        record = await coordinator.until_ended()
        assert record.state is JobState.COMPLETED
        assert [r.survivors for r in coordinator.store.rounds("job-1")] == [SITES[:3], SITES[:3]]
        (evidence,) = coordinator.store.evidence("job-1")
        assert (evidence.kind, evidence.accused) == ("false-accusation", "site-d")
        transcript = codec.decode_transcript(evidence.transcript)
        assert transcript.accusation == (3, Complaint(0, key))
        assert set(transcript.dealings) == {0, 1, 2, 3}


# --- jobs -----------------------------------------------------------------------------------------------------------


async def test_a_job_can_be_aborted_while_it_waits_runs_and_afterwards(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        for name in ("job-1", "job-2"):
            coordinator.add_job(name, cohort=FOUR)
        sites["site-a"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-a"].until_heard(DeliveredShares)
        for name in ("job-2", "job-1", "job-1"):
            done: asyncio.Future[JobRecord | None] = asyncio.get_running_loop().create_future()
            await coordinator.driver.post(happenings.JobAborted(name, "rosa", done))
            record = await done
            assert record is not None
            assert (record.state, record.reason) == (JobState.ABORTED, "aborted by rosa")
        closed = await sites["site-a"].until_heard(SessionClosed)
        assert closed == SessionClosed(False, "session ended: cancelled")


async def test_whoever_asked_for_an_abort_may_hang_up(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, _):
        coordinator.add_job()
        asked: asyncio.Future[JobRecord | None] = asyncio.get_running_loop().create_future()
        asked.cancel()
        await coordinator.driver.post(happenings.JobAborted("job-1", "rosa", asked))
        await coordinator.settled()
        assert coordinator.record().state is JobState.ABORTED


async def test_a_job_whose_model_is_damaged_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:3]) as (coordinator, sites):
        coordinator.add_job()
        path = coordinator.models.path(coordinator.record().initial_model)
        whole = path.read_bytes()
        path.write_bytes(whole[:-4] + b"\0\0\0\1")
        await connect_all(coordinator, sites)
        record = await coordinator.until_ended()
        assert record.state is JobState.FAILED
        assert "is damaged" in record.reason
        path.write_bytes(whole)
        coordinator.add_job("job-2")
        await coordinator.driver.post(happenings.Look())
        assert (await coordinator.until_ended("job-2")).state is JobState.COMPLETED


async def test_a_job_whose_model_vanishes_between_two_attempts_fails(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:3]) as (coordinator, sites):
        coordinator.add_job()
        sites["site-a"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-a"].until_heard(DeliveredShares)
        coordinator.models.path(coordinator.record().initial_model).unlink()
        await sites["site-a"].say(Withdraw(AbortReason.TRAINING_FAILED))
        record = await coordinator.until_ended()
        assert (record.state, "is missing" in record.reason) == (JobState.FAILED, True)


async def test_a_job_that_no_plan_can_be_made_for_fails_with_the_reason(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:3]) as (coordinator, sites):
        coordinator.add_job(metrics={"train.loss": 1e300})
        await connect_all(coordinator, sites)
        record = await coordinator.until_ended()
        assert record.state is JobState.FAILED
        assert record.reason.startswith("no plan can be made for 3 sites: ")


async def test_a_worker_that_fails_while_unmasking_is_tried_again_and_then_given_up(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:3]) as (coordinator, sites):
        coordinator.add_job(max_attempts=1)
        coordinator.worker.failures["release"] = [WorkerDied("killed"), MemoryError("no room")]
        await connect_all(coordinator, sites)
        record = await coordinator.until_ended()
        assert record.state is JobState.FAILED
        (attempt,) = coordinator.store.attempts("job-1")
        assert attempt.reason == "aggregation-failed: no room"
        assert coordinator.worker.calls.count("release") == 2
        assert coordinator.record().current_model == coordinator.record().initial_model


async def test_a_worker_that_died_while_unmasking_is_tried_again(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:3]) as (coordinator, sites):
        coordinator.add_job()
        coordinator.worker.failures["release"] = [WorkerDied("killed")]
        await connect_all(coordinator, sites)
        record = await coordinator.until_ended()
        assert record.state is JobState.COMPLETED
        np.testing.assert_allclose(model_of(coordinator, record.current_model), mean_update(SITES[:3]), atol=1e-5)


async def test_a_full_disk_ends_the_loop_with_words_for_the_operator(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:3]) as (coordinator, sites):
        coordinator.add_job()
        await coordinator.settled()
        (tmp_path / "sessions").rmdir()
        (tmp_path / "sessions").write_bytes(b"not a directory")
        await connect_all(coordinator, sites)
        assert coordinator.loop is not None
        async with asyncio.timeout(10):
            with pytest.raises(StoreError, match="sessions"):
                await coordinator.loop


async def test_an_error_beside_the_loop_ends_the_loop(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, _):

        async def fails() -> None:
            raise LookupError("nobody expected this")

        coordinator.driver._spawn(fails())
        assert coordinator.loop is not None
        async with asyncio.timeout(10):
            with pytest.raises(LookupError):
                await coordinator.loop
