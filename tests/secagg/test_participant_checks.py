"""One lie for each check in `maskwork.secagg.client`: the participant catches it, for the very reason it should.

Each test starts from a state of a clean run and changes one thing in the message that comes next. Where a lying peer
helps the coordinator, what the peer signs is signed anew, so that only the check under test can catch it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tests.secagg.harness import (
    NOW,
    Certificates,
    Federation,
    Verified,
    certificate_of,
    clean_run,
    fingerprint_of,
    make_plan,
    make_proposal,
    make_site,
    name_of,
    session_seed,
    signer,
)

from maskwork.secagg import client, keys
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
from maskwork.secagg.errors import AbortReason, CoordinatorError, DeclineCode, IllegalEvent, PlanRefused
from maskwork.secagg.keys import PublicKey
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Advertisements,
    Complaint,
    ConsistencyCheck,
    DeliveredShare,
    DeliveredShares,
    Proposal,
    SessionClosed,
    ShareKeys,
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


# --- step 2 ---------------------------------------------------------------------------------------------------------


def with_share(dealer: int, **changes: object) -> DeliveredShares:
    """The delivered shares, one of them changed."""
    message = message_of(DeliveredShares)
    shares = tuple(replace(s, **changes) if s.dealer == dealer else s for s in message.shares)  # type: ignore[arg-type]
    return replace(message, shares=shares)


def test_u2_without_this_participant() -> None:
    message = message_of(DeliveredShares)
    aborts(state_of(SharedKeys), replace(message, u2=message.u2 - {OWN}), AbortReason.BAD_SETS, "U2 is not within U1")


def test_u2_with_a_member_that_is_not_in_u1() -> None:
    run = Federation(make_plan(N), dies_before={4: AdvertiseKeys}).run()
    member = run.members[OWN]
    message = member.message(DeliveredShares)
    aborts(
        member.before(SharedKeys), replace(message, u2=message.u2 | {4}), AbortReason.BAD_SETS, "U2 is not within U1"
    )


def test_a_share_of_a_neighbour_in_u2_withheld() -> None:
    message = message_of(DeliveredShares)
    aborts(
        state_of(SharedKeys),
        replace(message, shares=message.shares[:-1]),
        AbortReason.BAD_SETS,
        "not those of the neighbours in U2",
    )


def test_fewer_share_holders_than_the_threshold_at_step_2() -> None:
    message = message_of(DeliveredShares)
    few = replace(message, u2=frozenset({0, 1, 2}), shares=message.shares[:2])
    aborts(state_of(SharedKeys), few, AbortReason.TOO_FEW_PARTICIPANTS, "3 share holders are fewer than t = 4")


@pytest.mark.parametrize("field", ["seed_commitment", "root"])
def test_a_dealing_that_its_dealer_did_not_sign(field: str) -> None:
    message = with_share(PEER, **{field: bytes(32)})
    aborts(state_of(SharedKeys), message, AbortReason.BAD_PEER_SIGNATURE, "the dealing of site-001 is not signed by it")


def test_a_dealing_signed_with_another_number_of_holders() -> None:
    aborts(state_of(SharedKeys), with_share(PEER, holders=4), AbortReason.BAD_PEER_SIGNATURE, "not signed by it")


def test_the_signed_dealing_of_another_dealer() -> None:
    message = message_of(DeliveredShares)
    one, two = message.shares[0], message.shares[1]
    swapped = replace(two, dealer=one.dealer)
    aborts(
        state_of(SharedKeys),
        replace(message, shares=(swapped, *message.shares[1:])),
        AbortReason.BAD_PEER_SIGNATURE,
        "not signed by it",
    )


@pytest.mark.parametrize(
    "change",
    [
        {"self_commitment": bytes(32)},
        {"mask_commitment": bytes(32)},
        {"ciphertext": bytes(keys.CIPHERTEXT_BYTES)},
        {"proof": ()},
        {"proof": (bytes(32),) * 3},
    ],
)
def test_a_share_that_is_not_under_its_dealers_root(change: dict[str, object]) -> None:
    """A coordinator that swaps a ciphertext must not be given the key that opens the true one."""
    aborts(
        state_of(SharedKeys), with_share(PEER, **change), AbortReason.BAD_COMMITMENT_PROOF, "not under its signed root"
    )


def dealt_anew(dealer: int, shares: Sequence[DeliveredShare], **changes: object) -> DeliveredShare:
    """What a dishonest dealer signs: its dealing to us changed, root and signature right."""
    run = clean_run(N)
    message = run.members[dealer].answer(ShareKeys)
    dealt = tuple(
        replace(s, **changes) if s.holder == OWN else s  # type: ignore[arg-type]
        for s in message.shares
    )
    tree = [
        keys.dealing_leaf(
            owner=dealer,
            holder=s.holder,
            self_commitment=s.self_commitment,
            mask_commitment=s.mask_commitment,
            ciphertext=s.ciphertext,
            session=run.id,
        )
        for s in dealt
    ]
    root, proofs = keys.merkle_tree(tree)
    body = ShareKeys.signed_bytes(message.seed_commitment, root, len(dealt), session=run.id, sender=dealer)
    delivered = next(s for s in shares if s.dealer == dealer)
    return replace(
        delivered,
        root=root,
        proof=proofs[OWN],
        signature=signer(dealer).sign(body),
        self_commitment=dealt[OWN].self_commitment,
        mask_commitment=dealt[OWN].mask_commitment,
        ciphertext=dealt[OWN].ciphertext,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"self_commitment": bytes(32)},
        {"mask_commitment": bytes(32)},
        {"ciphertext": bytes(keys.CIPHERTEXT_BYTES)},
    ],
)
def test_a_bad_dealing_is_complained_of(change: dict[str, object]) -> None:
    """The evidence is the key of this one direction, and the session ends before anything is masked."""
    message = message_of(DeliveredShares)
    bad = dealt_anew(PEER, message.shares, **change)
    state = state_of(SharedKeys)
    step = client.step(state, replace(message, shares=(bad, *message.shares[1:])), now=NOW)
    key = keys.share_key(
        state.secrets.encryption_secret,
        own=state.secrets.encryption_secret.public(),
        peer=state.peers[PEER].encryption_key,
        dealer=PEER,
        holder=OWN,
        own_index=OWN,
        session=clean_run(N).id,
    )
    assert step.effects == (Send(Complaint(PEER, key)), EndSession())
    assert isinstance(step.state, Aborted)
    assert step.state.reason is AbortReason.COMPLAINED
    assert "site-001" in step.state.detail


# --- step 3 ---------------------------------------------------------------------------------------------------------

ALL = frozenset(range(N))


def uploading(**rules: object) -> Uploading:
    state = state_of(Uploading)
    site = make_site(OWN, N, rules=replace(SiteRules(), **rules))  # type: ignore[arg-type]
    return replace(state, session=replace(state.session, site=site))


def test_sets_that_are_not_those_delivered_before() -> None:
    for sets in (SurvivorSets(ALL - {4}, ALL - {4}, ALL - {4}), SurvivorSets(ALL, ALL - {4}, ALL - {4})):
        aborts(uploading(), sets, AbortReason.EQUIVOCATION, "not what was delivered before")
    aborts(uploading(), SurvivorSets(ALL | {5}, ALL, ALL), AbortReason.EQUIVOCATION, "not what was delivered before")


def test_u3_with_a_member_that_is_not_in_u2() -> None:
    aborts(uploading(), SurvivorSets(ALL, ALL, ALL | {5}), AbortReason.BAD_SETS, "U3 is not within U2")


def test_u3_without_this_participant() -> None:
    aborts(uploading(), SurvivorSets(ALL, ALL, ALL - {OWN}), AbortReason.BAD_SETS, "U3 leaves this participant out")


def test_fewer_survivors_than_the_plan_admits() -> None:
    sets = SurvivorSets(ALL, ALL, frozenset({0, 1}))
    aborts(uploading(), sets, AbortReason.TOO_FEW_PARTICIPANTS, "2 survivors are fewer than 3")


def test_fewer_survivors_than_the_policy_admits() -> None:
    sets = SurvivorSets(ALL, ALL, frozenset({0, 1, 2}))
    aborts(uploading(min_survivors=4), sets, AbortReason.TOO_FEW_PARTICIPANTS, "3 survivors verified here")


def names(*indices: int) -> frozenset[str]:
    return frozenset(name_of(i) for i in indices)


def test_another_survivor_set_on_the_same_model() -> None:
    sets = SurvivorSets(ALL, ALL, ALL)
    for released in ((names(0, 1, 2, 3),), (names(0, 1, 2, 3, 4), names(0, 1, 2, 3, 4, 9))):
        aborts(uploading(released=released), sets, AbortReason.SAME_MODEL, "this set differs in 1")


def test_survivor_sets_that_differ_by_less_than_the_policy_wants() -> None:
    rules = SiteRules(min_survivor_difference=3)
    with pytest.raises(CoordinatorError, match="differs in 2"):
        client.check_same_model(names(0, 1, 2, 3, 4), replace(rules, released=(names(0, 1, 2),)))
    client.check_same_model(names(0, 1, 2, 3, 4), replace(rules, released=(names(0, 1),)))


def test_the_same_survivor_set_on_the_same_model_is_signed_again() -> None:
    state = uploading(released=(names(0, 1, 2, 3, 4),))
    assert isinstance(client.step(state, SurvivorSets(ALL, ALL, ALL), now=NOW).state, SignedSets)


# --- step 4 ---------------------------------------------------------------------------------------------------------


def signed_for(sets: SurvivorSets, index: int) -> bytes:
    body = ConsistencyCheck.signed_bytes(sets, N, session=clean_run(N).id, sender=index)
    return signer(index).sign(body)


def test_a_signature_of_no_surviving_holder() -> None:
    sets = SurvivorSets(ALL, ALL, ALL - {4})
    state = client.step(uploading(), sets, now=NOW).state
    signatures = SurvivorSignatures(tuple((i, signed_for(sets, i)) for i in range(N)))
    aborts(state, signatures, AbortReason.BAD_SETS, "a signature of 4, which is no surviving holder")


def test_signatures_of_others_over_another_survivor_set() -> None:
    """The coordinator showed two U3; each participant answers for the one that it signed."""
    mine, theirs = SurvivorSets(ALL, ALL, ALL), SurvivorSets(ALL, ALL, ALL - {4})
    state = client.step(uploading(), mine, now=NOW).state
    signatures = tuple((i, signed_for(mine if i == OWN else theirs, i)) for i in range(4))
    aborts(
        state,
        SurvivorSignatures(signatures),
        AbortReason.BAD_PEER_SIGNATURE,
        "site-001 did not sign these survivors",
    )


def test_a_forged_signature_in_this_participants_name() -> None:
    message = message_of(SurvivorSignatures)
    forged = SurvivorSignatures(((OWN, bytes(64)), *message.signatures[1:]))
    aborts(state_of(SignedSets), forged, AbortReason.BAD_PEER_SIGNATURE, "site-000 did not sign these survivors")


def test_fewer_signatures_than_the_threshold() -> None:
    message = message_of(SurvivorSignatures)
    few = SurvivorSignatures(message.signatures[:3])
    aborts(state_of(SignedSets), few, AbortReason.TOO_FEW_SIGNATURES, "3 signatures are fewer than t = 4")


def test_as_many_signatures_as_the_threshold_suffice() -> None:
    message = message_of(SurvivorSignatures)
    step = client.step(state_of(SignedSets), SurvivorSignatures(message.signatures[1:]), now=NOW)
    assert isinstance(step.state, Unmasked)
