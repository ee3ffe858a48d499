"""The coordinator's half of the protocol, as a state machine.

`begin` opens a session; `step` takes what a participant sent, or what became of it, and returns the next state and
effects. One bad peer is dropped with an enumerated reason (`DropPeer`) and the session goes on while enough remain;
below the threshold it ends in `Aborted`.

It does not: authenticate senders (mutual TLS and the service did; a sender is a roster index here), decode bytes,
keep time (a `DeadlinePassed` event says so), hold uploads (the driver spools them, reports `UploadCompleted` and
adds those that an `AddUpdate` names), or reconstruct anything (the `RemoveMasks` effect carries the job to a worker).

Rules it upholds:
  1. U1 ⊇ U2 ⊇ U3 are fixed one after the other and never change; one U3 is put to the participants in a session.
  2. `PersistUnmask` comes before the first request for unmasking, so that a restart resumes this very session.
  3. A share is used only if it is the one its dealer committed to; a holder that sends another is dropped.
  4. What is asked for at step 4 is one secret of each member, never both.

Sources: Bonawitz et al. CCS 2017, figure 4; Bell et al. CCS 2020, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.secagg import graph as graphs
from maskwork.secagg import keys
from maskwork.secagg.dealing import leaves, open_held, revealed_matches
from maskwork.secagg.errors import AbortReason, DropReason, IllegalEvent, PeerError
from maskwork.secagg.graph import GraphKind, NeighbourGraph
from maskwork.secagg.keys import ShareKind
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Complaint,
    ConsistencyCheck,
    Decline,
    Members,
    ParticipantMessage,
    Proposal,
    SessionClosed,
    ShareKeys,
    SurvivorSets,
    Unmask,
    Withdraw,
    advertisement_digest,
)
from maskwork.secagg.plan import neighbour_graph, session_id
from maskwork.secagg.server_requests import request, unmasking_job
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
    Dealing,
    Disconnected,
    DropPeer,
    Effect,
    Event,
    Lost,
    MasksRemoved,
    PersistUnmask,
    Received,
    Reconnected,
    RecordEvidence,
    RemoveMasks,
    RemovingMasks,
    SendTo,
    Session,
    Stage,
    StageOpened,
    State,
    Step,
    UploadCompleted,
)

# --- transitions ----------------------------------------------------------------------------------------------------


def begin(proposal: Proposal, signing_keys: tuple[ec.EllipticCurvePublicKey, ...]) -> Step:
    """Open a session: send the plan to everyone in the roster.

    Args:
        proposal: the plan, its bytes and our signature over them.
        signing_keys: the verified certificate key of each roster index, in order.
    """
    session = Session(session_id(proposal.plan_bytes), proposal, signing_keys)
    state = CollectingKeys(session, {}, frozenset(), frozenset())
    return Step(state, _open(state))


def step(state: State, event: Event) -> Step:
    """The next state and effects. Pure: `state` is not changed.

    Raises:
        IllegalEvent: an event of our own making that this state does not admit; nothing has changed.
    """
    if isinstance(state, Completed | Aborted):
        return Step(state)
    if isinstance(event, Cancelled):
        return _abort(state, event.reason, event.detail)
    if isinstance(state, RemovingMasks):
        return _removing(state, event)
    match event:
        case Received(sender, message):
            return _received(state, sender, message)
        case UploadCompleted(sender):
            return _uploaded(state, sender)
        case Disconnected(sender):
            return _advance(replace(state, away=state.away | {sender}))
        case Reconnected(sender):
            return _reconnected(state, sender)
        case Lost(sender, reason, detail):
            return _drop(state, sender, reason, detail)
        case DeadlinePassed(stage):
            return _deadline(state, stage)
        case MasksRemoved() | DealerConvicted():
            raise IllegalEvent(f"{type(event).__name__} in state {type(state).__name__}")
        case _:
            assert_never(event)


def outstanding(state: State) -> Members:
    """The members whose answer the open stage still waits for."""
    if isinstance(state, RemovingMasks | Completed | Aborted):
        return frozenset()
    return expected(state) - frozenset(state.answers) - state.lost


def expected(state: Collecting) -> Members:
    """The members that the open stage asks: the roster, U1, U2, U3, and those who signed."""
    match state:
        case CollectingKeys():
            return frozenset(range(state.session.plan.cohort))
        case CollectingShares():
            return frozenset(state.advertised)
        case CollectingUpdates():
            return frozenset(state.dealings)
        case CollectingSignatures():
            return state.sets.u3
        case CollectingUnmask():
            return frozenset(state.signatures)
        case _:
            assert_never(state)


def _received(state: Collecting, sender: int, message: ParticipantMessage) -> Step:
    if sender not in expected(state) or sender in state.lost:
        return Step(state)  # dropped or never asked in this stage: what it says no longer matters
    if isinstance(message, Withdraw):
        said = f"{message.reason.value}: {message.detail}" if message.detail else message.reason.value
        return _drop(state, sender, DropReason.WITHDREW, said)
    try:
        if isinstance(message, Complaint):
            return _judge(state, sender, message)
        return _accept(state, sender, message)
    except PeerError as error:
        return _drop(state, sender, error.reason, error.detail)


def _accept(state: Collecting, sender: int, message: ParticipantMessage) -> Step:
    match state, message:
        case CollectingKeys(), Decline():
            return _drop(state, sender, DropReason.DECLINED, f"{message.code.value}: {message.detail}")
        case CollectingKeys(), AdvertiseKeys():
            if sender not in state.answers:
                _check_advertisement(state, sender, message)
            return _answer(state, sender, message)
        case CollectingShares(), ShareKeys():
            dealt = state.answers.get(sender)
            return _answer(state, sender, _check_dealing(state, sender, message) if dealt is None else dealt, message)
        case CollectingSignatures(), ConsistencyCheck():
            _check_signature(state.session, state.sets, sender, message)
            return _answer(state, sender, message)
        case CollectingUnmask(), Unmask():
            if sender not in state.answers:
                _check_unmask(state, sender, message)
            return _answer(state, sender, message)
        case _:
            return _late(state, sender, message)


def _late(state: Collecting, sender: int, message: ParticipantMessage) -> Step:
    """A repeat of an earlier stage's answer changes nothing; anything else out of turn costs the sender its place."""
    earlier: object = None
    match message:
        case AdvertiseKeys() if not isinstance(state, CollectingKeys):
            earlier = state.advertised.get(sender)
        case ShareKeys() if not isinstance(state, CollectingKeys | CollectingShares):
            earlier = state.dealings[sender].message
        case ConsistencyCheck() if isinstance(state, CollectingUnmask):
            earlier = state.signatures.get(sender)
        case _:
            pass
    if earlier != message:
        raise PeerError(DropReason.WRONG_STAGE, f"{type(message).__name__} while {state.stage.value} is open")
    return Step(state)


