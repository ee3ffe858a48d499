"""A store whose every write is in the audit log as well: first the database, then the log, then whatever comes of it.

Nothing is sent before both have it, since each method returns only then. Killed between the two, the database knows one
thing that the log does not: `follow` writes it down at the next start, before anything else happens. The log never
knows what the database does not, so it never says that a round committed which then did not.

It decides nothing and refuses nothing of its own; what may follow what is `store`'s business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from maskwork.audit.records import (
    AttemptEnded,
    Committed,
    Dropped,
    Evidence,
    JobEnded,
    JobSubmitted,
    Plan,
    Record,
    RolledBack,
    Survivors,
)
from maskwork.coordinator.audit import Trail
from maskwork.coordinator.records import (
    TRANSITIONS,
    AttemptOutcome,
    AttemptRecord,
    CommittedRound,
    DropRecord,
    EvidenceRecord,
    JobRecord,
    JobState,
    ResumeRecord,
)
from maskwork.coordinator.store import Store
from maskwork.errors import StoreError
from maskwork.secagg.messages import advertisement_digest, encode_members
from maskwork.wire import codec


class AuditedStore(Store):
    """A `Store` with a trail. `follow` gives it one; before that it is a plain store."""

    _trail: Trail | None = None

    def follow(self, trail: Trail) -> None:
        """Write everything down in `trail` from now on, and first what a killed process left out.

        Raises:
            StoreError: the log cannot be written, or was lost: no record is in it, and jobs are in the database.
        """
        jobs = self.jobs()
        if jobs and not trail.log.size:  # a log begins before the first job is taken in
            raise StoreError(
                f"is missing or empty, and the database has {len(jobs)} jobs: sites that hold a head of it would "
                "decline whatever a new one says",
                file=trail.log.name,
                remedy="Restore audit.log. If it is lost for good, move the database away too, and keep it for "
                "auditors: the coordinator then begins anew, without jobs, and each site's operator has to go along "
                "with `maskwork participant accept-history`. The models stay where they are.",
            )
        trail.begin()
        for job in jobs:
            for record in self._missing(job, trail):
                trail.write(record)
        self._trail = trail

    def _write(self, *records: Record, durable: bool = True) -> None:
        if self._trail is not None:
            self._trail.write(*records, durable=durable)

    # Jobs

    def add_job(self, job: JobRecord) -> None:
        """As the store, and in the log."""
        super().add_job(job)
        self._write(_submitted(job))

    def set_job_state(self, job_id: str, state: JobState, reason: str = "") -> None:
        """As the store, and in the log when the job has ended."""
        attempt = self.current_attempt(job_id)
        super().set_job_state(job_id, state, reason)
        if not TRANSITIONS[state]:
            self._write(*self._ended(attempt), JobEnded(job=job_id, state=state.value, reason=reason))

    # Attempts

    def open_attempt(self, attempt: AttemptRecord) -> None:
        """As the store, and the plan in full in the log."""
        super().open_attempt(attempt)
        if self._trail is not None:
            self._write(_plan(attempt, self._trail))

    def close_attempt(self, session_id: bytes, outcome: AttemptOutcome, reason: str = "") -> None:
        """As the store, and in the log."""
        super().close_attempt(session_id, outcome, reason)
        self._write(AttemptEnded(session=session_id, outcome=outcome.value, reason=reason))

    def record_drop(self, drop: DropRecord) -> None:
        """As the store, and in the log; nothing waits for it to be durable there."""
        super().record_drop(drop)
        self._write(_dropped(drop), durable=False)

    def _ended(self, attempt: AttemptRecord | None) -> Iterator[Record]:
        """An attempt that ended with something else, as the database now has it."""
        if attempt is not None:
            after = next(a for a in self.attempts(attempt.job_id) if a.session_id == attempt.session_id)
            outcome = "" if after.outcome is None else after.outcome.value
            yield AttemptEnded(session=after.session_id, outcome=outcome, reason=after.reason)

    # Unmask and commit

    def save_resume(self, record: ResumeRecord) -> None:
        """As the store, and the sets with their signatures in the log."""
        super().save_resume(record)
        self._write(_survivors(record))

    def commit_round(self, committed: CommittedRound) -> None:
        """As the store, and in the log; the job's end too, if it was its last round."""
        super().commit_round(committed)
        self._write(self._committed(committed))
        job = self.job(committed.job_id)
        if job is not None and job.state is JobState.COMPLETED:
            self._write(JobEnded(job=job.job_id, state=job.state.value))

    def roll_back(self, job_id: str, *, to_round: int, reason: str) -> None:
        """As the store, and in the log."""
        attempt = self.current_attempt(job_id)
        super().roll_back(job_id, to_round=to_round, reason=reason)
        self._write(*self._ended(attempt), *list(self._rolled_back(job_id))[-1:])

    def add_evidence(self, evidence: EvidenceRecord) -> None:
        """As the store, and its digest in the log."""
        super().add_evidence(evidence)
        self._write(_evidence(evidence))

    def _committed(self, committed: CommittedRound) -> Committed:
        released = {r.session_id: r.base_model for r in self.releases(committed.job_id)}
        return Committed(
            session=committed.session_id,
            job=committed.job_id,
            round_number=committed.round_number,
            attempt=committed.attempt,
            model_in=released[committed.session_id],
            model_out=committed.model,
            survivors=committed.survivors,
            dropouts=committed.dropouts,
            statistics=dict(committed.statistics),
            stage_seconds=dict(committed.stage_seconds),
            uplink_bytes=committed.uplink_bytes,
            committed_at=committed.committed_at,
        )

    def _rolled_back(self, job_id: str) -> Iterator[RolledBack]:
        """Each time that rounds were taken back, in order; `model` is right for the last time only."""
        job = self.job(job_id)
        assert job is not None
        times: dict[tuple[float, str], list[int]] = {}
        for taken in self.rolled_back_rounds(job_id):
            times.setdefault((taken.at, taken.reason), []).append(taken.committed.round_number)
        for (_, reason), rounds in sorted(times.items()):
            yield RolledBack(job=job_id, rounds=tuple(rounds), model=job.current_model, reason=reason)

    # After a crash

    def _missing(self, job: JobRecord, trail: Trail) -> Iterator[Record]:
        """What the database has of a job and the log does not, in order: the last thing that a process did."""
        begun = trail.earlier.get(job.job_id, (0, 0))  # what it had done before there was a log is not missing there
        if job.job_id not in trail.earlier:
            yield from _if_missing(trail, _submitted(job))
        taken_back = [taken.committed for taken in self.rolled_back_rounds(job.job_id)]
        committed = {c.session_id: c for c in (*self.rounds(job.job_id), *taken_back)}
        resume = self.resume_record(job.job_id)
        drops: dict[tuple[int, int], list[DropRecord]] = {}
        for drop in self.drops(job.job_id):
            drops.setdefault((drop.round_number, drop.attempt), []).append(drop)
        for attempt in self.attempts(job.job_id):
            if (attempt.round_number, attempt.attempt) < begun:
                continue
            session = attempt.session_id
            if not trail.log.has((Plan.KIND, session.hex())):
                yield _plan(attempt, trail)
            for drop in drops.get((attempt.round_number, attempt.attempt), ()):
                yield from _if_missing(trail, _dropped(drop))
            if resume is not None and resume.session_id == session:
                yield from _if_missing(trail, _survivors(resume))
            if session in committed:
                yield from _if_missing(trail, self._committed(committed[session]))
            elif attempt.outcome is not None:
                ended = AttemptEnded(session=session, outcome=attempt.outcome.value, reason=attempt.reason)
                yield from _if_missing(trail, ended)
        for taken in self._rolled_back(job.job_id):
            if taken.rounds[0] >= begun[0]:
                yield from _if_missing(trail, taken)
        for evidence in self.evidence(job.job_id):
            if trail.log.has((Plan.KIND, evidence.session_id.hex())):
                yield from _if_missing(trail, _evidence(evidence))
        if not TRANSITIONS[job.state]:
            yield from _if_missing(trail, JobEnded(job=job.job_id, state=job.state.value, reason=job.reason))


