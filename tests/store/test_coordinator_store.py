"""Each rule of the coordinator's store: what it accepts, and that what it refuses changes nothing."""

import dataclasses
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maskwork.coordinator.migrations import tables
from maskwork.coordinator.records import (
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
from maskwork.coordinator.store import Store
from maskwork.errors import StoreError

SURVIVORS = ("anna", "bert", "åsa")


def digest(*parts: object) -> bytes:
    return repr(parts).encode().ljust(32, b"\0")[-32:]


def new_job(job_id: str = "j1", rounds_total: int = 3) -> JobRecord:
    return JobRecord(
        job_id=job_id,
        name="digits, twenty rounds",
        task="digits",
        state=JobState.QUEUED,
        rounds_total=rounds_total,
        next_round=1,
        next_attempt=1,
        spec_json='{"rounds": 3}',
        submitted_by="spiffe://fed/researcher/rosa",
        submitted_at=1.5,
        initial_model=digest("initial"),
        current_model=digest("initial"),
    )


def new_attempt(round_number: int = 1, attempt: int = 1, job_id: str = "j1") -> AttemptRecord:
    session_id = digest(job_id, round_number, attempt)
    return AttemptRecord(job_id, round_number, attempt, session_id, b"plan", b"signature", opened_at=2.0)


def resume_of(attempt: AttemptRecord, path: str = "") -> ResumeRecord:
    return ResumeRecord(attempt.session_id, attempt.job_id, b"state", path, SURVIVORS, saved_at=3.0)


def round_of(attempt: AttemptRecord) -> CommittedRound:
    return CommittedRound(
        job_id=attempt.job_id,
        round_number=attempt.round_number,
        attempt=attempt.attempt,
        session_id=attempt.session_id,
        model=digest("model", attempt.round_number),
        survivors=SURVIVORS,
        dropouts=("carl",),
        statistics={"loss": 0.25, "examples": 1437.0},
        stage_seconds={"training": 0.5},
        uplink_bytes=1 << 40,
        committed_at=4.0,
    )


def drop_of(attempt: AttemptRecord, participant: str = "carl", reason: str = "Deadline") -> DropRecord:
    where = (attempt.job_id, attempt.round_number, attempt.attempt)
    return DropRecord(*where, participant, "MaskedUpdate", reason, "nothing came", 2.5)


def everything(store: Store, job_id: str = "j1") -> tuple[object, ...]:
    return (
        store.jobs(),
        store.attempts(job_id),
        store.drops(job_id),
        store.rounds(job_id),
        store.resume_record(job_id),
        store.releases(job_id),
        store.evidence(job_id),
    )


def refuses(store: Store, saying: str, call: Callable[[], None]) -> None:
    before = everything(store)
    with pytest.raises(RuntimeError, match=saying):
        call()
    assert everything(store) == before


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(f"sqlite:///{tmp_path}/coordinator.sqlite", clock=lambda: 99.0) as opened:
        yield opened


@pytest.fixture
def running(store: Store) -> Store:
    store.add_job(new_job())
    store.set_job_state("j1", JobState.RUNNING)
    return store


@pytest.fixture
def opened(running: Store) -> Store:
    running.open_attempt(new_attempt())
    return running


@pytest.fixture
def saved(opened: Store) -> Store:
    opened.save_resume(resume_of(new_attempt()))
    return opened


def test_a_job_comes_back_as_it_was_added(store: Store) -> None:
    store.add_job(new_job())
    assert store.job("j1") == new_job()
    assert store.job("j2") is None


def test_jobs_are_served_in_order_of_submission(store: Store) -> None:
    for job_id in ("z", "a", "m"):
        store.add_job(new_job(job_id))
    assert [job.job_id for job in store.jobs()] == ["z", "a", "m"]
    store.set_job_state("z", JobState.RUNNING)
    following = store.next_queued()
    assert following is not None
    assert following.job_id == "a"


def test_no_queued_job_is_none(running: Store) -> None:
    assert running.next_queued() is None


def test_a_job_id_is_taken_once(store: Store) -> None:
    store.add_job(new_job())
    refuses(store, "contradicts", lambda: store.add_job(dataclasses.replace(new_job(), name="other")))


@pytest.mark.parametrize(
    ("change", "saying"),
    [
        ({"state": JobState.RUNNING}, "queued"),
        ({"next_round": 2}, "round 1"),
        ({"next_attempt": 2}, "attempt 1"),
        ({"current_model": digest("other")}, "initial model"),
        ({"rounds_total": 0}, "at least 1"),
        ({"initial_model": b"short", "current_model": b"short"}, "32 bytes"),
    ],
)
def test_a_job_that_is_not_fresh_is_refused(store: Store, change: dict[str, object], saying: str) -> None:
    job = dataclasses.replace(new_job(), **change)  # type: ignore[arg-type]  # the table's values are of mixed types
    refuses(store, saying, lambda: store.add_job(job))


@pytest.mark.parametrize("start", [state for state in JobState if state is not JobState.COMPLETED])
@pytest.mark.parametrize("target", list(JobState))
def test_job_states_follow_the_table(store: Store, start: JobState, target: JobState) -> None:
    store.add_job(new_job())
    if start is not JobState.QUEUED:
        store.set_job_state("j1", start)
    if target in TRANSITIONS[start]:
        store.set_job_state("j1", target, "because")
        job = store.job("j1")
        assert job is not None
        assert (job.state, job.reason) == (target, "because")
    else:
        refuses(store, "cannot become", lambda: store.set_job_state("j1", target))


def test_an_unknown_job_cannot_change(store: Store) -> None:
    refuses(store, "no such job", lambda: store.set_job_state("j1", JobState.RUNNING))
    refuses(store, "no such job", lambda: store.open_attempt(new_attempt()))


def test_opening_moves_the_next_attempt_in_the_same_transaction(opened: Store) -> None:
    job = opened.job("j1")
    assert job is not None
    assert (job.next_round, job.next_attempt) == (1, 2)
    assert opened.attempts("j1") == (new_attempt(),)
    assert opened.current_attempt("j1") == new_attempt()


def test_an_attempt_needs_a_running_job(store: Store) -> None:
    store.add_job(new_job())
    refuses(store, "not running", lambda: store.open_attempt(new_attempt()))


@pytest.mark.parametrize(("round_number", "attempt"), [(1, 1), (1, 0), (0, 9), (2, 1), (2, 9)])
def test_an_attempt_that_is_not_higher_is_refused(opened: Store, round_number: int, attempt: int) -> None:
    opened.close_attempt(new_attempt().session_id, AttemptOutcome.ABORTED)
    other = dataclasses.replace(new_attempt(round_number, attempt), session_id=digest("other"))
    refuses(opened, "round 1, attempt 2 or higher", lambda: opened.open_attempt(other))


def test_attempt_numbers_may_be_skipped_but_never_used_again(opened: Store) -> None:
    opened.close_attempt(new_attempt().session_id, AttemptOutcome.ABORTED)
    opened.open_attempt(new_attempt(1, 7))
    opened.close_attempt(new_attempt(1, 7).session_id, AttemptOutcome.ABANDONED)
    refuses(opened, "attempt 8 or higher", lambda: opened.open_attempt(new_attempt(1, 6)))


def test_a_session_id_is_used_once(opened: Store) -> None:
    opened.close_attempt(new_attempt().session_id, AttemptOutcome.ABORTED)
    again = dataclasses.replace(new_attempt(1, 2), session_id=new_attempt().session_id)
    refuses(opened, "contradicts", lambda: opened.open_attempt(again))


def test_an_attempt_that_has_ended_cannot_be_opened(running: Store) -> None:
    ended = dataclasses.replace(new_attempt(), closed_at=3.0, outcome=AttemptOutcome.ABORTED)
    refuses(running, "has not ended", lambda: running.open_attempt(ended))


def test_no_attempt_beside_an_open_one(opened: Store) -> None:
    refuses(opened, "resume it or close it", lambda: opened.open_attempt(new_attempt(1, 2)))


def test_no_attempt_beside_a_session_that_can_be_resumed(saved: Store) -> None:
    refuses(saved, "resume it or close it", lambda: saved.open_attempt(new_attempt(1, 2)))


def test_closing_an_attempt_ends_it_once(saved: Store) -> None:
    saved.close_attempt(new_attempt().session_id, AttemptOutcome.ABORTED, "below threshold")
    ended = dataclasses.replace(new_attempt(), closed_at=99.0, outcome=AttemptOutcome.ABORTED, reason="below threshold")
    assert saved.attempts("j1") == (ended,)
    assert saved.current_attempt("j1") is None
    assert saved.resume_record("j1") is None
    close = lambda: saved.close_attempt(new_attempt().session_id, AttemptOutcome.ABORTED)  # noqa: E731
    refuses(saved, "has ended as aborted", close)


def test_only_a_commit_marks_an_attempt_committed(opened: Store) -> None:
    session_id = new_attempt().session_id
    refuses(opened, "commit_round", lambda: opened.close_attempt(session_id, AttemptOutcome.COMMITTED))
    refuses(opened, "no such attempt", lambda: opened.close_attempt(digest("none"), AttemptOutcome.ABORTED))


def test_a_job_that_ends_takes_its_open_attempt_along(saved: Store) -> None:
    saved.set_job_state("j1", JobState.ABORTED, "by the operator")
    (attempt,) = saved.attempts("j1")
    assert (attempt.outcome, attempt.closed_at) == (AttemptOutcome.ABORTED, 99.0)
    assert attempt.reason == "job aborted: by the operator"
    assert saved.resume_record("j1") is None
    assert len(saved.releases("j1")) == 1, "what was released stays on record"


def test_drops_are_kept_in_order_and_the_first_reason_stands(opened: Store) -> None:
    first, second = drop_of(new_attempt()), drop_of(new_attempt(), "dora", "BadSignature")
    opened.record_drop(first)
    opened.record_drop(second)
    opened.record_drop(drop_of(new_attempt(), "carl", "SomethingElse"))
    assert opened.drops("j1") == (first, second)
    assert opened.drops("j1", 1) == (first, second)
    assert opened.drops("j1", 2) == ()


def test_a_drop_belongs_to_an_attempt(opened: Store) -> None:
    refuses(opened, "contradicts", lambda: opened.record_drop(drop_of(new_attempt(1, 2))))


def test_a_saved_session_comes_back_and_its_survivors_are_on_record(saved: Store) -> None:
    assert saved.resume_record("j1") == resume_of(new_attempt())
    session_id = new_attempt().session_id
    assert saved.releases("j1") == (ReleasedSet(session_id, "j1", 1, 1, digest("initial"), SURVIVORS, 3.0),)


def test_a_session_is_saved_with_one_content(saved: Store) -> None:
    record = resume_of(new_attempt())
    saved.save_resume(record)
    other_survivors = dataclasses.replace(record, survivors=("anna", "bert"))
    refuses(saved, "another content", lambda: saved.save_resume(other_survivors))
    other_state = dataclasses.replace(record, blob=b"other")
    refuses(saved, "another content", lambda: saved.save_resume(other_state))


def test_only_the_open_attempt_can_be_saved(opened: Store) -> None:
    refuses(opened, "no such attempt", lambda: opened.save_resume(resume_of(new_attempt(1, 2))))
    stranger = dataclasses.replace(resume_of(new_attempt()), job_id="j2")
    refuses(opened, "not its open attempt", lambda: opened.save_resume(stranger))
    opened.close_attempt(new_attempt().session_id, AttemptOutcome.ABORTED)
    refuses(opened, "not its open attempt", lambda: opened.save_resume(resume_of(new_attempt())))


@pytest.mark.parametrize("survivors", [(), ("anna", "anna")])
def test_a_survivor_set_names_somebody_and_nobody_twice(opened: Store, survivors: tuple[str, ...]) -> None:
    record = dataclasses.replace(resume_of(new_attempt()), survivors=survivors)
    refuses(opened, "nobody twice", lambda: opened.save_resume(record))


def test_the_accumulator_must_be_on_disk_before_unmask(opened: Store, tmp_path: Path) -> None:
    path = tmp_path / "accumulator"
    record = resume_of(new_attempt(), str(path))
    with pytest.raises(StoreError, match="accumulator"):
        opened.save_resume(record)
    assert opened.resume_record("j1") is None
    path.write_bytes(b"sum")
    opened.save_resume(record)
    assert opened.resume_record("j1") == record


def test_a_commit_changes_everything_it_must_at_once(saved: Store) -> None:
    saved.commit_round(round_of(new_attempt()))
    job = saved.job("j1")
    assert job is not None
    assert (job.next_round, job.next_attempt, job.state) == (2, 1, JobState.RUNNING)
    assert (job.current_model, job.initial_model) == (digest("model", 1), digest("initial"))
    assert saved.rounds("j1") == (round_of(new_attempt()),)
    assert saved.resume_record("j1") is None
    assert saved.attempts("j1") == (
        dataclasses.replace(new_attempt(), closed_at=4.0, outcome=AttemptOutcome.COMMITTED),
    )
    assert saved.last_survivors("j1") == SURVIVORS
    assert saved.referenced_models() == {digest("initial"), digest("model", 1)}


def test_before_the_first_commit_there_are_no_last_survivors(saved: Store) -> None:
    assert saved.last_survivors("j1") == ()


def commit(store: Store, attempt: AttemptRecord) -> None:
    store.open_attempt(attempt)
    store.save_resume(resume_of(attempt))
    store.commit_round(round_of(attempt))


def test_the_last_round_completes_the_job(running: Store) -> None:
    for round_number in (1, 2, 3):
        commit(running, new_attempt(round_number))
    job = running.job("j1")
    assert job is not None
    assert (job.state, job.next_round) == (JobState.COMPLETED, 4)
    assert [row.round_number for row in running.rounds("j1")] == [1, 2, 3]
    assert [row.base_model for row in running.releases("j1")] == [
        digest("initial"),
        digest("model", 1),
        digest("model", 2),
    ]
    refuses(running, "not running", lambda: running.open_attempt(new_attempt(4)))
    refuses(running, "cannot become", lambda: running.set_job_state("j1", JobState.ABORTED))


def test_a_round_commits_once(saved: Store) -> None:
    saved.commit_round(round_of(new_attempt()))
    refuses(saved, "the round to commit is 2", lambda: saved.commit_round(round_of(new_attempt())))


@pytest.mark.parametrize(
    ("change", "saying"),
    [
        ({"round_number": 2}, "the round to commit is 1"),
        ({"round_number": 0}, "the round to commit is 1"),
        ({"attempt": 2}, "not its open attempt"),
        ({"session_id": digest("none")}, "no such attempt"),
        ({"job_id": "j2"}, "no such job"),
        ({"model": b"short"}, "32 bytes"),
        ({"survivors": ("anna", "bert")}, "not those that were saved"),
    ],
)
def test_a_commit_that_does_not_fit_is_refused(saved: Store, change: dict[str, object], saying: str) -> None:
    wrong = dataclasses.replace(round_of(new_attempt()), **change)  # type: ignore[arg-type]  # mixed types
    refuses(saved, saying, lambda: saved.commit_round(wrong))


def test_a_closed_attempt_cannot_commit(saved: Store) -> None:
    saved.close_attempt(new_attempt().session_id, AttemptOutcome.ABORTED)
    refuses(saved, "not its open attempt", lambda: saved.commit_round(round_of(new_attempt())))


def test_an_aborted_job_cannot_commit(saved: Store) -> None:
    saved.set_job_state("j1", JobState.ABORTED)
    refuses(saved, "not running", lambda: saved.commit_round(round_of(new_attempt())))


def test_a_session_that_was_not_saved_cannot_commit(opened: Store) -> None:
    refuses(opened, "save_resume", lambda: opened.commit_round(round_of(new_attempt())))


def test_a_statistic_that_is_not_finite_is_refused(saved: Store) -> None:
    before = everything(saved)
    with pytest.raises(ValueError, match="JSON compliant"):
        saved.commit_round(dataclasses.replace(round_of(new_attempt()), statistics={"loss": float("nan")}))
    assert everything(saved) == before


def test_evidence_is_kept(opened: Store) -> None:
    record = EvidenceRecord("j1", new_attempt().session_id, "DealerEquivocated", "carl", b"\0signed\xff", 5.0)
    opened.add_evidence(record)
    opened.add_evidence(record)
    assert opened.evidence("j1") == (record, record)
    stray = dataclasses.replace(record, session_id=digest("none"))
    refuses(opened, "contradicts", lambda: opened.add_evidence(stray))


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/coordinator.sqlite"
    with Store.open(url) as store:
        store.add_job(new_job())
        store.set_job_state("j1", JobState.RUNNING)
        commit(store, new_attempt())
        store.open_attempt(new_attempt(2))
        store.record_drop(drop_of(new_attempt(2)))
        store.save_resume(resume_of(new_attempt(2)))
        before = everything(store)
    with Store.open(url) as store:
        assert everything(store) == before
        assert store.current_attempt("j1") == new_attempt(2)


def test_a_write_that_fails_half_way_leaves_nothing(saved: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "coordinator.sqlite") as other:
        other.execute("CREATE TRIGGER t BEFORE DELETE ON resumes BEGIN SELECT RAISE(ABORT, 'half-way'); END")
    other.close()
    before = everything(saved)
    with pytest.raises(RuntimeError, match="half-way"):
        saved.commit_round(round_of(new_attempt()))
    assert everything(saved) == before


def test_every_record_has_a_table_with_its_fields() -> None:
    pairs = {
        tables.Job: JobRecord,
        tables.Attempt: AttemptRecord,
        tables.Drop: DropRecord,
        tables.Round: CommittedRound,
        tables.Resume: ResumeRecord,
        tables.Release: ReleasedSet,
        tables.Evidence: EvidenceRecord,
    }
    for table, record in pairs.items():
        columns = {column.name.removesuffix("_json") for column in table.__table__.columns} - {"position"}
        fields = {field.name.removesuffix("_json") for field in dataclasses.fields(record)}
        if record is CommittedRound:  # its row also says whether it was taken back: `RolledBackRound`
            fields |= {"rolled_back_at", "rolled_back_reason"}
        assert columns == fields, table.__tablename__


def test_a_rolled_back_round_stays_on_record_and_its_number_is_not_used_again(running: Store) -> None:
    commit(running, new_attempt(1))
    commit(running, new_attempt(2))
    running.open_attempt(new_attempt(3))
    running.save_resume(resume_of(new_attempt(3)))
    running.roll_back("j1", to_round=1, reason="the disk ate it")
    job = running.job("j1")
    assert job is not None
    assert (job.current_model, job.next_round, job.next_attempt) == (digest("model", 1), 3, 2)
    assert (job.rounds_committed, job.rolled_back, job.last_round, job.reason) == (1, 1, 4, "the disk ate it")
    assert running.rounds("j1") == (round_of(new_attempt(1)),)
    assert running.rolled_back_rounds("j1") == (RolledBackRound(round_of(new_attempt(2)), 99.0, "the disk ate it"),)
    assert [(a.round_number, a.outcome, a.reason) for a in running.attempts("j1")] == [
        (1, AttemptOutcome.COMMITTED, ""),
        (2, AttemptOutcome.ROLLED_BACK, "the disk ate it"),
        (3, AttemptOutcome.ABORTED, "the disk ate it"),
    ]
    assert running.resume_record("j1") is None
    assert [r.round_number for r in running.releases("j1")] == [1, 2, 3]  # what was asked for was asked for
    assert digest("model", 2) in running.referenced_models()
    refuses(running, "the next is round 3, attempt 2", lambda: running.open_attempt(new_attempt(2, 2)))


def test_once_a_round_commits_on_top_a_rollback_is_history_and_not_how_the_job_stands(running: Store) -> None:
    commit(running, new_attempt(1))
    running.roll_back("j1", to_round=0, reason="the disk ate it")
    running.open_attempt(new_attempt(2))
    running.close_attempt(new_attempt(2).session_id, AttemptOutcome.ABORTED, "too few")
    job = running.job("j1")
    assert job is not None
    assert job.reason == "the disk ate it", "it still stands on the model that it was rolled back to"
    commit(running, new_attempt(2, 2))
    job = running.job("j1")
    assert job is not None
    assert (job.state, job.reason) == (JobState.RUNNING, "")
    assert [a.reason for a in running.attempts("j1") if a.outcome is AttemptOutcome.ROLLED_BACK] == ["the disk ate it"]


def test_a_job_completes_when_as_many_rounds_stand_as_were_asked_for(running: Store) -> None:
    commit(running, new_attempt(1))
    commit(running, new_attempt(2))
    running.roll_back("j1", to_round=0, reason="both are gone")
    commit(running, new_attempt(3))
    commit(running, new_attempt(4))
    assert running.last_survivors("j1") == SURVIVORS
    job = running.job("j1")
    assert job is not None
    assert (job.state, job.rounds_committed) == (JobState.RUNNING, 2)
    commit(running, new_attempt(5))
    job = running.job("j1")
    assert job is not None
    assert (job.state, job.rounds_committed, job.rolled_back) == (JobState.COMPLETED, 3, 2)


def test_nothing_is_rolled_back_twice_or_from_a_job_that_does_not_run(running: Store) -> None:
    refuses(running, "nothing to roll back", lambda: running.roll_back("j1", to_round=0, reason="r"))
    commit(running, new_attempt(1))
    commit(running, new_attempt(2))
    for to_round in (2, 3, 9):
        refuses(running, "nothing to roll back", lambda: running.roll_back("j1", to_round=to_round, reason="r"))  # noqa: B023
    running.roll_back("j1", to_round=0, reason="r")
    assert running.last_survivors("j1") == ()
    refuses(running, "nothing to roll back", lambda: running.roll_back("j1", to_round=0, reason="r"))
    refuses(running, "nothing to roll back", lambda: running.roll_back("j1", to_round=1, reason="r"))
    running.set_job_state("j1", JobState.FAILED)
    refuses(running, "it is failed, not running", lambda: running.roll_back("j1", to_round=0, reason="r"))
