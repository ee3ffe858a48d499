"""One lie for each check in `maskwork.secagg.server`: the coordinator drops the liar, for the very reason it should.

Each test starts from a state of a clean run in which only some have answered yet. What a liar signs it signs with its
own key, so that only the check under test can catch it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tests.secagg.harness import Federation, clean_run, make_plan, signer

from maskwork.secagg import keys, server
from maskwork.secagg.client_states import SharedKeys, SignedSets, UploadUpdate
from maskwork.secagg.dealing import leaves
from maskwork.secagg.errors import AbortReason, DeclineCode, DropReason, IllegalEvent
from maskwork.secagg.keys import PublicKey, ShareKind
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Complaint,
    ConsistencyCheck,
    DealtShare,
    Decline,
    ParticipantMessage,
    RevealedShare,
    ShareKeys,
    SurvivorSets,
    Unmask,
    Withdraw,
)
from maskwork.secagg.server_states import (
    Aborted,
    AddUpdate,
    Cancelled,
    Collecting,
    CollectingKeys,
    CollectingShares,
    CollectingSignatures,
    CollectingUnmask,
    CollectingUpdates,
    Completed,
    DeadlinePassed,
    DealerConvicted,
    Disconnected,
    DropPeer,
    Event,
    Lost,
    MasksRemoved,
    Received,
    Reconnected,
    RecordEvidence,
    RemovingMasks,
    SendTo,
    Session,
    Stage,
    State,
    Step,
    UploadCompleted,
)

T = TypeVar("T")

N, LIAR = 5, 4
"""The liar is the last to answer in every stage of the clean run."""
COLLECTING: tuple[type[Collecting], ...] = (
    CollectingKeys,
    CollectingShares,
    CollectingUpdates,
    CollectingSignatures,
    CollectingUnmask,
)
SMALL_ORDER = PublicKey(bytes(32))
DIES_BEFORE_ANSWER: dict[type, type] = {
    CollectingKeys: AdvertiseKeys,
    CollectingShares: ShareKeys,
    CollectingUpdates: UploadUpdate,
    CollectingSignatures: ConsistencyCheck,
    CollectingUnmask: Unmask,
}
DIES_BEFORE: dict[type, type] = {
    CollectingShares: AdvertiseKeys,
    CollectingUpdates: ShareKeys,
    CollectingSignatures: UploadUpdate,
    CollectingUnmask: ConsistencyCheck,
}
"""Death before this message leaves a member out of what the stage expects."""


def opening(kind: type[T]) -> T:
    return clean_run(N).opening(kind)


def closing(kind: type[T]) -> T:
    """Everyone but the liar has answered."""
    return clean_run(N).seen(kind)


def answer(kind: type[T], sender: int = LIAR) -> T:
    return clean_run(N).members[sender].answer(kind)


def drops(state: State, message: ParticipantMessage, reason: DropReason, because: str, *, sender: int = LIAR) -> Step:
    """The message costs its sender its place, with this reason."""
    assert isinstance(state, Collecting)
    step = server.step(state, Received(sender, message))
    drop = step.effects[0]
    assert isinstance(drop, DropPeer)
    assert (drop.member, drop.stage, drop.reason) == (sender, state.stage, reason), drop
    assert because in drop.detail
    assert isinstance(step.state, Aborted) or sender in step.state.lost  # type: ignore[union-attr]
    return step


def ignores(state: State, event: Event) -> None:
    assert server.step(state, event) == Step(state)


# --- step 0 ---------------------------------------------------------------------------------------------------------


def fresh_key(seed: int) -> PublicKey:
    return PublicKey(X25519PrivateKey.from_private_bytes(bytes([seed]) * 32).public_key().public_bytes_raw())


def advertisement(encryption_key: PublicKey, mask_key: PublicKey, *, sender: int = LIAR) -> AdvertiseKeys:
    body = AdvertiseKeys.signed_bytes(encryption_key, mask_key, session=clean_run(N).id, sender=sender)
    return AdvertiseKeys(encryption_key, mask_key, signer(sender).sign(body))


@pytest.mark.parametrize("signed_as", [0, None])
def test_keys_signed_by_someone_else_or_for_something_else(signed_as: int | None) -> None:
    message = answer(AdvertiseKeys)
    forged = replace(message, signature=signer(LIAR).sign(b"another session"))
    if signed_as is not None:
        forged = advertisement(message.encryption_key, message.mask_key, sender=signed_as)
    drops(opening(CollectingKeys), forged, DropReason.BAD_SIGNATURE, "not signed with the sender's certificate")


def test_one_key_for_both_purposes() -> None:
    both = advertisement(fresh_key(1), fresh_key(1))
    drops(opening(CollectingKeys), both, DropReason.REPEATED_KEY, "not fresh")


@pytest.mark.parametrize("copied", ["encryption_key", "mask_key"])
def test_the_key_of_another_member(copied: str) -> None:
    theirs = getattr(answer(AdvertiseKeys, 0), copied)
    for message in (advertisement(theirs, fresh_key(1)), advertisement(fresh_key(1), theirs)):
        drops(closing(CollectingKeys), message, DropReason.REPEATED_KEY, "not fresh")


@pytest.mark.parametrize("pair", [(SMALL_ORDER, fresh_key(1)), (fresh_key(1), SMALL_ORDER)])
def test_a_key_of_small_order(pair: tuple[PublicKey, PublicKey]) -> None:
    drops(opening(CollectingKeys), advertisement(*pair), DropReason.DEGENERATE_KEY, "small order")


def test_a_declined_plan() -> None:
    declined = Decline(DeclineCode.COLLUDERS, "wants c >= 2")
    drops(opening(CollectingKeys), declined, DropReason.DECLINED, "colluders: wants c >= 2")


# --- step 1 ---------------------------------------------------------------------------------------------------------


def dealing(*shares: DealtShare, root: bytes | None = None) -> ShareKeys:
    """A dealing that the liar signed, with the right root unless another is given."""
    session = clean_run(N).id
    made, _ = keys.merkle_tree(leaves(shares, owner=LIAR, session=session))
    commitment = answer(ShareKeys).seed_commitment
    body = ShareKeys.signed_bytes(commitment, root or made, len(shares), session=session, sender=LIAR)
    return ShareKeys(commitment, root or made, shares, signer(LIAR).sign(body))


def test_a_holder_left_out() -> None:
    message = dealing(*answer(ShareKeys).shares[1:])
    drops(opening(CollectingShares), message, DropReason.WRONG_RECIPIENTS, "not those of the graph")


def test_a_holder_that_is_not_in_u1() -> None:
    run = Federation(make_plan(N), dies_before={0: AdvertiseKeys}).run()
    state = run.opening(CollectingShares)
    drops(state, answer(ShareKeys), DropReason.WRONG_RECIPIENTS, "not those of the graph")


@pytest.mark.parametrize("wrong", ["missing", "to itself"])
def test_a_ciphertext_too_few_or_too_many(wrong: str) -> None:
    shares = list(answer(ShareKeys).shares)
    if wrong == "missing":
        shares[0] = replace(shares[0], ciphertext=b"")
    else:
        shares[LIAR] = replace(shares[LIAR], ciphertext=shares[0].ciphertext)
    drops(opening(CollectingShares), dealing(*shares), DropReason.WRONG_RECIPIENTS, "a ciphertext is missing")


def test_a_root_that_is_not_the_dealings() -> None:
    message = dealing(*answer(ShareKeys).shares, root=b"\1" * 32)
    drops(opening(CollectingShares), message, DropReason.WRONG_COMMITMENTS, "not that of the dealing")


def test_a_dealing_that_its_sender_did_not_sign() -> None:
    message = replace(answer(ShareKeys), seed_commitment=bytes(32))
    drops(opening(CollectingShares), message, DropReason.BAD_SIGNATURE, "the dealing is not signed")


# --- step 3 ---------------------------------------------------------------------------------------------------------


def test_a_signature_over_other_sets() -> None:
    state = opening(CollectingSignatures)
    sets = replace(state.sets, u3=state.sets.u3 - {0})
    body = ConsistencyCheck.signed_bytes(sets, N, session=clean_run(N).id, sender=LIAR)
    message = ConsistencyCheck(signer(LIAR).sign(body))
    drops(state, message, DropReason.BAD_SIGNATURE, "not over the survivor sets that were sent")


# --- step 4 ---------------------------------------------------------------------------------------------------------


def test_a_share_withheld() -> None:
    message = Unmask(answer(Unmask).shares[1:])
    drops(opening(CollectingUnmask), message, DropReason.WRONG_SHARES, "not one for each owner")


def with_share(owner: int, **changes: object) -> Unmask:
    shares = answer(Unmask).shares
    return Unmask(tuple(replace(s, **changes) if s.owner == owner else s for s in shares))  # type: ignore[arg-type]


def test_a_share_of_the_other_secret() -> None:
    """The share is a true one, and its commitment would match: but nobody asked for it."""
    run = clean_run(N)
    held = run.members[LIAR].before(SignedSets).held[0]
    message = with_share(0, **_fields(held.reveal(0, ShareKind.MASK_SECRET)))
    drops(opening(CollectingUnmask), message, DropReason.WRONG_SHARES, "MASK_SECRET where SELF_SEED was asked for")


def _fields(share: RevealedShare) -> dict[str, object]:
    return {"kind": share.kind, "salt": share.salt, "share": share.share}


@pytest.mark.parametrize("change", [{"share": bytes(33)}, {"salt": bytes(16)}])
def test_a_share_that_its_dealer_did_not_commit_to(change: dict[str, object]) -> None:
    drops(
        opening(CollectingUnmask),
        with_share(0, **change),
        DropReason.SHARE_MISMATCH,
        "the share of 0 is not the one its dealer committed to",
    )


# --- any step -------------------------------------------------------------------------------------------------------

ANSWERS: tuple[ParticipantMessage, ...] = (
    answer(AdvertiseKeys),
    answer(ShareKeys),
    answer(ConsistencyCheck),
    answer(Unmask),
)


@pytest.mark.parametrize("stage", range(5))
def test_an_answer_ahead_of_its_stage(stage: int) -> None:
    ahead = {0: ANSWERS[1:], 1: ANSWERS[2:], 2: ANSWERS[2:], 3: ANSWERS[3:], 4: ()}[stage]
    for message in ahead:
        drops(opening(COLLECTING[stage]), message, DropReason.WRONG_STAGE, "is open")


@pytest.mark.parametrize("stage", range(1, 5))
def test_a_late_answer_that_is_not_the_one_given_in_time(stage: int) -> None:
    earlier = {1: ANSWERS[:1], 2: ANSWERS[:2], 3: ANSWERS[:2], 4: ANSWERS[:3]}[stage]
    for message in earlier:
        ignores(opening(COLLECTING[stage]), Received(LIAR, message))
        drops(
            opening(COLLECTING[stage]),
            replace(message, signature=bytes(64)),  # type: ignore[arg-type]  # each of them is signed
            DropReason.WRONG_STAGE,
            "is open",
        )


def test_a_decline_after_keys_were_advertised() -> None:
    for kind in COLLECTING[1:]:
        drops(opening(kind), Decline(DeclineCode.BUSY, ""), DropReason.WRONG_STAGE, "Decline while")


@pytest.mark.parametrize("kind", COLLECTING)
def test_whoever_withdraws_is_a_dropout(kind: type[State]) -> None:
    drops(opening(kind), Withdraw(AbortReason.TRAINING_FAILED), DropReason.WITHDREW, "training-failed")


def resigned(message: AdvertiseKeys) -> AdvertiseKeys:
    """Another valid signature over the same keys: (r, n - s) verifies as (r, s) does."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    s = order - int.from_bytes(message.signature[32:], "big")
    return replace(message, signature=message.signature[:32] + s.to_bytes(32, "big"))


