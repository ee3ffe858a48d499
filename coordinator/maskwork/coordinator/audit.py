"""The coordinator's audit trail: what goes into its log, the head that plans name, and what sites are shown of it.

It knows how things are written down, not when: `audit_store` writes what the database took, `job_runner` asks for the
head of a plan, the services tell who asked for what. Certificates are written once for each fingerprint, before the
first plan whose roster names them.

Rule: the head that a plan names is on the disk before the plan is signed, so no crash can take back what a site holds.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import structlog

from maskwork.audit import chain
from maskwork.audit.lines import Entry
from maskwork.audit.log import AuditLog
from maskwork.audit.records import Certificate, CertificateEvent, Opened, Operator, Record, Service
from maskwork.audit.records import Signer as SignerRecord
from maskwork.net.identity import VerifiedCertificate, fingerprint
from maskwork.secagg.keys import Signer
from maskwork.wire.codec import OpenSession, ShownHistory
from maskwork.wire.history_codec import MAX_INLINE

log = structlog.get_logger("maskwork.coordinator")

LOG_NAME = "audit.log"
TAILS_KEPT = 256
"""How many different long tails may be waiting to be fetched; each is two numbers here."""


class Trail:
    """The coordinator's log and what hangs on it. Use `Trail.open`, or `Trail.in_memory`; `close` it.

    Attributes:
        log: the records.
        earlier: jobs that had begun before this log did, each with the round and attempt that came next. None in a log
            of today: `AuditedStore.follow` begins none for a database that has jobs.
    """

    def __init__(self, records: AuditLog, *, certificate: bytes, signer: Signer, clock: Callable[[], float]) -> None:
        self.log = records
        self._certificate = certificate
        self._signer = signer
        self._clock = clock
        self.earlier: Mapping[str, tuple[int, int]] = {}
        self._given: tuple[bytes, int] = (chain.EMPTY_HEAD, 0)
        self._tails: OrderedDict[bytes, tuple[int, int]] = OrderedDict()

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
    ) -> Trail:
        """Open the log at `path`, creating it if it is missing; `begin` must follow.

        Raises:
            StoreError: it cannot be read or written, another process has it, or a record in it is damaged.
        """
        signs: list[Opened | SignerRecord] = []

        def look(entry: Entry) -> None:
            if isinstance(entry.record, Opened | SignerRecord):
                signs.append(entry.record)

        records = AuditLog.open(path, federation, signer, fsync=fsync, look=look)
        last = signs[-1].certificate if signs else certificate
        trail = cls(records, certificate=last, signer=signer, clock=clock)
        if signs and isinstance(signs[0], Opened):
            trail.earlier = signs[0].earlier
        try:
            trail.renewed(certificate, signer)
        except BaseException:
            records.close()
            raise
        return trail

    @classmethod
    def in_memory(
        cls, *, federation: str, certificate: bytes, signer: Signer, clock: Callable[[], float] = time.time
    ) -> Trail:
        """A trail that ends with its process."""
        records = AuditLog.in_memory(federation, signer)
        trail = cls(records, certificate=certificate, signer=signer, clock=clock)
        trail.begin()
        return trail

    def close(self) -> None:
        """Let the log go. Calling it again does nothing."""
        self.log.close()

    def begin(self) -> None:
        """Begin a new log, or go on with the one that is there, and say that the service starts."""
        if not self.log.size:
            self.write(Opened(federation=self.log.federation, certificate=self._certificate))
        if self.log.dropped:
            detail = f"an incomplete last line of {self.log.dropped} bytes was dropped: the last process was killed"
            log.warning("the audit log was repaired", detail=detail)
            self.write(Service(event="recovered", detail=detail))
        self.write(Service(event="started"))

    def write(self, *records: Record, durable: bool = True) -> None:
        """Write records down; one that may be there once only and is there already changes nothing.

        Raises:
            StoreError: they cannot be written.
        """
        self.log.append(records, at=self._clock(), durable=durable)

    def renewed(self, certificate: bytes, signer: Signer) -> None:
        """This coordinator's own certificate was replaced: from now on its key signs the log. The same: nothing."""
        self._signer = signer
        if certificate != self._certificate:
            self._certificate = certificate
            self.log.sign_with(signer)
            self.write(SignerRecord(certificate=certificate))

    # --- what others tell ---------------------------------------------------------------------------------

    def certificate_event(self, event: CertificateEvent) -> None:
        """An enrolment, a renewal, a revocation or a new revocation list."""
        self.write(event)

    def asked_for(
        self, action: str, caller: VerifiedCertificate, *, job: str, round_number: int = 0, model: bytes = b""
    ) -> None:
        """Somebody asked for something that changes or hands out something: "submit", "abort" or "export"."""
        known = _certificates([caller.der])
        by = Operator(
            action=action,
            by=caller.identity.uri,
            fingerprint=caller.fingerprint,
            job=job,
            round_number=round_number,
            model=model,
        )
        self.write(*known, by)

    # --- plans --------------------------------------------------------------------------------------------

    def head_for(self, certificates: Iterable[bytes]) -> bytes:
        """The head for a plan whose roster has these certificates (DER); durable, certificates included."""
        self.write(*_certificates(certificates))
        self._given = (self.log.head, self.log.size)
        return self.log.head

    def standing(self) -> tuple[bytes, int]:
        """The head as it is now, and how many records are under it."""
        return self.log.head, self.log.size

    def size_of(self, head: bytes) -> int | None:
        """How many records there were when the chain had this head; None: it never had."""
        if self._given[0] == head:
            return self._given[1]
        digests = self.log.digests(0, self.log.size)
        heads = chain.heads_from(chain.EMPTY_HEAD, 0, digests)
        return 0 if head == chain.EMPTY_HEAD else next((n for n, h in enumerate(heads, 1) if h == head), None)

    def shown(self, offer: OpenSession, kept: int) -> OpenSession:
        """The offer with what leads from the head that a site keeps, of so many records, to the one in the plan."""
        head = offer.proposal.plan.audit_head
        size = self.size_of(head)
        if not size:
            return offer
        since = min(kept, size)
        signature = chain.sign_head(self._signer, self.log.federation, size, head).signature
        digests = self.log.digests(since, size)
        if len(digests) <= MAX_INLINE:
            return replace(offer, history=ShownHistory(size, signature, since, digests))
        digest = hashlib.sha256(digests).digest()
        self._tails[digest] = (since, size)
        self._tails.move_to_end(digest)
        if len(self._tails) > TAILS_KEPT:
            self._tails.popitem(last=False)
        return replace(offer, history=ShownHistory(size, signature, since, digests_digest=digest))

    def tail(self, digest: bytes) -> bytes | None:
        """The digests that an offer named instead of carrying them."""
        found = self._tails.get(digest)
        return None if found is None else self.log.digests(*found)


def _certificates(certificates: Iterable[bytes]) -> list[Certificate]:
    return [Certificate(certificate=der, fingerprint=fingerprint(der)) for der in certificates]