def _if_missing(trail: Trail, record: Record) -> Iterator[Record]:
    assert record.key is not None
    if not trail.log.has(record.key):
        yield record


def _submitted(job: JobRecord) -> JobSubmitted:
    return JobSubmitted(
        job=job.job_id,
        name=job.name,
        task=job.task,
        spec=job.spec_json,
        model=job.initial_model,
        submitted_by=job.submitted_by,
    )


def _plan(attempt: AttemptRecord, trail: Trail) -> Plan:
    size = trail.size_of(codec.decode_plan(attempt.plan_bytes).audit_head)
    return Plan(
        session=attempt.session_id,
        plan=attempt.plan_bytes,
        signature=attempt.plan_signature,
        audit_size=0 if size is None else size,
    )


def _dropped(drop: DropRecord) -> Dropped:
    return Dropped(
        job=drop.job_id,
        round_number=drop.round_number,
        attempt=drop.attempt,
        participant=drop.participant,
        stage=drop.stage,
        reason=drop.reason,
        detail=drop.detail,
    )


def _survivors(resume: ResumeRecord) -> Survivors:
    transcript = codec.decode_transcript(resume.blob)
    size = codec.decode_plan(transcript.plan_bytes).cohort
    return Survivors(
        session=resume.session_id,
        u1=encode_members(frozenset(transcript.advertised), size),
        u2=encode_members(frozenset(transcript.dealings), size),
        u3=encode_members(transcript.u3, size),
        signatures={index: check.signature for index, check in sorted(transcript.signatures.items())},
        advertisements={index: advertisement_digest(keys) for index, keys in sorted(transcript.advertised.items())},
    )


def _evidence(evidence: EvidenceRecord) -> Evidence:
    return Evidence(
        session=evidence.session_id,
        accused=evidence.accused,
        evidence=evidence.kind,
        transcript=hashlib.sha256(evidence.transcript).digest(),
    )