@pytest.mark.parametrize(
    ("kind", "same", "other"),
    [
        (CollectingKeys, answer(AdvertiseKeys, 0), resigned(answer(AdvertiseKeys, 0))),
        (CollectingKeys, answer(AdvertiseKeys, 0), advertisement(fresh_key(1), fresh_key(2), sender=0)),
        (CollectingShares, answer(ShareKeys, 0), replace(answer(ShareKeys, 0), root=bytes(32))),
        (CollectingSignatures, answer(ConsistencyCheck, 0), resigned(answer(ConsistencyCheck, 0))),  # type: ignore[arg-type]
        (CollectingUnmask, answer(Unmask, 0), Unmask(())),
    ],
)
def test_an_answer_counts_once(kind: type[State], same: ParticipantMessage, other: ParticipantMessage) -> None:
    state = closing(kind)
    ignores(state, Received(0, same))
    drops(state, other, DropReason.CONFLICTING_REPEAT, "a second, different answer", sender=0)


@pytest.mark.parametrize("kind", COLLECTING)
def test_what_a_dropped_member_says_no_longer_matters(kind: type[Collecting]) -> None:
    state = replace(opening(kind), lost=frozenset({LIAR}))
    for message in (*ANSWERS, Withdraw(AbortReason.CANCELLED), Complaint(0, bytes(32))):
        ignores(state, Received(LIAR, message))
    ignores(state, Lost(LIAR, DropReason.REVOKED, ""))


