"""What the coordinator must not forget, in one database: jobs, attempts, drops, rounds, releases, evidence.

Every method is one transaction, durable when it returns. It is synchronous: the driver calls it from its loop
or from a thread. It is NOT the keeper of models (`models.py`), holds no session secret, and decides nothing about a
round: it refuses what would contradict what it already holds.

Rules (DESIGN sections 4 and 6)
1. (round, attempt) of a job only grows, and at most one attempt of a job is open.
2. Once a session's accumulator, survivors and signatures are saved, it is resumed or ended: no new attempt beside it.
3. A round commits once, in order, from the open attempt, from a session that was saved before Unmask; or not at all.
   One that is rolled back stays on record, and no other round ever has its number (ADR 0010).
4. One process at a time: a lock file stands beside a SQLite database.

Errors: `StoreError` when the world failed; `RuntimeError` when the caller broke a rule. Either changes nothing.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Engine, Select, make_url, select
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

from maskwork.coordinator.migrations import MIGRATIONS, tables
from maskwork.coordinator.models import fsync
from maskwork.coordinator.records import (
    FIRST_ATTEMPT,
    FIRST_ROUND,
    TRANSITIONS,
    AttemptOutcome,
    AttemptRecord,
    CommittedRound,
    DropRecord,
    EvidenceRecord,
    JobRecord,
    JobState,
    ReleasedSet,
    ResumeRecord,
    RolledBackRound,
)
from maskwork.coordinator.sealed_rows import RowSeal, forget_old_pages
from maskwork.coordinator.vault import Vault
from maskwork.database import open_engine, world_failures
from maskwork.errors import StoreError

_DIGEST_BYTES = 32


class Store:
    """The coordinator's database. Use `Store.open`, and `close` it, or use it as a context manager."""

    def __init__(
        self, engine: Engine, *, file: str, lock: int | None, clock: Callable[[], float], vault: Vault | None = None
    ) -> None:
        self._engine = engine
        self._reading_engine = engine.execution_options(maskwork_reading=True)
        self._file = file
        self._lock = lock
        self._clock = clock
        self._seal = RowSeal(vault, file)

    @classmethod
    def open(
        cls,
        url: str,
        *,
        busy_timeout_s: float = 5.0,
        clock: Callable[[], float] = time.time,
        vault: Vault | None = None,
    ) -> Self:
        """Open the database at `url`, creating or migrating it as needed.

        Args:
            url: SQLAlchemy URL, for instance `sqlite:////var/lib/maskwork/coordinator.sqlite`.
            busy_timeout_s: How long a transaction waits for another one, in seconds.
            clock: Unix time in seconds, for the moment at which an attempt closes.
            vault: What transcripts are encrypted with; None: they are not.

        Raises:
            StoreError: It cannot be opened or written, is in use, damaged, or of a newer schema; says which.
        """
        lock = _lock_beside(url)
        try:
            engine = open_engine(MIGRATIONS, url, busy_timeout_s=busy_timeout_s)
        except BaseException:
            _unlock(lock)
            raise
        return cls(engine, file=engine.url.database or url, lock=lock, clock=clock, vault=vault)

    def close(self) -> None:
        """Close the database and let another process have it. Calling it again does nothing."""
        self._engine.dispose()
        _unlock(self._lock)
        self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Jobs

    def add_job(self, job: JobRecord) -> None:
        """Queue a new job, at its first round and attempt.

        Raises:
            RuntimeError: If its id is taken, or it is not a fresh, queued job.
        """
        fresh = job.state is JobState.QUEUED and (job.next_round, job.next_attempt) == (FIRST_ROUND, FIRST_ATTEMPT)
        if not fresh or job.current_model != job.initial_model:
            raise RuntimeError(f"job {job.job_id}: a new job is queued, at round 1, attempt 1, on its initial model")
        if job.rounds_total < 1:
            raise RuntimeError(f"job {job.job_id}: it has {job.rounds_total} rounds; at least 1 is needed")
        _check_digest(job.initial_model, "initial model")
        with self._writing() as session:
            session.add(tables.Job.of(job))

    def jobs(self) -> tuple[JobRecord, ...]:
        """Every job, in the order of submission."""
        with self._reading() as session:
            return tuple(row.record() for row in session.scalars(select(tables.Job).order_by(tables.Job.position)))

    def job(self, job_id: str) -> JobRecord | None:
        """One job, or None."""
        with self._reading() as session:
            row = session.scalar(select(tables.Job).where(tables.Job.job_id == job_id))
            return None if row is None else row.record()

    def next_queued(self) -> JobRecord | None:
        """The queued job that was submitted first, or None."""
        queued = select(tables.Job).where(tables.Job.state == JobState.QUEUED.value).order_by(tables.Job.position)
        with self._reading() as session:
            row = session.scalar(queued.limit(1))
            return None if row is None else row.record()

    def set_job_state(self, job_id: str, state: JobState, reason: str = "") -> None:
        """Start, fail or abort a job. An attempt still open ends with it, and what it saved to resume from goes.

        Raises:
            RuntimeError: If `TRANSITIONS` does not allow it (the last `commit_round` alone completes a job).
        """
        with self._writing() as session:
            job = _get_job(session, job_id)
            if state not in TRANSITIONS[JobState(job.state)]:
                raise RuntimeError(f"job {job_id}: it is {job.state} and cannot become {state.value}")
            job.state = state.value
            job.reason = reason
            row = _open_attempt_of(session, job_id)
            if row is not None and not TRANSITIONS[state]:
                self._close(session, row, AttemptOutcome.ABORTED, f"job {state.value}: {reason}")

    # Attempts

    def open_attempt(self, attempt: AttemptRecord) -> None:
        """Record an attempt before its plan is sent; the job's `next_attempt` moves past it.

        Raises:
            RuntimeError: If the job is not running, if (round, attempt) is not of `next_round` or not higher than
                every earlier one, or if an earlier attempt is still open or can be resumed.
        """
        _check_digest(attempt.session_id, "session id")
        where = f"job {attempt.job_id}, round {attempt.round_number}, attempt {attempt.attempt}"
        if attempt.closed_at is not None or attempt.outcome is not None:
            raise RuntimeError(f"{where}: an attempt that is opened has not ended yet")
        with self._writing() as session:
            job = _get_running(session, attempt.job_id)
            if attempt.round_number != job.next_round or attempt.attempt < job.next_attempt:
                raise RuntimeError(f"{where}: the next is round {job.next_round}, attempt {job.next_attempt} or higher")
            if _open_attempt_of(session, attempt.job_id) is not None:
                raise RuntimeError(f"{where}: an earlier attempt is open; resume it or close it first")
            job.next_attempt = attempt.attempt + 1
            session.add(tables.Attempt.of(attempt))

    def close_attempt(self, session_id: bytes, outcome: AttemptOutcome, reason: str = "") -> None:
        """End an attempt that did not commit; what it saved to resume from goes with it.

        Raises:
            RuntimeError: If there is no such attempt, it has ended, or `outcome` is `COMMITTED`.
        """
        if outcome is AttemptOutcome.COMMITTED:
            raise RuntimeError("an attempt is committed by commit_round")
        with self._writing() as session:
            row = _get_attempt(session, session_id)
            if row.closed_at is not None:
                raise RuntimeError(f"session {session_id.hex()}: its attempt has ended as {row.outcome}")
            self._close(session, row, outcome, reason)

    def attempts(self, job_id: str) -> tuple[AttemptRecord, ...]:
        """Every attempt of a job, in order."""
        table = tables.Attempt
        query = select(table).where(table.job_id == job_id).order_by(table.round_number, table.attempt)
        with self._reading() as session:
            return tuple(row.record() for row in session.scalars(query))

    def current_attempt(self, job_id: str) -> AttemptRecord | None:
        """The attempt of a job that is open, or None. After a restart it is resumed or closed as abandoned."""
        with self._reading() as session:
            row = _open_attempt_of(session, job_id)
            return None if row is None else row.record()

    def record_drop(self, drop: DropRecord) -> None:
        """Record that an attempt lost a participant. The first reason stands: a repeat changes nothing.

        Raises:
            RuntimeError: If there is no such attempt.
        """
        table = tables.Drop
        same = select(table.position).where(
            table.job_id == drop.job_id,
            table.round_number == drop.round_number,
            table.attempt == drop.attempt,
            table.participant == drop.participant,
        )
        with self._writing() as session:
            if session.scalar(same) is not None:
                return
            session.add(table.of(drop))

    def drops(self, job_id: str, round_number: int | None = None) -> tuple[DropRecord, ...]:
        """Who was dropped from a job, or from one of its rounds, in order of recording."""
        query = select(tables.Drop).where(tables.Drop.job_id == job_id).order_by(tables.Drop.position)
        if round_number is not None:
            query = query.where(tables.Drop.round_number == round_number)
        with self._reading() as session:
            return tuple(row.record() for row in session.scalars(query))

    # Unmask and commit

    def save_resume(self, record: ResumeRecord) -> None:
        """Make a session resumable; call it before asking for Unmask. The accumulator file is fsynced first.

        The survivor set is kept for audit from now on, whatever becomes of the session. Saving the very same record
        again changes nothing.

        Raises:
            StoreError: If the accumulator file is missing or cannot be made durable.
            RuntimeError: If its attempt is not open, or it was saved with another content: one U3 per session, ever.
        """
        _check_survivors(record.survivors)
        if record.accumulator_path:
            path = Path(record.accumulator_path)
            with world_failures(str(path)):
                fsync(path)
                fsync(path.parent)
        with self._writing() as session:
            saved = session.get(tables.Resume, record.job_id)
            if saved is not None:
                if self._seal.resume_of(saved) != record:
                    raise RuntimeError(f"job {record.job_id}: a session was saved before, with another content")
                return
            attempt = _get_attempt(session, record.session_id)
            if attempt.closed_at is not None or attempt.job_id != record.job_id:
                raise RuntimeError(f"job {record.job_id}: session {record.session_id.hex()} is not its open attempt")
            session.add(tables.Resume.of(self._seal.resume(record)))
            session.add(tables.Release.of(_released(record, attempt.record(), _get_job(session, record.job_id))))

    def resume_record(self, job_id: str) -> ResumeRecord | None:
        """The session of a job that must be resumed rather than attempted anew, or None."""
        with self._reading() as session:
            row = session.get(tables.Resume, job_id)
            return None if row is None else self._seal.resume_of(row)

    def releases(self, job_id: str) -> tuple[ReleasedSet, ...]:
        """Every survivor set of a job whose unmasking was asked for, in order."""
        table = tables.Release
        query = select(table).where(table.job_id == job_id).order_by(table.round_number, table.attempt)
        with self._reading() as session:
            return tuple(row.record() for row in session.scalars(query))

    def commit_round(self, committed: CommittedRound) -> None:
        """Commit a round: the row, the job's model and next round, its attempt's end, all or nothing.

        The model file must be in the `ModelStore` already. The job completes when it was its last round.

        Raises:
            RuntimeError: If it is out of order or a repeat, its attempt is not open, or its session was not saved.
            ValueError: If a statistic is not finite.
        """
        _check_digest(committed.model, "model")
        row = tables.Round.of(committed)
        with self._writing() as session:
            job = _get_running(session, committed.job_id)
            attempt = _check_commit(session, job, committed)
            session.add(row)
            job.current_model = committed.model
            job.next_round = committed.round_number + 1
            job.next_attempt = FIRST_ATTEMPT
            job.reason = ""  # of a rollback: from here on it is history, which its rounds and attempts keep
            if committed.round_number == job.rounds_total + job.rolled_back:
                job.state = JobState.COMPLETED.value
            self._close(session, attempt, AttemptOutcome.COMMITTED, "", at=committed.committed_at)

    def roll_back(self, job_id: str, *, to_round: int, reason: str) -> None:
        """Take back every committed round after one, because the models of those are damaged.

        The job goes on from that round's model (0: its initial one), under the round number that it was at: numbers
        never go back, since sites take up only what is higher than what they have seen. An open attempt ends with it.

        Raises:
            RuntimeError: If the job is not running, that round is not in its model, or there is none after it.
        """
        with self._writing() as session:
            job = _get_running(session, job_id)
            rows = {row.round_number: row for row in session.scalars(_standing(job_id))}
            after = [row for number, row in rows.items() if number > to_round]
            if (to_round and to_round not in rows) or not after:
                raise RuntimeError(f"job {job_id}: there is nothing to roll back to round {to_round}")
            now = self._clock()
            for row in after:
                row.rolled_back_at = now
                row.rolled_back_reason = reason
                attempt = _get_attempt(session, row.session_id)
                attempt.outcome = AttemptOutcome.ROLLED_BACK.value
                attempt.reason = reason
            open_attempt = _open_attempt_of(session, job_id)
            if open_attempt is not None:
                self._close(session, open_attempt, AttemptOutcome.ABORTED, reason)
            job.rolled_back += len(after)
            job.current_model = rows[to_round].model if to_round else job.initial_model
            job.reason = reason

    def rolled_back_rounds(self, job_id: str) -> tuple[RolledBackRound, ...]:
        """The rounds of a job that had committed and were taken back, in order. For audit."""
        table = tables.Round
        query = select(table).where(table.job_id == job_id, table.rolled_back_at.is_not(None))
        with self._reading() as session:
            return tuple(
                RolledBackRound(row.record(), row.rolled_back_at or 0.0, row.rolled_back_reason)
                for row in session.scalars(query.order_by(table.round_number))
            )

    def rounds(self, job_id: str) -> tuple[CommittedRound, ...]:
        """The committed rounds of a job, in order; those that were rolled back are not among them."""
        query = _standing(job_id).order_by(tables.Round.round_number)
        with self._reading() as session:
            return tuple(row.record() for row in session.scalars(query))

    def last_survivors(self, job_id: str) -> tuple[str, ...]:
        """U3 of the last committed round of a job, in roster order; empty before the first."""
        query = _standing(job_id).order_by(tables.Round.round_number.desc()).limit(1)
        with self._reading() as session:
            row = session.scalar(query)
            return () if row is None else row.record().survivors

    def referenced_models(self) -> frozenset[bytes]:
        """Digests of every model that any row refers to: what `ModelStore.sweep` must keep."""
        columns = (
            tables.Job.initial_model,
            tables.Job.current_model,
            tables.Round.model,
            tables.Release.base_model,
        )
        with self._reading() as session:
            return frozenset(digest for column in columns for digest in session.scalars(select(column)))

    # Evidence

    def add_evidence(self, evidence: EvidenceRecord) -> None:
        """Keep a transcript that convicts a participant.

        Raises:
            RuntimeError: If there is no such job or session.
        """
        with self._writing() as session:
            session.add(tables.Evidence.of(self._seal.evidence(evidence)))

    def evidence(self, job_id: str) -> tuple[EvidenceRecord, ...]:
        """The evidence gathered in a job, in order of recording."""
        query = select(tables.Evidence).where(tables.Evidence.job_id == job_id).order_by(tables.Evidence.position)
        with self._reading() as session:
            return tuple(self._seal.evidence_of(row) for row in session.scalars(query))

    def reseal(self) -> int:
        """Encrypt every transcript with the current key, and forget what was there; returns how many were not.

        Raises:
            StoreError: One does not open, or the disk fails; nothing was changed.
        """
        with world_failures(self._file):
            changed = self._seal.reseal(self._engine)
            forget_old_pages(self._engine)
        return changed

    # Transactions

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with world_failures(self._file), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with world_failures(self._file), Session(self._reading_engine) as session:
            yield session

    def _close(
        self, session: Session, row: tables.Attempt, outcome: AttemptOutcome, reason: str, *, at: float | None = None
    ) -> None:
        row.closed_at = self._clock() if at is None else at
        row.outcome = outcome.value
        row.reason = reason
        resume = session.get(tables.Resume, row.job_id)
        if resume is not None:
            session.delete(resume)


