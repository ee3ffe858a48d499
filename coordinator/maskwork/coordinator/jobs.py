"""What the coordinator does for researchers and operators: takes jobs in, tells about them, hands models out.

Running a job is the driver's business. Nothing here trusts what was sent: the spec is validated, the model's header is
read and its numbers are checked before a job exists.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import structlog

from maskwork.coordinator.board import EventBoard
from maskwork.coordinator.job_view import round_event, summary
from maskwork.coordinator.models import ModelFile, ModelStore, ModelTooLarge
from maskwork.coordinator.records import FIRST_ATTEMPT, FIRST_ROUND, JobRecord, JobState
from maskwork.coordinator.store import Store
from maskwork.job import JobSpec, parse_spec
from maskwork.job_events import Dropped, JobDetails, JobEvent, JobSummary, PastAttempt, RoundCommitted
from maskwork.net.status import Refusal, Refused
from maskwork.tensors import ModelFileError, ModelSource, check_finite

log = structlog.get_logger("maskwork.coordinator")

DISK_RESERVE_BYTES = 256 << 20
"""Left free whatever is submitted: the database, the open session's uploads and the next model need it."""


class JobDesk:
    """Jobs as their owners see them."""

    def __init__(
        self,
        *,
        store: Store,
        models: ModelStore,
        board: EventBoard,
        max_model_bytes: int,
        max_unfinished_jobs: int = 100,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._models = models
        self._board = board
        self._max_model_bytes = max_model_bytes
        self._max_unfinished_jobs = max_unfinished_jobs
        self._free_bytes = free_bytes
        self._promised = 0  # bytes of models that are on their way in
        self._reading = asyncio.Lock()
        self._clock = clock

    async def submit(
        self, spec_json: bytes, model_size: int, chunks: AsyncIterable[bytes], *, submitted_by: str
    ) -> JobSummary:
        """Take a job in and queue it.

        Raises:
            Refused: the spec or the model is not valid; the text says what to mend.
            StoreError: it cannot be stored.
        """
        try:
            spec = parse_spec(spec_json)
        except ValueError as error:
            raise Refused(Refusal.INVALID, f"the job is not valid: {error}") from error
        if not 0 < model_size <= self._max_model_bytes:
            raise Refused(Refusal.TOO_MUCH, f"a model has 1 to {self._max_model_bytes} bytes here, not {model_size}")
        self._check_room(submitted_by, model_size)
        self._promised += model_size
        try:
            digest = await self._take_model(model_size, chunks, submitted_by)
        finally:
            self._promised -= model_size
        record = self._record(spec, digest, submitted_by)
        self._store.add_job(record)
        return summary(record, at=self._clock())

    def _check_room(self, submitted_by: str, model_size: int = 0) -> None:
        unfinished = sum(r.submitted_by == submitted_by and JobState(r.state) not in _ENDED for r in self._store.jobs())
        if unfinished >= self._max_unfinished_jobs:
            raise Refused(
                Refusal.TOO_MUCH,
                f"{unfinished} jobs of yours have not ended, and {self._max_unfinished_jobs} may be here at a time: "
                "abort some, or wait",
            )
        free = self._free_bytes(self._models.directory) - self._promised
        wanted = model_size + DISK_RESERVE_BYTES  # as the log says it: the model alone may be below what is free
        if model_size and wanted > free:
            log.error("no room for a submitted model", file=str(self._models.directory), free=free, wanted=wanted)
            raise Refused(Refusal.TOO_MUCH, "the coordinator has no room for this model; tell its operator")

    async def _take_model(self, size: int, chunks: AsyncIterable[bytes], submitted_by: str) -> bytes:
        with self._models.incoming(max_bytes=size) as incoming:
            try:
                async for chunk in chunks:
                    incoming.write(chunk)
            except ModelTooLarge as error:
                raise Refused(Refusal.INVALID, f"more than the {size} bytes that were announced") from error
            if incoming.size != size:
                raise Refused(Refusal.INVALID, f"the model has {incoming.size} bytes, {size} were announced")
            await self._judge(incoming.written())
            self._check_room(submitted_by)  # others of the same submitter may have come in meanwhile
            return incoming.commit()

    async def _judge(self, model: ModelSource) -> None:
        """Refuse a model before it is kept: nothing would delete it before the next start."""
        try:
            async with self._reading:  # one at a time: a header's JSON may take many times its bytes
                await asyncio.to_thread(check_finite, model)
        except ModelFileError as error:
            said = str(error).removeprefix(f"{model}: ")  # where it lies here is not the submitter's business
            raise Refused(Refusal.INVALID, f"the initial model is not usable: {said}") from error

    def _record(self, spec: JobSpec, model: bytes, submitted_by: str) -> JobRecord:
        return JobRecord(
            job_id=f"{spec.name}-{secrets.token_hex(4)}",
            name=spec.name,
            task=spec.task,
            state=JobState.QUEUED,
            rounds_total=spec.rounds,
            next_round=FIRST_ROUND,
            next_attempt=FIRST_ATTEMPT,
            spec_json=spec.canonical_json().decode(),
            submitted_by=submitted_by,
            submitted_at=self._clock(),
            initial_model=model,
            current_model=model,
        )

    def list(self) -> tuple[JobSummary, ...]:
        """Every job, in the order of submission."""
        return tuple(summary(record, at=self._clock()) for record in self._store.jobs())

    def details(self, job_id: str) -> JobDetails:
        """One job with its rounds, attempts and drops.

        Raises:
            Refused: there is no such job.
        """
        record = self._find(job_id)
        attempts = self._store.attempts(job_id)
        drops = self._store.drops(job_id)
        shown, waiting = summary(record, at=self._clock()), self._board.waiting(job_id)
        return JobDetails(
            replace(shown, reason=f"waiting: {waiting}") if waiting and not shown.ended else shown,
            self._rounds(job_id),
            tuple(
                PastAttempt(
                    a.round_number, a.attempt, "" if a.outcome is None else a.outcome.value, a.reason, a.opened_at
                )
                for a in attempts
            ),
            tuple(
                Dropped(job_id, d.at, d.round_number, d.attempt, d.stage, d.participant, d.reason, d.detail)
                for d in drops
            ),
        )

    async def watch(self, job_id: str) -> AsyncIterator[JobEvent]:
        """The job as it stands, its past rounds, the attempt going on, then what happens until it ends.

        Raises:
            Refused: there is no such job, the watcher does not keep up, or the coordinator stops.
        """
        self._find(job_id)
        with self._board.subscribe(job_id) as subscription:
            yield summary(self._find(job_id), at=self._clock())
            past = self._rounds(job_id)
            for committed in past:
                yield committed
            if JobState(self._find(job_id).state) in _ENDED:
                return
            told = {committed.round_number for committed in past}
            async for event in subscription:
                if isinstance(event, RoundCommitted) and event.round_number in told:
                    continue
                yield event
                if isinstance(event, JobSummary) and event.ended:
                    return
        if self._board.closed:
            raise Refused(Refusal.STOPPING, "the coordinator stops")
        raise Refused(Refusal.TOO_MUCH, "this watcher has fallen too far behind")

    def model(self, job_id: str, round_number: int) -> ModelFile:
        """A committed model; round 0 means the newest.

        Raises:
            Refused: no such job or round.
            StoreError: the file is missing or damaged.
        """
        return self.committed(job_id, round_number)[0]

    def committed(self, job_id: str, round_number: int) -> tuple[ModelFile, int, bytes]:
        """As `model`, with the round that it came out of and that round's session; 0 and none for the initial model."""
        record = self._find(job_id)
        by_round = {r.round_number: r for r in self._store.rounds(job_id)}
        if round_number and round_number not in by_round:
            raise Refused(Refusal.NOT_FOUND, f"job {job_id} has no committed round {round_number}")
        newest = max((n for n, r in by_round.items() if r.model == record.current_model), default=0)
        chosen = by_round.get(round_number or newest)
        if chosen is None:
            return self._models.file(record.current_model), 0, b""
        return self._models.file(chosen.model), chosen.round_number, chosen.session_id

    def _rounds(self, job_id: str) -> tuple[RoundCommitted, ...]:
        opened = {a.session_id: a.opened_at for a in self._store.attempts(job_id)}
        return tuple(
            round_event(committed, seconds=max(0.0, committed.committed_at - opened[committed.session_id]))
            for committed in self._store.rounds(job_id)
        )

    def _find(self, job_id: str) -> JobRecord:
        record = self._store.job(job_id)
        if record is None:
            raise Refused(Refusal.NOT_FOUND, f"there is no job {job_id}")
        return record


_ENDED = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.ABORTED})