def test_what_a_member_says_that_was_not_asked_does_not_matter() -> None:
    late: dict[type[Collecting], ParticipantMessage] = {
        CollectingShares: ANSWERS[0],
        CollectingUpdates: Complaint(0, bytes(32)),
        CollectingSignatures: ANSWERS[2],
        CollectingUnmask: ANSWERS[3],
    }
    for kind, message in late.items():
        run = Federation(make_plan(N), dies_before={LIAR: DIES_BEFORE[kind]}).run()
        ignores(run.opening(kind), Received(LIAR, message))


# --- complaints -----------------------------------------------------------------------------------------------------


def true_key(dealer: int, holder: int) -> bytes:
    run = clean_run(N)
    state = run.members[holder].before(SharedKeys)
    return keys.share_key(
        state.secrets.encryption_secret,
        own=state.secrets.encryption_secret.public(),
        peer=state.peers[dealer].encryption_key,
        dealer=dealer,
        holder=holder,
        own_index=holder,
        session=run.id,
    )


@pytest.mark.parametrize("kind", [k for k in COLLECTING if k is not CollectingUpdates])
def test_a_complaint_out_of_its_stage(kind: type[State]) -> None:
    drops(opening(kind), Complaint(0, true_key(0, LIAR)), DropReason.WRONG_STAGE, "a complaint while")