def _get_job(session: Session, job_id: str) -> tables.Job:
    job = session.scalar(select(tables.Job).where(tables.Job.job_id == job_id))
    if job is None:
        raise RuntimeError(f"job {job_id}: there is no such job")
    return job


def _get_running(session: Session, job_id: str) -> tables.Job:
    job = _get_job(session, job_id)
    if job.state != JobState.RUNNING.value:
        raise RuntimeError(f"job {job_id}: it is {job.state}, not running")
    return job


def _get_attempt(session: Session, session_id: bytes) -> tables.Attempt:
    row = session.scalar(select(tables.Attempt).where(tables.Attempt.session_id == session_id))
    if row is None:
        raise RuntimeError(f"session {session_id.hex()}: there is no such attempt")
    return row


def _open_attempt_of(session: Session, job_id: str) -> tables.Attempt | None:
    table = tables.Attempt
    return session.scalar(select(table).where(table.job_id == job_id, table.closed_at.is_(None)))


def _standing(job_id: str) -> Select[tables.Round]:
    """The rounds that were committed and not rolled back."""
    return select(tables.Round).where(tables.Round.job_id == job_id, tables.Round.rolled_back_at.is_(None))


def _check_commit(session: Session, job: tables.Job, committed: CommittedRound) -> tables.Attempt:
    """The open attempt that `committed` ends, or `RuntimeError`."""
    where = f"job {job.job_id}, round {committed.round_number}"
    if committed.round_number != job.next_round:
        raise RuntimeError(f"{where}: the round to commit is {job.next_round}")
    attempt = _get_attempt(session, committed.session_id)
    this = (committed.job_id, committed.round_number, committed.attempt)
    if (attempt.job_id, attempt.round_number, attempt.attempt) != this or attempt.closed_at is not None:
        raise RuntimeError(f"{where}: session {committed.session_id.hex()} is not its open attempt {committed.attempt}")
    saved = session.get(tables.Resume, job.job_id)
    if saved is None:
        raise RuntimeError(f"{where}: its session was not saved; call save_resume before asking for Unmask")
    if saved.record().survivors != committed.survivors:
        raise RuntimeError(f"{where}: its survivors are not those that were saved before Unmask")
    return attempt


