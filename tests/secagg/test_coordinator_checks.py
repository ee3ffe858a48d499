"""One lie for each check in `maskwork.secagg.server`: the coordinator drops the liar, for the very reason it should.

Each test starts from a state of a clean run in which only some have answered yet. What a liar signs it signs with its
own key, so that only the check under test can catch it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tests.secagg.cohort import make_plan, signer
from tests.secagg.harness import Federation, clean_run

from maskwork.secagg import keys, server
from maskwork.secagg.client_states import SignedSets, UploadUpdate
from maskwork.secagg.dealing import leaves
from maskwork.secagg.errors import AbortReason, DeclineCode, DropReason
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
    Unmask,
    Withdraw,
)
from maskwork.secagg.server_states import (
    Aborted,
    Collecting,
    CollectingKeys,
    CollectingShares,
    CollectingSignatures,
    CollectingUnmask,
    CollectingUpdates,
    DeadlinePassed,
    DropPeer,
    Event,
    Lost,
    Received,
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


@pytest.mark.parametrize("kind", [CollectingKeys, CollectingShares, CollectingUpdates])
def test_who_was_dropped_before_a_deadline_is_out_after_it(kind: type[Collecting]) -> None:
    early, late = 0, 1
    state: State = clean_run(7).opening(kind)
    state = server.step(state, Lost(early, DropReason.MALFORMED, "said something odd")).state
    assert isinstance(state, Collecting)
    for sender in sorted(server.outstanding(state) - {late}):
        state = answered(state, sender)
    assert isinstance(state, Collecting)
    step = server.step(state, DeadlinePassed(state.stage))
    assert isinstance(step.state, Collecting)
    assert {early, late} <= step.state.lost


def answered(state: State, sender: int) -> State:
    """The state after the sender's answer of a clean run."""
    member = clean_run(7).members[sender]
    match state:
        case CollectingKeys():
            return server.step(state, Received(sender, member.answer(AdvertiseKeys))).state
        case CollectingShares():
            return server.step(state, Received(sender, member.answer(ShareKeys))).state
        case _:
            return server.step(state, UploadCompleted(sender)).state
