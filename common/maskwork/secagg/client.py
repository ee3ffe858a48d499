"""The participant's half of the protocol, as a state machine.

`begin` checks a plan and advertises keys; `step` takes a message of the coordinator, or a local event, and returns
the next state and effects. Nothing here performs an effect, and nothing trusts the coordinator: every message is
checked against what this participant saw and signed before, and a message that fails a check ends the session here
(`Aborted`), because a coordinator that lies once is not argued with.

It does not: decide whether a site *wants* a plan (the policy does), decode bytes (the codec does), encode or mask
vectors (a worker does, with the keys of a `MaskUpdate` effect), or retry.

Rules it upholds, whatever arrives:
  1. One survivor set is signed in a session, ever; `Unmask` is answered for that set only, and once.
  2. Of each peer at most one of its two secrets' shares leaves, chosen by whether the peer survived.
  3. Durable records come before the message that they guard (`RecordAttempt`, `RecordRelease`).
  4. A message repeated to the letter gets the same answer to the letter; a different one in its place is equivocation.
  5. Leaving a state drops the secrets that the next one does not need.

Sources: Bonawitz et al. CCS 2017, figure 4 and section 6; Bell et al. CCS 2020, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.secagg import graph as graphs
from maskwork.secagg import keys
from maskwork.secagg.client_states import (
    Aborted,
    AdvertisedKeys,
    Completed,
    EndSession,
    Event,
    LocalFailure,
    Masking,
    MaskUpdate,
    Peer,
    RecordAttempt,
    RecordRelease,
    Send,
    Session,
    SharedKeys,
    SignedSets,
    Site,
    SiteRules,
    StartTraining,
    State,
    Step,
    Unmasked,
    UpdateMasked,
    Uploading,
    UploadUpdate,
)
from maskwork.secagg.dealing import Dealer, HeldShares, deal, open_held
from maskwork.secagg.errors import AbortReason, CoordinatorError, DeclineCode, IllegalEvent, PlanRefused
from maskwork.secagg.graph import GraphKind, NeighbourGraph
from maskwork.secagg.keys import ShareKind
from maskwork.secagg.masking import MaskingKeys
from maskwork.secagg.member_rules import check_members
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Advertisements,
    Complaint,
    ConsistencyCheck,
    DeliveredShare,
    DeliveredShares,
    ParticipantMessage,
    Proposal,
    SessionClosed,
    ShareKeys,
    SurvivorSets,
    SurvivorSignatures,
    Unmask,
    Withdraw,
    advertisement_digest,
)
from maskwork.secagg.plan import GRAPH_SIGMA, neighbour_graph, session_id
from maskwork.secagg.prg import SignedKey

# --- transitions ----------------------------------------------------------------------------------------------------


def begin(proposal: Proposal, *, site: Site, rand: bytes) -> Step:
    """Check a proposal and complete step 0.

    Args:
        proposal: as decoded; `proposal.plan` is what `proposal.plan_bytes` says, canonically.
        site: identity, signer, policy and records.
        rand: 32 fresh bytes from the operating system's generator; every secret of the session comes from them.

    Raises:
        PlanRefused: the participant does not take part; nothing was made or recorded.
    """
    plan = proposal.plan
    session = session_id(proposal.plan_bytes)
    if not is_signed_by(proposal, site.coordinator_key):
        raise PlanRefused(DeclineCode.BAD_PLAN, "the plan's signature is not the coordinator's")
    index = plan.index_of(site.name, site.fingerprint)
    if index is None:
        raise PlanRefused(DeclineCode.NOT_IN_ROSTER, f"{site.name} with this certificate is not in the roster")
    if site.model_digest != plan.model_digest:
        raise PlanRefused(DeclineCode.WRONG_MODEL, "the model delivered is not the one the plan names")
    rules = site.rules
    if rules.highest_attempt is not None and (plan.round_number, plan.attempt) <= rules.highest_attempt:
        seen = "round {}, attempt {}".format(*rules.highest_attempt)
        raise PlanRefused(
            DeclineCode.STALE_ATTEMPT,
            f"round {plan.round_number}, attempt {plan.attempt} is not above the highest seen ({seen})",
        )
    check_same_model_roster(frozenset(entry.participant for entry in plan.roster), rules)
    if (plan.revocation_number, plan.revocation_digest) != (rules.revocation_number, rules.revocation_digest):
        raise PlanRefused(
            DeclineCode.REVOCATION,
            f"the plan names revocation list {plan.revocation_number}; this site holds {rules.revocation_number}",
        )
    secrets = keys.derive_session_secrets(rand)
    encryption_key, mask_key = secrets.encryption_secret.public(), secrets.mask_secret.public()
    message = AdvertiseKeys.signed_bytes(encryption_key, mask_key, session=session, sender=index)
    sent = AdvertiseKeys(encryption_key, mask_key, site.signer.sign(message))
    state = AdvertisedKeys(Session(session, plan, index, site), secrets, keys.dealing_stream_key(rand), sent)
    record = RecordAttempt(session, proposal.plan_bytes, proposal.signature)
    return Step(state, (record, StartTraining(), Send(sent)))


def is_signed_by(proposal: Proposal, coordinator_key: ec.EllipticCurvePublicKey) -> bool:
    """Whether the plan's signature was made with this key, over the session id of the plan's bytes as received."""
    session = session_id(proposal.plan_bytes)
    signed = keys.signed_message("plan", session=session, sender=keys.COORDINATOR_INDEX, fields=b"")
    return keys.verify_signature(coordinator_key, proposal.signature, signed)


def step(state: State, event: Event, *, now: float) -> Step:
    """The next state and effects. Pure: `state` is not changed.

    Args:
        state: as returned by `begin` or `step`.
        event: a decoded message of the coordinator, or a local event.
        now: seconds since the epoch, for the validity of certificates.

    Raises:
        IllegalEvent: a local event that this state does not admit (our own mistake); nothing has changed.
    """
    if isinstance(state, Completed | Aborted):
        return Step(state)
    match event:
        case SessionClosed():
            return Step(Completed(state.session, event.released), (EndSession(),))
        case LocalFailure():
            return _abort(state, event.reason, event.detail)
        case UpdateMasked():
            if not isinstance(state, Masking):
                raise IllegalEvent(f"an update was masked in state {type(state).__name__}")
            return Step(_uploading(state), (UploadUpdate(),))
        case Proposal() | Advertisements() | DeliveredShares() | SurvivorSets() | SurvivorSignatures():
            try:
                return _receive(state, event, now)
            except CoordinatorError as error:
                return _abort(state, error.reason, error.detail)
        case _:
            assert_never(event)


def _receive(
    state: State, message: Proposal | Advertisements | DeliveredShares | SurvivorSets | SurvivorSignatures, now: float
) -> Step:
    match state, message:
        case AdvertisedKeys(), Advertisements():
            return _share_keys(state, message, now)
        case SharedKeys(), DeliveredShares():
            return _mask(state, message)
        case Uploading(), SurvivorSets():
            return _sign_sets(state, message)
        case SignedSets(), SurvivorSignatures():
            return _unmask(state, message)
        case AdvertisedKeys(session=session, sent=advertised), Proposal():
            return _repeat(state, session.id, session_id(message.plan_bytes), advertised)
        case SharedKeys(request=asked, sent=answer), Advertisements():
            return _repeat(state, asked, message, answer)
        case ((Masking(request=asked) | Uploading(request=asked)), DeliveredShares()):
            return _repeat(state, asked, message, None)
        case SignedSets(sets=asked_sets, sent=signed), SurvivorSets():
            return _repeat(state, asked_sets, message, signed)
        case Unmasked(request=asked_signatures), SurvivorSignatures():
            return _repeat(state, asked_signatures, message, state.sent)
        case _:
            raise CoordinatorError(
                AbortReason.UNEXPECTED_MESSAGE, f"{type(message).__name__} in state {type(state).__name__}"
            )


def _repeat(state: State, asked: object, message: object, answer: ParticipantMessage | None) -> Step:
    if asked != message:
        raise CoordinatorError(AbortReason.EQUIVOCATION, f"a second, different request in {type(state).__name__}")
    return Step(state, () if answer is None else (Send(answer),))


def _abort(state: State, reason: AbortReason, detail: str) -> Step:
    told = detail if reason is AbortReason.POLICY else ""  # the site's own terms; anything else stays in its log
    return Step(Aborted(state.session, reason, detail), (Send(Withdraw(reason, told)), EndSession()))


def _uploading(state: Masking) -> Uploading:
    return Uploading(state.session, state.graph, state.u1, state.u2, state.peers, state.held, state.request)


# --- step 1: ShareKeys ----------------------------------------------------------------------------------------------


def _share_keys(state: AdvertisedKeys, message: Advertisements, now: float) -> Step:
    session, plan, own = state.session, state.session.plan, state.session.index
    if own not in message.u1 or not message.u1 <= frozenset(range(plan.cohort)):
        raise CoordinatorError(AbortReason.BAD_SETS, "U1 is not within the roster, or leaves this participant out")
    advertised = dict(message.advertised)
    graph = _graph(state, message, advertised)
    expected = frozenset(graph.neighbours(own)) & message.u1
    if frozenset(advertised) != expected:
        raise CoordinatorError(AbortReason.WRONG_NEIGHBOURS, "the neighbours delivered are not those of the graph")
    holders = [h for h in graph.holders(own) if h in message.u1]
    if len(holders) < plan.graph.threshold:
        raise CoordinatorError(
            AbortReason.UNSAFE_THRESHOLD, f"{len(holders)} share holders are fewer than t = {plan.graph.threshold}"
        )
    peers = {index: _verify_peer(session, index, advertised[index], now) for index in sorted(expected)}
    check_members(frozenset(peers) | {own}, plan=plan, rules=session.site.rules)
    _check_distinct(state, peers)
    for peer in peers.values():
        if keys.is_degenerate(peer.encryption_key) or keys.is_degenerate(peer.mask_key):
            raise CoordinatorError(AbortReason.DEGENERATE_KEY, "a neighbour's public key has small order")
    sent, own_shares = deal(
        Dealer(own, session.id, plan.graph.threshold, state.sent.encryption_key, state.sent.mask_key),
        state.secrets,
        holders=holders,
        encryption_keys={index: peer.encryption_key for index, peer in peers.items()},
        stream_key=state.stream_key,
        signer=session.site.signer,
    )
    following = SharedKeys(session, state.secrets, graph, message.u1, peers, own_shares, message, sent)
    return Step(following, (Send(sent),))


def _graph(state: AdvertisedKeys, message: Advertisements, advertised: Mapping[int, AdvertiseKeys]) -> NeighbourGraph:
    """The session's graph; on the sparse one, from a seed that our own advertisement is seen to have entered."""
    plan = state.session.plan
    if plan.graph.kind is GraphKind.COMPLETE:
        return neighbour_graph(plan, b"")
    digests = dict(zip(sorted(message.u1), message.digests, strict=False))
    for index, advertisement in {**advertised, state.session.index: state.sent}.items():
        if digests.get(index) != advertisement_digest(advertisement):
            raise CoordinatorError(
                AbortReason.EQUIVOCATION, f"the digest of advertisement {index} is not that advertisement's"
            )
    ordered = [digests.get(i, bytes(32)) for i in range(plan.cohort)]
    return neighbour_graph(plan, graphs.graph_seed(state.session.id, ordered))


