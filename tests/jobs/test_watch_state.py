"""What a watcher knows after which events."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.jobs import scripted_events as make

from maskwork.job_events import AttemptAborted, ConnectionLost, JobSummary, Waiting, WatchEvent
from maskwork.watch_state import KEPT_NOTICES, KEPT_ROUNDS, NoticeKind, WatchState, bytes_text, some

QUEUED = JobSummary(make.JOB, make.T0, "digits", "digits", "queued", 20, 0)
RUNNING = replace(QUEUED, state="running")
COMPLETED = replace(QUEUED, state="completed", rounds_committed=20)
ABORTED_ATTEMPT = AttemptAborted(make.JOB, make.T0, 1, 1, "complaint-upheld", "west dealt badly")
LOST = ConnectionLost(make.JOB, make.T0, "Socket closed", 0.5)


def after(events: Iterable[WatchEvent], state: WatchState | None = None) -> WatchState:
    state = state or WatchState()
    for event in events:
        state = state.apply(event)
    return state


def texts(state: WatchState) -> list[str]:
    return [notice.text for notice in state.notices]


def test_a_round_from_its_plan_to_its_commit() -> None:
    state = after([RUNNING, *make.whole_round()])
    assert state.attempt is not None
    assert state.attempt.outcome == "committed"
    assert [stage.name for stage in state.attempt.stages] == ["advertise-keys", "masked-update"]
    assert all(stage.closed_at is not None for stage in state.attempt.stages)
    upload = state.attempt.stage("masked-update")
    assert upload is not None
    assert upload.answered == set(make.SITES) - {"north"}
    assert state.attempt.out == {"north"}
    assert state.rounds_committed == 1
    assert texts(state) == [
        "job digits (3f9a1c) is running, 0 of 20 rounds",
        "round 1: north is out at masked-update: deadline (no answer before the deadline)",
        "round 1/20 committed: 4 of 5 sites, without north; train.loss 0.5, eval.loss 0.75, eval.accuracy 0.875; "
        "1.50 s, 2.09 MB",
    ]


def test_a_stage_ends_when_the_next_begins() -> None:
    opened = make.stage_opened("share-keys", at=make.T0 + 3)
    state = after([make.attempt_opened(), make.stage_opened("advertise-keys"), opened])
    assert state.attempt is not None
    first, second = state.attempt.stages
    assert first.closed_at == make.T0 + 3
    assert second.closed_at is None


def test_what_is_repeated_after_a_reconnection_says_nothing_new() -> None:
    history: list[WatchEvent] = [RUNNING, *make.whole_round(1), make.attempt_opened(2), make.stage_opened("unmask", 2)]
    history += [make.answered("unmask", "east", 2), make.dropped("west", 2)]
    once = after(history)
    assert after(history, once) == once


@given(st.data())
def test_a_repeat_from_anywhere_says_nothing_new(data: st.DataObject) -> None:
    history: list[WatchEvent] = [RUNNING, *make.whole_round(1), *make.whole_round(2), *make.whole_round(3)[:-3]]
    repeated = data.draw(st.lists(st.sampled_from(history), max_size=20))
    once = after(history)
    assert after(repeated, once) == once


def test_a_connection_lost_and_found_is_told_once_each() -> None:
    state = after([RUNNING, LOST, replace(LOST, at=make.T0 + 9), replace(LOST, at=make.T0 + 20)])
    assert state.lost is not None
    state = after([make.committed(1), make.committed(2)], state)
    assert state.lost is None
    kinds = [notice.kind for notice in state.notices]
    assert kinds.count(NoticeKind.CONNECTION) == 2
    found = next(notice for notice in state.notices if "again" in notice.text and "connected" in notice.text)
    assert found.at == make.T0 + 20


def test_an_aborted_attempt_and_the_next() -> None:
    opening: list[WatchEvent] = [make.attempt_opened(), make.stage_opened("share-keys"), make.dropped("west")]
    state = after([*opening, ABORTED_ATTEMPT])
    assert state.attempt is not None
    assert state.attempt.outcome == "aborted"
    assert texts(state)[-1] == (
        "round 1, attempt 1 came to nothing: complaint-upheld (west dealt badly); nothing of it is used"
    )
    state = after([make.attempt_opened(1, 2), make.stage_opened("share-keys", 1, 1)], state)
    assert state.attempt is not None
    assert state.attempt.position == (1, 2)
    assert state.attempt.stages == ()
    assert state.attempt.drops == ()
    assert "at attempt 2" in texts(after([make.committed(1, 2)], state))[-1]


@pytest.mark.parametrize(
    "late", [make.dropped("east"), make.answered("share-keys", "east"), make.stage_opened("unmask"), ABORTED_ATTEMPT]
)
def test_an_attempt_that_has_ended_stays_as_it_was(late: WatchEvent) -> None:
    for end in (ABORTED_ATTEMPT, make.committed(1)):
        state = after([make.attempt_opened(), make.stage_opened("share-keys"), end])
        assert state.apply(late) == state


def test_a_session_resumed_after_a_restart_begins_in_the_middle() -> None:
    state = after([make.stage_opened("unmask", 4), make.answered("unmask", "north", 4)])
    assert state.attempt is not None
    assert state.attempt.roster == make.SITES
    assert state.attempt.threshold is None
    assert after([make.committed(4)], state).rounds_committed == 4


def test_an_answer_to_a_stage_that_was_not_opened_is_not_counted() -> None:
    state = after([make.attempt_opened()])
    assert state.apply(make.answered("unmask", "north")) == state


def test_waiting_is_told_once_and_is_over_when_something_moves() -> None:
    wait = Waiting(make.JOB, make.T0, "2 of the 3 sites needed are ready")
    state = after([wait, replace(wait, at=make.T0 + 5)])
    assert texts(state) == ["waiting: 2 of the 3 sites needed are ready"]
    assert state.waiting is not None
    for over in (make.attempt_opened(), make.stage_opened("unmask"), make.committed(1), COMPLETED):
        assert after([over], state).waiting is None


def test_the_jobs_end_is_final() -> None:
    state = after([QUEUED, RUNNING, COMPLETED])
    assert state.ended
    assert state.succeeded
    assert state.apply(RUNNING) == state
    failed = after([RUNNING, replace(RUNNING, state="failed", reason="round 3 failed 20 times")])
    assert failed.ended
    assert not failed.succeeded
    assert texts(failed)[-1].endswith("is failed, 0 of 20 rounds: round 3 failed 20 times")
    assert not after([RUNNING]).ended


def test_rounds_committed_is_what_anybody_knows() -> None:
    assert after([replace(RUNNING, rounds_committed=7)]).rounds_committed == 7
    assert after([replace(RUNNING, rounds_committed=7), make.committed(9)]).rounds_committed == 9
    assert WatchState().rounds_total is None


def test_a_long_job_is_not_kept_whole() -> None:
    state = after(make.committed(number) for number in range(1, 301))
    assert len(state.rounds) == KEPT_ROUNDS
    assert len(state.notices) == KEPT_NOTICES
    assert state.notice_count == 300
    assert state.new_notices(after([], state)) == ()
    following = state.apply(make.committed(301))
    assert following.new_notices(state) == following.notices[-1:]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_090_000, "2.09 MB"), (999_600, "1 MB"), (10**15, "1e+03 TB")],
)
def test_bytes_for_people(size: int, text: str) -> None:
    assert bytes_text(size) == text


def test_names_for_people() -> None:
    assert some(("a", "b"), limit=2) == "a, b"
    assert some(("a", "b", "c"), limit=2) == "a, b and 1 more"
