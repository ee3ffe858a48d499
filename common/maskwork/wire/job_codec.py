"""Between ``jobs.proto`` and `maskwork.job_events`, in both directions: the coordinator encodes, clients decode.

It is NOT a check of what an event claims: a client believes the coordinator that it asked, since nothing about a job's
progress can be verified by somebody who was not in the session. It checks form alone.

Rules:

1. Decoding gives a well-formed event or raises `WireError`. An event of a kind that this version does not know is
   None, so that an older client can watch a newer coordinator.
2. Text comes out without control characters: it ends up on terminals, and third parties wrote some of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import assert_never

from maskwork.job_events import (
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
from maskwork.model_signature import ModelStatement, SignedModel
from maskwork.wire.codec import WireError
from maskwork.wire.v1 import jobs_pb2

# --- encoding -------------------------------------------------------------------------------------------------------


def encode_event(event: JobEvent) -> jobs_pb2.WatchJobResponse:
    """An event as it goes to a watcher."""
    response = jobs_pb2.WatchJobResponse(at=event.at)
    match event:
        case JobSummary():
            response.job.CopyFrom(encode_job(event))
        case AttemptOpened():
            response.attempt_opened.CopyFrom(_attempt_opened(event))
        case StageOpened():
            response.stage_opened.CopyFrom(_stage_opened(event))
        case Answered():
            response.answered.CopyFrom(_answered(event))
        case Dropped():
            response.dropped.CopyFrom(encode_dropped(event))
        case RoundCommitted():
            response.round_committed.CopyFrom(encode_round(event))
        case AttemptAborted():
            response.attempt_aborted.CopyFrom(_attempt_aborted(event))
        case Waiting():
            response.waiting.CopyFrom(jobs_pb2.Waiting(detail=event.detail, connected=event.connected))
        case _:
            assert_never(event)
    return response


def encode_details(details: JobDetails) -> jobs_pb2.GetJobResponse:
    """The answer to GetJob."""
    return jobs_pb2.GetJobResponse(
        job=encode_job(details.job),
        rounds=[encode_round(r) for r in details.rounds],
        attempts=[_past_attempt(a) for a in details.attempts],
        drops=[encode_dropped(d) for d in details.drops],
    )


def encode_job(job: JobSummary) -> jobs_pb2.Job:
    """A job's summary; its `at` travels beside it, or not at all."""
    return jobs_pb2.Job(
        job_id=job.job_id,
        name=job.name,
        task=job.task,
        state=job.state,
        rounds_total=job.rounds_total,
        rounds_committed=job.rounds_committed,
        reason=job.reason,
        submitted_by=job.submitted_by,
        submitted_at=job.submitted_at,
        model_digest=job.model_digest,
        rolled_back=job.rolled_back,
    )


def encode_round(event: RoundCommitted) -> jobs_pb2.RoundCommitted:
    """A committed round."""
    return jobs_pb2.RoundCommitted(
        round_number=event.round_number,
        attempt=event.attempt,
        survivors=event.survivors,
        dropouts=event.dropouts,
        statistics=event.statistics,
        stage_seconds=event.stage_seconds,
        seconds=event.seconds,
        uplink_bytes=event.uplink_bytes,
        model_digest=event.model_digest,
        committed_at=event.committed_at,
    )


def encode_dropped(event: Dropped) -> jobs_pb2.Dropped:
    """A drop."""
    return jobs_pb2.Dropped(
        round_number=event.round_number,
        attempt=event.attempt,
        stage=event.stage,
        participant=event.participant,
        reason=event.reason,
        detail=event.detail,
    )


def _attempt_opened(event: AttemptOpened) -> jobs_pb2.AttemptOpened:
    return jobs_pb2.AttemptOpened(
        round_number=event.round_number,
        attempt=event.attempt,
        roster=event.roster,
        threshold=event.threshold,
        session_id=event.session_id,
    )


def _stage_opened(event: StageOpened) -> jobs_pb2.StageOpened:
    return jobs_pb2.StageOpened(
        round_number=event.round_number, attempt=event.attempt, stage=event.stage, expected=event.expected
    )


def _answered(event: Answered) -> jobs_pb2.Answered:
    return jobs_pb2.Answered(
        round_number=event.round_number, attempt=event.attempt, stage=event.stage, participant=event.participant
    )


def _attempt_aborted(event: AttemptAborted) -> jobs_pb2.AttemptAborted:
    return jobs_pb2.AttemptAborted(
        round_number=event.round_number, attempt=event.attempt, reason=event.reason, detail=event.detail
    )


def _past_attempt(attempt: PastAttempt) -> jobs_pb2.AttemptRecord:
    return jobs_pb2.AttemptRecord(
        round_number=attempt.round_number,
        attempt=attempt.attempt,
        outcome=attempt.outcome,
        reason=attempt.reason,
        opened_at=attempt.opened_at,
    )


# --- decoding -------------------------------------------------------------------------------------------------------


def decode_event(response: jobs_pb2.WatchJobResponse, *, job_id: str) -> JobEvent | None:
    """An event of the job `job_id`, or None if it is of a kind that this version does not know.

    Raises:
        WireError: It is not well-formed.
    """
    at = _finite("at", response.at)
    match response.WhichOneof("event"):
        case "job":
            return decode_job(response.job, at=at)
        case "attempt_opened":
            opened = response.attempt_opened
            round_number, attempt = _position(opened.round_number, opened.attempt)
            return AttemptOpened(
                job_id, at, round_number, attempt, _names(opened.roster), opened.threshold, opened.session_id
            )
        case "stage_opened":
            stage = response.stage_opened
            round_number, attempt = _position(stage.round_number, stage.attempt)
            return StageOpened(job_id, at, round_number, attempt, printable(stage.stage), _names(stage.expected))
        case "answered":
            answer = response.answered
            round_number, attempt = _position(answer.round_number, answer.attempt)
            return Answered(job_id, at, round_number, attempt, printable(answer.stage), printable(answer.participant))
        case "dropped":
            return decode_dropped(response.dropped, job_id=job_id, at=at)
        case "round_committed":
            return decode_round(response.round_committed, job_id=job_id, at=at)
        case "attempt_aborted":
            aborted = response.attempt_aborted
            round_number, attempt = _position(aborted.round_number, aborted.attempt)
            return AttemptAborted(
                job_id, at, round_number, attempt, printable(aborted.reason), printable(aborted.detail)
            )
        case "waiting":
            return Waiting(job_id, at, printable(response.waiting.detail), _names(response.waiting.connected))
        case None:
            return None