def _verify_peer(session: Session, index: int, advertisement: AdvertiseKeys, now: float) -> Peer:
    entry = session.plan.roster[index]
    certificate = session.site.certificates.get(index)
    if certificate is None:
        raise CoordinatorError(AbortReason.BAD_CERTIFICATE, f"no certificate of {entry.participant} was delivered")
    try:
        verified = session.site.verifier.verify_participant(certificate, now)
    except ValueError as error:
        raise CoordinatorError(AbortReason.BAD_CERTIFICATE, f"certificate of {entry.participant}: {error}") from error
    if (verified.name, verified.fingerprint) != (entry.participant, entry.fingerprint):
        raise CoordinatorError(AbortReason.BAD_CERTIFICATE, f"the certificate is not the one of {entry.participant}")
    signed = advertisement.verified_bytes(session=session.id, sender=index)
    if not keys.verify_signature(verified.public_key, advertisement.signature, signed):
        raise CoordinatorError(AbortReason.BAD_PEER_SIGNATURE, f"the keys of {entry.participant} are not signed by it")
    return Peer(advertisement.encryption_key, advertisement.mask_key, verified.public_key)


def _check_distinct(state: AdvertisedKeys, peers: Mapping[int, Peer]) -> None:
    seen = {state.sent.encryption_key, state.sent.mask_key}
    for peer in peers.values():
        seen |= {peer.encryption_key, peer.mask_key}
    if len(seen) != 2 * (len(peers) + 1):
        raise CoordinatorError(AbortReason.REPEATED_KEY, "two of the advertised keys are equal")


