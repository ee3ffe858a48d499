"""What one identity may have in progress, and how that is counted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.coordinator.local_federation import FOUR, PATIENCE_S, LocalSite, connect_all, federation

from maskwork.coordinator.happenings import PeerSaid
from maskwork.coordinator.peers import UNHANDLED_LIMIT, Peer
from maskwork.coordinator.quotas import AT_A_TIME, AT_A_TIME_OF_OTHERS, CALLS_BURST, LINES_BURST, Bucket, Quotas
from maskwork.coordinator.records import JobState
from maskwork.net.permissions import PERMISSIONS
from maskwork.net.status import MAX_PHRASE, Refusal, Refused, status_of
from maskwork.secagg.messages import Advertisements
from maskwork.wire.codec import UploadReady

DOWNLOAD = "/maskwork.wire.v1.FederationService/Download"
CHECK = "/grpc.health.v1.Health/Check"


def test_every_method_with_a_quota_exists() -> None:
    assert AT_A_TIME.keys() <= PERMISSIONS.keys()


@pytest.mark.parametrize(("method", "most"), [(DOWNLOAD, AT_A_TIME[DOWNLOAD]), (CHECK, AT_A_TIME_OF_OTHERS)])
def test_one_identity_has_so_many_calls_at_a_time_and_others_have_theirs(method: str, most: int) -> None:
    quotas = Quotas()
    for _ in range(most):
        quotas.enter("a", method, now=0)
    with pytest.raises(Refused, match="in progress") as refused:
        quotas.enter("a", method, now=0)
    assert refused.value.refusal is Refusal.TOO_MUCH
    quotas.enter("b", method, now=0)
    quotas.leave("a", method, now=0)
    quotas.enter("a", method, now=0)


def test_calls_in_a_row_are_as_many_as_the_bucket_holds_and_then_as_time_gives() -> None:
    quotas = Quotas()
    for _ in range(CALLS_BURST):
        quotas.enter("a", CHECK, now=0)
        quotas.leave("a", CHECK, now=0)
    with pytest.raises(Refused, match="short time"):
        quotas.enter("a", CHECK, now=0)
    quotas.enter("b", CHECK, now=0)
    quotas.enter("a", CHECK, now=1)


def test_what_is_idle_is_forgotten() -> None:
    quotas = Quotas()
    quotas.enter("a", CHECK, now=0)
    quotas.leave("a", CHECK, now=100)
    assert not quotas._accounts
    quotas.enter("a", CHECK, now=100)
    quotas.enter("a", CHECK, now=100)
    quotas.leave("a", CHECK, now=1000)
    assert quotas._accounts


def test_a_bucket_holds_no_more_than_its_burst_and_takes_no_clock_that_goes_back() -> None:
    bucket = Bucket(2, 1)
    assert [bucket.take(now) for now in (0, 0, 0, 1, 1)] == [True, True, False, True, False]
    assert [bucket.take(1000) for _ in range(3)] == [True, True, False]
    assert not bucket.take(0)


def test_lines_that_were_left_out_are_counted_in_the_next_one() -> None:
    quotas = Quotas()
    assert [quotas.may_log("a", now=0) for _ in range(LINES_BURST)] == [0] * LINES_BURST
    assert [quotas.may_log("a", now=0) for _ in range(3)] == [None] * 3
    assert quotas.may_log("b", now=0) == 0
    assert quotas.may_log("a", now=10) == 3


async def test_one_sites_messages_wait_at_its_stream_not_in_front_of_others() -> None:
    site = LocalSite("site-a")
    peer = Peer(site.site, site.der)
    for _ in range(UNHANDLED_LIMIT):
        await peer.room()
    waiting = asyncio.create_task(peer.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    peer.handled()
    await waiting


async def test_a_member_that_floods_is_heard_in_turn_and_the_round_goes_on(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        coordinator.add_job(cohort=FOUR)
        await connect_all(coordinator, sites)
        flooding = sites["site-d"]
        await flooding.until_heard(Advertisements)
        assert flooding.peer is not None
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(20 * UNHANDLED_LIMIT):
                await flooding.peer.room()
                await coordinator.driver.post(PeerSaid(flooding.peer, bytes(32), UploadReady()))
        assert (await coordinator.until_ended()).state is JobState.COMPLETED


def test_a_phrase_fits_the_header_that_it_travels_in() -> None:
    for error in (Refused(Refusal.INVALID, "é" * 100_000), Refused(Refusal.NOT_FOUND, "x" * (MAX_PHRASE + 1))):
        assert len(status_of(error)[1]) == MAX_PHRASE
    assert status_of(Refused(Refusal.INVALID, "x" * MAX_PHRASE))[1] == "x" * MAX_PHRASE