def _released(record: ResumeRecord, attempt: AttemptRecord, job: tables.Job) -> ReleasedSet:
    return ReleasedSet(
        session_id=record.session_id,
        job_id=record.job_id,
        round_number=attempt.round_number,
        attempt=attempt.attempt,
        base_model=job.current_model,
        survivors=record.survivors,
        at=record.saved_at,
    )


def _check_digest(digest: bytes, what: str) -> None:
    if len(digest) != _DIGEST_BYTES:
        raise RuntimeError(f"{what}: a SHA-256 has {_DIGEST_BYTES} bytes, this one has {len(digest)}")


def _check_survivors(survivors: tuple[str, ...]) -> None:
    if not survivors or len(set(survivors)) != len(survivors):
        raise RuntimeError("a survivor set is not empty and names nobody twice")


def _lock_beside(url: str) -> int | None:
    """Hold `<database>.lock` while this process lives; a killed one lets go of it at once."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return None  # open_engine says what is wrong with it
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    database = Path(str(parsed.database).removeprefix("file:"))
    path = database.with_name(database.name + ".lock")
    with world_failures(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as cause:
        os.close(lock)
        remedy = "Stop the other coordinator, or give this one a database of its own."
        raise StoreError("is in use by another coordinator", file=database, remedy=remedy) from cause
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