# --- step 2: MaskedUpdate -------------------------------------------------------------------------------------------


def _mask(state: SharedKeys, message: DeliveredShares) -> Step:
    session, own = state.session, state.session.index
    if own not in message.u2 or not message.u2 <= state.u1:
        raise CoordinatorError(AbortReason.BAD_SETS, "U2 is not within U1, or leaves this participant out")
    neighbours = [v for v in state.graph.neighbours(own) if v in message.u2]
    if [share.dealer for share in message.shares] != neighbours:
        raise CoordinatorError(AbortReason.BAD_SETS, "the shares delivered are not those of the neighbours in U2")
    holders = [h for h in state.graph.holders(own) if h in message.u2]
    threshold = session.plan.graph.threshold
    if len(holders) < threshold:
        raise CoordinatorError(
            AbortReason.TOO_FEW_PARTICIPANTS, f"{len(holders)} share holders are fewer than t = {threshold}"
        )
    verified = message.u2 & (frozenset(state.peers) | {own})
    check_members(verified, plan=session.plan, rules=session.site.rules)
    # Every dealer's signature first: a complaint gives a key away, so it must be about what the dealer truly signed.
    for share in message.shares:
        _check_dealer_signed(state, share)
    held: dict[int, HeldShares] = {} if state.own_shares is None else {own: state.own_shares}
    for share in message.shares:
        opened, key = _open(state, share)
        if opened is None:
            detail = f"what {session.plan.roster[share.dealer].participant} dealt does not match its commitments"
            aborted = Aborted(session, AbortReason.COMPLAINED, detail)
            return Step(aborted, (Send(Complaint(share.dealer, key)), EndSession()))
        held[share.dealer] = opened
    masking = Masking(session, state.graph, state.u1, message.u2, state.peers, held, message)
    return Step(masking, (MaskUpdate(_masking_keys(state, neighbours)),))


