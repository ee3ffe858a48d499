"""Certificates that are good for something else: another CA's, another role's, one that was revoked; and puppets.

Connections are real: a real coordinator process on one side or real sites on the other, mutual TLS between them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import structlog
from tests.attacks.liar_coordinator import SITES, STEPS, Liar, against, changed, listening, site
from tests.e2e.services import World
from tests.fuzz.honest import attached, coordinator
from tests.fuzz.hostile_calls import exchange
from tests.revocation.lists import signed_list

from maskwork.net.authority import Authority
from maskwork.net.identity import IdentityFiles, Role, load_certificate
from maskwork.net.permissions import PERMISSIONS
from maskwork.net.tls import CHANNEL_OPTIONS, channel_credentials
from maskwork.participant.policy import Policy
from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Advertisements,
    ConsistencyCheck,
    DeliveredShares,
    SurvivorSets,
    Unmask,
)
from maskwork.secagg.plan import session_id
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor

PATIENCE_S: Final = 30.0
PUPPETS: Final = ("puppet-1", "puppet-2", "puppet-3")
JOINS: Final = "/maskwork.wire.v1.FederationService/Connect"


class Said:
    """What the sites of this process log, and a way to wait for it."""

    def __init__(self) -> None:
        self.lines: list[structlog.typing.EventDict] = []
        self._grew = asyncio.Event()

    def __call__(self, _logger: object, _level: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
        self.lines.append(line)
        self._grew.set()
        raise structlog.DropEvent

    async def until(self, event: str) -> structlog.typing.EventDict:
        async with asyncio.timeout(PATIENCE_S):
            while not (found := [line for line in self.lines if line["event"] == event]):
                self._grew.clear()
                await self._grew.wait()
        return found[0]


@asynccontextmanager
async def overheard() -> AsyncIterator[Said]:
    said, before = Said(), structlog.get_config()["processors"]
    structlog.configure(processors=[said])
    try:
        yield said
    finally:
        structlog.configure(processors=before)


async def call(world: World, files: IdentityFiles, method: str, *messages: bytes) -> tuple[grpc.StatusCode, str, int]:
    """One call with some certificate: the status, what was said, and how many messages came."""
    alone = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.secure_channel(world.address, channel_credentials(files), options=alone) as channel:
        code, detail, heard = await exchange(channel, method, messages)
    return code, detail or "", len(heard)


def status_of(world: World, files: IdentityFiles, method: str) -> grpc.StatusCode:
    """How a call with one message ends, whatever the method's kind: a refusal looks the same on the wire.

    Not by the asyncio client, which can lose the status of a refusal (github.com/grpc/grpc/issues/36066).
    """
    with grpc.secure_channel(world.address, channel_credentials(files), options=CHANNEL_OPTIONS) as channel:
        try:
            ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
            ask(hello(), timeout=20)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


# --- another CA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shows", ["a coordinator's certificate of another CA", "a member's certificate"])
async def test_a_man_in_the_middle_is_not_taken_for_the_coordinator(shows: str, tmp_path: Path) -> None:
    """Attack: whoever owns the wire answers the site's call, with a certificate that another CA made for the very name
    and federation, or with that of a member. Behind the handshake it would be a perfect coordinator: it has the true
    one's certificate to show in its Welcome. Expected: the handshake fails; the site says not one word.
    """
    if shows == "a member's certificate":
        world = World(tmp_path)
        impostor = world.identity(Role.PARTICIPANT, "site-d")
    else:
        stranger = Authority.create("ward", now=time.time())
        issued = stranger.issue(Role.COORDINATOR, "main", now=time.time(), ip_addresses=["127.0.0.1"])
        impostor = issued.write(tmp_path / "impostor")
    async with overheard() as said, listening(tmp_path / "ward", serve_as=impostor) as liar:
        files = liar.world.identity(Role.PARTICIPANT, "site-a")
        async with attached(liar.world.address, files, tmp_path / "site-a"):
            line = await said.until("not connected")
    assert "certificate" in line["detail"]
    assert not liar.connections
    assert not liar.heard


async def test_a_member_of_another_federation_does_not_get_in(tmp_path: Path) -> None:
    """Attack: the other half of the man in the middle: a client of another CA, under a member's name. Expected: no
    handshake with the real coordinator.
    """
    async with coordinator(tmp_path) as (world, _):
        stranger = Authority.create("ward", now=time.time()).issue(Role.PARTICIPANT, "site-a", now=time.time())
        theirs = stranger.write(tmp_path / "stranger")
        ours = world.identity(Role.PARTICIPANT, "site-a")
        mixed = IdentityFiles(ours.ca, theirs.cert, theirs.key)
        assert (await call(world, mixed, JOINS, hello()))[0] is grpc.StatusCode.UNAVAILABLE
        assert (await call(world, ours, JOINS, hello(), b"\xff"))[2] >= 1, "the true one is greeted"


def hello() -> bytes:
    return codec.encode_request(b"", codec.Hello((1,), "maskwork", ("gated",), b"")).SerializeToString()


# --- another role ---------------------------------------------------------------------------------------------------


async def test_no_certificate_does_the_work_of_another_role(tmp_path: Path) -> None:
    """Attack: an operator that joins a cohort as if it were a site, a site that submits or ends jobs, an auditor that
    changes something: certificates of the right CA for the wrong work. Expected: each is told so, for every method and
    every role that may not call it, before a message is looked at.
    """
    async with coordinator(tmp_path) as (world, _):
        methods = [m for m in PERMISSIONS if m.startswith("/maskwork.")]
        refused = [(m, r) for m in methods for r in Role if r not in PERMISSIONS[m] and r is not Role.COORDINATOR]
        assert (JOINS, Role.OPERATOR) in refused
        assert ("/maskwork.wire.v1.JobService/SubmitJob", Role.PARTICIPANT) in refused
        for method, role in refused:
            code = await asyncio.to_thread(status_of, world, world.identity(role, "someone"), method)
            assert code is grpc.StatusCode.PERMISSION_DENIED, (method, role)


async def test_an_operators_certificate_in_a_roster_is_no_members(tmp_path: Path) -> None:
    """Attack: the coordinator's own operator as a member beside real sites, with keys that its certificate signed.
    Expected: its role is in its certificate; the sites leave.
    """
    async with against(tmp_path, names=SITES[:3]) as (liar, _):
        files = liar.world.identity(Role.OPERATOR, "site-d")
        liar.world.identity(Role.PARTICIPANT, "site-d").cert.write_bytes(files.cert.read_bytes())
        liar.world.identity(Role.PARTICIPANT, "site-d").key.write_bytes(files.key.read_bytes())

        def join(_name: str, message: Advertisements) -> Advertisements:
            at, (_, some) = session.index("site-d"), message.advertised[0]
            signed = some.signed_bytes(some.mask_key, some.encryption_key, session=session.id, sender=at)
            mine = replace(
                some,
                encryption_key=some.mask_key,
                mask_key=some.encryption_key,
                signature=liar.signer("site-d").sign(signed),
            )
            return replace(message, u1=message.u1 | {at}, advertised=tuple(sorted([*message.advertised, (at, mine)])))

        session = liar.open(liar.plan(SITES), changed(Advertisements, join))
        session.lose("site-d")
        for name in SITES[:3]:
            await liar.leaves(name, session.id, AbortReason.BAD_CERTIFICATE)


# --- a stolen certificate -------------------------------------------------------------------------------------------


def list_of(liar: Liar, number: int, *revoked: str) -> bytes:
    """A revocation list of the CA's, DER."""
    certificates = [load_certificate(liar.world.identity(Role.PARTICIPANT, n).cert) for n in revoked]
    return signed_list(liar.world.authority, number, certificates, now=time.time())