def test_a_complaint_after_the_upload() -> None:
    state = closing(CollectingUpdates)
    drops(state, Complaint(1, true_key(1, 0)), DropReason.WRONG_STAGE, "a complaint while", sender=0)


def test_a_complaint_about_nobody_or_oneself() -> None:
    for dealer in (17, LIAR):
        complaint = Complaint(dealer, bytes(32))
        because = f"{dealer} dealt nothing to {LIAR}"
        drops(opening(CollectingUpdates), complaint, DropReason.FALSE_ACCUSATION, because)


def test_a_complaint_about_a_member_that_dropped_out_before_it_dealt() -> None:
    run = Federation(make_plan(N), dies_before={0: ShareKeys}).run()
    state = run.opening(CollectingUpdates)
    drops(state, Complaint(0, bytes(32)), DropReason.FALSE_ACCUSATION, "0 dealt nothing to 4")


def judged(state: CollectingUpdates, key: bytes) -> tuple[Aborted, RecordEvidence]:
    step = server.step(state, Received(LIAR, Complaint(0, key)))
    assert isinstance(step.state, Aborted)
    evidence = step.effects[0]
    assert isinstance(evidence, RecordEvidence)
    assert all(isinstance(e, SendTo) for e in step.effects[1:])
    assert len(step.effects) == N + 1
    return step.state, evidence


