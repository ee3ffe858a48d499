"""kill -9 of processes that write the stores, at random instants: a round either committed or never happened.

A child process runs jobs (put a model, open, save, commit, in a loop) and appends each acknowledged step to a plain
file; it is SIGKILLed, and what it left is opened and looked at. The same for a site's ledger.

A failure is: a store that does not open; a step that was acknowledged and is gone; a round twice or out of order; a row
whose model file is missing or damaged; a session saved before Unmask with a new attempt beside it. Not a failure: a
last step that is there although it was not acknowledged. The instants come from one seed, but what the child has done
by then depends on the machine.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.records import (
    AttemptOutcome,
    AttemptRecord,
    CommittedRound,
    JobRecord,
    JobState,
    ResumeRecord,
)
from maskwork.coordinator.store import Store
from maskwork.participant.ledger import Ledger

SEED = 20
KILLS = 12
SURVIVORS = ("a", "b", "c")
JOB, FED, MODEL = "j", "f", b"m" * 32


class Journal:
    """What the child acknowledged. One write call for each line: a killed process leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def add(self, *words: object) -> None:
        os.write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())


def coordinator_child(directory: Path) -> None:
    """Go on from where an earlier child was killed, as a coordinator does, until killed."""
    journal = Journal(directory / "journal")
    models = ModelStore(directory / "models")
    print("started", flush=True)
    with Store.open(f"sqlite:///{directory}/c.sqlite") as store:
        models.sweep(store.referenced_models())
        if store.job(JOB) is None:
            first = models.put(lambda path: path.write_bytes(b"initial"))
            store.add_job(JobRecord(JOB, "n", "t", JobState.QUEUED, 10**6, 1, 1, "{}", "uri", 0.0, first, first))
        if store.next_queued() is not None:
            store.set_job_state(JOB, JobState.RUNNING)
        resume, attempt = store.resume_record(JOB), store.current_attempt(JOB)
        if resume is not None:
            assert attempt is not None
            journal.add("resumed", resume.session_id.hex())
            commit(store, models, journal, attempt)
        elif attempt is not None:
            store.close_attempt(attempt.session_id, AttemptOutcome.ABANDONED)
        while True:
            run_round(store, models, journal, directory)


def run_round(store: Store, models: ModelStore, journal: Journal, directory: Path) -> None:
    job = store.job(JOB)
    assert job is not None
    session_id = os.urandom(32)
    attempt = AttemptRecord(JOB, job.next_round, job.next_attempt, session_id, os.urandom(3000), b"s", 1.0)
    store.open_attempt(attempt)
    journal.add("opened", attempt.round_number, attempt.attempt)
    accumulator = directory / "accumulator"
    accumulator.write_bytes(session_id)
    store.save_resume(ResumeRecord(session_id, JOB, os.urandom(3000), str(accumulator), SURVIVORS, 2.0))
    journal.add("saved", session_id.hex())
    commit(store, models, journal, attempt)


def commit(store: Store, models: ModelStore, journal: Journal, attempt: AttemptRecord) -> None:
    model = models.put(lambda path: path.write_bytes(os.urandom(200_000)))
    where = (attempt.round_number, attempt.attempt, attempt.session_id)
    store.commit_round(CommittedRound(JOB, *where, model, SURVIVORS, (), {"loss": 0.5}, {"t": 0.1}, 9, 3.0))
    journal.add("committed", attempt.round_number, model.hex())


def ledger_child(directory: Path) -> None:
    """Take up attempts and release sets until killed."""
    journal = Journal(directory / "journal")
    print("started", flush=True)
    with Ledger.open(directory / "site") as ledger:
        while True:
            highest = ledger.highest_attempt(FED, JOB)
            number = 1 if highest is None else highest[0] + 1
            session_id = number.to_bytes(32, "big")
            ledger.record_attempt(
                FED, JOB, number, attempt=1, session_id=session_id, plan_bytes=b"p", plan_signature=b"s", at=1.0
            )
            journal.add("attempt", number)
            ledger.record_release(FED, JOB, MODEL, session_id=session_id, survivors=["a", f"n{number}"], at=1.0)
            journal.add("release", number)


def lines(directory: Path, kind: str) -> list[list[str]]:
    found = [line.split() for line in (directory / "journal").read_text().splitlines()]
    return [words[1:] for words in found if words[0] == kind]


def run_and_kill(role: str, directory: Path, delay_s: float) -> None:
    """Let a child run for `delay_s` after it says that it has started, then SIGKILL it."""
    with (directory / "stderr").open("wb") as stderr:
        command = [sys.executable, "-P", __file__, role, str(directory)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
        try:
            assert child.stdout is not None
            child.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=delay_s)
        finally:
            child.kill()
            child.communicate()
    assert child.returncode == -signal.SIGKILL, (directory / "stderr").read_text()


def check_coordinator(directory: Path) -> None:
    with Store.open(f"sqlite:///{directory}/c.sqlite") as store:
        job, rounds, attempts = store.job(JOB), store.rounds(JOB), store.attempts(JOB)
        models = ModelStore(directory / "models")
        for digest in store.referenced_models():
            models.verify(digest)
        if job is None:
            assert not lines(directory, "opened")
            return
        assert [row.round_number for row in rounds] == list(range(1, job.next_round))
        assert job.current_model == (rounds[-1].model if rounds else job.initial_model)
        for number, model in lines(directory, "committed"):
            assert rounds[int(number) - 1].model.hex() == model, "an acknowledged commit is gone"
        known = {(row.round_number, row.attempt) for row in attempts}
        assert {(int(number), int(attempt)) for number, attempt in lines(directory, "opened")} <= known
        released = {row.session_id.hex() for row in store.releases(JOB)}
        assert {session for (session,) in lines(directory, "saved")} <= released
        for row in attempts:
            is_last = row is attempts[-1]
            committed = row.outcome is AttemptOutcome.COMMITTED
            assert committed or row.session_id.hex() not in released or is_last, "a new attempt beside a saved session"
            assert row.closed_at is not None or is_last, "two open attempts"
        resume = store.resume_record(JOB)
        if resume is not None:
            assert resume.session_id == attempts[-1].session_id
            assert Path(resume.accumulator_path).read_bytes() == resume.session_id


def check_ledger(directory: Path) -> None:
    with Ledger.open(directory / "site") as ledger:
        highest = ledger.highest_attempt(FED, JOB)
        acknowledged = [int(number) for (number,) in lines(directory, "attempt")]
        if acknowledged:
            assert highest is not None
            assert highest[0] >= acknowledged[-1]
            assert len(set(acknowledged)) == len(acknowledged), "an attempt was taken up twice"
        released = ledger.releases(FED, MODEL)
        for (number,) in lines(directory, "release"):
            assert frozenset({"a", f"n{number}"}) in released


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("role", "check", "kills"), [("coordinator", check_coordinator, KILLS), ("ledger", check_ledger, KILLS // 2)]
)
def test_kill_9_at_any_instant(role: str, check: object, kills: int, tmp_path: Path) -> None:
    assert callable(check)
    (tmp_path / "journal").touch()
    instants = random.Random(SEED)
    for kill in range(kills):
        # Half of them early: while the store is opened, migrated, swept, resumed.
        longest_s = 0.15 if kill % 2 == 0 else 0.4
        run_and_kill(role, tmp_path, instants.uniform(0.0, longest_s))
        check(tmp_path)
    assert lines(tmp_path, "committed" if role == "coordinator" else "release"), "no child got anywhere"


if __name__ == "__main__":
    {"coordinator": coordinator_child, "ledger": ledger_child}[sys.argv[1]](Path(sys.argv[2]))