def under(liar: Liar, number: int, der: bytes, **changes: object) -> OpenSession:
    """An offer under a revocation list."""
    plan = liar.plan(SITES, revocation_digest=liar.hand_out(der), revocation_number=number, **changes)
    return replace(liar.offer(plan), revocation_list_size=len(der))


async def test_a_stolen_certificate_after_its_revocation_is_in_no_cohort(tmp_path: Path) -> None:
    """Attack: site-d's key was stolen and its certificate revoked; a coordinator that plays the thief's game puts it
    into a roster all the same: under the list that names it, and, once sites have seen that one, under the list before
    it, or under none. Expected: declined each time, by the number that a site has seen, on its disk.
    """
    async with against(tmp_path, names=SITES[:3]) as (liar, _):
        older, newer = list_of(liar, 4), list_of(liar, 5, "site-d")
        before = under(liar, 4, older, attempt=1)
        session = session_id(before.proposal.plan_bytes)
        liar.say("site-a", session, before)
        await liar.answer("site-a", session, AdvertiseKeys)
        await liar.declines("site-b", under(liar, 5, newer, attempt=2), DeclineCode.REVOCATION, "site-d")
        three = liar.plan(SITES[:3], colluders=1)
        clean = under(liar, 5, newer, roster=three.roster, graph=three.graph, attempt=3)
        liar.say("site-b", after := session_id(clean.proposal.plan_bytes), clean, cohort=3)
        await liar.answer("site-b", after, AdvertiseKeys)
        await liar.declines("site-b", under(liar, 4, older, attempt=4), DeclineCode.REVOCATION)
        none = liar.offer(liar.plan(SITES, attempt=5))
        await liar.declines("site-b", none, DeclineCode.REVOCATION)


