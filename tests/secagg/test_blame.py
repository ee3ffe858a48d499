"""Who is blamed when a session is attacked from inside, and what becomes of the session: complaints, shares withheld
or forged at the end, dealers that equivocate; and a coordinator that comes back from what it had on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tests.secagg.cohort import make_plan, session_seed, signer
from tests.secagg.harness import Federation, Uplink

from maskwork.secagg import client_states, keys, server, server_requests
from maskwork.secagg.dealing import Dealer, HeldShares, deal, leaves
from maskwork.secagg.errors import AbortReason, DealerEquivocated, DropReason
from maskwork.secagg.keys import SecretKey, SessionSecrets, ShareKind
from maskwork.secagg.messages import (
    Complaint,
    ConsistencyCheck,
    DealtShare,
    ParticipantMessage,
    ShareKeys,
    Unmask,
)
from maskwork.secagg.server_states import (
    Aborted,
    CollectingUnmask,
    CollectingUpdates,
    Completed,
    DeadlinePassed,
    PersistUnmask,
    Received,
    RecordEvidence,
    SendTo,
    Stage,
    StageOpened,
)
from maskwork.secagg.sharing import PRIME
from maskwork.secagg.unmasking import MaskSecretShares, SelfSeedShares, UnmaskingJob, remaining_masks

N, CHEAT, VICTIM = 5, 1, 3


def lies(kind: type, change: Callable[[Federation, ParticipantMessage], ParticipantMessage]) -> Federation:
    """A session in which CHEAT changes its message of this kind."""
    box: list[Federation] = []

    def uplink(sender: int, message: ParticipantMessage) -> Sequence[ParticipantMessage]:
        return (change(box[0], message),) if sender == CHEAT and isinstance(message, kind) else (message,)

    box.append(Federation(make_plan(N), uplink=uplink))
    return box[0].run()


def signed_dealing(run: Federation, message: ShareKeys, shares: tuple[DealtShare, ...], commitment: bytes) -> ShareKeys:
    root, _ = keys.merkle_tree(leaves(shares, owner=CHEAT, session=run.id))
    body = ShareKeys.signed_bytes(commitment, root, len(shares), session=run.id, sender=CHEAT)
    return replace(message, seed_commitment=commitment, root=root, shares=shares, signature=signer(CHEAT).sign(body))


def key_between(run: Federation, dealer: int, holder: int) -> bytes:
    """The AEAD key of one direction, as the dealer derives it."""
    secrets = [keys.derive_session_secrets(session_seed(i, run.seed)) for i in range(N)]
    return keys.share_key(
        secrets[dealer].encryption_secret,
        own=secrets[dealer].encryption_secret.public(),
        peer=secrets[holder].encryption_secret.public(),
        dealer=dealer,
        holder=holder,
        own_index=dealer,
        session=run.id,
    )


# --- complaints -----------------------------------------------------------------------------------------------------


def garbled_share(run: Federation, message: ParticipantMessage) -> ParticipantMessage:
    """VICTIM gets a share that is not the committed one, properly encrypted; everything is signed."""
    assert isinstance(message, ShareKeys)
    key = key_between(run, CHEAT, VICTIM)
    dealt = message.shares[VICTIM]
    plaintext = keys.open_sealed(key, dealt.ciphertext, dealer=CHEAT, holder=VICTIM, session=run.id)
    assert plaintext is not None
    garbled = bytes(33) + plaintext[33:]
    ciphertext = keys.seal(key, garbled, dealer=CHEAT, holder=VICTIM, session=run.id)
    shares = tuple(replace(s, ciphertext=ciphertext) if s.holder == VICTIM else s for s in message.shares)
    return signed_dealing(run, message, shares, message.seed_commitment)


def share_beyond_the_field(run: Federation, message: ParticipantMessage) -> ParticipantMessage:
    """VICTIM gets the field's order for a share, committed to as such."""
    assert isinstance(message, ShareKeys)
    held = HeldShares(bytes(16), PRIME.to_bytes(33, "big"), bytes(16), bytes(33))
    self_commitment, mask_commitment = (
        keys.share_commitment(share, bytes(16), owner=CHEAT, holder=VICTIM, kind=kind, session=run.id)
        for kind, share in ((ShareKind.SELF_SEED, held.self_share), (ShareKind.MASK_SECRET, held.mask_share))
    )
    key = key_between(run, CHEAT, VICTIM)
    ciphertext = keys.seal(key, held.encode(), dealer=CHEAT, holder=VICTIM, session=run.id)
    bad = DealtShare(VICTIM, ciphertext, self_commitment, mask_commitment)
    shares = tuple(bad if s.holder == VICTIM else s for s in message.shares)
    return signed_dealing(run, message, shares, message.seed_commitment)