def _answer(
    state: CollectingKeys | CollectingShares | CollectingSignatures | CollectingUnmask,
    sender: int,
    answer: AdvertiseKeys | Dealing | ConsistencyCheck | Unmask,
    message: ParticipantMessage | None = None,
) -> Step:
    """Take an answer in, once: the same again changes nothing, another one is a conflict."""
    before = state.answers.get(sender)
    if before is not None:
        if (before.message if isinstance(before, Dealing) else before) != (message or answer):
            raise PeerError(DropReason.CONFLICTING_REPEAT, f"a second, different answer while {state.stage.value}")
        return Step(state)
    return _advance(replace(state, answers={**state.answers, sender: answer}))  # type: ignore[arg-type]  # one match arm each


def _uploaded(state: Collecting, sender: int) -> Step:
    if not isinstance(state, CollectingUpdates) or sender not in outstanding(state):
        return Step(state)  # it finished after the stage did: not in U3, so not in the sum
    following = _advance(replace(state, answers=state.answers | {sender}))
    return Step(following.state, (AddUpdate(sender), *following.effects))


def _reconnected(state: Collecting, sender: int) -> Step:
    back = replace(state, away=state.away - {sender})
    if sender not in expected(state) or sender in state.lost:
        return Step(back)
    return Step(back, (SendTo(sender, request(back, sender)),))


