"""Sites that come, go, come back and stream their updates: what the coordinator's driver makes of it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
from tests.coordinator.local_federation import (
    AUTHORITY,
    FOUR,
    NOW,
    SITES,
    LocalSite,
    connect_all,
    federation,
    mean_update,
    model_of,
)

from maskwork import job_events as events
from maskwork.coordinator import happenings, runner
from maskwork.coordinator.records import JobRecord, JobState
from maskwork.coordinator.spool import UploadRefused
from maskwork.job import Deadlines
from maskwork.net.identity import Role
from maskwork.secagg.client_states import AdvertisedKeys
from maskwork.secagg.errors import AbortReason
from maskwork.secagg.keys import Segment
from maskwork.secagg.messages import (
    AdvertiseKeys,
    DeliveredShares,
    SessionClosed,
    Withdraw,
)
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession, UploadGrant, UploadReady


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


async def test_a_second_agent_with_the_same_certificate_makes_the_first_hear_why_it_ended(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        twin = sites["site-b"]
        await twin.connect(coordinator.driver)
        first = twin.peer
        await twin.connect(coordinator.driver)
        await coordinator.settled()
        assert first is not None
        assert twin.peer is not None
        assert (first.displaced, twin.peer.displaced) == (True, False)


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
        await coordinator.driver.post(happenings.PeerGone(older))  # noticed late: changes nothing
        await coordinator.driver.post(happenings.PeerSaid(older, first.session, Withdraw(AbortReason.CANCELLED)))
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
            deaf.send(lambda: message)
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
        await coordinator.driver.post(happenings.PeerSaid(peer, bytes(32), Withdraw(AbortReason.CANCELLED)))
        await coordinator.settled()
        assert coordinator.store.drops("job-1") == ()


async def test_bytes_that_are_no_message_cost_the_sender_its_place(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        sites["site-a"].silent = {UploadReady}
        await connect_all(coordinator, sites)
        await sites["site-a"].until_heard(DeliveredShares)
        assert sites["site-a"].peer is not None
        await coordinator.driver.post(happenings.PeerMisbehaved(sites["site-a"].peer, "not a ConnectRequest"))
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


async def test_a_member_that_streams_is_not_hurried_by_its_grant(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        site = sites["site-a"]
        site.silent = {UploadGrant}
        await connect_all(coordinator, sites)
        await site.until_heard(UploadGrant)
        assert coordinator.driver._jobs.runner is not None
        timers = coordinator.driver._jobs.runner.session.timers
        assert ("grant", 0) in timers
        place = coordinator.driver.spool_for(site.site, site.session)
        assert place is not None
        await coordinator.driver.post(happenings.UploadBegan(site.session, place[1]))
        await coordinator.settled()
        assert ("grant", 0) not in timers


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
        await coordinator.driver.post(happenings.UploadEnded(site.session, place[1]))
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
            await coordinator.driver.post(happenings.JobAborted("job-1", "somebody", done))
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
        assert coordinator.driver.download(sites["site-a"].site, digest) == coordinator.models.file(digest)
        assert coordinator.driver.download(sites["site-a"].site, bytes(32)) is None
        assert coordinator.driver.download(LocalSite("site-d").site, digest) is None
