"""One lie for each check of the participant from step 2 on: shares, survivor sets, signatures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.secagg.cohort import (
    NOW,
    make_plan,
    make_site,
    name_of,
    signer,
)
from tests.secagg.harness import Federation, clean_run
from tests.secagg.test_participant_checks import OWN, PEER, N, aborts, message_of, state_of

from maskwork.secagg import client, keys
from maskwork.secagg.client_states import (
    Aborted,
    EndSession,
    Send,
    SharedKeys,
    SignedSets,
    SiteRules,
    Unmasked,
    Uploading,
)
from maskwork.secagg.errors import AbortReason, CoordinatorError
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Complaint,
    ConsistencyCheck,
    DeliveredShare,
    DeliveredShares,
    ShareKeys,
    SurvivorSets,
    SurvivorSignatures,
    Withdraw,
)

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
    """The other steps, and trusted survivors: test_participant_site_rules.py."""
    said = "3 survivors verified here are fewer than the policy's 4"
    step = client.step(uploading(min_survivors=4), SurvivorSets(ALL, ALL, frozenset({0, 1, 2})), now=NOW)
    assert step.effects == (Send(Withdraw(AbortReason.POLICY, said)), EndSession())


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
