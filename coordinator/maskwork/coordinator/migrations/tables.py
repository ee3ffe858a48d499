"""The coordinator's tables as they are at `HEAD`, each with its way to and from its record.

A test holds the migration scripts to these tables. Types are those that SQLite and PostgreSQL share: bytes as
`LargeBinary`, JSON as text, enumerations as strings.
NOT here: any rule beyond keys (those are `store.py`'s).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict

from sqlalchemy import BigInteger, Float, ForeignKey, ForeignKeyConstraint, LargeBinary, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from maskwork.coordinator.records import (
    AttemptOutcome,
    AttemptRecord,
    CommittedRound,
    DropRecord,
    EvidenceRecord,
    JobRecord,
    JobState,
    ReleasedSet,
    ResumeRecord,
)


class Base(DeclarativeBase):
    """Root of the tables."""

    type_annotation_map = {float: Float(53), bytes: LargeBinary, str: Text}  # noqa: RUF012  (SQLAlchemy reads it)


class Job(Base):
    """`JobRecord`; `position` is the order of submission."""

    __tablename__ = "jobs"
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(String(255), unique=True)
    name: Mapped[str]
    task: Mapped[str]
    state: Mapped[str] = mapped_column(String(32), index=True)
    rounds_total: Mapped[int]
    next_round: Mapped[int]
    next_attempt: Mapped[int]
    spec_json: Mapped[str]
    submitted_by: Mapped[str]
    submitted_at: Mapped[float]
    initial_model: Mapped[bytes]
    current_model: Mapped[bytes]
    reason: Mapped[str]
    rolled_back: Mapped[int] = mapped_column(server_default="0")

    @classmethod
    def of(cls, record: JobRecord) -> "Job":
        """The row of a record."""
        return cls(**asdict(record) | {"state": record.state.value})

    def record(self) -> JobRecord:
        """The record of this row."""
        return JobRecord(
            job_id=self.job_id,
            name=self.name,
            task=self.task,
            state=JobState(self.state),
            rounds_total=self.rounds_total,
            next_round=self.next_round,
            next_attempt=self.next_attempt,
            spec_json=self.spec_json,
            submitted_by=self.submitted_by,
            submitted_at=self.submitted_at,
            initial_model=self.initial_model,
            current_model=self.current_model,
            reason=self.reason,
            rolled_back=self.rolled_back,
        )


class Attempt(Base):
    """`AttemptRecord`."""

    __tablename__ = "attempts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    session_id: Mapped[bytes] = mapped_column(unique=True)
    plan_bytes: Mapped[bytes]
    plan_signature: Mapped[bytes]
    opened_at: Mapped[float]
    closed_at: Mapped[float | None]
    outcome: Mapped[str | None] = mapped_column(String(32))
    reason: Mapped[str]

    @classmethod
    def of(cls, record: AttemptRecord) -> "Attempt":
        """The row of a record."""
        return cls(**asdict(record) | {"outcome": None if record.outcome is None else record.outcome.value})

    def record(self) -> AttemptRecord:
        """The record of this row."""
        return AttemptRecord(
            job_id=self.job_id,
            round_number=self.round_number,
            attempt=self.attempt,
            session_id=self.session_id,
            plan_bytes=self.plan_bytes,
            plan_signature=self.plan_signature,
            opened_at=self.opened_at,
            closed_at=self.closed_at,
            outcome=None if self.outcome is None else AttemptOutcome(self.outcome),
            reason=self.reason,
        )


class Drop(Base):
    """`DropRecord`."""

    __tablename__ = "drops"
    __table_args__ = (
        ForeignKeyConstraint(
            ["job_id", "round_number", "attempt"], ["attempts.job_id", "attempts.round_number", "attempts.attempt"]
        ),
        UniqueConstraint("job_id", "round_number", "attempt", "participant"),
    )
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(String(255))
    round_number: Mapped[int]
    attempt: Mapped[int]
    participant: Mapped[str]
    stage: Mapped[str]
    reason: Mapped[str]
    detail: Mapped[str]
    at: Mapped[float]

    @classmethod
    def of(cls, record: DropRecord) -> "Drop":
        """The row of a record."""
        return cls(**asdict(record))

    def record(self) -> DropRecord:
        """The record of this row."""
        return DropRecord(
            job_id=self.job_id,
            round_number=self.round_number,
            attempt=self.attempt,
            participant=self.participant,
            stage=self.stage,
            reason=self.reason,
            detail=self.detail,
            at=self.at,
        )


class Round(Base):
    """`CommittedRound` and, once it was taken back, `RolledBackRound`; lists and mappings as JSON."""

    __tablename__ = "rounds"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int]
    session_id: Mapped[bytes] = mapped_column(ForeignKey("attempts.session_id"), unique=True)
    model: Mapped[bytes]
    survivors_json: Mapped[str]
    dropouts_json: Mapped[str]
    statistics_json: Mapped[str]
    stage_seconds_json: Mapped[str]
    uplink_bytes: Mapped[int] = mapped_column(BigInteger)
    committed_at: Mapped[float]
    rolled_back_at: Mapped[float | None]
    rolled_back_reason: Mapped[str] = mapped_column(server_default="")

    @classmethod
    def of(cls, record: CommittedRound) -> "Round":
        """The row of a record; raises `ValueError` if a number is not finite."""
        return cls(
            job_id=record.job_id,
            round_number=record.round_number,
            attempt=record.attempt,
            session_id=record.session_id,
            model=record.model,
            survivors_json=json.dumps(record.survivors),
            dropouts_json=json.dumps(record.dropouts),
            statistics_json=_finite(record.statistics),
            stage_seconds_json=_finite(record.stage_seconds),
            uplink_bytes=record.uplink_bytes,
            committed_at=record.committed_at,
            rolled_back_at=None,
            rolled_back_reason="",
        )

    def record(self) -> CommittedRound:
        """The record of this row."""
        return CommittedRound(
            job_id=self.job_id,
            round_number=self.round_number,
            attempt=self.attempt,
            session_id=self.session_id,
            model=self.model,
            survivors=_names(self.survivors_json),
            dropouts=_names(self.dropouts_json),
            statistics=_numbers(self.statistics_json),
            stage_seconds=_numbers(self.stage_seconds_json),
            uplink_bytes=self.uplink_bytes,
            committed_at=self.committed_at,
        )


class Resume(Base):
    """`ResumeRecord`: at most one for each job, gone once its session has ended."""

    __tablename__ = "resumes"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), primary_key=True)
    session_id: Mapped[bytes] = mapped_column(ForeignKey("attempts.session_id"), unique=True)
    blob: Mapped[bytes]
    accumulator_path: Mapped[str]
    survivors_json: Mapped[str]
    saved_at: Mapped[float]

    @classmethod
    def of(cls, record: ResumeRecord) -> "Resume":
        """The row of a record."""
        return cls(
            job_id=record.job_id,
            session_id=record.session_id,
            blob=record.blob,
            accumulator_path=record.accumulator_path,
            survivors_json=json.dumps(record.survivors),
            saved_at=record.saved_at,
        )

    def record(self) -> ResumeRecord:
        """The record of this row."""
        return ResumeRecord(
            session_id=self.session_id,
            job_id=self.job_id,
            blob=self.blob,
            accumulator_path=self.accumulator_path,
            survivors=_names(self.survivors_json),
            saved_at=self.saved_at,
        )


class Release(Base):
    """`ReleasedSet`: never deleted."""

    __tablename__ = "releases"
    session_id: Mapped[bytes] = mapped_column(ForeignKey("attempts.session_id"), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), index=True)
    round_number: Mapped[int]
    attempt: Mapped[int]
    base_model: Mapped[bytes]
    survivors_json: Mapped[str]
    at: Mapped[float]

    @classmethod
    def of(cls, record: ReleasedSet) -> "Release":
        """The row of a record."""
        return cls(
            session_id=record.session_id,
            job_id=record.job_id,
            round_number=record.round_number,
            attempt=record.attempt,
            base_model=record.base_model,
            survivors_json=json.dumps(record.survivors),
            at=record.at,
        )

    def record(self) -> ReleasedSet:
        """The record of this row."""
        return ReleasedSet(
            session_id=self.session_id,
            job_id=self.job_id,
            round_number=self.round_number,
            attempt=self.attempt,
            base_model=self.base_model,
            survivors=_names(self.survivors_json),
            at=self.at,
        )


class Evidence(Base):
    """`EvidenceRecord`."""

    __tablename__ = "evidence"
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.job_id"), index=True)
    session_id: Mapped[bytes] = mapped_column(ForeignKey("attempts.session_id"))
    kind: Mapped[str]
    accused: Mapped[str]
    transcript: Mapped[bytes]
    at: Mapped[float]

    @classmethod
    def of(cls, record: EvidenceRecord) -> "Evidence":
        """The row of a record."""
        return cls(**asdict(record))

    def record(self) -> EvidenceRecord:
        """The record of this row."""
        return EvidenceRecord(
            job_id=self.job_id,
            session_id=self.session_id,
            kind=self.kind,
            accused=self.accused,
            transcript=self.transcript,
            at=self.at,
        )


def _names(stored: str) -> tuple[str, ...]:
    return tuple(str(name) for name in json.loads(stored))


def _numbers(stored: str) -> dict[str, float]:
    return {str(name): float(number) for name, number in json.loads(stored).items()}


def _finite(numbers: Mapping[str, float]) -> str:
    return json.dumps(dict(numbers), allow_nan=False)