def decode_details(response: jobs_pb2.GetJobResponse) -> JobDetails:
    """The answer to GetJob.

    Raises:
        WireError: It is not well-formed.
    """
    job = decode_job(response.job)
    return JobDetails(
        job=job,
        rounds=tuple(decode_round(r, job_id=job.job_id, at=r.committed_at) for r in response.rounds),
        attempts=tuple(_decode_past_attempt(a) for a in response.attempts),
        drops=tuple(decode_dropped(d, job_id=job.job_id) for d in response.drops),
    )


def decode_job(message: jobs_pb2.Job, *, at: float = 0.0) -> JobSummary:
    """A job's summary, as of `at`.

    Raises:
        WireError: It has no id, no state, or more rounds committed than there are.
    """
    if not message.job_id or not message.state:
        raise WireError("a job without an id or a state")
    if message.rounds_committed > message.rounds_total:
        raise WireError(f"a job with {message.rounds_committed} of {message.rounds_total} rounds committed")
    return JobSummary(
        job_id=printable(message.job_id),
        at=at,
        name=printable(message.name),
        task=printable(message.task),
        state=printable(message.state),
        rounds_total=message.rounds_total,
        rounds_committed=message.rounds_committed,
        reason=printable(message.reason),
        submitted_by=printable(message.submitted_by),
        submitted_at=_finite("submitted_at", message.submitted_at),
        model_digest=message.model_digest,
        rolled_back=message.rolled_back,
    )


def decode_round(message: jobs_pb2.RoundCommitted, *, job_id: str, at: float = 0.0) -> RoundCommitted:
    """A committed round of the job `job_id`.

    Raises:
        WireError: It counts from zero, or holds a number that is none.
    """
    round_number, attempt = _position(message.round_number, message.attempt)
    return RoundCommitted(
        job_id=job_id,
        at=_finite("at", at),
        round_number=round_number,
        attempt=attempt,
        survivors=_names(message.survivors),
        dropouts=_names(message.dropouts),
        statistics=_finite_map(message.statistics),
        stage_seconds=_finite_map(message.stage_seconds),
        seconds=_finite("seconds", message.seconds),
        uplink_bytes=message.uplink_bytes,
        model_digest=message.model_digest,
        committed_at=_finite("committed_at", message.committed_at),
    )


def decode_dropped(message: jobs_pb2.Dropped, *, job_id: str, at: float = 0.0) -> Dropped:
    """A drop in the job `job_id`.

    Raises:
        WireError: It counts from zero.
    """
    round_number, attempt = _position(message.round_number, message.attempt)
    return Dropped(
        job_id,
        at,
        round_number,
        attempt,
        printable(message.stage),
        printable(message.participant),
        printable(message.reason),
        printable(message.detail),
    )


def _decode_past_attempt(message: jobs_pb2.AttemptRecord) -> PastAttempt:
    round_number, attempt = _position(message.round_number, message.attempt)
    opened_at = _finite("opened_at", message.opened_at)
    return PastAttempt(round_number, attempt, printable(message.outcome), printable(message.reason), opened_at)


def printable(text: str) -> str:
    """A text from elsewhere with a space for whatever a terminal could take for a command."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _names(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(printable(text) for text in texts)


def _position(round_number: int, attempt: int) -> tuple[int, int]:
    if round_number < 1 or attempt < 1:
        raise WireError(f"round {round_number}, attempt {attempt}: both count from 1")
    return round_number, attempt


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise WireError(f"{name} is not a finite number")
    return value


def _finite_map(values: Mapping[str, float]) -> dict[str, float]:
    return {printable(name): _finite(name, value) for name, value in values.items()}


# --- a model's signature --------------------------------------------------------------------------------------------


def encode_signature(signed: SignedModel) -> jobs_pb2.ModelSignature:
    """A signature as it goes before the model."""
    said = signed.statement
    return jobs_pb2.ModelSignature(
        federation=said.federation,
        job_id=said.job_id,
        round_number=said.round_number,
        session_id=said.session_id,
        file_sha256=said.file_sha256,
        model_digest=said.model_digest,
        signed_at=said.signed_at,
        audit_head=said.audit_head,
        audit_size=said.audit_size,
        certificate=said.certificate,
        signature=signed.signature,
    )


def decode_signature(message: jobs_pb2.ModelSignature) -> SignedModel:
    """A signature as it came, not yet verified.

    Raises:
        WireError: It cannot be one.
    """
    try:
        statement = ModelStatement(
            federation=message.federation,
            job_id=message.job_id,
            round_number=message.round_number,
            session_id=message.session_id,
            file_sha256=message.file_sha256,
            model_digest=message.model_digest,
            signed_at=message.signed_at,
            audit_head=message.audit_head,
            audit_size=message.audit_size,
            certificate=message.certificate,
        )
    except ValueError as error:
        raise WireError(f"a model's signature that cannot be one: {error}") from None
    return SignedModel(statement, message.signature)