def _drop(state: Collecting, sender: int, reason: DropReason, detail: str) -> Step:
    if sender in state.lost:
        return Step(state)
    following = _advance(replace(state, lost=state.lost | {sender}))
    return Step(following.state, (DropPeer(sender, state.stage, reason, detail), *following.effects))


def _deadline(state: Collecting, stage: Stage) -> Step:
    if stage is not state.stage:
        return Step(state)  # a timer that fired while its stage was being closed
    late = sorted(outstanding(state))
    dropped = tuple(DropPeer(i, stage, DropReason.DEADLINE, "no answer before the deadline") for i in late)
    following = _advance(replace(state, lost=state.lost | frozenset(late)))
    return Step(following.state, (*dropped, *following.effects))


def _abort(
    state: State, reason: AbortReason, detail: str, *, blamed: Members = frozenset(), evidence: tuple[Effect, ...] = ()
) -> Step:
    phrase = f"session ended: {reason.value}"
    members = range(state.session.plan.cohort)
    closing = tuple(SendTo(i, SessionClosed(released=False, phrase=phrase)) for i in members)
    return Step(Aborted(state.session, reason, detail, blamed), (*evidence, *closing))


def _removing(state: RemovingMasks, event: Event) -> Step:
    match event:
        case MasksRemoved():
            phrase = "session complete: the sum was released"
            closing = tuple(
                SendTo(i, SessionClosed(released=True, phrase=phrase)) for i in sorted(state.gathered.sets.u1)
            )
            return Step(Completed(state.session, state.gathered.sets.u3), closing)
        case DealerConvicted(dealer, detail):
            evidence = RecordEvidence(dealer, DropReason.EQUIVOCATED_DEALER, None)
            return _abort(
                state,
                AbortReason.DEALER_EQUIVOCATED,
                detail,
                blamed=frozenset({dealer}),
                evidence=(evidence,),
            )
        case Received() | UploadCompleted() | Disconnected() | Reconnected() | Lost() | DeadlinePassed():
            return Step(state)  # everything needed is here; who comes or goes no longer matters
        case _:
            raise IllegalEvent(f"{type(event).__name__} in state {type(state).__name__}")


# --- closing one stage and opening the next ---------------------------------------------------------------------------


def _advance(state: Collecting) -> Step:
    """Close the open stage when there is nobody left to wait for.

    A member that is away is waited for (until the deadline, or until it is `Lost`) in steps 0 to 2, where its update
    is at stake; in steps 3 and 4 only if the others do not suffice.
    """
    waiting = outstanding(state)
    present = waiting - state.away
    if present or (waiting and not isinstance(state, CollectingSignatures | CollectingUnmask)):
        return Step(state)
    if not _enough(state):
        if waiting:
            return Step(state)
        return _abort(
            state, AbortReason.TOO_FEW_PARTICIPANTS, f"{len(state.answers)} answered while {state.stage.value} was open"
        )
    return _close(state)


def _enough(state: Collecting) -> bool:
    """Whether those who answered can carry the session on."""
    plan, answered = state.session.plan, frozenset(state.answers)
    if len(answered) < plan.survivor_floor and not isinstance(state, CollectingSignatures | CollectingUnmask):
        return False
    if isinstance(state, CollectingKeys):
        return len(answered) >= plan.graph.threshold if plan.graph.kind is GraphKind.COMPLETE else True
    match state:
        case CollectingShares():
            owners = answered  # they become U2
        case CollectingUpdates():
            owners = frozenset(state.dealings)
        case CollectingSignatures() | CollectingUnmask():
            owners = state.sets.u2
        case _:
            assert_never(state)
    return all(_holders(state, owner, answered) >= plan.graph.threshold for owner in owners)


def _holders(state: Collecting, owner: int, among: Members) -> int:
    assert not isinstance(state, CollectingKeys)
    return sum(1 for h in state.graph.holders(owner) if h in among)


