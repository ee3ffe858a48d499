"""One lie for each check in `maskwork.secagg.client`: the participant catches it, for the very reason it should.

Each test starts from a state of a clean run and changes one thing in the message that comes next. Where a lying peer
helps the coordinator, what the peer signs is signed anew, so that only the check under test can catch it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tests.secagg.cohort import (
    NOW,
    Certificates,
    Verified,
    certificate_of,
    fingerprint_of,
    make_plan,
    make_proposal,
    make_site,
    name_of,
    session_seed,
    signer,
)
from tests.secagg.harness import clean_run

from maskwork.secagg import client
from maskwork.secagg.client_states import (
    Aborted,
    AdvertisedKeys,
    Completed,
    EndSession,
    Event,
    LocalFailure,
    Masking,
    Send,
    SharedKeys,
    SignedSets,
    Site,
    SiteRules,
    State,
    Step,
    Unmasked,
    UpdateMasked,
    Uploading,
)
from maskwork.secagg.errors import AbortReason, DeclineCode, IllegalEvent, PlanRefused
from maskwork.secagg.keys import PublicKey
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Advertisements,
    DeliveredShares,
    Proposal,
    SessionClosed,
    SurvivorSets,
    SurvivorSignatures,
    Withdraw,
)

T = TypeVar("T")

N, OWN, PEER = 5, 0, 1
SMALL_ORDER = PublicKey(bytes(32))


def state_of(kind: type[T]) -> T:
    return clean_run(N).members[OWN].before(kind)


def message_of(kind: type[T]) -> T:
    return clean_run(N).members[OWN].message(kind)


def aborts(state: State, message: Event, reason: AbortReason, because: str) -> None:
    """The message ends the session here, with this reason, and the coordinator is told the reason only."""
    step = client.step(state, message, now=NOW)
    assert isinstance(step.state, Aborted), step.state
    assert (step.state.reason, because in step.state.detail) == (reason, True), step.state.detail
    assert step.effects == (Send(Withdraw(reason)), EndSession())


def refuses(proposal: Proposal, site: Site, code: DeclineCode, because: str) -> None:
    with pytest.raises(PlanRefused, match=because) as refused:
        client.begin(proposal, site=site, rand=session_seed(OWN, 0))
    assert refused.value.code is code


# --- begin ----------------------------------------------------------------------------------------------------------


def test_a_plan_that_the_coordinator_did_not_sign() -> None:
    proposal = clean_run(N).proposal
    other = replace(proposal, signature=signer(PEER).sign(b"something else"))
    refuses(other, make_site(OWN, N), DeclineCode.BAD_PLAN, "signature is not the coordinator's")


def test_a_plan_signed_for_other_bytes() -> None:
    proposal = make_proposal(make_plan(N, attempt=2))
    other = replace(proposal, signature=clean_run(N).proposal.signature)
    refuses(other, make_site(OWN, N), DeclineCode.BAD_PLAN, "signature is not the coordinator's")


@pytest.mark.parametrize("change", [{"name": "site-x"}, {"fingerprint": bytes(32)}, {"name": name_of(PEER)}])
def test_a_roster_without_this_participant_and_certificate(change: dict[str, object]) -> None:
    site = make_site(OWN, N, **change)
    refuses(clean_run(N).proposal, site, DeclineCode.NOT_IN_ROSTER, "not in the roster")


def test_a_plan_about_another_model() -> None:
    site = make_site(OWN, N, model_digest=bytes(32))
    refuses(clean_run(N).proposal, site, DeclineCode.WRONG_MODEL, "not the one the plan names")


@pytest.mark.parametrize("seen", [(3, 1), (3, 2), (4, 1)])
def test_an_attempt_that_is_not_above_the_highest_seen(seen: tuple[int, int]) -> None:
    site = make_site(OWN, N, rules=SiteRules(highest_attempt=seen))
    refuses(clean_run(N).proposal, site, DeclineCode.STALE_ATTEMPT, "not above the highest seen")


def names(*members: int) -> frozenset[str]:
    return frozenset(name_of(i) for i in members)


@pytest.mark.parametrize("released", [names(*range(N - 1)), names(*range(N), 9), names(0, 1, 2)])
def test_another_cohort_on_a_model_that_was_answered_on(released: frozenset[str]) -> None:
    """A site that has uploaded is in a sum whether it signs or not, so it does not even advertise keys."""
    site = make_site(OWN, N, rules=SiteRules(released=(names(*range(N)), released)))
    refuses(clean_run(N).proposal, site, DeclineCode.SAME_MODEL, "only a cohort of exactly those can repeat it")


def test_the_same_cohort_on_a_model_that_was_answered_on() -> None:
    site = make_site(OWN, N, rules=SiteRules(released=(names(*range(N)),)))
    assert isinstance(client.begin(clean_run(N).proposal, site=site, rand=bytes(32)).state, AdvertisedKeys)


def test_a_cohort_that_differs_as_much_as_the_policy_wants() -> None:
    for difference, joined in ((1, True), (2, True), (3, False)):
        rules = SiteRules(released=(names(*range(N - 2)),), min_survivor_difference=difference)
        site = make_site(OWN, N, rules=rules)
        if joined:
            assert isinstance(client.begin(clean_run(N).proposal, site=site, rand=bytes(32)).state, AdvertisedKeys)
        else:
            refuses(clean_run(N).proposal, site, DeclineCode.SAME_MODEL, "was released")


@pytest.mark.parametrize("seen", [(3, 0), (2, 9)])
def test_an_attempt_above_the_highest_seen_is_joined(seen: tuple[int, int]) -> None:
    site = make_site(OWN, N, rules=SiteRules(highest_attempt=seen))
    assert isinstance(client.begin(clean_run(N).proposal, site=site, rand=bytes(32)).state, AdvertisedKeys)


@pytest.mark.parametrize("held", [{"revocation_number": 1}, {"revocation_digest": b"\1" * 32}])
def test_a_revocation_list_that_is_not_the_one_held(held: dict[str, object]) -> None:
    site = make_site(OWN, N, rules=replace(SiteRules(), **held))  # type: ignore[arg-type]  # one field each
    refuses(clean_run(N).proposal, site, DeclineCode.REVOCATION, "revocation list")


# --- step -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AdvertisedKeys, SharedKeys, Uploading, SignedSets, Unmasked])
def test_an_update_masked_at_the_wrong_time_is_our_own_mistake(kind: type[State]) -> None:
    with pytest.raises(IllegalEvent, match="an update was masked"):
        client.step(state_of(kind), UpdateMasked(), now=NOW)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (AdvertisedKeys, DeliveredShares),
        (AdvertisedKeys, SurvivorSets),
        (AdvertisedKeys, SurvivorSignatures),
        (SharedKeys, Proposal),
        (SharedKeys, SurvivorSets),
        (SharedKeys, SurvivorSignatures),
        (Masking, Advertisements),
        (Masking, SurvivorSets),
        (Masking, SurvivorSignatures),
        (Uploading, Advertisements),
        (Uploading, SurvivorSignatures),
        (SignedSets, Advertisements),
        (SignedSets, DeliveredShares),
        (Unmasked, Advertisements),
        (Unmasked, DeliveredShares),
        (Unmasked, SurvivorSets),
    ],
)
def test_a_message_out_of_turn(kind: type[State], message: type[Event]) -> None:
    aborts(state_of(kind), message_of(message), AbortReason.UNEXPECTED_MESSAGE, f"in state {kind.__name__}")


def other_proposal() -> Proposal:
    return make_proposal(make_plan(N, nonce=b"\7" * 16))


def other_advertisements() -> Advertisements:
    message = message_of(Advertisements)
    return replace(message, u1=message.u1 - {4}, advertised=message.advertised[:-1])


def other_shares() -> DeliveredShares:
    message = message_of(DeliveredShares)
    return replace(message, u2=message.u2 - {4}, shares=message.shares[:-1])


def other_sets() -> SurvivorSets:
    return replace(message_of(SurvivorSets), u3=frozenset(range(4)))


def other_signatures() -> SurvivorSignatures:
    return SurvivorSignatures(message_of(SurvivorSignatures).signatures[:-1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (AdvertisedKeys, other_proposal()),
        (SharedKeys, other_advertisements()),
        (Masking, other_shares()),
        (Uploading, other_shares()),
        (SignedSets, other_sets()),
        (Unmasked, other_signatures()),
    ],
)
def test_a_second_different_request(kind: type[State], message: Event) -> None:
    aborts(state_of(kind), message, AbortReason.EQUIVOCATION, "a second, different")


def test_nothing_moves_a_session_that_is_over() -> None:
    for over in (
        Completed(state_of(Masking).session, True),
        Aborted(state_of(Masking).session, AbortReason.CANCELLED, ""),
    ):
        events: list[Event] = [UpdateMasked(), SessionClosed(False, ""), LocalFailure(AbortReason.CANCELLED, "")]
        events += [message_of(Proposal), message_of(Advertisements), message_of(DeliveredShares)]
        events += [message_of(SurvivorSets), message_of(SurvivorSignatures)]
        for event in events:
            assert client.step(over, event, now=NOW) == Step(over)


# --- step 1 ---------------------------------------------------------------------------------------------------------


def advertised_by(index: int, encryption_key: PublicKey, mask_key: PublicKey) -> AdvertiseKeys:
    """An advertisement that its sender did sign."""
    body = AdvertiseKeys.signed_bytes(encryption_key, mask_key, session=clean_run(N).id, sender=index)
    return AdvertiseKeys(encryption_key, mask_key, signer(index).sign(body))


def with_advertisement(index: int, advertisement: AdvertiseKeys) -> Advertisements:
    message = message_of(Advertisements)
    return replace(message, advertised=tuple((i, advertisement if i == index else a) for i, a in message.advertised))


def fresh_key(seed: int) -> PublicKey:
    return PublicKey(X25519PrivateKey.from_private_bytes(bytes([seed]) * 32).public_key().public_bytes_raw())


def test_u1_without_this_participant() -> None:
    message = message_of(Advertisements)
    aborts(state_of(AdvertisedKeys), replace(message, u1=message.u1 - {OWN}), AbortReason.BAD_SETS, "U1 is not")


def test_u1_with_a_member_beyond_the_roster() -> None:
    message = message_of(Advertisements)
    aborts(state_of(AdvertisedKeys), replace(message, u1=message.u1 | {N}), AbortReason.BAD_SETS, "U1 is not")


def test_a_neighbour_of_the_graph_left_out() -> None:
    message = message_of(Advertisements)
    aborts(
        state_of(AdvertisedKeys),
        replace(message, advertised=message.advertised[:-1]),
        AbortReason.WRONG_NEIGHBOURS,
        "not those of the graph",
    )


def test_a_neighbour_that_the_graph_does_not_have() -> None:
    message = message_of(Advertisements)
    own = state_of(AdvertisedKeys).sent
    aborts(
        state_of(AdvertisedKeys),
        replace(message, advertised=((OWN, own), *message.advertised)),
        AbortReason.WRONG_NEIGHBOURS,
        "not those of the graph",
    )


def test_fewer_share_holders_than_the_threshold_at_step_1() -> None:
    message = message_of(Advertisements)  # t = 4; three of five are left
    few = replace(message, u1=frozenset({0, 1, 2}), advertised=message.advertised[:2])
    aborts(state_of(AdvertisedKeys), few, AbortReason.UNSAFE_THRESHOLD, "3 share holders are fewer than t = 4")


def advertised_state(**changes: object) -> AdvertisedKeys:
    """The state after step 0 at a site with other certificates or another verifier."""
    state = state_of(AdvertisedKeys)
    return replace(state, session=replace(state.session, site=make_site(OWN, N, **changes)))


def test_a_neighbour_without_a_certificate() -> None:
    state = advertised_state(certificates={i: certificate_of(i) for i in range(N - 1)})
    aborts(state, message_of(Advertisements), AbortReason.BAD_CERTIFICATE, "no certificate of site-004")


def test_a_neighbour_whose_certificate_is_revoked() -> None:
    state = advertised_state(verifier=Certificates(N, revoked=frozenset({PEER})))
    aborts(state, message_of(Advertisements), AbortReason.BAD_CERTIFICATE, "site-001: it is revoked")


def test_a_neighbour_whose_certificate_has_expired() -> None:
    state = advertised_state(verifier=Certificates(N, valid_until=NOW - 1))
    aborts(state, message_of(Advertisements), AbortReason.BAD_CERTIFICATE, "it has expired")


def test_a_neighbour_from_another_federation() -> None:
    state = advertised_state(verifier=Certificates(4))
    aborts(state, message_of(Advertisements), AbortReason.BAD_CERTIFICATE, "not issued by this federation")


class Renaming(Certificates):
    """Says of a valid certificate that it carries another name, or another fingerprint, than the roster."""

    name = ""
    fingerprint = b""

    def verify_participant(self, certificate_der: bytes, now: float) -> Verified:
        verified = Certificates(N).verify_participant(certificate_der, now)
        return replace(verified, name=self.name or verified.name, fingerprint=self.fingerprint or verified.fingerprint)


class OtherName(Renaming):
    name = "mallory"


class OtherFingerprint(Renaming):
    fingerprint = fingerprint_of(77)


@pytest.mark.parametrize("verifier", [OtherName(N), OtherFingerprint(N)])
def test_a_valid_certificate_that_is_not_the_rosters(verifier: Certificates) -> None:
    state = advertised_state(verifier=verifier)
    aborts(state, message_of(Advertisements), AbortReason.BAD_CERTIFICATE, "not the one of site-001")


def test_keys_that_the_neighbour_did_not_sign() -> None:
    """The relay substitutes keys of its own."""
    theirs = dict(message_of(Advertisements).advertised)[PEER]
    for forged in (
        replace(theirs, encryption_key=fresh_key(1)),
        replace(theirs, mask_key=fresh_key(1)),
        replace(theirs, signature=signer(PEER).sign(b"another session")),
    ):
        aborts(
            state_of(AdvertisedKeys),
            with_advertisement(PEER, forged),
            AbortReason.BAD_PEER_SIGNATURE,
            "the keys of site-001 are not signed by it",
        )


@pytest.mark.parametrize("which", ["own", "other", "itself"])
def test_a_key_that_appears_twice(which: str) -> None:
    theirs = dict(message_of(Advertisements).advertised)
    copied = {
        "own": state_of(AdvertisedKeys).sent.mask_key,
        "other": theirs[2].encryption_key,
        "itself": theirs[PEER].encryption_key,
    }[which]
    repeated = advertised_by(PEER, theirs[PEER].encryption_key, copied)
    aborts(state_of(AdvertisedKeys), with_advertisement(PEER, repeated), AbortReason.REPEATED_KEY, "keys are equal")


@pytest.mark.parametrize("pair", [(SMALL_ORDER, fresh_key(1)), (fresh_key(1), SMALL_ORDER)])
def test_a_key_of_small_order(pair: tuple[PublicKey, PublicKey]) -> None:
    message = with_advertisement(PEER, advertised_by(PEER, *pair))
    aborts(state_of(AdvertisedKeys), message, AbortReason.DEGENERATE_KEY, "small order")
