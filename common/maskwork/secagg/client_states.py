"""The participant's half of the protocol as data: ports, states, events, effects and the legal transitions.

Each state holds only what its phase may know: leaving a phase drops the secrets that the next one does not need.
What leads from one state to the next, and every check on the way, is in `maskwork.secagg.client`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.secagg.dealing import HeldShares
from maskwork.secagg.errors import AbortReason
from maskwork.secagg.graph import NeighbourGraph
from maskwork.secagg.keys import PublicKey, SessionSecrets, Signer
from maskwork.secagg.masking import MaskingKeys
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Advertisements,
    ConsistencyCheck,
    DeliveredShares,
    Members,
    ParticipantMessage,
    Proposal,
    SessionClosed,
    ShareKeys,
    SurvivorSets,
    SurvivorSignatures,
    Unmask,
)
from maskwork.secagg.plan import RoundPlan


class VerifiedPeer(Protocol):
    """What a certificate says once its chain, role, validity and revocation have been checked."""

    @property
    def name(self) -> str:
        """The participant's name within the federation."""
        ...

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate's DER bytes."""
        ...

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The P-256 key that signs the participant's messages."""
        ...


class CertificateVerifier(Protocol):
    """Checks a neighbour's certificate. A port: chains and revocation lists are not the protocol's business."""

    def verify_participant(self, certificate_der: bytes, now: float) -> VerifiedPeer:
        """The identity in a valid participant certificate.

        Raises:
            ValueError: chain, role, validity or revocation is not in order; the text says which.
        """
        ...


@dataclass(frozen=True, slots=True)
class SiteRules:
    """The part of a site's policy and durable records that the protocol itself must obey.

    Attributes:
        min_survivors: fewest survivors this site releases a sum over, counting members it verified itself.
        min_survivor_difference: on one model digest, the fewest members in which a later survivor set must differ
            from an earlier one; None: only an equal set.
        trusted: names of the members that this site trusts.
        min_trusted_survivors: fewest of them that must be among the survivors that it verified itself.
        released: every survivor set, by names, that this site has answered for on the plan's model digest.
        highest_attempt: the highest (round, attempt) this site ever joined in this job.
        revocation_digest: digest of the revocation list that this site holds.
        revocation_number: its number.
    """

    min_survivors: int = 3
    min_survivor_difference: int | None = None
    trusted: frozenset[str] = frozenset()
    min_trusted_survivors: int = 0
    released: tuple[frozenset[str], ...] = ()
    highest_attempt: tuple[int, int] | None = None
    revocation_digest: bytes = bytes(32)
    revocation_number: int = 0


@dataclass(frozen=True, slots=True)
class Site:
    """What a participant brings to a session besides randomness.

    Attributes:
        name: its own name in the federation.
        fingerprint: of its own certificate.
        signer: signs with its certificate's key.
        verifier: checks its neighbours' certificates.
        certificates: DER certificate of each roster index that the coordinator delivered.
        coordinator_key: the key of the coordinator's verified certificate.
        model_digest: SHA-256 of the model file that the site holds and trains.
        rules: policy and durable records.
    """

    name: str
    fingerprint: bytes
    signer: Signer
    verifier: CertificateVerifier
    certificates: Mapping[int, bytes] = field(repr=False)
    coordinator_key: ec.EllipticCurvePublicKey = field(repr=False)
    model_digest: bytes = field(repr=False)
    rules: SiteRules


@dataclass(frozen=True, slots=True)
class Session:
    """What stays the same from `begin` to the end."""

    id: bytes
    plan: RoundPlan
    index: int
    site: Site


@dataclass(frozen=True, slots=True)
class Peer:
    """A neighbour whose certificate and step-0 signature this participant verified itself."""

    encryption_key: PublicKey
    mask_key: PublicKey
    signing_key: ec.EllipticCurvePublicKey


# --- states ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AdvertisedKeys:
    """Step 0 done; waiting for U1 and the neighbours' keys."""

    session: Session
    secrets: SessionSecrets
    stream_key: bytes = field(repr=False)
    sent: AdvertiseKeys


@dataclass(frozen=True, slots=True)
class SharedKeys:
    """Step 1 done; waiting for U2 and the shares dealt to us."""

    session: Session
    secrets: SessionSecrets
    graph: NeighbourGraph
    u1: Members
    peers: Mapping[int, Peer]
    own_shares: HeldShares | None
    request: Advertisements
    sent: ShareKeys