@pytest.mark.parametrize("change", [garbled_share, share_beyond_the_field])
def test_a_dealer_of_bad_shares_is_convicted_by_a_complaint(
    change: Callable[[Federation, ParticipantMessage], ParticipantMessage],
) -> None:
    run = lies(ShareKeys, change)
    assert (run.aborted.reason, run.aborted.blamed) == (AbortReason.COMPLAINT_UPHELD, frozenset({CHEAT}))
    assert RecordEvidence(CHEAT, DropReason.DISHONEST_DEALER, VICTIM) in run.effects
    assert not any(isinstance(e, client_states.RecordRelease) for m in run.members for e in m.effects)
    assert isinstance(run.members[VICTIM].state, client_states.Aborted)


def test_a_ciphertext_of_rubbish_leaves_both_out() -> None:
    def rubbish(run: Federation, message: ParticipantMessage) -> ParticipantMessage:
        assert isinstance(message, ShareKeys)
        shares = tuple(
            replace(s, ciphertext=b"\x5a" * keys.CIPHERTEXT_BYTES) if s.holder == VICTIM else s for s in message.shares
        )
        return signed_dealing(run, message, shares, message.seed_commitment)

    run = lies(ShareKeys, rubbish)
    assert (run.aborted.reason, run.aborted.blamed) == (AbortReason.COMPLAINT_DISPUTED, frozenset({CHEAT, VICTIM}))
    assert RecordEvidence(CHEAT, DropReason.DISPUTED_CIPHERTEXT, VICTIM) in run.effects


def test_a_false_accuser_is_left_out_and_not_the_accused() -> None:
    accused: list[Complaint] = []

    def accuse(sender: int, message: ParticipantMessage) -> Sequence[ParticipantMessage]:
        if sender == CHEAT and isinstance(message, ShareKeys):
            return (message, *accused)
        return (message,)

    run = Federation(make_plan(N), uplink=accuse, dies_before={CHEAT: client_states.UploadUpdate})
    run.run(lambda f: isinstance(f.state, CollectingUpdates))
    run.tell(Received(CHEAT, Complaint(VICTIM, key_between(run, VICTIM, CHEAT))))
    run.run()
    assert (run.aborted.reason, run.aborted.blamed) == (AbortReason.COMPLAINT_REJECTED, frozenset({CHEAT}))
    assert RecordEvidence(CHEAT, DropReason.FALSE_ACCUSATION, None) in run.effects


def test_the_evidence_of_a_complaint_opens_that_one_direction_only() -> None:
    """What the complaint gives away decrypts what this dealer sent to this holder, and nothing else."""
    run = Federation(make_plan(N)).run()
    key = key_between(run, CHEAT, VICTIM)
    for dealer in range(N):
        for share in run.members[dealer].answer(ShareKeys).shares:
            opened = keys.open_sealed(key, share.ciphertext, dealer=dealer, holder=share.holder, session=run.id)
            assert (opened is not None) == ((dealer, share.holder) == (CHEAT, VICTIM))


# --- step 4 ---------------------------------------------------------------------------------------------------------


def forged(run: Federation, message: ParticipantMessage) -> ParticipantMessage:
    assert isinstance(message, Unmask)
    return Unmask((replace(message.shares[0], share=bytes(33)), *message.shares[1:]))


def withheld(run: Federation, message: ParticipantMessage) -> ParticipantMessage:
    assert isinstance(message, Unmask)
    return Unmask(message.shares[1:])


def beyond_the_field(run: Federation, message: ParticipantMessage) -> ParticipantMessage:
    assert isinstance(message, Unmask)
    return Unmask((replace(message.shares[0], share=b"\xff" * 33), *message.shares[1:]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (forged, DropReason.SHARE_MISMATCH),
        (beyond_the_field, DropReason.SHARE_MISMATCH),
        (withheld, DropReason.WRONG_SHARES),
    ],
)
def test_a_bad_share_at_unmasking_is_the_holders_fault_and_the_round_is_saved(
    change: Callable[[Federation, ParticipantMessage], ParticipantMessage], reason: DropReason
) -> None:
    run = lies(Unmask, change)
    assert run.drops == {CHEAT: reason}
    assert run.survivors == frozenset(range(N)), "its update is in the sum all the same"
    run.assert_exact()


