"""Whole rounds through the coordinator's driver, with the participants' protocol half in process."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
from tests.coordinator.local_federation import (
    AUTHORITY,
    NOW,
    PARAMETERS,
    SITES,
    LocalCoordinator,
    LocalSite,
    federation,
    mean_update,
)

from maskwork import job_events as events
from maskwork.coordinator import driver as driving
from maskwork.coordinator import runner
from maskwork.coordinator.records import AttemptOutcome, JobRecord, JobState
from maskwork.coordinator.spool import UploadRefused
from maskwork.errors import StoreError
from maskwork.job import Cohort, Deadlines
from maskwork.net.identity import Role
from maskwork.secagg import keys
from maskwork.secagg import server_states as core
from maskwork.secagg.client_states import AdvertisedKeys
from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.keys import Segment
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Complaint,
    ConsistencyCheck,
    Decline,
    DeliveredShares,
    SessionClosed,
    SurvivorSignatures,
    Unmask,
    Withdraw,
)
from maskwork.tensors import read_vector
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession, UploadGrant, UploadReady
from maskwork.worker import WorkerDied

FOUR = Cohort(participants=SITES, min_participants=3, max_participants=4, wait_s=60)


async def connect_all(coordinator: LocalCoordinator, sites: dict[str, LocalSite]) -> None:
    for site in sites.values():
        await site.connect(coordinator.driver)


def model_of(coordinator: LocalCoordinator, digest: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    vector: np.ndarray[tuple[int], np.dtype[np.float32]] = read_vector(coordinator.models.path(digest))[1]
    return vector


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
        await coordinator.driver.post(driving.SessionEvent(session, late))
        record = await coordinator.until_ended()
        assert record.state is JobState.COMPLETED
        (committed,) = coordinator.store.rounds("job-1")
        assert (committed.survivors, committed.dropouts) == (SITES[:3], ("site-d",))
        np.testing.assert_allclose(model_of(coordinator, record.current_model), mean_update(SITES[:3]), atol=1e-5)
        told = SessionClosed(False, "left out of this session: deadline")
        assert told in [m for _, m in sites["site-d"].heard]
        (drop,) = coordinator.store.drops("job-1")
        assert (drop.participant, drop.stage, drop.reason) == ("site-d", "masked-update", "deadline")


def answered(event: events.JobEvent, stage: str, participant: str) -> bool:
    return isinstance(event, events.Answered) and (event.stage, event.participant) == (stage, participant)


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
        coordinator.worker.failures["make_durable"] = [WorkerDied("out of memory"), OSError(28, "No space left")]
        await connect_all(coordinator, sites)
        record = await coordinator.until_ended()
        assert record.state is JobState.FAILED
        assert record.reason.startswith("round 1 failed 2 times, the last one with aggregation-failed")
        assert [a.reason for a in coordinator.store.attempts("job-1")] == [
            "aggregation-failed: out of memory",
            "aggregation-failed: [Errno 28] No space left",
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


# --- connections ----------------------------------------------------------------------------------------------------


async def test_a_site_that_comes_back_in_its_session_is_asked_again_and_answers_the_same(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        flaky = sites["site-b"]
        flaky.silent = {AdvertiseKeys}
        await connect_all(coordinator, sites)
        await flaky.until_heard(OpenSession)
        assert isinstance(flaky.state, AdvertisedKeys)
        await flaky.disconnect()
        flaky.silent = set()
        await flaky.connect(coordinator.driver, active=True)
        await flaky.until_heard(OpenSession, count=2)
        await flaky.say(flaky.state.sent)
        assert (await coordinator.until_ended()).state is JobState.COMPLETED
        assert coordinator.store.rounds("job-1")[0].survivors == SITES


async def test_a_site_that_comes_back_without_its_session_is_a_dropout(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        sites["site-b"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-b"].until_heard(DeliveredShares)
        await sites["site-b"].disconnect()
        await LocalSite("site-b").connect(coordinator.driver)
        assert (await coordinator.until_ended()).state is JobState.COMPLETED
        assert coordinator.store.rounds("job-1")[0].dropouts == ("site-b",)


async def test_a_site_that_comes_back_after_it_was_given_up_is_told_so(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR, deadlines=Deadlines(reconnect_s=0.01))
        late, holding = sites["site-b"], sites["site-d"]
        late.silent, holding.silent = {UploadReady}, {UploadReady}
        await connect_all(coordinator, sites)
        await late.until_heard(DeliveredShares)
        await late.disconnect()
        await coordinator.until(lambda e: isinstance(e, events.Dropped) and e.participant == "site-b")
        await late.connect(coordinator.driver, active=True)
        closed = await late.until_heard(SessionClosed)
        assert closed == SessionClosed(False, "left out of this session: it went on without you")


async def test_a_newer_connection_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        first = sites["site-a"]
        first.silent = {UploadReady}
        await connect_all(coordinator, sites)
        await first.until_heard(DeliveredShares)
        older = first.peer
        assert older is not None
        assert first._pump is not None
        first.silent = set()
        await first.connect(coordinator.driver, active=True)
        await coordinator.settled()
        assert older._closed
        await coordinator.driver.post(driving.PeerGone(older))  # noticed late: changes nothing
        await coordinator.driver.post(driving.PeerSaid(older, first.session, Withdraw(AbortReason.CANCELLED)))
        await first.say(UploadReady())
        assert (await coordinator.until_ended()).state is JobState.COMPLETED
        assert coordinator.store.rounds("job-1")[0].survivors == SITES


async def test_a_site_with_a_new_certificate_is_not_waited_for_under_the_old_one(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        sites["site-c"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-c"].until_heard(DeliveredShares)
        renewed = LocalSite("site-c", AUTHORITY.issue(Role.PARTICIPANT, "site-c", now=NOW))
        await renewed.connect(coordinator.driver)
        await coordinator.until_ended()
        (drop,) = coordinator.store.drops("job-1")
        assert (drop.participant, drop.detail) == ("site-c", "came back with another certificate")


async def test_a_site_that_does_not_read_its_messages_is_cut_off(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:3]) as (coordinator, sites):
        await connect_all(coordinator, sites)
        await coordinator.settled()
        deaf = sites["site-a"].peer
        assert deaf is not None
        assert sites["site-a"]._pump is not None
        sites["site-a"]._pump.cancel()
        message = codec.encode_response(bytes(32), SessionClosed(False, "x"), 0)
        for _ in range(100):
            deaf.send(message)
        assert deaf._closed
        read = 0
        while await deaf.next_response() is not None:
            read += 1
        assert read == 64


async def test_a_message_about_another_session_changes_nothing(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        sites["site-a"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-a"].until_heard(DeliveredShares)
        peer = sites["site-a"].peer
        assert peer is not None
        await coordinator.driver.post(driving.PeerSaid(peer, bytes(32), Withdraw(AbortReason.CANCELLED)))
        await coordinator.settled()
        assert coordinator.store.drops("job-1") == ()


async def test_bytes_that_are_no_message_cost_the_sender_its_place(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        sites["site-a"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-a"].until_heard(DeliveredShares)
        assert sites["site-a"].peer is not None
        await coordinator.driver.post(driving.PeerMisbehaved(sites["site-a"].peer, "not a ConnectRequest"))
        await coordinator.until_ended()
        (drop,) = coordinator.store.drops("job-1")
        assert (drop.participant, drop.reason, drop.detail) == ("site-a", "malformed", "not a ConnectRequest")


# --- uploads --------------------------------------------------------------------------------------------------------


async def test_no_more_members_upload_at_a_time_than_there_are_slots(tmp_path: Path) -> None:
    async with federation(tmp_path, max_uploads=2) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        for site in sites.values():
            site.silent = {UploadGrant}
        await connect_all(coordinator, sites)
        for site in sites.values():
            await site.until_heard(DeliveredShares)
        await coordinator.settled()
        granted = [s for s in sites.values() if any(isinstance(m, UploadGrant) for _, m in s.heard)]
        waiting = [s for s in sites.values() if s not in granted]
        assert (len(granted), len(waiting)) == (2, 2)
        assert not await waiting[0].upload()  # nobody asked it to: the service refuses
        assert await granted[0].upload()
        await waiting[0].until_heard(UploadGrant)
        for site in (granted[1], waiting[0]):
            assert await site.upload()
        await waiting[1].until_heard(UploadGrant)
        assert await waiting[1].upload()
        assert (await coordinator.until_ended()).state is JobState.COMPLETED


async def test_a_member_that_does_not_use_its_grant_loses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRANT_S", 0.02)
    async with federation(tmp_path, max_uploads=1) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        sites["site-a"].silent = {UploadGrant}
        for name in SITES[1:]:
            sites[name].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-a"].until_heard(UploadGrant)
        for name in SITES[1:]:
            await sites[name].until_heard(DeliveredShares)
            sites[name].silent = set()
            await sites[name].say(UploadReady())
        assert (await coordinator.until_ended()).state is JobState.COMPLETED
        (drop,) = coordinator.store.drops("job-1")
        assert (drop.participant, drop.reason) == ("site-a", "deadline")
        assert "did not begin its upload" in drop.detail


async def test_an_upload_goes_on_from_the_offset_that_the_grant_names(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        site = sites["site-a"]
        site.silent = {UploadGrant}
        await connect_all(coordinator, sites)
        await site.until_heard(UploadGrant)
        place = coordinator.driver.spool_for(site.site, site.session)
        assert place is not None
        with place[0].writing() as writer:
            writer.write(Segment.UPDATE, 0, site._masked[0][:5])
        await coordinator.driver.post(driving.UploadEnded(site.session, place[1]))
        site.silent = set()
        await site.say(UploadReady())
        assert await site.until_heard(UploadGrant, count=2) == UploadGrant(5, 0)
        assert (await coordinator.until_ended()).state is JobState.COMPLETED
        assert coordinator.store.rounds("job-1")[0].survivors == SITES
        np.testing.assert_allclose(
            model_of(coordinator, coordinator.record().current_model), mean_update(SITES), atol=1e-5
        )


async def test_an_upload_in_progress_ends_with_its_session(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        site = sites["site-a"]
        site.silent = {UploadGrant}
        await connect_all(coordinator, sites)
        await site.until_heard(UploadGrant)
        place = coordinator.driver.spool_for(site.site, site.session)
        assert place is not None
        with place[0].writing() as writer:
            writer.write(Segment.UPDATE, 0, site._masked[0][:5])
            done: asyncio.Future[JobRecord | None] = asyncio.get_running_loop().create_future()
            await coordinator.driver.post(driving.JobAborted("job-1", "somebody", done))
            await done
            assert writer.superseded
            with pytest.raises(UploadRefused, match="not wanted any more"):
                writer.write(Segment.UPDATE, 5, site._masked[0][5:])
        assert os.listdir(tmp_path / "sessions") == []


async def test_files_of_a_session_are_for_its_members_alone(tmp_path: Path) -> None:
    async with federation(tmp_path, SITES[:3]) as (coordinator, sites):
        coordinator.add_job()
        sites["site-a"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-a"].until_heard(DeliveredShares)
        digest = coordinator.record().current_model
        assert coordinator.driver.download(sites["site-a"].site, digest) == coordinator.models.path(digest)
        assert coordinator.driver.download(sites["site-a"].site, bytes(32)) is None
        assert coordinator.driver.download(LocalSite("site-d").site, digest) is None


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
            await coordinator.driver.post(driving.JobAborted(name, "rosa", done))
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
        await coordinator.driver.post(driving.JobAborted("job-1", "rosa", asked))
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
        await coordinator.driver.post(driving.Look())
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


# --- the end, and after it ------------------------------------------------------------------------------------------


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
