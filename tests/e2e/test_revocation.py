"""Revocation and the replacement of a CA with real processes: who is cut off, what goes on, and what each side says.

What counts as failure: a round that does not commit with the rest, a revoked member that is let in, a traceback. Lists
are made by the CA's own code and put where an operator puts them; nothing here waits for time to pass.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.e2e.services import PATIENCE_S, SITES, Service, World

from maskwork import job_events as events
from maskwork.net import tls
from maskwork.net.authority import Authority
from maskwork.net.identity import IdentityFiles, Role, load_certificate, serial_bytes
from maskwork.net.revocation import LIST_FILE, Reason, RevocationList
from maskwork.net.revoking import begin_rollover, next_list, take_over
from maskwork.net.whole_files import write_whole
from maskwork.wire.v1 import jobs_pb2, jobs_pb2_grpc

# isort: split
# Only now: gRPC reads its cipher suites while it is imported.
import grpc

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("services")]


class Ward(World):
    """A federation whose CA lies in a directory, and whose operator puts lists where the coordinator looks."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.ca = home / "ca"
        self.authority.write(self.ca)

    def revoke(self, *files: IdentityFiles) -> RevocationList:
        serials = [serial_bytes(load_certificate(one.cert)) for one in files]
        reasons = dict.fromkeys(serials, Reason.KEY_COMPROMISE)
        made = next_list(self.authority, self.ca, now=time.time(), withdrawn=reasons)
        self.publish(made)
        return made

    def publish(self, made: RevocationList) -> None:
        write_whole(self.identity(Role.COORDINATOR, "main").ca.with_name(LIST_FILE), made.der)

    def seen_by(self, site: str) -> RevocationList:
        der = (self.home / f"state-{site}" / LIST_FILE).read_bytes()
        return RevocationList.parse(der, self.authority.roots, now=time.time())

    def trust(self, pem: bytes) -> None:
        """Everybody gets this ca.pem."""
        for path in self.home.glob("*-*/ca.pem"):
            if path.parent.name.split("-")[0] in set(Role):
                path.write_bytes(pem)

    def reissue(self, role: Role, name: str) -> None:
        """A new certificate, and a new key, by the CA of the day."""
        addresses = ["127.0.0.1"] if role is Role.COORDINATOR else []
        files = self.identity(role, name)
        self.authority.issue(role, name, now=time.time(), ip_addresses=addresses).write(files.ca.parent, overwrite=True)

    async def restart(self, site: str) -> None:
        assert await self.sites[site].terminate() == 0
        await self.start_site(site)
        await self.sites[site].logged("connected")

    async def begin(self, *sites: str) -> None:
        await self.gate.open()
        await self.start_coordinator()
        for site in sites:
            await self.start_site(site)
        await asyncio.gather(*(self.sites[site].logged("connected") for site in sites))


@pytest_asyncio.fixture
async def ward(tmp_path: Path) -> AsyncIterator[Ward]:
    """A coordinator with four sites."""
    ward = Ward(tmp_path)
    try:
        await ward.begin(*SITES)
        yield ward
    finally:
        await ward.close()


@pytest_asyncio.fixture
async def lonely(tmp_path: Path) -> AsyncIterator[Ward]:
    """A coordinator without sites."""
    ward = Ward(tmp_path)
    try:
        await ward.begin()
        yield ward
    finally:
        await ward.close()


def complaints(service: Service) -> list[str]:
    return [str(line["event"]) for line in service.lines if "Traceback" in str(line)]


async def watching(ward: Ward, files: IdentityFiles, job_id: str, begun: asyncio.Event) -> tuple[grpc.StatusCode, str]:
    """Watch a job until the call ends; how it ended. `begun` is set when the first event is here."""
    async with grpc.aio.secure_channel(
        ward.address, tls.channel_credentials(files), options=tls.CHANNEL_OPTIONS
    ) as channel:
        stub: jobs_pb2_grpc.JobServiceAsyncStub = jobs_pb2_grpc.JobServiceStub(channel)
        call = stub.WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id), timeout=PATIENCE_S)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in call:
                begun.set()
        return await call.code(), await call.details()


async def test_a_site_that_is_revoked_during_a_round_is_cut_off_and_the_round_goes_on(ward: Ward) -> None:
    ward.gate.held = {"site-d"}
    nosy = ward.identity(Role.AUDITOR, "nosy")
    async with ward.job("revoked", rounds=2) as watch:
        await watch.answered("masked-update", "site-a", "site-b", "site-c")
        await ward.gate.reached("site-d")
        begun = asyncio.Event()
        cut = asyncio.create_task(watching(ward, nosy, watch.job_id, begun))
        async with asyncio.timeout(PATIENCE_S):
            await begun.wait()
        revoked = ward.sites["site-d"]
        made = ward.revoke(ward.identity(Role.PARTICIPANT, "site-d"), nosy)

        first = await watch.committed(1)
        assert (first.survivors, first.dropouts) == (SITES[:3], ("site-d",))
        second = await watch.committed(2)
        assert (second.survivors, second.dropouts) == (SITES[:3], ())
        assert (await watch.ended()).state == "completed"
        details = await ward.details(watch.job_id)
        # A running call of another role is cut off by the same list.
        assert await cut == (grpc.StatusCode.UNAUTHENTICATED, "certificate refused: revoked")

    # The operator reads why, in the job's history and in the log.
    (drop,) = details.drops
    assert (drop.round_number, drop.participant, drop.reason) == (1, "site-d", "revoked")
    assert drop.detail == "its certificate is on revocation list 1: key-compromise"
    await ward.coordinator.logged("participant cut off", participant="site-d")
    # The others hold the new number, from the next round's plan.
    assert {ward.seen_by(site).number for site in SITES[:3]} == {1}
    assert ward.seen_by("site-a").digest == made.digest
    # The revoked one is told, its training was ended, and it stops dialling every second.
    await revoked.logged("the coordinator refuses this site's certificate", detail="certificate refused: revoked")
    said = await revoked.logged("waiting long before dialling again")
    assert 150 <= said["seconds"] <= 300
    await ward.gate.left("site-d")
    # Nor does a process started anew get in.
    assert await revoked.terminate() == 0
    again = await ward.start_site("site-d")
    await again.logged("the coordinator refuses this site's certificate")
    assert not [line for line in again.lines if line["event"] == "connected"]
    assert not complaints(ward.coordinator)
    assert not complaints(revoked)