def test_a_false_accusation_is_rejected() -> None:
    verdict, evidence = judged(opening(CollectingUpdates), true_key(0, LIAR))
    assert (verdict.reason, verdict.blamed) == (AbortReason.COMPLAINT_REJECTED, frozenset({LIAR}))
    assert evidence == RecordEvidence(LIAR, DropReason.FALSE_ACCUSATION, None)


def test_a_key_that_opens_nothing_is_a_dispute() -> None:
    verdict, evidence = judged(opening(CollectingUpdates), bytes(32))
    assert (verdict.reason, verdict.blamed) == (AbortReason.COMPLAINT_DISPUTED, frozenset({0, LIAR}))
    assert evidence == RecordEvidence(0, DropReason.DISPUTED_CIPHERTEXT, LIAR)


@pytest.mark.parametrize("field", ["self_commitment", "mask_commitment"])
def test_a_true_accusation_is_upheld(field: str) -> None:
    state = opening(CollectingUpdates)
    honest = state.dealings[0]
    shares = tuple(
        replace(s, **{field: bytes(32)}) if s.holder == LIAR else s  # type: ignore[arg-type]
        for s in honest.message.shares
    )
    bad = replace(honest, message=replace(honest.message, shares=shares))
    verdict, evidence = judged(replace(state, dealings={**state.dealings, 0: bad}), true_key(0, LIAR))
    assert (verdict.reason, verdict.blamed) == (AbortReason.COMPLAINT_UPHELD, frozenset({0}))
    assert evidence == RecordEvidence(0, DropReason.DISHONEST_DEALER, LIAR)


# --- uploads, streams and time --------------------------------------------------------------------------------------


def test_an_upload_is_added_once_and_only_while_its_stage_is_open() -> None:
    state = opening(CollectingUpdates)
    step = server.step(state, UploadCompleted(LIAR))
    assert step.effects == (AddUpdate(LIAR),)
    assert isinstance(step.state, CollectingUpdates)
    ignores(step.state, UploadCompleted(LIAR))
    ignores(replace(state, lost=frozenset({LIAR})), UploadCompleted(LIAR))
    for kind in COLLECTING:
        if kind is not CollectingUpdates:
            ignores(opening(kind), UploadCompleted(LIAR))


@pytest.mark.parametrize("event", [MasksRemoved(), DealerConvicted(0, "")])
@pytest.mark.parametrize("kind", COLLECTING)
def test_masks_are_not_removed_before_their_time(kind: type[State], event: Event) -> None:
    with pytest.raises(IllegalEvent, match=f"in state {kind.__name__}"):
        server.step(opening(kind), event)


def test_the_deadline_of_a_stage_that_is_over_changes_nothing() -> None:
    for kind in COLLECTING:
        for stage in Stage:
            if stage is not opening(kind).stage:
                ignores(opening(kind), DeadlinePassed(stage))


@pytest.mark.parametrize("kind", COLLECTING)
def test_whoever_has_not_answered_at_the_deadline_is_out(kind: type[Collecting]) -> None:
    state = closing(kind)
    step = server.step(state, DeadlinePassed(state.stage))
    assert step.effects[0] == DropPeer(LIAR, state.stage, DropReason.DEADLINE, "no answer before the deadline")
    assert not isinstance(step.state, kind | Aborted)