@dataclass(frozen=True, slots=True)
class Masking:
    """Shares checked; the worker masks the update once training ends. Session keys are gone from here on."""

    session: Session
    graph: NeighbourGraph
    u1: Members
    u2: Members
    peers: Mapping[int, Peer]
    held: Mapping[int, HeldShares]
    request: DeliveredShares


@dataclass(frozen=True, slots=True)
class Uploading:
    """Step 2: the masked update exists and is on its way; waiting for the three sets."""

    session: Session
    graph: NeighbourGraph
    u1: Members
    u2: Members
    peers: Mapping[int, Peer]
    held: Mapping[int, HeldShares]
    request: DeliveredShares


@dataclass(frozen=True, slots=True)
class SignedSets:
    """Step 3 done: one U3 is signed, no other ever will be; waiting for the others' signatures."""

    session: Session
    graph: NeighbourGraph
    sets: SurvivorSets
    peers: Mapping[int, Peer]
    held: Mapping[int, HeldShares]
    sent: ConsistencyCheck


@dataclass(frozen=True, slots=True)
class Unmasked:
    """Step 4 done: shares are out; a repeat of the request gets the same bytes."""

    session: Session
    request: SurvivorSignatures
    sent: Unmask


@dataclass(frozen=True, slots=True)
class Completed:
    """The coordinator closed the session; nothing secret is left."""

    session: Session
    released: bool


@dataclass(frozen=True, slots=True)
class Aborted:
    """The session ended here; nothing secret is left. The detail is for this site's own log."""

    session: Session
    reason: AbortReason
    detail: str


State: TypeAlias = AdvertisedKeys | SharedKeys | Masking | Uploading | SignedSets | Unmasked | Completed | Aborted

TRANSITIONS: Mapping[type, frozenset[type]] = {
    AdvertisedKeys: frozenset({SharedKeys, Completed, Aborted}),
    SharedKeys: frozenset({Masking, Completed, Aborted}),
    Masking: frozenset({Uploading, Completed, Aborted}),
    Uploading: frozenset({SignedSets, Completed, Aborted}),
    SignedSets: frozenset({Unmasked, Completed, Aborted}),
    Unmasked: frozenset({Completed, Aborted}),
    Completed: frozenset(),
    Aborted: frozenset(),
}
"""The legal transitions, as data: a test holds the code to it and docs/protocol.md draws it."""


# --- events and effects ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UpdateMasked:
    """Local event: the worker has written the masked update; it may be uploaded."""


@dataclass(frozen=True, slots=True)
class LocalFailure:
    """Local event: training or encoding failed, or the site stops; the session cannot go on."""

    reason: AbortReason
    detail: str


Event: TypeAlias = (
    Proposal
    | Advertisements
    | DeliveredShares
    | SurvivorSets
    | SurvivorSignatures
    | SessionClosed
    | UpdateMasked
    | LocalFailure
)


@dataclass(frozen=True, slots=True)
class RecordAttempt:
    """Write down, durably and before anything is sent, that this (round, attempt) was joined."""

    session: bytes
    plan_bytes: bytes = field(repr=False)
    plan_signature: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RecordRelease:
    """Write down, durably and before `Unmask` is sent, the survivor set answered for on this model."""

    session: bytes
    model_digest: bytes
    survivors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to the coordinator on the control stream."""

    message: ParticipantMessage


@dataclass(frozen=True, slots=True)
class StartTraining:
    """Begin local training; key set-up goes on meanwhile."""


@dataclass(frozen=True, slots=True)
class MaskUpdate:
    """Encode and mask the trained update with these keys, as soon as training has ended."""

    keys: MaskingKeys


@dataclass(frozen=True, slots=True)
class UploadUpdate:
    """Offer the masked update to the coordinator and stream it when granted."""


@dataclass(frozen=True, slots=True)
class EndSession:
    """Forget everything that the session left behind: training results, the masked update, keys."""


Effect: TypeAlias = RecordAttempt | RecordRelease | Send | StartTraining | MaskUpdate | UploadUpdate | EndSession


@dataclass(frozen=True, slots=True)
class Step:
    """The next state and what must be done, in this order."""

    state: State
    effects: tuple[Effect, ...] = ()