def _check_dealer_signed(state: SharedKeys, share: DeliveredShare) -> None:
    session = state.session
    name = session.plan.roster[share.dealer].participant
    signed = ShareKeys.signed_bytes(
        share.seed_commitment, share.root, share.holders, session=session.id, sender=share.dealer
    )
    if not keys.verify_signature(state.peers[share.dealer].signing_key, share.signature, signed):
        raise CoordinatorError(AbortReason.BAD_PEER_SIGNATURE, f"the dealing of {name} is not signed by it")
    holders = [h for h in state.graph.holders(share.dealer) if h in state.u1]
    leaf = keys.dealing_leaf(
        owner=share.dealer,
        holder=session.index,
        self_commitment=share.self_commitment,
        mask_commitment=share.mask_commitment,
        ciphertext=share.ciphertext,
        session=session.id,
    )
    root = keys.merkle_root_from_proof(leaf, holders.index(session.index), len(holders), share.proof)
    if root != share.root:
        raise CoordinatorError(
            AbortReason.BAD_COMMITMENT_PROOF, f"the share delivered as dealt by {name} is not under its signed root"
        )


def _open(state: SharedKeys, share: DeliveredShare) -> tuple[HeldShares | None, bytes]:
    session, own = state.session, state.session.index
    key = keys.share_key(
        state.secrets.encryption_secret,
        own=state.secrets.encryption_secret.public(),
        peer=state.peers[share.dealer].encryption_key,
        dealer=share.dealer,
        holder=own,
        own_index=own,
        session=session.id,
    )
    plaintext = keys.open_sealed(key, share.ciphertext, dealer=share.dealer, holder=own, session=session.id)
    opened = open_held(
        plaintext,
        self_commitment=share.self_commitment,
        mask_commitment=share.mask_commitment,
        owner=share.dealer,
        holder=own,
        session=session.id,
    )
    return opened, key


def _masking_keys(state: SharedKeys, neighbours: list[int]) -> MaskingKeys:
    """The self mask and one pair mask for each neighbour in U2, the higher roster index subtracting."""
    own, session = state.session.index, state.session.id
    streams = [(keys.self_mask_keys(state.secrets.self_seed, index=own, session=session), False)]
    own_public = state.secrets.mask_secret.public()
    for v in neighbours:
        pair = keys.pair_mask_keys(
            state.secrets.mask_secret,
            own=own_public,
            peer=state.peers[v].mask_key,
            own_index=own,
            peer_index=v,
            session=session,
        )
        streams.append((pair, own > v))
    return MaskingKeys(
        update=tuple(SignedKey(pair[0], negative) for pair, negative in streams),
        statistics=tuple(SignedKey(pair[1], negative) for pair, negative in streams),
        rounding_key=state.secrets.rounding_key,
    )


# --- step 3: ConsistencyCheck ---------------------------------------------------------------------------------------


