"""What the coordinator remembers, as frozen dataclasses: jobs, attempts, drops, rounds, releases, evidence.

These are the domain's side of `maskwork.coordinator.store`; they know nothing of tables or SQL. They are NOT
wire messages (`maskwork.wire`) and they do not decide anything: the rules about which record may follow which
are the store's, and what to do next is `rounds.py`'s.

Rules
1. Rounds and attempts count from 1; (round, attempt) only ever grows within a job (DESIGN sections 4 and 6).
2. Digests are SHA-256, 32 raw bytes. Times are seconds since the Unix epoch, given by the caller.
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

FIRST_ROUND = 1
FIRST_ATTEMPT = 1


class JobState(StrEnum):
    """Where a job stands; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    ABORTED = "aborted"


class AttemptOutcome(StrEnum):
    """How an attempt ended; an open one has none yet. The store writes `COMMITTED` and `ROLLED_BACK` itself."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    ABANDONED = "abandoned"  # found open after a restart, before Unmask had been asked for
    ROLLED_BACK = "rolled-back"  # it had committed; its model was damaged later, and the round was taken back


# What `Store.set_job_state` allows. COMPLETED is missing on purpose: the last commit is what completes a job.
TRANSITIONS: Mapping[JobState, frozenset[JobState]] = types.MappingProxyType(
    {
        JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.ABORTED}),
        JobState.RUNNING: frozenset({JobState.FAILED, JobState.ABORTED}),
        JobState.COMPLETED: frozenset(),
        JobState.FAILED: frozenset(),
        JobState.ABORTED: frozenset(),
    }
)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job and how far it has come.

    Attributes:
        job_id: Unique name of the job in this federation.
        name: What its submitter calls it.
        task: Name under which sites offer the code.
        state: Where it stands.
        rounds_total: Rounds to commit, at least 1; those rolled back do not count.
        next_round: The round being worked on; it never goes back. `last_round + 1` once all are in.
        next_attempt: Lowest attempt number that `next_round` may still open.
        spec_json: The submitted job, as JSON.
        submitted_by: URI name of the submitter's certificate.
        submitted_at: Unix time, seconds.
        initial_model: SHA-256 of the model that round 1 starts from.
        current_model: SHA-256 of the model that `next_round` starts from.
        reason: Why it stands where it stands, for people; empty if there is nothing to say.
        rolled_back: Rounds that had committed and were taken back, because their models were damaged.
    """

    job_id: str
    name: str
    task: str
    state: JobState
    rounds_total: int
    next_round: int
    next_attempt: int
    spec_json: str
    submitted_by: str
    submitted_at: float
    initial_model: bytes
    current_model: bytes
    reason: str = ""
    rolled_back: int = 0

    @property
    def last_round(self) -> int:
        """The number of the last round: each round that was rolled back used up one."""
        return self.rounds_total + self.rolled_back

    @property
    def rounds_committed(self) -> int:
        """Rounds that are in the current model."""
        return self.next_round - 1 - self.rolled_back


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt at a round: the signed plan, and how it ended.

    Attributes:
        job_id: The job.
        round_number: From 1.
        attempt: From 1 in each round.
        session_id: SHA-256 session id of the plan.
        plan_bytes: The plan exactly as sent.
        plan_signature: The coordinator's signature over it.
        opened_at: Unix time, seconds.
        closed_at: Unix time, seconds; None while open.
        outcome: None while open.
        reason: Why it ended so.
    """

    job_id: str
    round_number: int
    attempt: int
    session_id: bytes
    plan_bytes: bytes
    plan_signature: bytes
    opened_at: float
    closed_at: float | None = None
    outcome: AttemptOutcome | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DropRecord:
    """One participant dropped from one attempt.

    Attributes:
        job_id: The job.
        round_number: From 1.
        attempt: From 1.
        participant: Its name in the roster.
        stage: The step it was dropped in.
        reason: Enumerated reason code.
        detail: For our log; never sent to the peer.
        at: Unix time, seconds.
    """

    job_id: str
    round_number: int
    attempt: int
    participant: str
    stage: str
    reason: str
    detail: str
    at: float


@dataclass(frozen=True, slots=True)
class CommittedRound:
    """One round that is in the model.

    Attributes:
        job_id: The job.
        round_number: From 1.
        attempt: The attempt that succeeded.
        session_id: Its session id.
        model: SHA-256 of the model after this round; its file must be in the `ModelStore` already.
        survivors: U3, by name, in roster order.
        dropouts: The roster without U3.
        statistics: Decoded aggregate statistics by name; finite.
        stage_seconds: Seconds by stage; finite.
        uplink_bytes: Bytes of masked updates received.
        committed_at: Unix time, seconds.
    """

    job_id: str
    round_number: int
    attempt: int
    session_id: bytes
    model: bytes
    survivors: tuple[str, ...]
    dropouts: tuple[str, ...]
    statistics: Mapping[str, float]
    stage_seconds: Mapping[str, float]
    uplink_bytes: int
    committed_at: float


@dataclass(frozen=True, slots=True)
class RolledBackRound:
    """A round that had committed and was taken back. It stays on record; its number is never used again.

    Attributes:
        committed: The round as it was committed.
        at: When it was taken back, Unix time in seconds.
        reason: What was damaged, and which model the job went on from.
    """

    committed: CommittedRound
    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class ResumeRecord:
    """What a session needs to go on after a restart, once Unmask may have been asked for.

    It holds sums, bitmaps and signatures, all of them public to the coordinator; no session secret.

    Attributes:
        session_id: The session.
        job_id: Its job.
        blob: State of the server half, opaque to the store.
        accumulator_path: File with the masked sum; empty if the blob carries it.
        survivors: U3, by name, in roster order.
        saved_at: Unix time, seconds.
    """

    session_id: bytes
    job_id: str
    blob: bytes
    accumulator_path: str
    survivors: tuple[str, ...]
    saved_at: float


@dataclass(frozen=True, slots=True)
class ReleasedSet:
    """A survivor set whose unmasking was asked for, whether or not its round then committed. Kept for audit.

    Attributes:
        session_id: The session.
        job_id: Its job.
        round_number: From 1.
        attempt: From 1.
        base_model: SHA-256 of the model that the round started from.
        survivors: U3, by name, in roster order.
        at: Unix time, seconds.
    """

    session_id: bytes
    job_id: str
    round_number: int
    attempt: int
    base_model: bytes
    survivors: tuple[str, ...]
    at: float


@dataclass(frozen=True, slots=True)
class EvidenceRecord:
    """A signed transcript that convicts a participant.

    Attributes:
        job_id: The job.
        session_id: The session that it happened in.
        kind: What it proves, for instance `DealerEquivocated`.
        accused: The participant's name.
        transcript: The signed messages, serialised.
        at: Unix time, seconds.
    """

    job_id: str
    session_id: bytes
    kind: str
    accused: str
    transcript: bytes
    at: float