# --- equivocating dealers -------------------------------------------------------------------------------------------


def other_secrets(run: Federation, **changes: object) -> SessionSecrets:
    made = keys.derive_session_secrets(session_seed(CHEAT, run.seed))
    return replace(made, **changes)  # type: ignore[arg-type]


def deals_another_secret(**changes: object) -> Callable[[Federation, ParticipantMessage], ParticipantMessage]:
    """Every share matches its commitment, and they are of one polynomial: of another secret than announced."""

    def change(run: Federation, message: ParticipantMessage) -> ParticipantMessage:
        assert isinstance(message, ShareKeys)
        state = run.members[CHEAT].before(client_states.SharedKeys)
        dealt, _ = deal(
            Dealer(
                CHEAT,
                run.id,
                run.plan.graph.threshold,
                state.secrets.encryption_secret.public(),
                state.secrets.mask_secret.public(),
            ),
            other_secrets(run, **changes),
            holders=tuple(range(N)),
            encryption_keys={i: peer.encryption_key for i, peer in state.peers.items()},
            stream_key=bytes(16),
            signer=signer(CHEAT),
        )
        return signed_dealing(run, dealt, dealt.shares, message.seed_commitment)

    return change


def inconsistent_polynomial(run: Federation, message: ParticipantMessage) -> ParticipantMessage:
    """One holder's share is off the polynomial, with a commitment that matches it."""
    assert isinstance(message, ShareKeys)
    held = HeldShares(bytes(16), bytes(32) + b"\7", bytes(16), bytes(32) + b"\7")
    commitments = [
        keys.share_commitment(held.self_share, bytes(16), owner=CHEAT, holder=0, kind=kind, session=run.id)
        for kind in ShareKind
    ]
    key = key_between(run, CHEAT, 0)
    bad = DealtShare(0, keys.seal(key, held.encode(), dealer=CHEAT, holder=0, session=run.id), *commitments)
    return signed_dealing(run, message, (bad, *message.shares[1:]), message.seed_commitment)


def mimic(change: Callable[[Federation, ParticipantMessage], ParticipantMessage], dies: bool) -> Federation:
    """CHEAT deals dishonestly; with `dies`, it is gone before its upload, so that its mask key is reconstructed."""
    box: list[Federation] = []

    def uplink(sender: int, message: ParticipantMessage) -> Sequence[ParticipantMessage]:
        if sender == CHEAT and isinstance(message, ShareKeys):
            return (change(box[0], message),)
        if sender == CHEAT and isinstance(message, Unmask):
            return ()  # its own shares do not match what it dealt, and it knows
        return (message,)

    gone: dict[int, type] = {CHEAT: client_states.UploadUpdate} if dies else {}
    box.append(Federation(make_plan(N), uplink=uplink, dies_before=gone))
    run = box[0].run()
    return run if dies or isinstance(run.state, Completed | Aborted) else run.deadline()


FRESH = SecretKey(X25519PrivateKey.from_private_bytes(b"\5" * 32).private_bytes_raw())


@pytest.mark.parametrize(
    ("change", "dies", "secret"),
    [
        (deals_another_secret(self_seed=bytes(32)), False, "self seed"),
        (deals_another_secret(mask_secret=FRESH), True, "mask key"),
        (inconsistent_polynomial, False, "self seed"),
        (inconsistent_polynomial, True, "mask key"),
    ],
)
def test_matching_shares_that_reconstruct_wrongly_convict_the_dealer(
    change: Callable[[Federation, ParticipantMessage], ParticipantMessage], dies: bool, secret: str
) -> None:
    run = mimic(change, dies)
    assert (run.aborted.reason, run.aborted.blamed) == (AbortReason.DEALER_EQUIVOCATED, frozenset({CHEAT}))
    assert secret in run.aborted.detail
    assert RecordEvidence(CHEAT, DropReason.EQUIVOCATED_DEALER, None) in run.effects
    assert run.mean is None


@pytest.mark.parametrize("dies", [True, False])
def test_a_secret_that_was_dealt_wrongly_but_not_needed_does_no_harm(dies: bool) -> None:
    change = deals_another_secret(self_seed=bytes(32)) if dies else deals_another_secret(mask_secret=FRESH)
    mimic(change, dies).assert_exact()


