"""Certificates renewed under running services: nothing restarts, no attempt is lost, later rosters carry the new ones.

Real processes over loopback. What counts as failure: an attempt that does not commit, a dropout, a roster or signature
under another certificate than the one that was in use when the session was opened, a process that restarted.
"""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec
from tests.e2e.services import MASKWORK, PATIENCE_S, SITES, Service, Watch, World

from maskwork.net.identity import IdentityFiles, Role, fingerprint, load_certificate, to_der
from maskwork.net.presented import presented_certificates
from maskwork.secagg import keys
from maskwork.secagg.plan import RoundPlan, session_id
from maskwork.wire import codec

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("services")]

HELD_ROUND = 2
ROUNDS = 4


class SigningWorld(World):
    """A federation whose coordinator holds the CA's key."""

    def coordinator_config(self, **changes: str | float) -> Path:
        self.authority.write(self.home / "ca", overwrite=True)
        return super().coordinator_config(enrolment_ca="ca", **changes)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SigningWorld]:
    world = SigningWorld(tmp_path_factory.mktemp("ward"))
    await world.gate.open()
    try:
        await world.start_coordinator()
        for site in SITES:
            await world.start_site(site)
        await asyncio.gather(*(world.sites[site].logged("connected") for site in SITES))
        yield world
    finally:
        await world.close()


