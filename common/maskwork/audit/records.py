"""What is written down, one model for each kind of record: by the coordinator, by a site, or by both.

A record that exists is well-formed; what it claims is checked by `contents`, never here. Digests, fingerprints,
signatures and bitmaps are hexadecimal, plans and certificates base64.

Rule: no secret, no share, no mask, no update and no example. What left a site is there as a number of bytes and a
digest. A field that could hold a value of somebody's data has no place in any of these.
"""

from __future__ import annotations

import base64
from typing import Annotated, ClassVar, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

FORMAT: Final = 1


def _from_hex(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or value != value.lower():
        raise ValueError("not lower-case hexadecimal")
    return bytes.fromhex(value)


def _from_base64(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError("not base64")
    return base64.b64decode(value, validate=True)


def _to_base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


Hex = Annotated[bytes, BeforeValidator(_from_hex), PlainSerializer(bytes.hex, return_type=str)]
Base64 = Annotated[bytes, BeforeValidator(_from_base64), PlainSerializer(_to_base64, return_type=str)]
Digest = Annotated[Hex, Field(min_length=32, max_length=32)]
Signature = Annotated[Hex, Field(min_length=64, max_length=64)]
Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """Root of the records; `KIND` is its name in the log."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
    KIND: ClassVar[str] = ""

    @property
    def key(self) -> tuple[str, ...] | None:
        """What there is at most one record of; None: as many as there are."""
        return None


# --- both sides -----------------------------------------------------------------------------------------------------


class Opened(Record):
    """A log begins. It is the first record, and says whose log it is and who signs it.

    Attributes:
        format: of the log.
        federation: the federation.
        certificate: of the owner, DER.
        earlier: jobs that the owner had begun before there was a log, each with the round and attempt that come next.
    """

    KIND = "opened"
    format: int = FORMAT
    federation: str
    certificate: Base64
    earlier: dict[str, tuple[int, int]] = Field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """One for each log."""
        return (self.KIND,)


class Signer(Record):
    """From this record on another certificate of the same owner signs."""

    KIND = "signer"
    certificate: Base64


class Service(Record):
    """The service started, stopped, or found something after a crash; `event` says which, `detail` more."""

    KIND = "service"
    event: str
    detail: str = ""


class Certificate(Record):
    """A certificate that later records mean by its fingerprint, DER."""

    KIND = "certificate"
    certificate: Base64
    fingerprint: Digest

    @property
    def key(self) -> tuple[str, ...]:
        """One for each fingerprint."""
        return (self.KIND, self.fingerprint.hex())


class CertificateEvent(Record):
    """Something happened to a certificate of the federation.

    Attributes:
        event: "enrolled", "renewed", "revoked", or "list" when a new revocation list came into force.
        subject: the URI name that it is about; empty for a list.
        fingerprint: of the certificate; empty for a list.
        number: of the revocation list.
        digest: of the revocation list.
        by: URI name of whoever caused it, where it is known.
        detail: for people.
    """

    KIND = "certificate-event"
    event: str
    subject: str = ""
    fingerprint: Hex = b""
    number: Count | None = None
    digest: Hex = b""
    by: str = ""
    detail: str = ""


class Plan(Record):
    """A plan that the coordinator signed, in full.

    Attributes:
        session: its session id.
        plan: the bytes as sent.
        signature: the coordinator's, over the session id.
        audit_size: how many records the chain had when its head was written into the plan.
    """

    KIND = "plan"
    session: Digest
    plan: Base64
    signature: Signature
    audit_size: Count

    @property
    def key(self) -> tuple[str, ...]:
        """One for each session."""
        return (self.KIND, self.session.hex())


# --- the coordinator's ----------------------------------------------------------------------------------------------


class JobSubmitted(Record):
    """A job was taken in.

    Attributes:
        job: its id.
        name: what the submitter calls it.
        task: the task.
        spec: the job file, canonical JSON.
        model: digest of its initial model.
        submitted_by: URI name.
    """

    KIND = "job-submitted"
    job: str
    name: str
    task: str
    spec: str
    model: Digest
    submitted_by: str

    @property
    def key(self) -> tuple[str, ...]:
        """One for each job."""
        return (self.KIND, self.job)


class JobEnded(Record):
    """A job reached a final state."""

    KIND = "job-ended"
    job: str
    state: str
    reason: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """One for each job."""
        return (self.KIND, self.job)


class Operator(Record):
    """Somebody with a certificate asked for something that changes or hands out something.

    Attributes:
        action: "submit", "abort" or "export".
        by: URI name of the caller.
        fingerprint: of the caller's certificate.
        job: the job concerned.
        round_number: the round whose model was exported; 0: not about a round.
        model: digest of the model that was handed out or in; empty: none.
    """

    KIND = "operator"
    action: str
    by: str
    fingerprint: Digest
    job: str
    round_number: Count = 0
    model: Hex = b""


class Dropped(Record):
    """A participant was left out of the rest of an attempt. A decline carries the site's own words in `detail`."""

    KIND = "dropped"
    job: str
    round_number: int
    attempt: int
    participant: str
    stage: str
    reason: str
    detail: str

    @property
    def key(self) -> tuple[str, ...]:
        """The first reason stands."""
        return (self.KIND, self.job, str(self.round_number), str(self.attempt), self.participant)


class Survivors(Record):
    """Unmasking is asked for: the three sets, and who signed them. Written before the first share is asked for.

    Attributes:
        session: the session.
        u1: completed step 0; bitmap in roster order.
        u2: completed step 1.
        u3: completed step 2: whose updates are in the sum.
        signatures: each signer's `ConsistencyCheck`, by roster index.
        advertisements: digest of each step-0 message, by roster index; the sparse graph is seeded by them.
    """

    KIND = "survivors"
    session: Digest
    u1: Hex
    u2: Hex
    u3: Hex
    signatures: dict[int, Signature]
    advertisements: dict[int, Digest]

    @property
    def key(self) -> tuple[str, ...]:
        """One U3 per session, ever."""
        return (self.KIND, self.session.hex())


class Committed(Record):
    """A round is in the model.

    Attributes:
        session: the session.
        job: the job.
        round_number: from 1.
        attempt: the attempt that succeeded.
        model_in: digest of the model that the round started from.
        model_out: digest of the model after it.
        survivors: U3 by name, in roster order.
        dropouts: the roster without U3.
        statistics: decoded sums and means over all survivors.
        stage_seconds: seconds by stage.
        uplink_bytes: bytes of masked updates received.
        committed_at: Unix time, seconds.
    """

    KIND = "committed"
    session: Digest
    job: str
    round_number: int
    attempt: int
    model_in: Digest
    model_out: Digest
    survivors: tuple[str, ...]
    dropouts: tuple[str, ...]
    statistics: dict[str, Finite]
    stage_seconds: dict[str, Finite]
    uplink_bytes: Count
    committed_at: Finite

    @property
    def key(self) -> tuple[str, ...]:
        """One for each session."""
        return (self.KIND, self.session.hex())


class AttemptEnded(Record):
    """An attempt ended without a commit."""

    KIND = "attempt-ended"
    session: Digest
    outcome: str
    reason: str

    @property
    def key(self) -> tuple[str, ...]:
        """One for each session."""
        return (self.KIND, self.session.hex())


class RolledBack(Record):
    """Committed rounds were taken back because their models were damaged.

    Attributes:
        job: the job.
        rounds: the numbers taken back.
        model: digest of the model that the job goes on from.
        reason: what was damaged.
    """

    KIND = "rolled-back"
    job: str
    rounds: tuple[int, ...]
    model: Digest
    reason: str

    @property
    def key(self) -> tuple[str, ...]:
        """A round is taken back once."""
        return (self.KIND, self.job, ",".join(map(str, self.rounds)))


class Evidence(Record):
    """A signed transcript that convicts a participant is in the coordinator's database; here is its digest."""

    KIND = "evidence"
    session: Digest
    accused: str
    evidence: str
    transcript: Digest

    @property
    def key(self) -> tuple[str, ...]:
        """One for each transcript."""
        return (self.KIND, self.transcript.hex())


# --- a site's -------------------------------------------------------------------------------------------------------


class PlanDeclined(Record):
    """A signed plan that the site did not take part in, in full, and why."""

    KIND = "plan-declined"
    session: Digest
    plan: Base64
    signature: Signature
    code: str
    detail: str

    @property
    def key(self) -> tuple[str, ...]:
        """One for each session."""
        return (self.KIND, self.session.hex())


class HeadKept(Record):
    """The head of the coordinator's chain that the site holds from now on. Written before step 0 is answered.

    Attributes:
        size: records that the head stands for.
        head: 32 bytes; it is the plan's `audit_head`.
        signature: the coordinator's, over federation, size and head.
        session: the session whose signed plan names the head.
        since: size of the head that it was seen to extend; 0: the first one that this site was shown.
        digests: digests of the records from `since` on, one after the other; empty when there are too many to keep.
    """

    KIND = "head-kept"
    size: Count
    head: Digest
    signature: Signature
    session: Digest
    since: Count
    digests: Base64 = b""


class HistoryRefused(Record):
    """The coordinator showed a history that does not extend the one kept: both signed heads, as evidence.

    `kept_*` is what this site holds, `offered_*` what a signed plan of the session named.
    """

    KIND = "history-refused"
    session: Digest
    kept_size: Count
    kept_head: Digest
    kept_signature: Hex
    offered_size: Count
    offered_head: Digest
    offered_signature: Hex
    detail: str


class HistoryAccepted(Record):
    """The site's operator accepted another history of the coordinator, by an explicit act."""

    KIND = "history-accepted"
    size: Count
    head: Digest
    reason: str


class ModelReceived(Record):
    """The global model of a session was fetched and hashed."""

    KIND = "model-received"
    session: Digest
    model: Digest
    bytes: Count


class SetsSigned(Record):
    """The survivor sets that the site signed, with its signature. Written before that is sent."""

    KIND = "sets-signed"
    session: Digest
    u1: Hex
    u2: Hex
    u3: Hex
    signature: Signature

    @property
    def key(self) -> tuple[str, ...]:
        """One U3 per session, ever."""
        return (self.KIND, self.session.hex())


class Released(Record):
    """The site helps to unmask. Written before its shares are sent.

    Attributes:
        session: the session.
        model: digest of the model that the updates are relative to.
        survivors: U3 by name.
        signatures: the signatures over the very sets that the site signed, which it verified, by roster index.
    """

    KIND = "released"
    session: Digest
    model: Digest
    survivors: tuple[str, ...]
    signatures: dict[int, Signature]

    @property
    def key(self) -> tuple[str, ...]:
        """One for each session."""
        return (self.KIND, self.session.hex())


class Sent(Record):
    """Something leaves the site: its kind, how many bytes, and their SHA-256. Written before it is sent.

    Attributes:
        session: the session.
        what: the kind of message; "update" and "statistics" are the two segments of the masked upload.
        bytes: how many.
        digest: of those bytes; empty if they were not hashed.
    """

    KIND = "sent"
    session: Digest
    what: str
    bytes: Count
    digest: Hex

    @property
    def key(self) -> tuple[str, ...]:
        """The same bytes sent again are not another message."""
        return (self.KIND, self.session.hex(), self.what, self.digest.hex())


class SessionEnded(Record):
    """A session is over for the site.

    Attributes:
        session: the session.
        outcome: "released", "closed", "aborted", or "lost" if the agent did not live to see the end.
        detail: why.
    """

    KIND = "session-ended"
    session: Digest
    outcome: str
    detail: str

    @property
    def key(self) -> tuple[str, ...]:
        """One for each session."""
        return (self.KIND, self.session.hex())


KINDS: Final[dict[str, type[Record]]] = {
    kind.KIND: kind
    for kind in (
        Opened,
        Signer,
        Service,
        Certificate,
        CertificateEvent,
        Plan,
        JobSubmitted,
        JobEnded,
        Operator,
        Dropped,
        Survivors,
        Committed,
        AttemptEnded,
        RolledBack,
        Evidence,
        PlanDeclined,
        HeadKept,
        HistoryRefused,
        HistoryAccepted,
        ModelReceived,
        SetsSigned,
        Released,
        Sent,
        SessionEnded,
    )
}
"""Every kind by its name in the log."""
