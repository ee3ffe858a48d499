"""What the participant's driver holds for one session, what can happen to it, and the ports that it works through.

Data and protocols only: the loop that reads these and performs effects is `driver`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, ParamSpec, Protocol, TypeAlias, TypeVar

from maskwork.net.identity import ParticipantVerifier
from maskwork.net.revocation import NO_LIST, RevocationList
from maskwork.participant import training_calls
from maskwork.participant.client import LinkDown, LinkUp, Said, TurnedAway
from maskwork.participant.config import TaskConfig
from maskwork.participant.training_calls import MaskResult, TrainSummary
from maskwork.secagg import client_states as core
from maskwork.secagg.errors import AbortReason, PlanRefused
from maskwork.secagg.keys import Signer
from maskwork.secagg.masking import MaskingKeys
from maskwork.secagg.plan import RoundPlan
from maskwork.task import TrainingConfig
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession
from maskwork.worker import WorkerProcess


@dataclass(frozen=True, slots=True)
class Fetched:
    """The model and the certificates of an offer are here, and what else came with it has been read and found good."""

    work: Work
    model_digest: bytes
    certificates: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Unacceptable:
    """What was fetched for an offer speaks against it."""

    work: Work
    refused: PlanRefused


@dataclass(frozen=True, slots=True)
class Trained:
    """Local training ended well."""

    work: Work
    summary: TrainSummary = field(repr=False)


@dataclass(frozen=True, slots=True)
class Masked:
    """The masked update is in its file."""

    work: Work
    result: MaskResult = field(repr=False)


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The coordinator holds this many bytes of the upload; the stream ended, or broke (None)."""

    work: Work
    received: int | None


@dataclass(frozen=True, slots=True)
class Failed:
    """Something that a session needed went wrong at this site."""

    work: Work
    reason: AbortReason
    detail: str


Happening: TypeAlias = (
    LinkUp | LinkDown | TurnedAway | Said | Fetched | Unacceptable | Trained | Masked | Uploaded | Failed
)


@dataclass(eq=False, slots=True)
class Work:
    """What this site does for one session, from the offer to the end.

    Attributes:
        id: the session.
        offer: what was offered.
        config: the training config, checked.
        folder: model, certificates and masked update; deleted at the end.
        state: the protocol's state; None until the model is here.
        trained: whether the update can be masked.
        mask_keys: once the shares were checked.
        revocations: the list that the plan names, once it is here and read.
        update: the masked update's file, which has no name any more.
        update_sent: its length and digest, for the audit log.
        interrupted: how often an upload broke; the pause before the next one grows with it.
    """

    id: bytes
    offer: OpenSession
    config: TrainingConfig
    folder: Path
    state: core.State | None = None
    trained: bool = False
    mask_keys: MaskingKeys | None = field(default=None, repr=False)
    update: BinaryIO | None = None
    update_sent: tuple[int, bytes] = (0, b"")
    statistics: bytes = field(default=b"", repr=False)
    revocations: RevocationList = NO_LIST
    uploading: bool = False
    interrupted: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def plan(self) -> RoundPlan:
        """The plan."""
        return self.offer.proposal.plan

    @property
    def model(self) -> Path:
        """Where the global model is."""
        return self.folder / "model.safetensors"


class Link(Protocol):
    """The way to the coordinator; a `maskwork.participant.client.CoordinatorLink` in a service."""

    def send(self, session: bytes, message: codec.Request) -> None:
        """Send a message if connected."""
        ...

    def redial(self) -> None:
        """End the connection and make another."""
        ...

    async def download(self, digest: bytes, size: int, path: Path) -> bytes:
        """Fetch something content-addressed into `path`; returns its digest; raises TransferError."""
        ...

    async def upload(self, session: bytes, update: BinaryIO, statistics: bytes, offsets: tuple[int, int]) -> int:
        """Stream both segments from their offsets; raises TransferError."""
        ...


P = ParamSpec("P")
R = TypeVar("R")


class Worker(Protocol):
    """Where a task's training runs; a `maskwork.worker.WorkerProcess` in a service."""

    async def start(self) -> None:
        """Load the task and its data; raises what is wrong with them."""
        ...

    async def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function` and wait for what it returns or raises; cancelled, it ends the work."""
        ...

    async def close(self) -> None:
        """End it."""
        ...


def training_worker(name: str, task: TaskConfig) -> WorkerProcess:
    """The process that trains one task."""
    setup = partial(training_calls.configure, task.use, task.options, task.threads)
    return WorkerProcess(name=f"training {name}", preload=training_calls.PRELOAD, setup=setup)


@dataclass(frozen=True, slots=True)
class SiteIdentity:
    """Who this participant is."""

    federation: str
    name: str
    fingerprint: bytes
    signer: Signer = field(repr=False)
    verifier: ParticipantVerifier
