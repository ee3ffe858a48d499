"""What happens in a job, as frozen dataclasses: the events that a watcher receives and the summaries that lists show.

The coordinator makes them, `maskwork.wire.job_codec` carries them, `maskwork.watch_view` shows them. They mirror
``protos/maskwork/wire/v1/jobs.proto`` one to one. They hold nothing that the coordinator may not know: counts and
means over all survivors, names, stages, reasons. They are NOT protocol messages (`maskwork.secagg.messages`) and not
what the coordinator stores.

Rules: every event carries the job's id and `at`, seconds since the epoch by the coordinator's clock (0.0 where the
wire does not say). Rounds and attempts count from 1. Digests are SHA-256, 32 raw bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

STAGES: Final = ("advertise-keys", "share-keys", "masked-update", "consistency-check", "unmask")
"""Names of steps 0 to 4 of the protocol, as events, reasons and `RoundCommitted.stage_seconds` spell them."""

COMPLETED: Final = "completed"
FINAL_STATES: Final = frozenset({COMPLETED, "failed", "aborted"})
"""States of a job that nothing follows; the others are "queued" and "running"."""


@dataclass(frozen=True, slots=True)
class JobSummary:
    """A job and how far it has come.

    Attributes:
        job_id: Unique in the federation.
        at: When this was so.
        name: What its submitter calls it.
        task: Name under which sites offer the code.
        state: "queued", "running", "completed", "failed" or "aborted".
        rounds_total: Rounds to commit.
        rounds_committed: Rounds committed.
        reason: Why it stands where it stands, for people; may be empty.
        submitted_by: URI name of the submitter's certificate.
        submitted_at: Seconds since the epoch.
        model_digest: SHA-256 of the newest committed model, or of the initial one.
        rolled_back: Rounds that had committed and were taken back; their numbers are not used again.
    """

    job_id: str
    at: float
    name: str
    task: str
    state: str
    rounds_total: int
    rounds_committed: int
    reason: str = ""
    submitted_by: str = ""
    submitted_at: float = 0.0
    model_digest: bytes = b""
    rolled_back: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        return self.state in FINAL_STATES


@dataclass(frozen=True, slots=True)
class AttemptOpened:
    """The coordinator sent a plan.

    Attributes:
        job_id: The job.
        at: When.
        round_number: From 1.
        attempt: From 1 in each round.
        roster: Names, in roster order.
        threshold: The plan's t.
        session_id: SHA-256 session id, 32 bytes.
    """

    job_id: str
    at: float
    round_number: int
    attempt: int
    roster: tuple[str, ...]
    threshold: int
    session_id: bytes


@dataclass(frozen=True, slots=True)
class StageOpened:
    """A stage waits for the answers of `expected`, names in roster order; `stage` is one of `STAGES`."""

    job_id: str
    at: float
    round_number: int
    attempt: int
    stage: str
    expected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """A participant completed a stage."""

    job_id: str
    at: float
    round_number: int
    attempt: int
    stage: str
    participant: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A participant is out of the rest of an attempt; `reason` is a `maskwork.secagg.errors.DropReason` value."""

    job_id: str
    at: float
    round_number: int
    attempt: int
    stage: str
    participant: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RoundCommitted:
    """A round is in the model for good.

    Attributes:
        job_id: The job.
        at: When this was said; `committed_at` is when it happened.
        round_number: From 1.
        attempt: The attempt that succeeded.
        survivors: U3, names in roster order.
        dropouts: The roster without U3.
        statistics: Counts and means over all survivors' examples: "examples", "train.loss", "eval.examples",
            "eval.loss", "eval.accuracy" and whatever else the task measures.
        stage_seconds: Seconds by stage.
        seconds: From the plan to the commit.
        uplink_bytes: Bytes of masked updates received, from all participants together.
        model_digest: SHA-256 of the model after this round.
        committed_at: Seconds since the epoch.
    """

    job_id: str
    at: float
    round_number: int
    attempt: int
    survivors: tuple[str, ...]
    dropouts: tuple[str, ...]
    statistics: Mapping[str, float] = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    uplink_bytes: int = 0
    model_digest: bytes = b""
    committed_at: float = 0.0


@dataclass(frozen=True, slots=True)
class AttemptAborted:
    """An attempt came to nothing; `reason` is a `maskwork.secagg.errors.AbortReason` value."""

    job_id: str
    at: float
    round_number: int
    attempt: int
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why nothing moves, for people, and which sites are connected."""

    job_id: str
    at: float
    detail: str
    connected: tuple[str, ...] = ()


JobEvent: TypeAlias = (
    JobSummary | AttemptOpened | StageOpened | Answered | Dropped | RoundCommitted | AttemptAborted | Waiting
)


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """Made by the watcher itself, never sent: the coordinator cannot be reached; trying again in `retry_s` seconds."""

    job_id: str
    at: float
    detail: str
    retry_s: float


WatchEvent: TypeAlias = JobEvent | ConnectionLost


@dataclass(frozen=True, slots=True)
class PastAttempt:
    """One attempt of the past; `outcome` is "committed", "aborted" or "abandoned", empty while it is open."""

    round_number: int
    attempt: int
    outcome: str
    reason: str
    opened_at: float


@dataclass(frozen=True, slots=True)
class JobDetails:
    """A job with its history: committed rounds, attempts and drops, each in order."""

    job: JobSummary
    rounds: tuple[RoundCommitted, ...] = ()
    attempts: tuple[PastAttempt, ...] = ()
    drops: tuple[Dropped, ...] = ()
