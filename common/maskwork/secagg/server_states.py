"""The coordinator's half of the protocol as data: states, events, effects and the legal transitions.

What leads from one state to the next, and every check on the way, is in `maskwork.secagg.server`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.secagg.errors import AbortReason, DropReason
from maskwork.secagg.graph import NeighbourGraph
from maskwork.secagg.messages import (
    AdvertiseKeys,
    ConsistencyCheck,
    CoordinatorMessage,
    Members,
    ParticipantMessage,
    Proposal,
    ShareKeys,
    SurvivorSets,
    Unmask,
)
from maskwork.secagg.plan import RoundPlan
from maskwork.secagg.unmasking import UnmaskingJob


class Stage(StrEnum):
    """The five steps, as logs, metrics and the job's view name them."""

    ADVERTISE_KEYS = "advertise-keys"
    SHARE_KEYS = "share-keys"
    MASKED_UPDATE = "masked-update"
    CONSISTENCY_CHECK = "consistency-check"
    UNMASK = "unmask"


@dataclass(frozen=True, slots=True)
class Session:
    """What stays the same from `begin` to the end.

    `signing_keys` holds the verified certificate key of each roster index.
    """

    id: bytes
    proposal: Proposal
    signing_keys: tuple[ec.EllipticCurvePublicKey, ...] = field(repr=False)

    @property
    def plan(self) -> RoundPlan:
        """The plan that all of this is about."""
        return self.proposal.plan


@dataclass(frozen=True, slots=True)
class Dealing:
    """A dealing that passed its checks, with the Merkle proof of each holder's leaf."""

    message: ShareKeys
    proofs: tuple[tuple[bytes, ...], ...]


# --- states ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CollectingKeys:
    """Step 0 is open."""

    session: Session
    answers: Mapping[int, AdvertiseKeys]
    lost: Members
    away: Members
    stage: Stage = Stage.ADVERTISE_KEYS


@dataclass(frozen=True, slots=True)
class CollectingShares:
    """Step 1 is open; U1 is fixed."""

    session: Session
    graph: NeighbourGraph
    advertised: Mapping[int, AdvertiseKeys]
    answers: Mapping[int, Dealing]
    lost: Members
    away: Members
    stage: Stage = Stage.SHARE_KEYS


@dataclass(frozen=True, slots=True)
class CollectingUpdates:
    """Step 2 is open; U2 is fixed."""

    session: Session
    graph: NeighbourGraph
    advertised: Mapping[int, AdvertiseKeys]
    dealings: Mapping[int, Dealing]
    answers: Members
    lost: Members
    away: Members
    stage: Stage = Stage.MASKED_UPDATE


@dataclass(frozen=True, slots=True)
class CollectingSignatures:
    """Step 3 is open; U3 is fixed."""

    session: Session
    graph: NeighbourGraph
    advertised: Mapping[int, AdvertiseKeys]
    dealings: Mapping[int, Dealing]
    sets: SurvivorSets
    answers: Mapping[int, ConsistencyCheck]
    lost: Members
    away: Members
    stage: Stage = Stage.CONSISTENCY_CHECK


@dataclass(frozen=True, slots=True)
class CollectingUnmask:
    """Step 4 is open; the survivors' signatures are fixed and on disk."""

    session: Session
    graph: NeighbourGraph
    advertised: Mapping[int, AdvertiseKeys]
    dealings: Mapping[int, Dealing]
    sets: SurvivorSets
    signatures: Mapping[int, ConsistencyCheck]
    answers: Mapping[int, Unmask]
    lost: Members
    away: Members
    stage: Stage = Stage.UNMASK


@dataclass(frozen=True, slots=True)
class RemovingMasks:
    """Enough shares are in; a worker reconstructs and removes the masks."""

    session: Session
    gathered: CollectingUnmask


@dataclass(frozen=True, slots=True)
class Completed:
    """The sum over `survivors` is free of masks."""

    session: Session
    survivors: Members


