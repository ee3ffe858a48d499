"""Whom the demo kills and what it believes of it, from scripted events: no process, no timer."""

from dataclasses import replace

import pytest
from tests.jobs import scripted_events as make

from maskwork.job_events import AttemptAborted, ConnectionLost, RoundCommitted, WatchEvent
from maskwork.participant.demo.faults import (
    Fault,
    Injector,
    Landed,
    Missed,
    Moment,
    Rejoined,
    Strike,
    Turn,
    planned,
)

SITES = make.SITES
A_FAULT = Fault(Moment.BEFORE_UPLOAD, 2)
B_FAULT = Fault(Moment.BEFORE_UNMASKING, 3)


def injector(*faults: Fault) -> Injector:
    return Injector(faults or (A_FAULT, B_FAULT), participants=len(SITES))


def feed(subject: Injector, *events: WatchEvent) -> list[Turn]:
    return [turn for event in events if (turn := subject.take(event)) is not None]


def without_upload(number: int, victim: str, *, attempt: int = 1) -> list[WatchEvent]:
    """The rest of a round whose victim died after dealing."""
    left = tuple(site for site in SITES if site != victim)
    return [
        *(make.answered("share-keys", site, number, attempt) for site in left),
        make.stage_opened("masked-update", number, attempt),
        *(make.answered("masked-update", site, number, attempt) for site in left),
        *(make.answered("unmask", site, number, attempt) for site in left),
        make.committed(number, attempt, dropouts=(victim,)),
    ]


def whole(number: int) -> list[WatchEvent]:
    stages = ("advertise-keys", "share-keys", "masked-update", "consistency-check", "unmask")
    answers = [make.answered(stage, site, number) for stage in stages for site in SITES]
    return [make.attempt_opened(number), *answers, make.committed(number)]


def after_first_fault() -> Injector:
    subject = injector()
    first: list[WatchEvent] = [
        make.attempt_opened(2),
        make.answered("share-keys", "east", 2),
        *without_upload(2, "east"),
    ]
    turns = feed(subject, *first, make.attempt_opened(3), make.committed(3))
    assert [type(turn) for turn in turns] == [Strike, Landed, Rejoined]
    return subject


def test_the_plan_for_twenty_rounds_and_for_the_fewest() -> None:
    assert planned(20) == (Fault(Moment.BEFORE_UPLOAD, 5), Fault(Moment.BEFORE_UNMASKING, 10))
    assert planned(4) == (Fault(Moment.BEFORE_UPLOAD, 1), Fault(Moment.BEFORE_UNMASKING, 2))


def test_nobody_is_killed_before_the_planned_round() -> None:
    assert feed(injector(), *whole(1)) == []


def test_the_first_to_deal_is_killed_and_the_round_stands_without_it() -> None:
    subject = injector()
    strike = Strike(Moment.BEFORE_UPLOAD, "east", 2, 1)
    assert feed(subject, make.attempt_opened(2), make.answered("advertise-keys", "north", 2)) == []
    assert feed(subject, make.answered("share-keys", "east", 2)) == [strike]
    assert feed(subject, *without_upload(2, "east")) == [Landed(strike)]
    assert subject.landed == (Landed(strike),)


def test_a_site_that_uploaded_all_the_same_does_not_count_and_another_round_is_tried() -> None:
    subject = injector()
    events: list[WatchEvent] = [
        make.attempt_opened(2),
        make.answered("share-keys", "east", 2),
        make.stage_opened("masked-update", 2),
    ]
    _, missed = feed(subject, *events, make.committed(2))
    assert isinstance(missed, Missed)
    assert "faster" in missed.why
    assert subject.landed == ()
    assert feed(subject, make.attempt_opened(3), make.answered("share-keys", "west", 3)) == [
        Strike(Moment.BEFORE_UPLOAD, "west", 3, 1)
    ]


def test_a_site_that_was_not_in_u2_any_more_does_not_count() -> None:
    left = tuple(site for site in SITES if site != "east")
    events: list[WatchEvent] = [make.attempt_opened(2), make.answered("share-keys", "east", 2)]
    opened = make.stage_opened("masked-update", 2, expected=left)
    _, missed = feed(injector(), *events, opened, make.committed(2, dropouts=("east",)))
    assert isinstance(missed, Missed)
    assert "U2" in missed.why


