"""Why a participant is out, in words: a refusal reads as the site's own, anything else by its reason."""

from __future__ import annotations

import pytest
from tests.jobs import scripted_events as make

from maskwork.drop_texts import because, decline_code, named
from maskwork.job_events import Dropped
from maskwork.secagg.errors import DeclineCode
from maskwork.watch_state import WatchState, dropped_text


@pytest.mark.parametrize(
    ("reason", "detail", "text"),
    [
        ("declined", "cohort-too-small: cohort 4 < 5", "site-b declined: cohort 4 < 5"),
        ("declined", "policy: job x: it is not ours", "site-b declined: job x: it is not ours"),
        ("declined", "of an older version: with a colon", "site-b declined: of an older version: with a colon"),
        ("declined", "busy: ", "site-b declined: busy: "),
        ("withdrew", "policy: trusted survivors verified here 1 < 2", None),
        ("withdrew", "training-failed", "site-b: withdrew (training-failed)"),
        ("deadline", "no answer before the deadline", "site-b: deadline (no answer before the deadline)"),
        ("disconnected", "", "site-b: disconnected"),
    ],
)
def test_who_is_out_and_why(reason: str, detail: str, text: str | None) -> None:
    expected = text or "site-b withdrew: trusted survivors verified here 1 < 2"
    assert named("site-b", because(reason, detail)) == expected


def test_the_code_of_a_decline_is_read_and_of_nothing_else() -> None:
    assert decline_code("declined", "participation: 3 of 4") is DeclineCode.PARTICIPATION
    assert decline_code("declined", "whatever: 3 of 4") is None
    assert decline_code("withdrew", "policy: 3 of 4") is None


def dropped(reason: str, detail: str) -> Dropped:
    return Dropped(make.JOB, make.T0, 1, 1, "advertise-keys", "site-b", reason, detail)


def test_a_watcher_reads_a_refusal_as_one_and_where_any_other_happened() -> None:
    refused = dropped("declined", "cohort-too-small: cohort 4 < 5")
    assert dropped_text(refused) == "site-b declined: cohort 4 < 5"
    assert dropped_text(dropped("deadline", "late")) == "site-b is out at advertise-keys: deadline (late)"
    state = WatchState().apply(make.attempt_opened()).apply(refused)
    assert [notice.text for notice in state.notices] == ["round 1: site-b declined: cohort 4 < 5"]
