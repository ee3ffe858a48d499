"""Who is in the cohort: a coordinator that puts its own keys, or its own members, between real sites."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tests.attacks.liar_coordinator import SITES, STEPS, against, changed
from tests.secagg.test_plan import FIELD, SMALL_ORDER

from maskwork.net.authority import Authority
from maskwork.net.diagnosis import load_private_key
from maskwork.net.identity import Role, fingerprint, load_certificate, to_der
from maskwork.secagg.errors import AbortReason
from maskwork.secagg.keys import PublicKey, SoftwareSigner
from maskwork.secagg.messages import AdvertiseKeys, Advertisements, ShareKeys
from maskwork.secagg.plan import RosterEntry
from maskwork.wire import codec

VICTIM: Final = "site-b"


async def test_without_a_lie_real_sites_get_the_sum(tmp_path: Path) -> None:
    """The liar tells the truth: the harness is a coordinator that sites work with, so a refusal is one of the lie."""
    async with against(tmp_path) as (liar, sites):
        plan = liar.plan(SITES)
        run = await liar.run(plan)
        assert run.mean is not None
        np.testing.assert_allclose(run.mean, np.mean(list(STEPS.values())), atol=1e-4)
        for name, running in sites.items():
            assert not liar.left_because(name, run.id)
            assert running.ledger.releases("ward", plan.model_digest) == (frozenset(SITES),)


# --- key substitution -----------------------------------------------------------------------------------------------


def own_keys(signature: Callable[[bytes], bytes], *, session: bytes, index: int) -> AdvertiseKeys:
    """Fresh keys whose secret halves the coordinator has."""
    made = [PublicKey(X25519PrivateKey.generate().public_key().public_bytes_raw()) for _ in range(2)]
    signed = AdvertiseKeys.signed_bytes(made[0], made[1], session=session, sender=index)
    return AdvertiseKeys(made[0], made[1], signature(signed))


@pytest.mark.parametrize("signed_by", ["the victim, for its own keys", "the coordinator", "another member"])
async def test_a_coordinator_that_puts_its_own_keys_in_a_sites_place(signed_by: str, tmp_path: Path) -> None:
    """Attack: with X25519 keys of its own in the victim's place, the relay reads what is dealt to the victim and knows
    its pair masks. Expected: every other site sees that the victim did not sign them, and leaves; nothing is uploaded.
    Where public keys travel unsigned the relay can do this unnoticed.
    """
    async with against(tmp_path) as (liar, _):

        def substitute(name: str, message: Advertisements) -> Advertisements:
            at = session.index(VICTIM)
            honest = dict(message.advertised).get(at)
            if honest is None:  # the victim itself
                return message
            signers = {
                "the victim, for its own keys": lambda _: honest.signature,
                "the coordinator": SoftwareSigner(liar.coordinator_key()).sign,
                "another member": liar.signer("site-d").sign,
            }
            forged = own_keys(signers[signed_by], session=session.id, index=at)
            advertised = tuple((i, forged if i == at else a) for i, a in message.advertised)
            return replace(message, advertised=advertised)

        session = liar.open(liar.plan(SITES), changed(Advertisements, substitute))
        for name in set(SITES) - {VICTIM}:
            await liar.leaves(name, session.id, AbortReason.BAD_PEER_SIGNATURE)
        await session.ends()
        assert not liar.uploads


@pytest.mark.parametrize(
    "issuer", ["another CA under the same name", "another federation", "nobody that the plan names"]
)
async def test_a_coordinator_that_brings_a_certificate_of_its_own_for_a_site(issuer: str, tmp_path: Path) -> None:
    """Attack: the victim's name with a certificate that the coordinator had made elsewhere, and keys that this one
    signed. Expected: the others leave, since the chain, the federation or the fingerprint is wrong.
    """
    async with against(tmp_path) as (liar, _):
        federation = "elsewhere" if issuer == "another federation" else "ward"
        issued = Authority.create(federation, now=time.time()).issue(Role.PARTICIPANT, VICTIM, now=time.time())
        issued.write(tmp_path / "forged")
        forged = to_der(load_certificate(tmp_path / "forged" / "cert.pem"))
        bundle = [forged if n == VICTIM else liar.certificate(n) for n in SITES]
        plan = liar.plan(SITES)
        if issuer != "nobody that the plan names":
            roster = tuple(
                RosterEntry(e.participant, fingerprint(forged) if e.participant == VICTIM else e.fingerprint)
                for e in plan.roster
            )
            plan = replace(plan, roster=roster)
        at = SITES.index(VICTIM)

        def substitute(name: str, message: Advertisements) -> Advertisements:
            signer = SoftwareSigner(load_private_key(tmp_path / "forged" / "key.pem"))
            mine = own_keys(signer.sign, session=session.id, index=at)
            others = {i: a for i, a in message.advertised if i != at}
            return replace(message, u1=message.u1 | {at}, advertised=tuple(sorted({**others, at: mine}.items())))

        session = liar.open(plan, changed(Advertisements, substitute), certificates=bundle)
        for name in set(SITES) - {VICTIM}:
            await liar.leaves(name, session.id, AbortReason.BAD_CERTIFICATE)
        assert not liar.uploads


async def test_a_member_in_league_with_the_coordinator_advertises_a_degenerate_point(tmp_path: Path) -> None:
    """Attack: a member signs a point of small order, so that everybody knows what anyone agrees with it, and the
    coordinator lets it through. Every such point there is, for either key. Expected: every honest site leaves before it
    deals a share.
    """
    async with against(tmp_path, names=SITES[:3]) as (liar, _):

        async def advertise(attempt: int, encryption: PublicKey, mask: PublicKey) -> None:
            def degenerate(_name: str, message: Advertisements) -> Advertisements:
                cheat = session.index("site-d")
                signed = AdvertiseKeys.signed_bytes(encryption, mask, session=session.id, sender=cheat)
                mine = {cheat: AdvertiseKeys(encryption, mask, liar.signer("site-d").sign(signed))}
                advertised = tuple(sorted({**dict(message.advertised), **mine}.items()))
                return replace(message, u1=message.u1 | {cheat}, advertised=advertised)

            session = liar.open(liar.plan(SITES, attempt=attempt), changed(Advertisements, degenerate))
            session.lose("site-d")
            for name in SITES[:3]:
                await liar.leaves(name, session.id, AbortReason.DEGENERATE_KEY)
                assert not liar.answers(name, session.id, ShareKeys)

        good = PublicKey(b"\x09" + bytes(31))
        for at, u in enumerate(SMALL_ORDER):
            point = PublicKey(u.to_bytes(32, "little"))
            await advertise(2 * at + 1, point, good)
            await advertise(2 * at + 2, good, point)


async def test_another_encoding_of_a_degenerate_point_is_no_message(tmp_path: Path) -> None:
    """Attack: the same points, which RFC 7748 would read in a second encoding too, past a comparison of bytes.
    Expected: they cannot even be decoded; the site leaves.
    """
    async with against(tmp_path, names=SITES[:3]) as (liar, _):

        async def advertise(attempt: int, u: int) -> None:
            def spoil(_name: str, message: Advertisements) -> bytes:
                response = codec.encode_response(session.id, message, len(SITES))
                response.advertisements.advertised[0].keys.mask_key = u.to_bytes(32, "little")
                return response.SerializeToString()

            session = liar.open(liar.plan(SITES, attempt=attempt), changed(Advertisements, spoil))
            session.lose("site-d")
            for name in SITES[:3]:
                await liar.leaves(name, session.id, AbortReason.UNEXPECTED_MESSAGE)

        for attempt, u in enumerate((FIELD, FIELD + 1, *((1 << 255) + u for u in SMALL_ORDER)), 1):
            await advertise(attempt, u)


# --- false members --------------------------------------------------------------------------------------------------


async def test_a_roster_of_puppets_gives_a_site_away_when_its_policy_names_nobody(tmp_path: Path) -> None:
    """Attack: whoever has the CA's key mints three members and fills the cohort with them. **It succeeds**: what the
    coordinator takes off the sum leaves the one honest site's update. No protocol can tell a puppet from a hospital;
    only a site that names whom it trusts can.
    """
    names = ("puppet-1", "puppet-2", "puppet-3", "site-a")
    async with against(tmp_path, names=names) as (liar, _):
        run = await liar.run(liar.plan(names))
        assert run.mean is not None
        of_puppets = 3 * 0.01
        np.testing.assert_allclose(4 * run.mean - of_puppets, STEPS["site-a"], atol=1e-4)
