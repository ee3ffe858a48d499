"""What the coordinator asks of each member at each stage, and what it makes of the answers to the last one.

Pure functions of a state, without a decision: the same state gives the same message to the letter, however often it is
asked for. When to ask is `maskwork.secagg.server`'s business.
"""

from __future__ import annotations

from typing import assert_never

from maskwork.secagg.graph import GraphKind
from maskwork.secagg.messages import (
    Advertisements,
    CoordinatorMessage,
    DeliveredShare,
    DeliveredShares,
    SurvivorSignatures,
    advertisement_digest,
)
from maskwork.secagg.server_states import (
    Collecting,
    CollectingKeys,
    CollectingShares,
    CollectingSignatures,
    CollectingUnmask,
    CollectingUpdates,
)
from maskwork.secagg.unmasking import MaskSecretShares, SelfSeedShares, UnmaskingJob


def request(state: Collecting, recipient: int) -> CoordinatorMessage:
    """What the open stage asks of one member; the same to the letter however often it is asked."""
    match state:
        case CollectingKeys():
            return state.session.proposal
        case CollectingShares():
            return _advertisements(state, recipient)
        case CollectingUpdates():
            return _delivered_shares(state, recipient)
        case CollectingSignatures():
            return state.sets
        case CollectingUnmask():
            holders = state.graph.holders(recipient)
            return SurvivorSignatures(
                tuple((h, state.signatures[h].signature) for h in holders if h in state.signatures)
            )
        case _:
            assert_never(state)


def _advertisements(state: CollectingShares, recipient: int) -> Advertisements:
    u1 = frozenset(state.advertised)
    neighbours = [v for v in state.graph.neighbours(recipient) if v in u1]
    digests: tuple[bytes, ...] = ()
    if state.graph.kind is GraphKind.SPARSE:
        digests = tuple(advertisement_digest(state.advertised[i]) for i in sorted(u1))
    return Advertisements(u1, tuple((v, state.advertised[v]) for v in neighbours), digests)


def _delivered_shares(state: CollectingUpdates, recipient: int) -> DeliveredShares:
    u2 = frozenset(state.dealings)
    shares = []
    for dealer in state.graph.neighbours(recipient):
        if dealer not in u2:
            continue
        dealing = state.dealings[dealer]
        position = next(i for i, s in enumerate(dealing.message.shares) if s.holder == recipient)
        dealt = dealing.message.shares[position]
        shares.append(
            DeliveredShare(
                dealer=dealer,
                seed_commitment=dealing.message.seed_commitment,
                root=dealing.message.root,
                holders=len(dealing.message.shares),
                signature=dealing.message.signature,
                self_commitment=dealt.self_commitment,
                mask_commitment=dealt.mask_commitment,
                ciphertext=dealt.ciphertext,
                proof=dealing.proofs[position],
            )
        )
    return DeliveredShares(u2, tuple(shares))


def unmasking_job(state: CollectingUnmask) -> UnmaskingJob:
    """The first t shares of each secret that step 4 asked for, and what they must lead to."""
    threshold, sets = state.session.plan.graph.threshold, state.sets
    revealed: dict[int, dict[int, bytes]] = {owner: {} for owner in sets.u2}
    for holder in sorted(state.answers):
        for share in state.answers[holder].shares:
            if len(revealed[share.owner]) < threshold:
                revealed[share.owner][holder + 1] = share.share
    seeds = tuple(SelfSeedShares(v, state.dealings[v].message.seed_commitment, revealed[v]) for v in sorted(sets.u3))
    secrets = tuple(
        MaskSecretShares(
            v,
            state.advertised[v].mask_key,
            revealed[v],
            tuple((u, state.advertised[u].mask_key) for u in state.graph.neighbours(v) if u in sets.u3),
        )
        for v in sorted(sets.u2 - sets.u3)
    )
    return UnmaskingJob(state.session.id, seeds, secrets)
