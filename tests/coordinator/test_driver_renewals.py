"""Certificates that are renewed while a session is open: they wait, and count from the next one on."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from tests.coordinator.local_federation import (
    AUTHORITY,
    COORDINATOR,
    FOUR,
    NOW,
    SITES,
    LocalCoordinator,
    LocalSite,
    connect_all,
    der_of,
    federation,
    signer_of,
)

from maskwork.coordinator import happenings
from maskwork.coordinator.peers import Peer
from maskwork.coordinator.records import JobState
from maskwork.net.identity import Role
from maskwork.secagg import client
from maskwork.secagg.messages import DeliveredShares, Proposal
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession, UploadReady, Welcome


def renewed(name: str) -> LocalSite:
    return LocalSite(name, AUTHORITY.issue(Role.PARTICIPANT, name, now=NOW))


async def stand_by(site: LocalSite, coordinator: LocalCoordinator) -> None:
    """Connect beside the older connection, as a site does whose certificate was renewed."""
    site._driver = coordinator.driver
    site.peer = Peer(site.site, site.der, succeeds_another=True)
    await coordinator.driver.post(happenings.PeerConnected(site.peer))
    site._pump = asyncio.create_task(site._run(site.peer))
    await coordinator.settled()


async def held(coordinator: LocalCoordinator, sites: dict[str, LocalSite], *, rounds: int = 2) -> None:
    """A job in whose first session everybody but site-a has uploaded."""
    coordinator.add_job(cohort=FOUR, rounds=rounds)
    sites["site-a"].silent = {UploadReady}
    await connect_all(coordinator, sites)
    await sites["site-a"].until_heard(DeliveredShares)
    await coordinator.settled()


async def go_on(site: LocalSite) -> None:
    site.silent = set()
    await site.say(UploadReady())


def is_open(site: LocalSite) -> bool:
    assert site.peer is not None
    return not site.peer._closed


def plans(coordinator: LocalCoordinator) -> list[Proposal]:
    attempts = coordinator.store.attempts("job-1")
    return [Proposal(a.plan_bytes, a.plan_signature, codec.decode_plan(a.plan_bytes)) for a in attempts]


async def test_a_newer_certificate_waits_until_the_session_has_ended(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        await held(coordinator, sites)
        older, newer = sites["site-a"], renewed("site-a")
        await stand_by(newer, coordinator)
        assert is_open(older)
        assert newer.heard == []
        await go_on(older)
        await newer.until_heard(OpenSession)
        assert not is_open(older)
        assert (await coordinator.until_ended()).state is JobState.COMPLETED
        assert [r.survivors for r in coordinator.store.rounds("job-1")] == [SITES, SITES]
        assert coordinator.store.drops("job-1") == ()
        first, second = plans(coordinator)
    assert first.plan.roster[0].fingerprint == older.site.fingerprint
    assert second.plan.roster[0].fingerprint == newer.site.fingerprint


async def test_a_newer_certificate_counts_at_once_when_no_session_is_open(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        await connect_all(coordinator, sites)
        await coordinator.settled()
        newer = renewed("site-a")
        await stand_by(newer, coordinator)
        assert not is_open(sites["site-a"])
        coordinator.add_job(cohort=FOUR)
        await coordinator.driver.post(happenings.Look())
        assert (await coordinator.until_ended()).state is JobState.COMPLETED
        (plan,) = plans(coordinator)
    assert plan.plan.roster[0].fingerprint == newer.site.fingerprint


async def test_a_connection_that_waits_and_goes_is_forgotten(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        await held(coordinator, sites)
        newer = renewed("site-a")
        await stand_by(newer, coordinator)
        await newer.disconnect()
        await go_on(sites["site-a"])
        assert (await coordinator.until_ended()).state is JobState.COMPLETED
        assert [r.survivors for r in coordinator.store.rounds("job-1")] == [SITES, SITES]
        assert {p.plan.roster[0].fingerprint for p in plans(coordinator)} == {sites["site-a"].site.fingerprint}


async def test_a_connection_that_waits_says_nothing_for_the_older(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        await held(coordinator, sites, rounds=1)
        newer = renewed("site-a")
        await stand_by(newer, coordinator)
        assert newer.peer is not None
        session = sites["site-a"].session
        await coordinator.driver.post(happenings.PeerMisbehaved(newer.peer, "a lie"))
        await coordinator.driver.post(happenings.PeerSaid(newer.peer, session, UploadReady()))
        await coordinator.settled()
        assert coordinator.driver.spool_for(newer.site, session) is None
        assert coordinator.store.drops("job-1") == ()
        await go_on(sites["site-a"])
        assert (await coordinator.until_ended()).state is JobState.COMPLETED


async def test_with_the_same_certificate_nobody_stands_beside_anybody(tmp_path: Path) -> None:
    async with federation(tmp_path) as (coordinator, sites):
        await held(coordinator, sites, rounds=1)
        await stand_by(LocalSite("site-a"), coordinator)
        await coordinator.until_ended()
        (drop,) = coordinator.store.drops("job-1")
    assert drop.participant == "site-a"


async def test_the_coordinators_new_key_signs_from_the_next_session_on_and_everybody_is_told_before(
    tmp_path: Path,
) -> None:
    issued = AUTHORITY.issue(Role.COORDINATOR, "main", now=NOW, dns_names=["localhost"])
    new = der_of(issued)
    async with federation(tmp_path) as (coordinator, sites):
        await held(coordinator, sites)
        for site in sites.values():
            assert site.peer is not None
            site.peer.welcomed_by = der_of(COORDINATOR)
        await coordinator.driver.post(happenings.OwnCertificateRenewed(new, signer_of(issued)))
        await coordinator.settled()
        assert coordinator.driver.federation.certificate == der_of(COORDINATOR)  # who connects now is told of this one
        assert not [m for _, m in sites["site-b"].heard if isinstance(m, Welcome)]
        await go_on(sites["site-a"])
        await coordinator.until_ended()
        first, second = plans(coordinator)
        for site in sites.values():
            kinds = [type(m) for _, m in site.heard if isinstance(m, Welcome | OpenSession)]
            assert kinds == [OpenSession, Welcome, OpenSession]
            (welcome,) = [m for _, m in site.heard if isinstance(m, Welcome)]
            assert welcome.coordinator_certificate == new
        assert coordinator.driver.federation.certificate == new
    old_key, new_key = key_of(der_of(COORDINATOR)), key_of(new)
    assert [client.is_signed_by(p, old_key) for p in (first, second)] == [True, False]
    assert [client.is_signed_by(p, new_key) for p in (first, second)] == [False, True]


def key_of(der: bytes) -> ec.EllipticCurvePublicKey:
    key = x509.load_der_x509_certificate(der).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key