@dataclass(frozen=True, slots=True)
class Aborted:
    """The session ended without a sum. `blamed` are left out of the next attempt."""

    session: Session
    reason: AbortReason
    detail: str
    blamed: Members = frozenset()


Collecting: TypeAlias = CollectingKeys | CollectingShares | CollectingUpdates | CollectingSignatures | CollectingUnmask
State: TypeAlias = Collecting | RemovingMasks | Completed | Aborted

TRANSITIONS: Mapping[type, frozenset[type]] = {
    CollectingKeys: frozenset({CollectingShares, Aborted}),
    CollectingShares: frozenset({CollectingUpdates, Aborted}),
    CollectingUpdates: frozenset({CollectingSignatures, Aborted}),
    CollectingSignatures: frozenset({CollectingUnmask, Aborted}),
    CollectingUnmask: frozenset({RemovingMasks, Aborted}),
    RemovingMasks: frozenset({Completed, Aborted}),
    Completed: frozenset(),
    Aborted: frozenset(),
}
"""The legal transitions, as data: a test holds the code to it and docs/protocol.md draws it."""


# --- events and effects ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Received:
    """A decoded message from an authenticated member of the roster."""

    sender: int
    message: ParticipantMessage


@dataclass(frozen=True, slots=True)
class UploadCompleted:
    """A member's masked update has arrived whole; its lengths are right."""

    sender: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A member's control stream broke; it may come back within the stage."""

    sender: int


@dataclass(frozen=True, slots=True)
class Reconnected:
    """A member is back in this very session; it is told again what it may have missed."""

    sender: int


@dataclass(frozen=True, slots=True)
class Lost:
    """A member will not answer in this session any more (restarted, revoked, grace over, misbehaved elsewhere)."""

    sender: int
    reason: DropReason
    detail: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The stage's time is up; whoever has not answered is out."""

    stage: Stage


@dataclass(frozen=True, slots=True)
class MasksRemoved:
    """The worker verified every secret and removed the masks."""


@dataclass(frozen=True, slots=True)
class DealerConvicted:
    """The worker found shares that match signed commitments and reconstruct something else."""

    dealer: int
    detail: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The session is to end: the job was aborted, the service stops, or an effect failed."""

    reason: AbortReason
    detail: str


Event: TypeAlias = (
    Received
    | UploadCompleted
    | Disconnected
    | Reconnected
    | Lost
    | DeadlinePassed
    | MasksRemoved
    | DealerConvicted
    | Cancelled
)


@dataclass(frozen=True, slots=True)
class SendTo:
    """Send a message to one member."""

    recipient: int
    message: CoordinatorMessage


@dataclass(frozen=True, slots=True)
class DropPeer:
    """A member is out of this session; record it, and tell it the generic phrase."""

    member: int
    stage: Stage
    reason: DropReason
    detail: str


@dataclass(frozen=True, slots=True)
class StageOpened:
    """A stage begins: start its deadline."""

    stage: Stage
    expected: Members


@dataclass(frozen=True, slots=True)
class AddUpdate:
    """This member is in U3: add its upload to the accumulator. Every addition is finished before `PersistUnmask`."""

    member: int


@dataclass(frozen=True, slots=True)
class PersistUnmask:
    """Make accumulator, sets and signatures durable; nothing after this may be sent before that is done."""


@dataclass(frozen=True, slots=True)
class RemoveMasks:
    """Reconstruct, verify and remove the masks in a worker; then report `MasksRemoved` or `DealerConvicted`."""

    job: UnmaskingJob


@dataclass(frozen=True, slots=True)
class RecordEvidence:
    """Keep the signed transcript that convicts a member."""

    accused: int
    kind: DropReason
    accuser: int | None


Effect: TypeAlias = SendTo | DropPeer | StageOpened | AddUpdate | PersistUnmask | RemoveMasks | RecordEvidence


@dataclass(frozen=True, slots=True)
class Step:
    """The next state and what must be done, in this order."""

    state: State
    effects: tuple[Effect, ...] = ()
