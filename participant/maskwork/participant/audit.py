"""A site's own audit trail: what it agreed to, what it signed, what left it, and the coordinator's heads that it holds.

The driver tells what happens, one call for each; here it becomes records, durable before the message that depends on
them. From the same log the site knows at its next start which head of the coordinator's it holds: there is no second
place for it. Whether a history may be gone along with is `audit_history`'s to say.

Rule: no value of this site's data, no share and no update enters a record; a message is its bytes' number and digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.audit.chain import DIGEST_BYTES, SignedHead
from maskwork.audit.lines import Entry
from maskwork.audit.log import AuditLog
from maskwork.audit.records import (
    Certificate,
    HeadKept,
    HistoryAccepted,
    HistoryRefused,
    ModelReceived,
    Opened,
    Plan,
    PlanDeclined,
    Record,
    Released,
    Sent,
    Service,
    SessionEnded,
    SetsSigned,
)
from maskwork.audit.records import Signer as SignerRecord
from maskwork.net.identity import fingerprint
from maskwork.participant.audit_history import (
    PIECE_BYTES,
    FinishedRound,
    HistoryDiffers,
    Known,
    check_digests,
    check_history,
    check_previous_survivors,
)
from maskwork.secagg import client_states as core
from maskwork.secagg.errors import PlanRefused
from maskwork.secagg.keys import Signer
from maskwork.secagg.messages import ConsistencyCheck, ParticipantMessage, Proposal, encode_members
from maskwork.secagg.plan import RoundPlan
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession
from maskwork.wire.plan_codec import decode_plan

log = structlog.get_logger("maskwork.participant")

LOG_NAME = "audit.log"
MOST_KEPT = 4096 * DIGEST_BYTES
"""Most bytes of digests that go into one record with a head; of more, only the head is kept."""
HEADS_KEPT = 1000
REFUSALS_KEPT = 1000
"""Most refused histories written down in full: enough to prove anything, and a coordinator cannot fill the disk."""


@dataclass(slots=True)
class _Open:
    """A session that was taken up and has not ended."""

    plan: RoundPlan
    survivors: tuple[str, ...] = ()


class _Memory:
    """What the records of a site mean for what comes next: read again at every start, kept up with each new one."""

    def __init__(self) -> None:
        self.known = Known()
        self.open: dict[bytes, _Open] = {}
        self.refusals = 0
        self.signed_by = b""

    def take(self, record: Record) -> None:
        match record:
            case Opened() | SignerRecord():
                self.signed_by = record.certificate
            case Plan():
                self.open.setdefault(record.session, _Open(decode_plan(record.plan)))
            case HeadKept():
                self._keep(SignedHead(record.size, record.head, record.signature))
            case HistoryAccepted():
                self.known.heads.clear()
                self._keep(SignedHead(record.size, record.head, b""))
            case HistoryRefused():
                self.refusals += 1
            case Released() if (of := self.open.get(record.session)) is not None:
                of.survivors = record.survivors
            case SessionEnded() if (of := self.open.pop(record.session, None)) is not None:
                if record.outcome == "released" and of.survivors:
                    finished = FinishedRound(of.plan.round_number, of.plan.rounds_total, of.survivors)
                    self.known.finished[of.plan.job] = finished
            case _:
                pass

    def _keep(self, kept: SignedHead) -> None:
        self.known.kept = kept
        self.known.heads[kept.size] = kept.head
        while len(self.known.heads) > HEADS_KEPT:
            del self.known.heads[next(iter(self.known.heads))]


class SiteTrail:
    """The site's log. Use `SiteTrail.open`, or `SiteTrail.in_memory`; `close` it.

    Attributes:
        log: the records.
    """

    def __init__(self, records: AuditLog, memory: _Memory, *, certificate: bytes, clock: Callable[[], float]) -> None:
        self.log = records
        self._memory = memory
        self._certificate = certificate
        self._clock = clock
        self._tails: dict[bytes, bytes] = {}

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        federation: str,
        certificate: bytes,
        signer: Signer,
        clock: Callable[[], float] = time.time,
        fsync: Callable[[int], None] = os.fsync,
    ) -> SiteTrail:
        """Open the log at `path`, creating it if it is missing, and say that the agent starts.

        Raises:
            StoreError: it cannot be read or written, another process has it, or a record in it is damaged.
        """
        memory = _Memory()

        def look(entry: Entry) -> None:
            memory.take(entry.record)

        records = AuditLog.open(path, federation, signer, fsync=fsync, look=look)
        trail = cls(records, memory, certificate=certificate, clock=clock)
        try:
            trail._begin()
        except BaseException:
            records.close()
            raise
        return trail

    @classmethod
    def in_memory(
        cls, *, federation: str, certificate: bytes, signer: Signer, clock: Callable[[], float] = time.time
    ) -> SiteTrail:
        """A trail that ends with its process."""
        trail = cls(AuditLog.in_memory(federation, signer), _Memory(), certificate=certificate, clock=clock)
        trail._begin()
        return trail

    def close(self) -> None:
        """Let the log go. Calling it again does nothing."""
        self.log.close()

    @property
    def known(self) -> Known:
        """What this site knows of the coordinator's past."""
        return self._memory.known

    @property
    def kept_size(self) -> int:
        """How many records are under the head of the coordinator's that this site keeps."""
        return self.known.kept.size

    def renewed(self, certificate: bytes, signer: Signer) -> None:
        """This site's own certificate was replaced: from now on its key signs the log. The same again: nothing."""
        if certificate != self._certificate:
            self._certificate = certificate
            self.log.sign_with(signer)
            self._write(SignerRecord(certificate=certificate))

    def _begin(self) -> None:
        if not self.log.size:
            self._write(Opened(federation=self.log.federation, certificate=self._certificate))
        elif self._memory.signed_by != self._certificate:
            self._write(SignerRecord(certificate=self._certificate))
        if self.log.dropped:
            detail = f"an incomplete last line of {self.log.dropped} bytes was dropped: the last process was killed"
            log.warning("the audit log was repaired", detail=detail)
            self._write(Service(event="recovered", detail=detail))
        self._write(Service(event="started"))
        for session in tuple(self._memory.open):
            self._end(session, "lost", "the agent was ended in the middle of it")

    def _write(self, *records: Record, durable: bool = True) -> None:
        self.log.append(records, at=self._clock(), durable=durable)
        for record in records:
            self._memory.take(record)

    # --- offers -------------------------------------------------------------------------------------------

    def check(self, session: bytes, offer: OpenSession, key: ec.EllipticCurvePublicKey) -> None:
        """Whether an offer goes on from the past known here; `check_fetched` follows if its digests are elsewhere.

        Raises:
            PlanRefused: it does not. What contradicts a head held here is kept as evidence and told to the operator.
        """
        plan, shown = offer.proposal.plan, offer.history
        try:
            check_history(self.known, plan, shown, key=key)
            check_previous_survivors(self.known.finished, plan)
            if not shown.digests_digest:
                (kept,) = check_digests(self.known, plan, shown, [shown.digests])
                self._tails = {session: kept if len(kept) <= MOST_KEPT else b""}
        except HistoryDiffers as found:
            self._refuse(session, offer, found)
            raise

    async def check_fetched(self, session: bytes, offer: OpenSession, file: Path) -> PlanRefused | None:
        """The rest of `check`, from the file with the digests; it may be long, and others get their turn meanwhile."""
        kept = bytearray()
        try:
            with file.open("rb") as digests:
                pieces = iter(lambda: digests.read(PIECE_BYTES), b"")
                for piece in check_digests(self.known, offer.proposal.plan, offer.history, pieces):
                    kept += piece if len(kept) <= MOST_KEPT else b""
                    await asyncio.sleep(0)
        except HistoryDiffers as found:
            self._refuse(session, offer, found)
            return found
        except PlanRefused as refused:
            return refused
        self._tails = {session: bytes(kept) if len(kept) <= MOST_KEPT else b""}
        return None

    def _refuse(self, session: bytes, offer: OpenSession, found: HistoryDiffers) -> None:
        kept, plan, shown = self.known.kept, offer.proposal.plan, offer.history
        log.error(
            "the coordinator shows another history",
            detail=found.detail,
            held_size=kept.size,
            held_head=kept.head.hex(),
            shown_size=shown.size,
            shown_head=plan.audit_head.hex(),
            remedy="ask the coordinator's operator why. If it was restored from a backup and you accept that: stop "
            "this agent, then `maskwork participant accept-history` with "
            f"--size {shown.size} --head {plan.audit_head.hex()}",
        )
        if self._memory.refusals < REFUSALS_KEPT:
            self._write(
                HistoryRefused(
                    session=session,
                    kept_size=kept.size,
                    kept_head=kept.head,
                    kept_signature=kept.signature,
                    offered_size=shown.size,
                    offered_head=plan.audit_head,
                    offered_signature=shown.signature,
                    detail=found.detail,
                )
            )

    def declined(self, session: bytes, proposal: Proposal, refused: PlanRefused, coordinator: bytes) -> None:
        """A signed plan in which this site does not take part."""
        self._write(
            _certificate(coordinator),
            PlanDeclined(
                session=session,
                plan=proposal.plan_bytes,
                signature=proposal.signature,
                code=refused.code.value,
                detail=refused.detail,
            ),
        )

    def accepted(self, session: bytes, offer: OpenSession, coordinator: bytes) -> None:
        """A plan is taken up, its model is here: plan and head are kept before anything is answered."""
        proposal, shown = offer.proposal, offer.history
        plan = Plan(session=session, plan=proposal.plan_bytes, signature=proposal.signature, audit_size=shown.size)
        model = ModelReceived(session=session, model=proposal.plan.model_digest, bytes=offer.model_size)
        records: list[Record] = [_certificate(coordinator), plan, model]
        if shown.size:
            records.append(
                HeadKept(
                    size=shown.size,
                    head=proposal.plan.audit_head,
                    signature=shown.signature,
                    session=session,
                    since=self.known.kept.size,
                    digests=self._tails.pop(session, b""),
                )
            )
        self._write(*records)

    def accept_history(self, size: int, head: bytes, reason: str) -> None:
        """The site's operator goes on from another history of the coordinator's."""
        self._write(HistoryAccepted(size=size, head=head, reason=reason))

    # --- sessions -----------------------------------------------------------------------------------------

    def sending(self, session: bytes, message: ParticipantMessage, state: core.State) -> None:
        """A message is about to leave; a signature over survivor sets is written down first."""
        if session not in self._memory.open:
            return
        encoded = codec.encode_request(session, message).SerializeToString()
        self._sent(session, type(message).__name__, len(encoded), hashlib.sha256(encoded).digest())
        if isinstance(message, ConsistencyCheck) and isinstance(state, core.SignedSets):
            size = state.session.plan.cohort
            u1, u2, u3 = (encode_members(m, size) for m in (state.sets.u1, state.sets.u2, state.sets.u3))
            self._write(SetsSigned(session=session, u1=u1, u2=u2, u3=u3, signature=message.signature))

    def releasing(self, record: core.RecordRelease, state: core.State) -> None:
        """Shares are about to leave, for these survivors, on the word of these signers."""
        assert isinstance(state, core.Unmasked)
        signers = dict(state.request.signatures)
        roster = state.session.site.certificates
        self._write(
            *(_certificate(roster[index]) for index in sorted(signers) if index in roster),
            Released(session=record.session, model=record.model_digest, survivors=record.survivors, signatures=signers),
        )

    def uploading(self, session: bytes, *, size: int, digest: bytes, statistics: bytes) -> None:
        """The masked upload begins to leave; asked for again, the same bytes leave again."""
        if session in self._memory.open:
            self._sent(session, "update", size, digest)
            self._sent(session, "statistics", len(statistics), hashlib.sha256(statistics).digest())

    def ended(self, session: bytes, state: core.State | None) -> None:
        """A session is over."""
        match state:
            case core.Completed(released=True):
                self._end(session, "released", "the coordinator says that the sum was released")
            case core.Aborted(reason=reason, detail=detail):
                self._end(session, "aborted", f"{reason.value}: {detail}")
            case _:
                self._end(session, "closed", "the coordinator closed it, or went on without this site")

    def _end(self, session: bytes, outcome: str, detail: str) -> None:
        if session in self._memory.open:
            self._write(SessionEnded(session=session, outcome=outcome, detail=detail), durable=False)

    def _sent(self, session: bytes, what: str, size: int, digest: bytes) -> None:
        self._write(Sent(session=session, what=what, bytes=size, digest=digest), durable=False)


def is_held(trail: SiteTrail, head: bytes | None) -> bool:
    """Whether a head that the ledger holds is one that the log knows of; a log that was cut or replaced does not."""
    return head is None or head in trail.known.heads.values()


def lacking(trail: SiteTrail, *, taken_up: Collection[bytes], released: Collection[bytes]) -> str:
    """What the log says is in the ledger, and is not; empty if nothing is.

    Each goes into the ledger first, so no kill leaves the log ahead: a ledger that lacks one was lost or replaced.

    Args:
        trail: the log.
        taken_up: the sessions whose plans the ledger has.
        released: the sessions whose survivor sets the ledger has.
    """
    parts = []
    for kind, what, known in (
        (Plan.KIND, "plans taken up", taken_up),
        (Released.KIND, "survivor sets answered for", released),
    ):
        told = {bytes.fromhex(key[1]) for key in trail.log.keys(kind)}
        if missing := told.difference(known):
            parts.append(f"{len(missing)} of {len(told)} {what}")
    return " and ".join(parts)


def _certificate(der: bytes) -> Certificate:
    return Certificate(certificate=der, fingerprint=fingerprint(der))
