"""One open session at run time: the protocol's state, and what the driver holds beside it (files, timers, clocks).

It performs nothing by itself. It lives from the moment an attempt is recorded to the moment it is committed or closed;
nothing of it is used in another session.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.coordinator.revocations import withdrawn
from maskwork.coordinator.shape import SessionShape
from maskwork.coordinator.spool import Spool, UploadSlots
from maskwork.coordinator.vault import UploadSeal, Vault
from maskwork.drop_texts import because, decline_code
from maskwork.net.revocation import RevocationList
from maskwork.secagg.errors import DeclineCode, DropReason
from maskwork.secagg.messages import ShareKeys
from maskwork.secagg.plan import RoundPlan
from maskwork.secagg.server_states import (
    CollectingKeys,
    CollectingShares,
    CollectingSignatures,
    CollectingUnmask,
    CollectingUpdates,
    Dealing,
    RemovingMasks,
    Session,
    Stage,
    State,
)
from maskwork.wire.codec import OpenSession, Transcript, UploadGrant, encode_certificates

KEPT_OUT_UNTIL_RECONNECT = frozenset(DropReason) - {DropReason.DEADLINE, DropReason.DISCONNECTED, DropReason.WITHDREW}
"""Reasons that would repeat at the next attempt: a site dropped for one of them is asked again when it reconnects."""


@dataclass(eq=False, slots=True)
class ActiveSession:
    """What belongs to one attempt.

    Attributes:
        job_id: its job.
        core: the session as the protocol knows it.
        state: where the protocol stands.
        folder: accumulator and spools; deleted at the end.
        certificates: DER, in roster order.
        training_config: canonical JSON, as sent.
        model_size: bytes of the global model's file.
        slots: who may upload.
        excluded: members that are asked again when they connect anew, each with why.
        sitting_out: members that are asked again in the next round, each with why.
        drops: every member that was dropped, with why.
        doubted: members that said that the model they were sent is not the plan's.
        vault: what accumulator and spools are encrypted with, if they are.
        revocations: the list that the plan names.
    """

    job_id: str
    core: Session
    state: State
    folder: Path
    certificates: tuple[bytes, ...] = field(repr=False)
    training_config: bytes = field(repr=False)
    model_size: int
    slots: UploadSlots
    opened_at: float
    revocations: RevocationList
    vault: Vault | None = None
    spools: dict[int, Spool] = field(default_factory=dict)
    additions: list[asyncio.Task[None]] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    sitting_out: dict[str, str] = field(default_factory=dict)
    drops: dict[str, str] = field(default_factory=dict)
    doubted: set[str] = field(default_factory=set)
    stage: Stage | None = None
    stage_since: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    uplink_bytes: int = 0
    timers: dict[object, asyncio.TimerHandle] = field(default_factory=dict)

    @property
    def id(self) -> bytes:
        """The session id."""
        return self.core.id

    @property
    def plan(self) -> RoundPlan:
        """The plan."""
        return self.core.plan

    @property
    def accumulator(self) -> Path:
        """The file with the running sum."""
        return self.folder / "accumulator"

    @property
    def shape(self) -> SessionShape:
        """Lengths of the vectors."""
        return shape_of(self.plan)

    @property
    def certificate_bundle(self) -> bytes:
        """The roster's certificates as they are downloaded."""
        return encode_certificates(self.certificates)

    def index_of(self, participant: str, fingerprint: bytes) -> int | None:
        """The roster index of a connected participant, by name and certificate."""
        return self.plan.index_of(participant, fingerprint)

    def name(self, index: int) -> str:
        """The name at a roster index."""
        return self.plan.roster[index].participant

    def names(self, members: frozenset[int]) -> tuple[str, ...]:
        """Names of a set of members, in roster order."""
        return self.plan.participants(members)

    def spool(self, index: int) -> Spool:
        """The member's upload, made at the first use."""
        if index not in self.spools:
            self.spools[index] = Spool(self.folder / f"upload-{index}", self.shape, self._seal(index))
        return self.spools[index]

    def _seal(self, index: int) -> UploadSeal | None:
        if self.vault is None:
            return None
        return UploadSeal(self.vault, self.vault.accumulator(self.id), self.vault.upload(self.id, index))

    def grant(self, index: int) -> UploadGrant:
        """The grant for a member: where its upload goes on."""
        return UploadGrant(*self.spool(index).offsets)

    def opening(self) -> OpenSession:
        """The proposal as it goes to every member."""
        bundle = self.certificate_bundle
        return OpenSession(
            self.core.proposal,
            self.training_config,
            self.model_size,
            hashlib.sha256(bundle).digest(),
            len(bundle),
            revocation_list_size=len(self.revocations.der),
        )

    def note_drop(self, name: str, reason: DropReason, detail: str) -> str:
        """Remember a dropped member and whether it can be asked again; returns why it is out, in words."""
        why = self.drops[name] = because(reason.value, detail)
        code = decline_code(reason.value, detail)
        if code is DeclineCode.PARTICIPATION:
            self.sitting_out[name] = why
        elif reason in KEPT_OUT_UNTIL_RECONNECT:
            self.excluded[name] = why
        if code is DeclineCode.WRONG_MODEL:
            self.doubted.add(name)
        return why

    def withdrawn(self, revocations: RevocationList) -> dict[int, str]:
        """The members whose certificates a list withdraws, each with why."""
        found = {index: withdrawn(der, revocations) for index, der in enumerate(self.certificates)}
        return {index: why for index, why in found.items() if why}

    def enter_stage(self, stage: Stage | None, now: float) -> None:
        """Close the books of the stage before."""
        if self.stage is not None:
            self.stage_seconds[self.stage.value] = now - self.stage_since
        self.stage, self.stage_since = stage, now

    def transcript(self, state: State) -> Transcript:
        """What is known of the session in `state`, signed by those whom it concerns."""
        state = state.gathered if isinstance(state, RemovingMasks) else state
        base = Transcript(self.core.proposal.plan_bytes, self.core.proposal.signature, self.certificates, {}, {})
        match state:
            case CollectingKeys():
                return replace(base, advertised=state.answers)
            case CollectingShares():
                return replace(base, advertised=state.advertised, dealings=_messages(state.answers))
            case CollectingUpdates() | CollectingSignatures():
                return replace(base, advertised=state.advertised, dealings=_messages(state.dealings))
            case CollectingUnmask():
                return replace(
                    base,
                    advertised=state.advertised,
                    dealings=_messages(state.dealings),
                    u3=state.sets.u3,
                    signatures=state.signatures,
                    revealed=state.answers,
                )
            case _:
                return base

    def cancel_timers(self) -> None:
        """Stop every timer."""
        for timer in self.timers.values():
            timer.cancel()
        self.timers.clear()