def _sign_sets(state: Uploading, sets: SurvivorSets) -> Step:
    session, plan, rules = state.session, state.session.plan, state.session.site.rules
    if sets.u1 != state.u1 or sets.u2 != state.u2:
        raise CoordinatorError(AbortReason.EQUIVOCATION, "U1 or U2 is not what was delivered before")
    if not sets.u3 <= sets.u2:  # with U2 ⊆ U1 ⊆ roster checked at step 2, and U2(u) = N(u) ∩ U2 by construction
        raise CoordinatorError(AbortReason.BAD_SETS, "U3 is not within U2")
    if session.index not in sets.u3:
        raise CoordinatorError(AbortReason.BAD_SETS, "U3 leaves this participant out")
    if len(sets.u3) < plan.survivor_floor:
        raise CoordinatorError(
            AbortReason.TOO_FEW_PARTICIPANTS, f"{len(sets.u3)} survivors are fewer than {plan.survivor_floor}"
        )
    verified = sets.u3 & (frozenset(state.peers) | {session.index})
    check_members(verified, plan=plan, rules=rules)
    if plan.graph.kind is GraphKind.SPARSE:
        window = plan.graph.degree // 2
        bound = graphs.window_pair_bound(plan.cohort, corrupt=plan.graph.corrupt, window=window, sigma=GRAPH_SIGMA)
        if graphs.parts_ring(state.graph, sets.u3, bound):
            raise CoordinatorError(AbortReason.RING_CUT, "the survivors leave two gaps that corrupt members could fill")
    check_same_model(frozenset(plan.participants(sets.u3)), rules)
    message = ConsistencyCheck.signed_bytes(sets, plan.cohort, session=session.id, sender=session.index)
    sent = ConsistencyCheck(session.site.signer.sign(message))
    return Step(SignedSets(session, state.graph, sets, state.peers, state.held, sent), (Send(sent),))


def check_same_model_roster(roster: frozenset[str], rules: SiteRules) -> None:
    """Refuse a cohort from which a survivor set could come that this site will not sign on a model it has answered on.

    Refusing to sign is not enough: a site that has uploaded is in the sum, and others may sign for it. So a site that
    has answered for a set on this model takes part again only if nobody but that set is asked.

    Raises:
        PlanRefused: SAME_MODEL.
    """
    for earlier in rules.released:
        difference = len(roster ^ earlier)
        too_close = rules.min_survivor_difference is None or difference < rules.min_survivor_difference
        if difference and too_close:
            raise PlanRefused(
                DeclineCode.SAME_MODEL,
                f"on this model a sum over {len(earlier)} sites was released; only a cohort of exactly those can "
                "repeat it; for another cohort begin from another model (maskwork model init --seed)",
            )


def check_same_model(survivors: frozenset[str], rules: SiteRules) -> None:
    """Refuse a survivor set so close to one already answered for, on one model, that their difference tells.

    Raises:
        CoordinatorError: SAME_MODEL.
    """
    for earlier in rules.released:
        difference = len(survivors ^ earlier)
        too_close = rules.min_survivor_difference is None or difference < rules.min_survivor_difference
        if difference and too_close:
            raise CoordinatorError(
                AbortReason.SAME_MODEL,
                f"on this model a sum over {len(earlier)} sites was released; this set differs in {difference}",
            )


# --- step 4: Unmask -------------------------------------------------------------------------------------------------


def _unmask(state: SignedSets, message: SurvivorSignatures) -> Step:
    session, plan, sets = state.session, state.session.plan, state.sets
    eligible = frozenset(state.graph.holders(session.index)) & sets.u3
    fields = ConsistencyCheck.fields(sets, plan.cohort)
    for index, signature in message.signatures:
        if index not in eligible:
            raise CoordinatorError(AbortReason.BAD_SETS, f"a signature of {index}, which is no surviving holder")
        if not _signed_sets(state, fields, index, signature):
            name = plan.roster[index].participant
            raise CoordinatorError(AbortReason.BAD_PEER_SIGNATURE, f"{name} did not sign these survivors")
    if len(message.signatures) < plan.graph.threshold:
        raise CoordinatorError(
            AbortReason.TOO_FEW_SIGNATURES,
            f"{len(message.signatures)} signatures are fewer than t = {plan.graph.threshold}",
        )
    shares = tuple(
        held.reveal(owner, ShareKind.SELF_SEED if owner in sets.u3 else ShareKind.MASK_SECRET)
        for owner, held in sorted(state.held.items())
    )
    sent = Unmask(shares)
    record = RecordRelease(session.id, plan.model_digest, plan.participants(sets.u3))
    return Step(Unmasked(session, message, sent), (record, Send(sent)))


def _signed_sets(state: SignedSets, fields: bytes, index: int, signature: bytes) -> bool:
    session = state.session
    if index == session.index:
        return signature == state.sent.signature
    signed = ConsistencyCheck.signed_over(fields, session=session.id, sender=index)
    return keys.verify_signature(state.peers[index].signing_key, signature, signed)
