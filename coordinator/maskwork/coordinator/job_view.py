"""The coordinator's records as the events and summaries that watchers and lists see. Pure; it reads nothing itself."""

from __future__ import annotations

from maskwork import job_events as events
from maskwork.coordinator.records import CommittedRound, JobRecord


def summary(record: JobRecord, *, at: float) -> events.JobSummary:
    """A job's record as watchers and lists see it."""
    return events.JobSummary(
        job_id=record.job_id,
        at=at,
        name=record.name,
        task=record.task,
        state=record.state.value,
        rounds_total=record.rounds_total,
        rounds_committed=record.rounds_committed,
        reason=record.reason,
        submitted_by=record.submitted_by,
        submitted_at=record.submitted_at,
        model_digest=record.current_model,
        rolled_back=record.rolled_back,
    )


def round_event(committed: CommittedRound, *, seconds: float) -> events.RoundCommitted:
    """A committed round as watchers see it."""
    return events.RoundCommitted(
        job_id=committed.job_id,
        at=committed.committed_at,
        round_number=committed.round_number,
        attempt=committed.attempt,
        survivors=committed.survivors,
        dropouts=committed.dropouts,
        statistics=dict(committed.statistics),
        stage_seconds=dict(committed.stage_seconds),
        seconds=seconds,
        uplink_bytes=committed.uplink_bytes,
        model_digest=committed.model,
        committed_at=committed.committed_at,
    )