@pytest.mark.parametrize("kind", COLLECTING)
def test_too_few_answers_end_the_session(kind: type[Collecting]) -> None:
    state = opening(kind)
    for sender in (0, 1):
        state = answered(state, sender)
    step = server.step(state, DeadlinePassed(state.stage))
    assert isinstance(step.state, Aborted)
    assert step.state.reason is AbortReason.TOO_FEW_PARTICIPANTS
    assert step.state.detail == f"2 answered while {state.stage.value} was open"
    told = [e.recipient for e in step.effects if isinstance(e, SendTo)]
    assert told == list(range(N))


def answered(state: Collecting, sender: int) -> Collecting:
    messages: dict[type, ParticipantMessage] = {
        CollectingKeys: answer(AdvertiseKeys, sender),
        CollectingShares: answer(ShareKeys, sender),
        CollectingSignatures: answer(ConsistencyCheck, sender),
        CollectingUnmask: answer(Unmask, sender),
    }
    event: Event = UploadCompleted(sender)
    if not isinstance(state, CollectingUpdates):
        event = Received(sender, messages[type(state)])
    following = server.step(state, event).state
    assert isinstance(following, type(state))
    return following


@pytest.mark.parametrize("kind", COLLECTING)
def test_exactly_the_threshold_suffices_and_one_less_does_not(kind: type[Collecting]) -> None:
    state = opening(kind)  # t = 4 of 5
    for sender in (0, 1, 2):
        state = answered(state, sender)
    assert isinstance(server.step(state, DeadlinePassed(state.stage)).state, Aborted)
    state = answered(state, 3)
    assert not isinstance(server.step(state, DeadlinePassed(state.stage)).state, kind | Aborted)


@pytest.mark.parametrize("kind", [CollectingKeys, CollectingShares, CollectingUpdates])
def test_the_plans_least_number_of_survivors_counts_before_the_sets_are_put(kind: type[Collecting]) -> None:
    run = Federation(make_plan(N, min_survivors=5), dies_before={LIAR: DIES_BEFORE_ANSWER[kind]}).run()
    assert run.aborted.reason is AbortReason.TOO_FEW_PARTICIPANTS
    assert isinstance(run.history[-1][0], kind)


@pytest.mark.parametrize("kind", [CollectingSignatures, CollectingUnmask])
def test_afterwards_only_the_threshold_counts(kind: type[Collecting]) -> None:
    run = Federation(make_plan(N, min_survivors=5), dies_before={LIAR: DIES_BEFORE_ANSWER[kind]}).run()
    assert len(run.survivors) == N
    run.assert_exact()


@pytest.mark.parametrize("kind", [CollectingKeys, CollectingShares, CollectingUpdates])
def test_a_member_that_is_away_is_waited_for_while_its_update_is_at_stake(kind: type[Collecting]) -> None:
    step = server.step(closing(kind), Disconnected(LIAR))
    assert step == Step(replace(closing(kind), away=frozenset({LIAR})))
    for event in (Lost(LIAR, DropReason.DISCONNECTED, ""), DeadlinePassed(closing(kind).stage)):
        assert not isinstance(server.step(step.state, event).state, kind | Aborted)


@pytest.mark.parametrize("kind", [CollectingSignatures, CollectingUnmask])
def test_a_member_that_is_away_is_not_waited_for_where_the_others_suffice(kind: type[Collecting]) -> None:
    assert not isinstance(server.step(closing(kind), Disconnected(LIAR)).state, kind | Aborted)


@pytest.mark.parametrize("kind", [CollectingSignatures, CollectingUnmask])
def test_members_that_are_away_are_waited_for_where_the_others_do_not_suffice(kind: type[Collecting]) -> None:
    state = opening(kind)
    for sender in (0, 1):
        state = answered(state, sender)
    for sender in (2, 3, 4):
        following = server.step(state, Disconnected(sender)).state
        assert isinstance(following, kind)
        state = following
    assert server.outstanding(state) == {2, 3, 4}
    for sender in (2, 3):
        back = server.step(state, Reconnected(sender)).state
        assert isinstance(back, kind)
        state = back
    state = answered(state, 2)
    assert not isinstance(server.step(state, Received(3, answer_to(kind, 3))).state, kind | Aborted)