def test_an_attempt_that_came_to_nothing_does_not_count() -> None:
    subject = injector()
    aborted = AttemptAborted(make.JOB, make.T0, 2, 1, "too-few-participants")
    _, missed = feed(subject, make.attempt_opened(2), make.answered("share-keys", "east", 2), aborted)
    assert isinstance(missed, Missed)
    again = feed(subject, make.attempt_opened(2, 2), make.answered("share-keys", "west", 2, 2))
    assert again == [Strike(Moment.BEFORE_UPLOAD, "west", 2, 2)]


def test_a_round_that_another_attempt_committed_does_not_count() -> None:
    subject = injector()
    feed(subject, make.attempt_opened(2), make.answered("share-keys", "east", 2), make.stage_opened("masked-update", 2))
    (missed,) = feed(subject, make.committed(2, 2, dropouts=("east",)))
    assert isinstance(missed, Missed)
    assert "another attempt" in missed.why


def test_nobody_is_killed_where_a_site_is_missing_already() -> None:
    subject = injector()
    few = make.attempt_opened(2, sites=SITES[:4])
    assert feed(subject, few, make.answered("share-keys", "east", 2)) == []
    assert feed(subject, make.answered("share-keys", "east", 2, 2)) == []  # an attempt that was not announced


def test_a_victim_that_stays_away_has_not_rejoined_and_nobody_else_is_killed() -> None:
    subject = injector()
    feed(subject, make.attempt_opened(2), make.answered("share-keys", "east", 2), *without_upload(2, "east"))
    away: list[WatchEvent] = [
        make.attempt_opened(3),
        make.answered("masked-update", "west", 3),
        make.committed(3, dropouts=("east",)),
    ]
    assert feed(subject, *away) == []
    (back,) = feed(subject, make.attempt_opened(4), make.answered("masked-update", "west", 4), make.committed(4))
    assert back == Rejoined(Strike(Moment.BEFORE_UPLOAD, "east", 2, 1), 4)
    assert subject.rejoined == (back,)


def test_an_earlier_round_told_again_is_no_return() -> None:
    subject = injector()
    feed(subject, make.attempt_opened(2), make.answered("share-keys", "east", 2), *without_upload(2, "east"))
    assert feed(subject, make.committed(1)) == []
    assert subject.rejoined == ()


def test_the_second_victim_is_the_first_other_site_that_uploaded() -> None:
    subject = after_first_fault()
    strike = Strike(Moment.BEFORE_UNMASKING, "north", 4, 1)
    assert feed(subject, make.attempt_opened(4), make.answered("masked-update", "east", 4)) == []
    assert feed(subject, make.answered("masked-update", "north", 4)) == [strike]
    others = [make.answered("unmask", site, 4) for site in SITES if site != "north"]
    assert feed(subject, *others, make.committed(4)) == [Landed(strike)]
    assert feed(subject, *whole(5)) == [Rejoined(strike, 5)]
    assert feed(subject, *whole(6)) == []  # nothing more is planned


@pytest.mark.parametrize(
    ("answers", "dropouts", "why"), [(SITES, (), "faster"), (SITES[1:], ("north",), "was not counted")]
)
def test_a_second_victim_that_answered_or_was_not_counted_does_not_count(
    answers: tuple[str, ...], dropouts: tuple[str, ...], why: str
) -> None:
    subject = after_first_fault()
    feed(subject, make.attempt_opened(4), make.answered("masked-update", "north", 4))
    (missed,) = feed(
        subject, *(make.answered("unmask", site, 4) for site in answers), make.committed(4, dropouts=dropouts)
    )
    assert isinstance(missed, Missed)
    assert why in missed.why


def test_answers_of_another_attempt_say_nothing_about_the_victim() -> None:
    subject = after_first_fault()
    feed(subject, make.attempt_opened(4), make.answered("masked-update", "north", 4))
    (landed,) = feed(subject, make.answered("unmask", "north", 3), make.committed(4))
    assert isinstance(landed, Landed)


def test_rounds_told_again_after_a_broken_connection_change_nothing() -> None:
    subject = after_first_fault()
    before = list(subject.turns)
    past: list[RoundCommitted] = [make.committed(1), make.committed(2, dropouts=("east",)), make.committed(3)]
    lost = ConnectionLost(make.JOB, make.T0, "gone", 1.0)
    assert feed(subject, lost, *past) == []
    feed(subject, make.attempt_opened(4), make.answered("masked-update", "north", 4))
    assert feed(subject, lost, *(replace(event, at=0.0) for event in past)) == []
    assert subject.turns[: len(before)] == before