def shape_of(plan: RoundPlan) -> SessionShape:
    """Lengths of a plan's vectors."""
    return SessionShape(plan.parameters, plan.encoding.ring_bits, len(plan.statistics))


def public_keys(certificates: tuple[bytes, ...]) -> tuple[ec.EllipticCurvePublicKey, ...]:
    """The keys of certificates that were verified when their holders connected."""
    found = []
    for der in certificates:
        key = x509.load_der_x509_certificate(der).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        found.append(key)
    return tuple(found)


def deadline_s(plan: RoundPlan, stage: Stage) -> float:
    """How long a stage may take, in seconds."""
    by_stage: Mapping[Stage, int] = {
        Stage.ADVERTISE_KEYS: plan.deadlines.advertise_keys_ms,
        Stage.SHARE_KEYS: plan.deadlines.share_keys_ms,
        Stage.MASKED_UPDATE: plan.deadlines.masked_update_ms,
        Stage.CONSISTENCY_CHECK: plan.deadlines.consistency_check_ms,
        Stage.UNMASK: plan.deadlines.unmask_ms,
    }
    return by_stage[stage] / 1000


def _messages(dealings: Mapping[int, Dealing]) -> dict[int, ShareKeys]:
    return {index: dealing.message for index, dealing in dealings.items()}
