"""What can happen to the coordinator, as data: the one vocabulary of the driver's queue.

The service, timers and the worker say these; `driver` alone reads them. They carry what was said, never a decision.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TypeAlias

from maskwork.coordinator.aggregation import Release
from maskwork.coordinator.peers import Peer
from maskwork.coordinator.records import JobRecord
from maskwork.errors import StoreError
from maskwork.net.revocation import RevocationList
from maskwork.secagg import server_states as core
from maskwork.secagg.keys import Signer
from maskwork.secagg.messages import ParticipantMessage
from maskwork.wire.codec import UploadReady


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A participant's control stream is open."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerGone:
    """A control stream ended."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerSaid:
    """A decoded message from a control stream."""

    peer: Peer
    session: bytes
    message: ParticipantMessage | UploadReady


@dataclass(frozen=True, slots=True)
class PeerMisbehaved:
    """A control stream carried something that is no message; the stream is being closed."""

    peer: Peer
    detail: str


@dataclass(frozen=True, slots=True)
class UploadBegan:
    """A member with a grant has begun to stream."""

    session: bytes
    member: int


@dataclass(frozen=True, slots=True)
class UploadEnded:
    """An upload stream ended: whole, or cut."""

    session: bytes
    member: int


@dataclass(frozen=True, slots=True)
class StorageFailed:
    """What a session needs cannot be written here now: the disk is full, or the like."""

    session: bytes
    error: StoreError


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """Something for the protocol: a timer or the worker speaks."""

    session: bytes
    event: core.Event


@dataclass(frozen=True, slots=True)
class ReleaseDone:
    """The worker finished unmasking."""

    session: bytes
    release: Release


@dataclass(frozen=True, slots=True)
class JobAborted:
    """An operator or researcher ends a job."""

    job_id: str
    by: str
    done: asyncio.Future[JobRecord | None] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ListChanged:
    """A newer revocation list is in force."""

    revocations: RevocationList


@dataclass(frozen=True, slots=True)
class OwnCertificateRenewed:
    """The coordinator has a new certificate and key, which count once no session is open."""

    certificate: bytes = field(repr=False)
    signer: Signer = field(repr=False)


@dataclass(frozen=True, slots=True)
class Crashed:
    """Work beside the loop ended with an error that nobody expected: the loop ends with it."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Look:
    """Time to look whether an attempt can be opened or a job started."""


Happening: TypeAlias = (
    PeerConnected
    | PeerGone
    | PeerSaid
    | PeerMisbehaved
    | UploadBegan
    | UploadEnded
    | StorageFailed
    | SessionEvent
    | ReleaseDone
    | JobAborted
    | ListChanged
    | OwnCertificateRenewed
    | Crashed
    | Look
)
