"""Job events on the wire: everything that goes in comes out, and nothing malformed or hostile does."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.jobs import scripted_events as make

from maskwork.job_events import (
    STAGES,
    Answered,
    AttemptAborted,
    AttemptOpened,
    Dropped,
    JobDetails,
    JobEvent,
    JobSummary,
    PastAttempt,
    RoundCommitted,
    StageOpened,
    Waiting,
)
from maskwork.secagg.server_states import Stage
from maskwork.wire.codec import WireError
from maskwork.wire.job_codec import decode_details, decode_event, encode_details, encode_event, printable
from maskwork.wire.v1 import jobs_pb2

JOB = st.just(make.JOB)
TEXTS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=20).map(printable)
WORDS = TEXTS.filter(bool)
NAMES = st.lists(WORDS, max_size=4).map(tuple)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(1, 2**32 - 1)
DIGESTS = st.binary(min_size=32, max_size=32)
MEANS = st.dictionaries(WORDS, FINITE, max_size=3)
POSITION = (JOB, FINITE, COUNTS, COUNTS)

EVENTS: st.SearchStrategy[JobEvent] = st.one_of(
    st.integers(0, 2**32 - 1).flatmap(
        lambda total: st.builds(
            JobSummary,
            *(JOB, FINITE, TEXTS, TEXTS, WORDS, st.just(total), st.integers(0, total)),
            *(TEXTS, TEXTS, FINITE, DIGESTS),
        )
    ),
    st.builds(AttemptOpened, *POSITION, NAMES, st.integers(0, 1000), DIGESTS),
    st.builds(StageOpened, *POSITION, st.sampled_from(STAGES), NAMES),
    st.builds(Answered, *POSITION, st.sampled_from(STAGES), WORDS),
    st.builds(Dropped, *POSITION, st.sampled_from(STAGES), WORDS, WORDS, TEXTS),
    st.builds(
        RoundCommitted, *POSITION, NAMES, NAMES, MEANS, MEANS, FINITE, st.integers(0, 2**64 - 1), DIGESTS, FINITE
    ),
    st.builds(AttemptAborted, *POSITION, WORDS, TEXTS),
    st.builds(Waiting, JOB, FINITE, TEXTS, NAMES),
)


@given(EVENTS)
def test_an_event_survives_the_wire(event: JobEvent) -> None:
    data = encode_event(event).SerializeToString()
    assert decode_event(jobs_pb2.WatchJobResponse.FromString(data), job_id=make.JOB) == event


def test_a_jobs_history_survives_the_wire() -> None:
    details = JobDetails(
        JobSummary(make.JOB, 0.0, "digits", "digits", "running", 20, 2, submitted_at=make.T0),
        (make.committed(1), make.committed(2, 2, dropouts=("east",))),
        (PastAttempt(2, 1, "aborted", "complaint-upheld", make.T0),),
        (replace(make.dropped("east", 2, 2), at=0.0),),
    )
    data = encode_details(details).SerializeToString()
    assert decode_details(jobs_pb2.GetJobResponse.FromString(data)) == details


def test_stages_are_the_protocols() -> None:
    assert tuple(stage.value for stage in Stage) == STAGES


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (make.committed(0), "count from 1"),
        (replace(make.committed(1), attempt=0), "count from 1"),
        (make.attempt_opened(0), "count from 1"),
        (make.stage_opened("unmask", 0), "count from 1"),
        (make.answered("unmask", "north", 1, 0), "count from 1"),
        (make.dropped("north", 0), "count from 1"),
        (AttemptAborted(make.JOB, 0.0, 1, 0, "cancelled"), "count from 1"),
        (replace(make.committed(1), statistics={"train.loss": math.nan}), "train.loss is not a finite"),
        (replace(make.committed(1), stage_seconds={"unmask": math.inf}), "unmask is not a finite"),
        (replace(make.committed(1), seconds=math.inf), "seconds is not a finite"),
        (replace(make.committed(1), committed_at=math.nan), "committed_at is not a finite"),
        (replace(make.committed(1), at=math.nan), "at is not a finite"),
        (JobSummary(make.JOB, 0.0, "n", "t", "running", 2, 3), "3 of 2 rounds"),
        (JobSummary("", 0.0, "n", "t", "running", 2, 1), "without an id"),
        (JobSummary(make.JOB, 0.0, "n", "t", "", 2, 1), "without an id or a state"),
        (JobSummary(make.JOB, 0.0, "n", "t", "running", 2, 1, submitted_at=math.inf), "submitted_at is not a finite"),
    ],
)
def test_what_is_malformed_is_refused(event: JobEvent, words: str) -> None:
    with pytest.raises(WireError, match=words):
        decode_event(encode_event(event), job_id=make.JOB)


def test_a_past_attempt_counts_from_one() -> None:
    job = JobSummary(make.JOB, 0.0, "n", "t", "running", 2, 1)
    with pytest.raises(WireError, match="count from 1"):
        decode_details(encode_details(JobDetails(job, attempts=(PastAttempt(0, 1, "aborted", "", 0.0),))))


def test_an_event_of_the_future_is_nothing() -> None:
    assert decode_event(jobs_pb2.WatchJobResponse(at=1.0), job_id=make.JOB) is None


ESCAPES = "\x1b]0;owned\x07\x1b[2Jnorth\r\n"


@pytest.mark.parametrize(
    "event",
    [
        JobSummary(ESCAPES, 0.0, ESCAPES, ESCAPES, ESCAPES, 2, 1, ESCAPES, ESCAPES),
        AttemptOpened(make.JOB, 0.0, 1, 1, (ESCAPES,), 4, b""),
        StageOpened(make.JOB, 0.0, 1, 1, ESCAPES, (ESCAPES,)),
        Answered(make.JOB, 0.0, 1, 1, ESCAPES, ESCAPES),
        Dropped(make.JOB, 0.0, 1, 1, ESCAPES, ESCAPES, ESCAPES, ESCAPES),
        RoundCommitted(make.JOB, 0.0, 1, 1, (ESCAPES,), (ESCAPES,), {ESCAPES: 1.0}, {ESCAPES: 1.0}),
        AttemptAborted(make.JOB, 0.0, 1, 1, ESCAPES, ESCAPES),
        Waiting(make.JOB, 0.0, ESCAPES, (ESCAPES,)),
    ],
    ids=lambda event: type(event).__name__,
)
def test_nothing_from_elsewhere_commands_the_terminal(event: JobEvent) -> None:
    decoded = decode_event(encode_event(event), job_id=make.JOB)
    assert "north" in str(decoded)
    assert "\\x1b" not in repr(decoded)
    assert "\\r" not in repr(decoded)


def test_a_past_attempts_words_do_not_command_the_terminal_either() -> None:
    job = JobSummary(make.JOB, 0.0, "n", "t", "running", 2, 1)
    details = JobDetails(job, attempts=(PastAttempt(1, 1, ESCAPES, ESCAPES, 0.0),))
    assert "\\x1b" not in repr(decode_details(encode_details(details)))