def _close(state: Collecting) -> Step:
    following: Collecting
    match state:
        case CollectingKeys():
            graph = _graph(state.session, state.answers)
            following = CollectingShares(state.session, graph, state.answers, {}, state.lost, state.away)
        case CollectingShares():
            following = CollectingUpdates(
                state.session, state.graph, state.advertised, state.answers, frozenset(), state.lost, state.away
            )
        case CollectingUpdates():
            sets = SurvivorSets(frozenset(state.advertised), frozenset(state.dealings), state.answers)
            following = CollectingSignatures(
                state.session, state.graph, state.advertised, state.dealings, sets, {}, state.lost, state.away
            )
        case CollectingSignatures():
            following = CollectingUnmask(
                state.session,
                state.graph,
                state.advertised,
                state.dealings,
                state.sets,
                state.answers,
                {},
                state.lost,
                state.away,
            )
            return Step(following, (PersistUnmask(), *_open(following)))
        case CollectingUnmask():
            return Step(RemovingMasks(state.session, state), (RemoveMasks(unmasking_job(state)),))
        case _:
            assert_never(state)
    return Step(following, _open(following))


def _open(state: Collecting) -> tuple[Effect, ...]:
    asked = outstanding(state)
    requests = tuple(SendTo(i, request(state, i)) for i in sorted(asked))
    return (StageOpened(state.stage, asked), *requests)


def resume(state: CollectingUnmask) -> Step:
    """Go on from a state that `PersistUnmask` made durable: everyone is away until it reconnects."""
    waiting = replace(state, answers={}, lost=frozenset(), away=frozenset(state.signatures))
    return Step(waiting, (StageOpened(waiting.stage, frozenset(state.signatures)),))


def restore(
    proposal: Proposal,
    signing_keys: tuple[ec.EllipticCurvePublicKey, ...],
    *,
    advertised: Mapping[int, AdvertiseKeys],
    dealings: Mapping[int, ShareKeys],
    u3: Members,
    signatures: Mapping[int, ConsistencyCheck],
) -> CollectingUnmask:
    """The state that `PersistUnmask` wrote down, for `resume`. No share has to be delivered any more: no proofs."""
    session = Session(session_id(proposal.plan_bytes), proposal, signing_keys)
    sets = SurvivorSets(frozenset(advertised), frozenset(dealings), u3)
    return CollectingUnmask(
        session,
        _graph(session, advertised),
        advertised,
        {i: Dealing(message, ()) for i, message in dealings.items()},
        sets,
        signatures,
        {},
        frozenset(),
        frozenset(),
    )


def _graph(session: Session, advertised: Mapping[int, AdvertiseKeys]) -> NeighbourGraph:
    digests = [
        advertisement_digest(advertised[i]) if i in advertised else graphs.ABSENT_DIGEST
        for i in range(session.plan.cohort)
    ]
    return neighbour_graph(session.plan, graphs.graph_seed(session.id, digests))


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_advertisement(state: CollectingKeys, sender: int, message: AdvertiseKeys) -> None:
    session = state.session
    signed = message.verified_bytes(session=session.id, sender=sender)
    if not keys.verify_signature(session.signing_keys[sender], message.signature, signed):
        raise PeerError(DropReason.BAD_SIGNATURE, "the advertised keys are not signed with the sender's certificate")
    own = {message.encryption_key, message.mask_key}
    taken = {key for other in state.answers.values() for key in (other.encryption_key, other.mask_key)}
    if len(own) != 2 or own & taken:
        raise PeerError(DropReason.REPEATED_KEY, "an advertised key is not fresh")
    if keys.is_degenerate(message.encryption_key) or keys.is_degenerate(message.mask_key):
        raise PeerError(DropReason.DEGENERATE_KEY, "an advertised key has small order")


def _check_dealing(state: CollectingShares, sender: int, message: ShareKeys) -> Dealing:
    session = state.session
    holders = [h for h in state.graph.holders(sender) if h in state.advertised]
    if [s.holder for s in message.shares] != holders:
        raise PeerError(DropReason.WRONG_RECIPIENTS, "the holders are not those of the graph")
    if any((s.holder == sender) != (s.ciphertext == b"") for s in message.shares):
        raise PeerError(DropReason.WRONG_RECIPIENTS, "a ciphertext is missing, or is one to the sender itself")
    root, proofs = keys.merkle_tree(leaves(message.shares, owner=sender, session=session.id))
    if root != message.root:
        raise PeerError(DropReason.WRONG_COMMITMENTS, "the root is not that of the dealing")
    signed = message.verified_bytes(session=session.id, sender=sender)
    if not keys.verify_signature(session.signing_keys[sender], message.signature, signed):
        raise PeerError(DropReason.BAD_SIGNATURE, "the dealing is not signed with the sender's certificate")
    return Dealing(message, proofs)