async def test_a_coordinator_that_shows_an_older_list_is_declined(ward: Ward) -> None:
    ward.identity(Role.PARTICIPANT, "site-x")
    older = ward.revoke()
    await ward.coordinator.logged("revocation list in force", number=1)
    newer = ward.revoke(ward.identity(Role.PARTICIPANT, "site-x"))
    await ward.coordinator.logged("revocation list in force", number=2)
    async with ward.job("newer") as watch:
        assert (await watch.ended()).state == "completed"
    assert {ward.seen_by(site).number for site in SITES} == {2}
    # A file put back is refused by the coordinator itself, and said; a coordinator that forgets is declined.
    ward.publish(older)
    await ward.coordinator.logged("revocation list refused", in_force=2)
    assert await ward.coordinator.terminate() == 0
    (ward.home / "coordinator-state" / LIST_FILE).unlink()
    await ward.start_coordinator()
    async with ward.job("older") as watch:
        dropped = await watch.until(lambda e: isinstance(e, events.Dropped))
        assert isinstance(dropped, events.Dropped)
        assert dropped.reason == "declined"
        assert "revocation" in dropped.detail
        assert "revocation list 1, where list 2 was seen before" in dropped.detail
        # The right list again, and the sites take part once they have connected anew.
        ward.publish(newer)
        await ward.coordinator.logged("revocation list in force", number=2)
        await asyncio.gather(*map(ward.restart, SITES))
        assert (await watch.ended()).state == "completed"


async def test_a_coordinator_whose_own_certificate_is_revoked_stops_and_does_not_start(lonely: Ward) -> None:
    lonely.revoke(lonely.identity(Role.COORDINATOR, "main"))
    assert await lonely.coordinator.wait() == 1
    assert "has been revoked" in lonely.coordinator.text
    again = await lonely.start("coordinator", "coordinator", lonely.coordinator_config())
    assert await again.wait() == 1
    assert "has been revoked" in again.text
    assert not complaints(again)


async def test_one_ca_replaces_another_while_a_job_runs(ward: Ward) -> None:
    both = begin_rollover(ward.authority, ward.ca, ward.home / "ca-2", now=time.time())
    ward.identity(Role.RESEARCHER, "someone")
    ward.gate.held = {"site-a"}
    async with ward.job("rollover", rounds=4) as watch:
        # 1. Everybody trusts both: a restart each, the coordinator in the middle of a round. No round is lost by it.
        await ward.gate.reached("site-a")
        ward.trust(both.roots_pem)
        assert await ward.coordinator.terminate() == 0
        ward.gate.release("site-a")
        await ward.start_coordinator()
        await asyncio.gather(*map(ward.restart, SITES))
        ward.gate.held = {"site-a"}
        # 2. The new CA signs: the list at once, certificates one after the other.
        await ward.gate.reached("site-a")
        ward.publish(take_over(both, ward.ca, ward.home / "ca-2", now=time.time()))
        await ward.coordinator.logged("revocation list in force", number=1)
        ward.authority = Authority.load(ward.home / "ca-2")
        ward.reissue(Role.PARTICIPANT, "site-d")
        await ward.restart("site-d")
        ward.gate.release("site-a")
        mixed = await watch.until(lambda e: isinstance(e, events.RoundCommitted) and e.survivors == SITES)
        assert isinstance(mixed, events.RoundCommitted)
        for site in SITES[:3]:
            ward.reissue(Role.PARTICIPANT, site)
        ward.reissue(Role.COORDINATOR, "main")
        ward.reissue(Role.RESEARCHER, "someone")
        # 3. The old one is trusted no more.
        ward.trust((ward.home / "ca-2" / "ca.pem").read_bytes())
        assert await ward.coordinator.terminate() == 0
        await ward.start_coordinator()
        await asyncio.gather(*map(ward.restart, SITES))
        ward.authority = Authority.create("unused", now=time.time())
        details = await ended(ward, watch.job_id)
    assert (details.job.state, len(details.rounds)) == ("completed", 4)
    assert details.rounds[-1].survivors == SITES


async def ended(ward: Ward, job_id: str) -> events.JobDetails:
    """The job once it has ended, over a new connection: the one that watched has the old certificate."""
    async with ward.client() as client, asyncio.timeout(PATIENCE_S):
        async for event in client.watch(job_id):
            if isinstance(event, events.JobSummary) and event.ended:
                break
    return await ward.details(job_id)