async def maskwork(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        MASKWORK, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(PATIENCE_S):
        said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode()


def certificate_of(files: IdentityFiles) -> bytes:
    return fingerprint(to_der(load_certificate(files.cert)))


@dataclass
class Opened:
    """An attempt as the coordinator recorded it."""

    plan: RoundPlan
    plan_bytes: bytes
    signature: bytes

    def fingerprint_of(self, site: str) -> bytes:
        return next(e.fingerprint for e in self.plan.roster if e.participant == site)

    def is_signed_by(self, key: ec.EllipticCurvePublicKey) -> bool:
        identifier = session_id(self.plan_bytes)
        signed = keys.signed_message("plan", session=identifier, sender=keys.COORDINATOR_INDEX, fields=b"")
        return keys.verify_signature(key, self.signature, signed)


def opened(world: World, job_id: str) -> list[Opened]:
    with sqlite3.connect(world.home / "coordinator-state" / "coordinator.sqlite") as database:
        rows = database.execute(
            "SELECT plan_bytes, plan_signature FROM attempts WHERE job_id = ? ORDER BY round_number, attempt", (job_id,)
        ).fetchall()
    return [Opened(codec.decode_plan(plan), plan, signature) for plan, signature in rows]


async def assert_nothing_was_lost(world: World, watch: Watch, rounds: int) -> None:
    assert (await watch.ended()).state == "completed"
    details = await world.details(watch.job_id)
    assert [(a.round_number, a.attempt, a.outcome) for a in details.attempts] == [
        (number, 1, "committed") for number in range(1, rounds + 1)
    ]
    assert details.drops == ()
    assert [r.survivors for r in details.rounds] == [SITES] * rounds


async def test_a_site_and_the_coordinator_are_renewed_while_a_job_runs(world: SigningWorld) -> None:
    coordinator, site = world.identity(Role.COORDINATOR, "main"), world.identity(Role.PARTICIPANT, "site-a")
    before = certificate_of(site)
    old_key, processes = load_certificate(coordinator.cert).public_key(), [s.process.pid for s in world.all]
    world.gate.held = {"site-d"}
    async with world.job("renewed", rounds=ROUNDS) as watch:
        await world.gate.reached("site-d")  # of round 1: the next one is the one that is held
        world.gate.release("site-d")
        world.gate.held = {"site-d"}
        await watch.committed(HELD_ROUND - 1)
        await world.gate.reached("site-d")
        said = await maskwork("participant", "renew", "--config", str(world.site_config("site-a")))
        assert "takes it up by itself" in said
        issued = world.authority.issue(Role.COORDINATOR, "main", now=time.time(), ip_addresses=["127.0.0.1"])
        issued.write(coordinator.cert.parent, overwrite=True)
        await world.coordinator.logged("a new certificate was found")
        await world.sites["site-a"].logged("a new certificate was found")
        waits = "a participant has a new certificate, which counts after this session"
        await world.coordinator.logged(waits, participant="site-a")
        assert not [line for line in world.sites["site-a"].lines if line["event"] == "the new certificate counts"]
        world.gate.release("site-d")
        await assert_nothing_was_lost(world, watch, ROUNDS)
    after, new_key = certificate_of(site), load_certificate(coordinator.cert).public_key()
    assert before != after
    assert isinstance(old_key, ec.EllipticCurvePublicKey)
    assert isinstance(new_key, ec.EllipticCurvePublicKey)
    attempts = opened(world, watch.job_id)
    assert [a.fingerprint_of("site-a") for a in attempts] == [before] * HELD_ROUND + [after] * (ROUNDS - HELD_ROUND)
    assert [a.is_signed_by(old_key) for a in attempts] == [True] * HELD_ROUND + [False] * (ROUNDS - HELD_ROUND)
    assert [a.is_signed_by(new_key) for a in attempts] == [False] * HELD_ROUND + [True] * (ROUNDS - HELD_ROUND)
    # Who connects from now on meets the new certificate.
    (shown, *_) = await asyncio.to_thread(presented_certificates, world.address)
    assert fingerprint(to_der(shown)) == certificate_of(coordinator)
    assert processes == [s.process.pid for s in world.all]
    for service in (world.coordinator, *world.sites.values()):
        service.assert_clean()


async def test_every_site_is_renewed_at_once_between_two_jobs_and_in_one(world: SigningWorld) -> None:
    """The offline way: another pair is simply put there."""

    async def renew(sites: tuple[str, ...]) -> None:
        lines = {site: len(world.sites[site].lines) for site in sites}
        for site in sites:
            directory = world.identity(Role.PARTICIPANT, site).cert.parent
            world.authority.issue(Role.PARTICIPANT, site, now=time.time()).write(directory, overwrite=True)
        for site in sites:
            await world.sites[site].logged("a new certificate was found", since=lines[site])

    since = {site: len(world.sites[site].lines) for site in SITES}
    await renew(SITES)
    for site in SITES:
        await world.sites[site].logged("the new certificate counts", since=since[site])
    world.gate.held = {"site-d"}
    async with world.job("renewed-again", rounds=2) as watch:
        await world.gate.reached("site-d")
        first = {site: certificate_of(world.identity(Role.PARTICIPANT, site)) for site in SITES}
        count = len(world.coordinator.lines)
        await renew(SITES)
        waits = "a participant has a new certificate, which counts after this session"
        for site in SITES:
            await world.coordinator.logged(waits, since=count, participant=site)
        world.gate.release("site-d")
        await assert_nothing_was_lost(world, watch, 2)
    second = {site: certificate_of(world.identity(Role.PARTICIPANT, site)) for site in SITES}
    one, two = opened(world, watch.job_id)
    assert {site: one.fingerprint_of(site) for site in SITES} == first
    assert {site: two.fingerprint_of(site) for site in SITES} == second


async def test_a_pair_that_does_not_fit_is_not_taken_up_and_said_once(world: SigningWorld) -> None:
    site: Service = world.sites["site-b"]
    files = world.identity(Role.PARTICIPANT, "site-b")
    right = files.cert.read_bytes()
    other = world.authority.issue(Role.PARTICIPANT, "site-c", now=time.time())
    since = len(site.lines)
    files.cert.write_bytes(other.cert_pem)
    await site.logged("the new certificate is not taken up", since=since)
    files.cert.write_bytes(right)
    async with world.job("unmoved") as watch:
        assert (await watch.ended()).state == "completed"
    assert not [line for line in site.lines[since:] if line["event"] == "a new certificate was found"]