def _check_signature(session: Session, sets: SurvivorSets, sender: int, message: ConsistencyCheck) -> None:
    signed = ConsistencyCheck.signed_bytes(sets, session.plan.cohort, session=session.id, sender=sender)
    if not keys.verify_signature(session.signing_keys[sender], message.signature, signed):
        raise PeerError(DropReason.BAD_SIGNATURE, "the signature is not over the survivor sets that were sent")


def _check_unmask(state: CollectingUnmask, sender: int, message: Unmask) -> None:
    sets = state.sets
    # u's own shares are its own on the complete graph; there N(u) plus u is everyone.
    owners = [v for v in state.graph.holders(sender) if v in sets.u2]
    if [s.owner for s in message.shares] != owners:
        raise PeerError(DropReason.WRONG_SHARES, "the shares revealed are not one for each owner")
    for share in message.shares:
        wanted = ShareKind.SELF_SEED if share.owner in sets.u3 else ShareKind.MASK_SECRET
        if share.kind is not wanted:
            raise PeerError(DropReason.WRONG_SHARES, f"a share of {share.kind.name} where {wanted.name} was asked for")
        dealt = next(s for s in state.dealings[share.owner].message.shares if s.holder == sender)
        commitment = dealt.self_commitment if share.kind is ShareKind.SELF_SEED else dealt.mask_commitment
        if not revealed_matches(share, commitment, holder=sender, session=state.session.id):
            raise PeerError(
                DropReason.SHARE_MISMATCH, f"the share of {share.owner} is not the one its dealer committed to"
            )


def _judge(state: Collecting, accuser: int, complaint: Complaint) -> Step:
    """Settle a complaint with the very check the accuser claims to have made, and end the attempt."""
    if not isinstance(state, CollectingUpdates) or accuser in state.answers:
        raise PeerError(DropReason.WRONG_STAGE, f"a complaint while {state.stage.value} is open")
    dealer = complaint.dealer
    dealing = state.dealings.get(dealer)
    dealt = None if dealing is None else next((s for s in dealing.message.shares if s.holder == accuser), None)
    if dealt is None or dealer == accuser:
        raise PeerError(DropReason.FALSE_ACCUSATION, f"{dealer} dealt nothing to {accuser}")
    session = state.session.id
    plaintext = keys.open_sealed(complaint.key, dealt.ciphertext, dealer=dealer, holder=accuser, session=session)
    if plaintext is None:
        # Either the dealer sealed rubbish or the accuser gave a wrong key; without a second secret nobody can tell.
        detail = f"the key that {accuser} gave does not open what {dealer} dealt: one of them lies, both are left out"
        blamed = frozenset({dealer, accuser})
        evidence = RecordEvidence(dealer, DropReason.DISPUTED_CIPHERTEXT, accuser)
        return _abort(state, AbortReason.COMPLAINT_DISPUTED, detail, blamed=blamed, evidence=(evidence,))
    held = open_held(
        plaintext,
        self_commitment=dealt.self_commitment,
        mask_commitment=dealt.mask_commitment,
        owner=dealer,
        holder=accuser,
        session=session,
    )
    if held is None:
        evidence = RecordEvidence(dealer, DropReason.DISHONEST_DEALER, accuser)
        detail = f"what {dealer} dealt to {accuser} does not match its signed commitments"
        return _abort(state, AbortReason.COMPLAINT_UPHELD, detail, blamed=frozenset({dealer}), evidence=(evidence,))
    evidence = RecordEvidence(accuser, DropReason.FALSE_ACCUSATION, None)
    detail = f"what {dealer} dealt to {accuser} is in order: the accusation is false"
    return _abort(state, AbortReason.COMPLAINT_REJECTED, detail, blamed=frozenset({accuser}), evidence=(evidence,))