def test_shares_of_no_polynomial_convict_their_dealer_too() -> None:
    """Shares that combine to more than 32 bytes are of no secret at all; the blame is the same."""
    shares = {1: (PRIME - 1).to_bytes(33, "big")}  # t = 1: the "secret" is 2^256 + 296
    for job in (
        UnmaskingJob(bytes(32), (SelfSeedShares(7, bytes(32), shares),), ()),
        UnmaskingJob(bytes(32), (), (MaskSecretShares(7, FRESH.public(), shares, ()),)),
    ):
        with pytest.raises(DealerEquivocated) as convicted:
            remaining_masks(job)
        assert convicted.value.dealer == 7


# --- the coordinator comes back -------------------------------------------------------------------------------------


def test_a_coordinator_goes_on_from_what_it_persisted() -> None:
    """Killed after `PersistUnmask`, before anyone was asked, or after some had answered: the same sum."""
    for answered in (0, 2):
        run = Federation(make_plan(N), dies_before={2: client_states.UploadUpdate}).run_to(CollectingUnmask)
        assert any(isinstance(e, PersistUnmask) for e in run.effects)
        saved = run.opening(CollectingUnmask)
        held = run.update.copy(), run.statistics.copy()
        run.run(lambda f: len(getattr(f.state, "answers", ())) == answered)  # noqa: B023  # run at once
        resumed = server.resume(saved)
        assert resumed.effects == (StageOpened(Stage.UNMASK, frozenset({0, 1, 3, 4})),)
        run.state, (run.update, run.statistics) = resumed.state, held
        for index in (0, 1, 3, 4):
            run.disconnect(index)
        assert isinstance(run.state, CollectingUnmask), "everyone is away, and is waited for"
        for index in (0, 1, 3, 4):
            run.reconnect(index)
            assert run.history[-1][2].effects[0] == SendTo(index, server_requests.request(saved, index))
        run.run()
        assert run.survivors == {0, 1, 3, 4}
        run.assert_exact()
        assert run.members[2].answers(Unmask) == []
        assert [len(run.members[i].answers(Unmask)) for i in (0, 1, 3, 4)] >= [1] * 4
        for index in (0, 1, 3, 4):
            assert len(set(run.members[index].answers(Unmask))) == 1, "a repeat is the same bytes"


def test_a_resumed_session_does_not_wait_for_those_who_are_not_needed() -> None:
    """After a restart everyone is away: t of them suffice, and fewer are waited for until the deadline."""
    run = Federation(make_plan(N)).run_to(CollectingUnmask)
    for member in run.members:
        member.connected = False  # nobody says so to a coordinator that has just started
    run.run()
    run.state = server.resume(run.opening(CollectingUnmask)).state
    for index in range(N - 2):
        run.reconnect(index)
    run.run()
    assert isinstance(run.state, CollectingUnmask), "three of the four shares that are needed"
    run.reconnect(N - 2)
    run.run()
    assert run.survivors == frozenset(range(N))
    run.assert_exact()


def test_a_resumed_session_that_too_few_come_back_to_ends() -> None:
    run = Federation(make_plan(N)).run_to(CollectingUnmask)
    state = server.resume(run.opening(CollectingUnmask)).state
    ended = server.step(state, DeadlinePassed(Stage.UNMASK)).state
    assert isinstance(ended, Aborted)
    assert ended.reason is AbortReason.TOO_FEW_PARTICIPANTS


def test_a_member_dropped_before_the_restart_may_answer_after_it() -> None:
    """A verdict that was not persisted is not held against anyone; a bad answer is found out again."""
    uplink: Uplink = lambda sender, message: (  # noqa: E731
        (forged(run, message),) if sender == CHEAT and isinstance(message, Unmask) else (message,)
    )
    run = Federation(make_plan(N), uplink=uplink).run_to(CollectingUnmask)
    saved = run.opening(CollectingUnmask)
    assert server.outstanding(server.resume(replace(saved, lost=frozenset({CHEAT}))).state) == frozenset(range(N))
    run.run()
    assert run.drops == {CHEAT: DropReason.SHARE_MISMATCH}
    assert isinstance(run.state, Completed)
    assert run.members[CHEAT].answer(ConsistencyCheck) in saved.signatures.values()
