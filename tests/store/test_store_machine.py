"""The life of jobs in the coordinator's store, against a model in plain Python, from random calls and restarts.

A failure is: a call that one of the two accepts and the other refuses; anything that the store then answers
otherwise than the model. Not a failure: which of several broken rules an error names.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from maskwork.coordinator.records import (
    AttemptOutcome,
    AttemptRecord,
    CommittedRound,
    DropRecord,
    JobRecord,
    JobState,
    ResumeRecord,
)
from maskwork.coordinator.store import Store

JOBS = st.sampled_from(["j1", "j2"])
NAMES = ("a", "b", "c")
NOW = 50.0


def session_of(job_id: str, round_number: int, attempt: int) -> bytes:
    return f"{job_id}/{round_number}/{attempt}".encode().ljust(32, b".")


@dataclass
class ModelJob:
    """One job as it should be."""

    record: JobRecord
    attempts: list[AttemptRecord] = field(default_factory=list)
    rounds: list[CommittedRound] = field(default_factory=list)
    drops: list[DropRecord] = field(default_factory=list)
    released: list[bytes] = field(default_factory=list)
    resume: ResumeRecord | None = None

    @property
    def open(self) -> AttemptRecord | None:
        return self.attempts[-1] if self.attempts and self.attempts[-1].closed_at is None else None

    def end(self, outcome: AttemptOutcome, reason: str, at: float = NOW) -> None:
        self.attempts[-1] = dataclasses.replace(self.attempts[-1], closed_at=at, outcome=outcome, reason=reason)
        self.resume = None


class JobLife(RuleBasedStateMachine):
    """Random calls, right and wrong ones."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="maskwork-machine-")
        self.store = self.opened()
        self.jobs: dict[str, ModelJob] = {}

    def opened(self) -> Store:
        return Store.open(f"sqlite:///{self.directory}/c.sqlite", clock=lambda: NOW)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)

    def expect(self, allowed: bool, call: Callable[[], None]) -> bool:
        if allowed:
            call()
        else:
            with pytest.raises(RuntimeError):
                call()
        return allowed

    @initialize()
    def first_job(self) -> None:
        self.add("j1", 2)
        self.start("j1")

    @rule(job_id=JOBS, rounds=st.integers(1, 3))
    def add(self, job_id: str, rounds: int) -> None:
        model = b"0" * 32
        record = JobRecord(job_id, "n", "t", JobState.QUEUED, rounds, 1, 1, "{}", "uri", 0.0, model, model)
        if self.expect(job_id not in self.jobs, lambda: self.store.add_job(record)):
            self.jobs[job_id] = ModelJob(record)

    @rule(job_id=JOBS)
    def start(self, job_id: str) -> None:
        job = self.jobs.get(job_id)
        allowed = job is not None and job.record.state is JobState.QUEUED
        if self.expect(allowed, lambda: self.store.set_job_state(job_id, JobState.RUNNING)):
            assert job is not None
            job.record = dataclasses.replace(job.record, state=JobState.RUNNING)

    @rule(job_id=JOBS, state=st.sampled_from([JobState.FAILED, JobState.ABORTED, JobState.COMPLETED, JobState.QUEUED]))
    def end(self, job_id: str, state: JobState) -> None:
        job = self.jobs.get(job_id)
        live = job is not None and job.record.state in (JobState.QUEUED, JobState.RUNNING)
        allowed = live and state in (JobState.FAILED, JobState.ABORTED)
        if self.expect(allowed, lambda: self.store.set_job_state(job_id, state, "why")):
            assert job is not None
            job.record = dataclasses.replace(job.record, state=state, reason="why")
            if job.open:
                job.end(AttemptOutcome.ABORTED, f"job {state.value}: why")

    @rule(job_id=JOBS, round_offset=st.sampled_from([0, 0, 0, 0, -1, 1]), offset=st.sampled_from([0, 0, 0, -1, 2]))
    def open_attempt(self, job_id: str, round_offset: int, offset: int) -> None:
        job = self.jobs.get(job_id)
        round_number = (job.record.next_round if job else 1) + round_offset
        number = (job.record.next_attempt if job else 1) + offset
        record = AttemptRecord(
            job_id, round_number, number, session_of(job_id, round_number, number), b"p", b"s", opened_at=1.0
        )
        right = round_offset == 0 and offset >= 0
        allowed = job is not None and job.record.state is JobState.RUNNING and job.open is None and right
        if self.expect(allowed, lambda: self.store.open_attempt(record)):
            assert job is not None
            job.attempts.append(record)
            job.record = dataclasses.replace(job.record, next_attempt=number + 1)

    @rule(job_id=JOBS, outcome=st.sampled_from([AttemptOutcome.ABORTED, AttemptOutcome.ABANDONED]))
    def close_attempt(self, job_id: str, outcome: AttemptOutcome) -> None:
        job = self.jobs.get(job_id)
        last = job.attempts[-1].session_id if job and job.attempts else b"?" * 32
        allowed = job is not None and job.open is not None
        if self.expect(allowed, lambda: self.store.close_attempt(last, outcome, "r")):
            assert job is not None
            job.end(outcome, "r")

    @rule(job_id=JOBS, participant=st.sampled_from(NAMES), reason=st.sampled_from(["Deadline", "BadSignature"]))
    def drop(self, job_id: str, participant: str, reason: str) -> None:
        job = self.jobs.get(job_id)
        where = (job.attempts[-1].round_number, job.attempts[-1].attempt) if job and job.attempts else (1, 1)
        record = DropRecord(job_id, *where, participant, "MaskedUpdate", reason, "", 1.0)
        if self.expect(job is not None and bool(job.attempts), lambda: self.store.record_drop(record)):
            assert job is not None
            if (*where, participant) not in [(d.round_number, d.attempt, d.participant) for d in job.drops]:
                job.drops.append(record)

    @rule(job_id=JOBS, survivors=st.sampled_from([NAMES, NAMES, NAMES[:2]]))
    def save(self, job_id: str, survivors: tuple[str, ...]) -> None:
        job = self.jobs.get(job_id)
        last = job.attempts[-1].session_id if job and job.attempts else b"?" * 32
        record = ResumeRecord(last, job_id, b"blob", "", survivors, 2.0)
        allowed = job is not None and job.open is not None and job.resume in (None, record)
        if self.expect(allowed, lambda: self.store.save_resume(record)):
            assert job is not None
            if job.resume is None:
                job.released.append(last)
            job.resume = record

    @rule(job_id=JOBS, round_offset=st.sampled_from([0, 0, 0, 0, -1, 1]), survivors=st.sampled_from([NAMES, NAMES[:2]]))
    def commit(self, job_id: str, round_offset: int, survivors: tuple[str, ...]) -> None:
        job = self.jobs.get(job_id)
        last = job.attempts[-1] if job and job.attempts else AttemptRecord(job_id, 1, 1, b"?" * 32, b"", b"", 1.0)
        round_number = last.round_number + round_offset
        model = session_of("model", round_number, last.attempt)
        record = CommittedRound(
            job_id, round_number, last.attempt, last.session_id, model, survivors, (), {"l": 1.0}, {}, 3, 4.0
        )
        ready = job is not None and job.open is not None and job.resume is not None and round_offset == 0
        allowed = ready and job is not None and job.resume is not None and job.resume.survivors == survivors
        if self.expect(allowed, lambda: self.store.commit_round(record)):
            assert job is not None
            job.rounds.append(record)
            job.end(AttemptOutcome.COMMITTED, "", 4.0)
            done = round_number == job.record.rounds_total
            state = JobState.COMPLETED if done else JobState.RUNNING
            job.record = dataclasses.replace(
                job.record, state=state, current_model=model, next_round=round_number + 1, next_attempt=1
            )

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = self.opened()

    @invariant()
    def answers_are_the_models(self) -> None:
        assert self.store.jobs() == tuple(job.record for job in self.jobs.values())
        queued = [job.record for job in self.jobs.values() if job.record.state is JobState.QUEUED]
        assert self.store.next_queued() == (queued[0] if queued else None)
        for job_id, job in self.jobs.items():
            assert self.store.attempts(job_id) == tuple(job.attempts)
            assert self.store.current_attempt(job_id) == job.open
            assert self.store.rounds(job_id) == tuple(job.rounds)
            assert self.store.drops(job_id) == tuple(job.drops)
            assert self.store.resume_record(job_id) == job.resume
            assert [release.session_id for release in self.store.releases(job_id)] == job.released
            assert self.store.last_survivors(job_id) == (job.rounds[-1].survivors if job.rounds else ())


TestJobLife = pytest.mark.timeout(60)(JobLife.TestCase)
TestJobLife.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