# --- false members --------------------------------------------------------------------------------------------------


async def test_a_roster_of_puppets_is_refused_by_a_site_that_says_whom_it_trusts(tmp_path: Path) -> None:
    """Attack: the CA, or who stole its key, mints a cohort around one honest site. Expected: a policy that wants
    trusted members in the sum, by name, declines before the site has said a word about itself.
    """
    async with listening(tmp_path) as liar:
        policy = Policy(min_weight_cap=1, trusted_participants=("site-b", "site-c"), min_trusted_survivors=1)
        async with site(liar, "site-a", policy=policy):
            offer = liar.offer(liar.plan(("site-a", *PUPPETS)))
            await liar.declines("site-a", offer, DeclineCode.TOO_FEW_SURVIVORS, "trusted members 0 < 1")


async def test_a_trusted_member_that_is_only_named_does_not_count(tmp_path: Path) -> None:
    """Attack: a trusted member's name in the roster, and it is never there: puppets do the rest. Expected: the site
    goes on only with a trusted member whose keys it has verified, at each step: here it leaves before it deals a share.
    """
    async with listening(tmp_path) as liar:
        policy = Policy(min_weight_cap=1, trusted_participants=("site-b",), min_trusted_survivors=1)
        names = ("puppet-1", "puppet-2", "puppet-3", "site-a", "site-b")
        async with (
            site(liar, "puppet-1"),
            site(liar, "puppet-2"),
            site(liar, "puppet-3"),
            site(liar, "site-a", policy=policy),
        ):
            session = liar.open(liar.plan(names))
            session.lose("site-b")
            await liar.leaves("site-a", session.id, AbortReason.POLICY)
            assert (session.id, "site-a") not in liar.uploads


async def test_a_trusted_member_that_is_dropped_after_the_upload_gets_no_signature(tmp_path: Path) -> None:
    """Attack: the trusted member takes part until everybody has uploaded, and is then said to have dropped out.
    Expected: the site signs no such survivors and reveals nothing, and with fewer than t puppets nothing opens.
    """
    async with listening(tmp_path) as liar:
        policy = Policy(min_weight_cap=1, trusted_participants=("site-b",), min_trusted_survivors=1)
        async with (
            site(liar, "site-a", policy=policy),
            site(liar, "site-b"),
            site(liar, "puppet-1"),
            site(liar, "puppet-2"),
        ):
            names = ("puppet-1", "puppet-2", "site-a", "site-b")
            lie = changed(SurvivorSets, lambda _n, sets: replace(sets, u3=frozenset({0, 1, 2})))
            session = liar.open(liar.plan(names), lie)
            await liar.leaves("site-a", session.id, AbortReason.POLICY)
            assert not liar.answers("site-a", session.id, ConsistencyCheck)
            assert not [n for n in names if liar.answers(n, session.id, Unmask)]


async def test_as_many_puppets_as_the_threshold_release_what_a_site_refused_to_sign(tmp_path: Path) -> None:
    """Attack: the same with t puppets. **It succeeds**: the site leaves at step 3, after its upload, and t others sign
    for a set with it in and its trusted member out. What they have without its consent is what t colluders always have.
    The policy's rules at steps 1 and 2 keep a site out of cohorts in which that is plausible: let
    `min_trusted_survivors` be above n - t, and there are not enough puppets (docs/policy.md).
    """
    async with listening(tmp_path) as liar, AsyncExitStack() as stack:
        policy = Policy(min_weight_cap=1, trusted_participants=("site-b",), min_trusted_survivors=1)
        puppets = tuple(f"puppet-{n}" for n in range(1, 6))
        await stack.enter_async_context(site(liar, "site-a", policy=policy))
        for name in (*puppets, "site-b"):
            await stack.enter_async_context(site(liar, name))
        plan = liar.plan((*puppets, "site-a", "site-b"))
        assert plan.graph.threshold == len(puppets)
        session = liar.open(plan, changed(DeliveredShares, lambda name, m: None if name == "site-b" else m))
        await liar.until(lambda: len(liar.uploads) == 6)
        session.lose("site-b")
        await liar.leaves("site-a", session.id, AbortReason.POLICY)
        await session.ends()
        assert session.mean is not None
        assert not liar.revealed("site-a", session.id)
        of_puppets = len(puppets) * 0.01
        np.testing.assert_allclose(6 * session.mean - of_puppets, STEPS["site-a"], atol=1e-4)