def answer_to(kind: type[Collecting], sender: int) -> ParticipantMessage:
    return answer(ConsistencyCheck, sender) if kind is CollectingSignatures else answer(Unmask, sender)


def test_a_stage_waits_for_everyone_present() -> None:
    for kind in COLLECTING:
        state = opening(kind)
        for sender in range(N - 1):
            state = answered(state, sender)
        assert server.outstanding(state) == {LIAR}


@pytest.mark.parametrize("kind", COLLECTING)
def test_a_reconnected_member_is_asked_again_to_the_letter(kind: type[Collecting]) -> None:
    state = replace(opening(kind), away=frozenset({LIAR, 3}))
    asked = next(e for before, _, s in clean_run(N).history for e in s.effects if is_request(e, before, kind))
    if kind is CollectingKeys:
        asked = SendTo(LIAR, clean_run(N).proposal)
    step = server.step(state, Reconnected(LIAR))
    assert step.effects == (asked,)
    assert step.state == replace(state, away=frozenset({3}))


def is_request(effect: object, before: State, kind: type[Collecting]) -> bool:
    """Whether this is what opened the stage for the liar."""
    follows = {
        CollectingKeys: CollectingKeys,
        CollectingShares: CollectingKeys,
        CollectingUpdates: CollectingShares,
        CollectingSignatures: CollectingUpdates,
        CollectingUnmask: CollectingSignatures,
    }
    return isinstance(effect, SendTo) and effect.recipient == LIAR and isinstance(before, follows[kind])


def test_a_lost_member_that_reconnects_is_asked_nothing() -> None:
    for kind in COLLECTING:
        state = replace(opening(kind), lost=frozenset({LIAR}), away=frozenset({LIAR}))
        assert server.step(state, Reconnected(LIAR)) == Step(replace(state, away=frozenset()))
    run = Federation(make_plan(N), dies_before={LIAR: AdvertiseKeys}).run()
    left_out = replace(run.opening(CollectingShares), lost=frozenset(), away=frozenset({LIAR}))
    assert server.step(left_out, Reconnected(LIAR)) == Step(replace(left_out, away=frozenset()))


# --- the end --------------------------------------------------------------------------------------------------------


def test_once_enough_shares_are_in_nobody_is_needed_any_more() -> None:
    state = opening(RemovingMasks)
    for event in (
        Received(0, answer(Unmask, 0)),
        Disconnected(0),
        Reconnected(0),
        Lost(0, DropReason.REVOKED, ""),
        DeadlinePassed(Stage.UNMASK),
    ):
        ignores(state, event)
    with pytest.raises(IllegalEvent):
        server.step(state, UploadCompleted(0))


@pytest.mark.parametrize("kind", [*COLLECTING, RemovingMasks])
def test_a_session_can_be_cancelled_until_it_is_over(kind: type[State]) -> None:
    step = server.step(opening(kind), Cancelled(AbortReason.CANCELLED, "the job was aborted"))
    assert step.state == Aborted(clean_session(), AbortReason.CANCELLED, "the job was aborted")
    assert [e.recipient for e in step.effects if isinstance(e, SendTo)] == list(range(N))


def clean_session() -> Session:
    return opening(CollectingKeys).session


def test_nothing_moves_a_session_that_is_over() -> None:
    for over in (opening(Completed), Aborted(clean_session(), AbortReason.CANCELLED, "")):
        assert server.outstanding(over) == frozenset()
        for event in (Cancelled(AbortReason.CANCELLED, ""), MasksRemoved(), Received(0, ANSWERS[0]), Reconnected(0)):
            ignores(over, event)


def test_sets_are_put_once() -> None:
    """What step 3 asks is one set for everyone, and a reconnection does not change it."""
    asked = [e.message for e in clean_run(N).effects if isinstance(e, SendTo) and isinstance(e.message, SurvivorSets)]
    assert len(asked) == N
    assert len(set(asked)) == 1
