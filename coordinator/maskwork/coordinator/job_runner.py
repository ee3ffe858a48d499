"""The jobs' side of the coordinator: which job runs, which attempt is opened, and what its end means for the job.

`JobRunner` asks `rounds` what to do next and does it: the plan, the session, the rows in the store, what watchers are
told. It is called by `driver`'s loop, one event at a time, and by nothing else. It decides nothing about jobs (`rounds`
does) or the protocol (`maskwork.secagg.server` does); what happens within a session is `runner`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import assert_never

import structlog

from maskwork import job_events as events
from maskwork.coordinator import recovery, rounds
from maskwork.coordinator.aggregation import Convicted, Implausible, Release, Released
from maskwork.coordinator.happenings import (
    JobAborted,
)
from maskwork.coordinator.job_view import round_event, summary
from maskwork.coordinator.models import ModelDamaged
from maskwork.coordinator.records import (
    AttemptOutcome,
    AttemptRecord,
    CommittedRound,
    JobRecord,
    JobState,
    ResumeRecord,
)
from maskwork.coordinator.recovery import JobLost
from maskwork.coordinator.room import make_room
from maskwork.coordinator.rounds import GiveUp, JobRun, OpenAttempt, PresentSite, Wait
from maskwork.coordinator.runner import SessionRunner, Surroundings
from maskwork.coordinator.session import ActiveSession, public_keys, shape_of
from maskwork.coordinator.spool import UploadSlots
from maskwork.errors import StorageUnavailable
from maskwork.metrics import means
from maskwork.net.revocation import RevocationList
from maskwork.secagg import keys, server
from maskwork.secagg import server_states as core
from maskwork.secagg.encoding import EncodingParameterError
from maskwork.secagg.errors import AbortReason, PlanError
from maskwork.secagg.graph import GraphError
from maskwork.secagg.keys import Signer
from maskwork.secagg.messages import (
    Proposal,
)
from maskwork.secagg.plan import session_id
from maskwork.wire import codec

log = structlog.get_logger("maskwork.coordinator")


@dataclass(frozen=True, slots=True)
class Federation:
    """Who this coordinator is.

    Attributes:
        name: the federation.
        certificate: its own certificate, DER.
        signer: signs plans.
    """

    name: str
    certificate: bytes = field(repr=False)
    signer: Signer = field(repr=False)


class JobRunner:
    """Runs jobs, one at a time, in the order of their submission.

    Attributes:
        run: the job that runs, as far as `rounds` knows it.
        runner: the open session.
        federation: who this coordinator is; changes between sessions alone.
        revocations: the revocation list in force.
    """

    def __init__(
        self,
        *,
        federation: Federation,
        around: Surroundings,
        sessions: Path,
        max_uploads: int,
        entropy: Callable[[int], bytes],
        look_at: Callable[[float], None],
        revocations: RevocationList,
    ) -> None:
        self.revocations = revocations
        self.run: JobRun | None = None
        self.runner: SessionRunner | None = None
        self.federation = federation
        self._around = around
        self._sessions = sessions
        self._max_uploads = max_uploads
        self._entropy = entropy
        self._look_at = look_at
        self._waiting_told = ""
        self._model_doubted = False

    # --- what comes next ----------------------------------------------------------------------------------

    def after_step(self) -> None:
        """Put an ended session away."""
        if self.runner is not None and isinstance(self.runner.session.state, core.Aborted):
            self._close_aborted(self.runner, self.runner.session.state)
        elif self.runner is not None and isinstance(self.runner.session.state, core.Completed):
            self.runner.forget()
            self.runner = None

    async def consider(self) -> None:
        """Start the next job, or open the next attempt, or wait: whatever `rounds` says."""
        while self.runner is None:
            if self.run is None and not self._start_next_job():
                return
            assert self.run is not None
            if self._model_doubted:
                await self._check_model(self.run)
                continue
            present = [peer.site for peer in self._around.peers.values()]
            self.run, decision = rounds.decide(self.run, present, now=self._around.ticks(), rand=self._entropy(16))
            match decision:
                case OpenAttempt(cohort):
                    await self._open_attempt(self.run, cohort)
                    self.after_step()
                case Wait(why, until):
                    self._tell_waiting(why)
                    if until is not None:
                        self._look_at(until)
                    return
                case GiveUp(reason):
                    self._end_job(self.run.job_id, JobState.FAILED, reason)
                case _:
                    assert_never(decision)

    # --- jobs ----------------------------------------------------------------------------------

    def _start_next_job(self) -> bool:
        record = self._around.store.next_queued()
        if record is None:
            return False
        self._around.store.set_job_state(record.job_id, JobState.RUNNING)
        self._publish_job(record.job_id)
        log.info("job started", job=record.job_id, task=record.task, rounds=record.rounds_total)
        self.run = self._job_run(record)
        return self.run is not None or self._start_next_job()

    def _job_run(self, record: JobRecord) -> JobRun | None:
        """The job as it stands, rolled back if it had to be; None, and the job has failed, when it cannot go on."""
        try:
            run = recovery.run_of(record, store=self._around.store, models=self._around.models)
        except JobLost as lost:
            self._end_job(record.job_id, JobState.FAILED, str(lost))
            return None
        if run.rolled_back != record.rolled_back:
            self._publish_job(record.job_id)
        return run

    def _end_job(self, job_id: str, state: JobState, reason: str) -> None:
        self._around.store.set_job_state(job_id, state, reason)
        self._job_over(job_id)
        log.warning("job ended", job=job_id, state=state.value, reason=reason)

    def _job_over(self, job_id: str) -> None:
        self.run = None
        self._waiting_told = ""
        self._publish_job(job_id)
        self._around.board.forget(job_id)

    async def abort(self, request: JobAborted) -> None:
        """End a job that somebody asked to end, and say what it came to."""
        record = self._around.store.job(request.job_id)
        if record is not None and record.state in (JobState.QUEUED, JobState.RUNNING):
            reason = f"aborted by {request.by}"
            if self.runner is not None and self.runner.session.job_id == request.job_id:
                await self.runner.step(core.Cancelled(AbortReason.CANCELLED, reason))
                self.after_step()
            if self.run is not None and self.run.job_id == request.job_id:
                self._end_job(request.job_id, JobState.ABORTED, reason)
            else:
                self._around.store.set_job_state(request.job_id, JobState.ABORTED, reason)
                self._publish_job(request.job_id)
        if not request.done.done():  # who asked may have hung up
            request.done.set_result(self._around.store.job(request.job_id))

    def _publish_job(self, job_id: str) -> None:
        record = self._around.store.job(job_id)
        if record is not None:
            self._around.board.publish(summary(record, at=self._around.clock()))

    def _tell_waiting(self, why: str) -> None:
        assert self.run is not None
        if why != self._waiting_told:
            self._waiting_told = why
            connected = tuple(sorted(self._around.peers))
            self._around.board.publish(events.Waiting(self.run.job_id, self._around.clock(), why, connected))
            log.info("waiting", job=self.run.job_id, why=why)

    # --- attempts ----------------------------------------------------------------------------------

    async def _open_attempt(self, run: JobRun, cohort: tuple[PresentSite, ...]) -> None:
        config = run.spec.training.canonical_json()
        certificates = tuple(self._around.peers[site.name].certificate for site in cohort)
        try:
            plan = rounds.build_plan(
                run,
                cohort,
                federation=self.federation.name,
                nonce=self._entropy(16),
                training_digest=hashlib.sha256(config).digest(),
                revocation_digest=self.revocations.digest,
                revocation_number=self.revocations.number,
                audit_head=self._around.audit.head_for(certificates),
            )
        except (PlanError, EncodingParameterError, GraphError) as error:
            self._end_job(run.job_id, JobState.FAILED, f"no plan can be made for {len(cohort)} sites: {error}")
            return
        try:
            model_size = self._around.models.file(run.model).size
        except ModelDamaged:
            self._roll_back(run)
            return
        plan_bytes = codec.encode_plan(plan)
        identifier = session_id(plan_bytes)
        signed = keys.signed_message("plan", session=identifier, sender=keys.COORDINATOR_INDEX, fields=b"")
        signature = self.federation.signer.sign(signed)
        started = server.begin(Proposal(plan_bytes, signature, plan), public_keys(certificates))
        session = self._new_session(run.job_id, started.state, certificates, config=config, model_size=model_size)
        try:
            make_room(session, self._around.models.directory)
        except StorageUnavailable as error:
            self.run = rounds.put_off(run, str(error), now=self._around.ticks())
            return
        now = self._around.clock()
        self._around.store.open_attempt(
            AttemptRecord(run.job_id, run.round_number, run.attempt, identifier, plan_bytes, signature, now)
        )
        runner = self.runner = SessionRunner(session, self._around)
        self._waiting_told = ""
        self._around.board.publish(
            events.AttemptOpened(
                run.job_id,
                now,
                run.round_number,
                run.attempt,
                tuple(site.name for site in cohort),
                plan.graph.threshold,
                identifier,
            )
        )
        log.info("attempt opened", job=run.job_id, round=run.round_number, attempt=run.attempt, cohort=plan.cohort)
        await runner.perform(started)

    def _roll_back(self, run: JobRun) -> None:
        """The model was found damaged: go on from an earlier one, with whoever is there, or fail."""
        record = self._around.store.job(run.job_id)
        assert record is not None
        following = self._job_run(record)
        # A site that declined because of what it was given did nothing wrong; one that was convicted did.
        self.run = None if following is None else replace(following, barred=run.barred)

    async def _check_model(self, run: JobRun) -> None:
        """Hash the model again when an attempt has given reason to."""
        self._model_doubted = False
        try:
            await asyncio.to_thread(self._around.models.verify, run.model)
        except ModelDamaged:
            self._roll_back(run)

    def _new_session(
        self, job_id: str, state: core.State, certificates: tuple[bytes, ...], *, config: bytes, model_size: int
    ) -> ActiveSession:
        return ActiveSession(
            job_id=job_id,
            core=state.session,
            state=state,
            folder=self._sessions / state.session.id.hex(),
            certificates=certificates,
            training_config=config,
            model_size=model_size,
            slots=UploadSlots(self._max_uploads),
            opened_at=self._around.ticks(),
            revocations=self.revocations,
            vault=self._around.models.vault,
        )

    async def withdraw(self, revocations: RevocationList, peers: Mapping[str, str]) -> None:
        """A newer list is in force: it is in every plan from now on, and who is on it loses its place.

        Args:
            revocations: the list.
            peers: names of connected sites that are on it, each with why.
        """
        self.revocations = revocations
        if self.runner is not None:
            await self.runner.withdraw(revocations)
        if self.run is not None:
            self.run = rounds.exclude(self.run, {name: f"revoked ({why})" for name, why in peers.items()})

    async def released(self, runner: SessionRunner, release: Release) -> None:
        """What removing the masks gave: a model to commit, or the reason why there is none."""
        match release:
            case Released(model, sums):
                self._commit(runner.session, model, sums)
                await runner.step(core.MasksRemoved())
            case Convicted(dealer, detail):
                await runner.step(core.DealerConvicted(dealer, detail))
            case Implausible(detail):
                await runner.step(core.Cancelled(AbortReason.AGGREGATION_FAILED, detail))
            case _:
                assert_never(release)

    def _commit(self, session: ActiveSession, model: bytes, sums: tuple[float, ...]) -> None:
        assert isinstance(session.state, core.RemovingMasks)
        assert self.run is not None
        now, p = self._around.clock(), session.plan
        session.enter_stage(None, self._around.ticks())
        survivors = session.names(session.state.gathered.sets.u3)
        committed = CommittedRound(
            job_id=session.job_id,
            round_number=p.round_number,
            attempt=p.attempt,
            session_id=session.id,
            model=model,
            survivors=survivors,
            dropouts=tuple(e.participant for e in p.roster if e.participant not in set(survivors)),
            statistics=means([s.name for s in p.statistics], sums),
            stage_seconds=dict(session.stage_seconds),
            uplink_bytes=session.uplink_bytes,
            committed_at=now,
        )
        self._around.store.commit_round(committed)
        self._around.board.publish(round_event(committed, seconds=self._around.ticks() - session.opened_at))
        log.info("round committed", job=p.job, round=p.round_number, attempt=p.attempt, survivors=len(survivors))
        run = rounds.after_commit(self.run, model=model, survivors=survivors)
        if run is None:
            self._job_over(session.job_id)
        else:
            self.run = rounds.exclude(run, session.excluded)

    def _close_aborted(self, runner: SessionRunner, state: core.Aborted) -> None:
        session, now = runner.session, self._around.clock()
        p = session.plan
        blamed = {session.name(i): f"{state.reason.value} ({state.detail})" for i in state.blamed}
        self._around.store.close_attempt(session.id, AttemptOutcome.ABORTED, f"{state.reason.value}: {state.detail}")
        self._around.board.publish(
            events.AttemptAborted(session.job_id, now, p.round_number, p.attempt, state.reason.value, state.detail)
        )
        log.warning("attempt aborted", job=p.job, round=p.round_number, reason=state.reason.value, detail=state.detail)
        # Of a disputed ciphertext nobody can tell who lied: both are asked again when they connect anew.
        disputed = state.reason is AbortReason.COMPLAINT_DISPUTED
        if self.run is not None:
            self.run = rounds.after_abort(
                self.run,
                reason=state.reason,
                excluded={**session.excluded, **(blamed if disputed else {})},
                barred={} if disputed else blamed,
                now=self._around.ticks(),
                sitting_out=session.sitting_out,
                drops=session.drops,
                detail=state.detail,
            )
            answered = recovery.answered_on(self._around.store, session.job_id, p.model_digest)
            self.run = rounds.repeat_only(self.run, answered)
        self._model_doubted = state.reason is AbortReason.AGGREGATION_FAILED or bool(session.doubted)
        runner.forget()
        self.runner = None

    # --- after a restart ----------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Go on where the last process stopped: resume a session that asked for unmasking, give up any other."""
        self._around.models.sweep(set(self._around.store.referenced_models()))
        keep = ""
        for record in self._around.store.jobs():
            if record.state is not JobState.RUNNING:
                continue
            self.run = self._job_run(record)
            # Only now: a job that was rolled back, or has failed, has no session to go on with.
            resume = self._around.store.resume_record(record.job_id)
            attempt = self._around.store.current_attempt(record.job_id)
            if self.run is not None and resume is not None:
                keep = resume.session_id.hex()
                await self._resume(self.run, resume)
            elif attempt is not None:
                self._around.store.close_attempt(
                    attempt.session_id, AttemptOutcome.ABANDONED, "the coordinator restarted"
                )
                log.warning("attempt abandoned", job=record.job_id, round=attempt.round_number)
        recovery.remove_all_but(self._sessions, keep)

    async def _resume(self, run: JobRun, resume: ResumeRecord) -> None:
        restored = recovery.restore(resume)
        plan = restored.plan
        session = self._new_session(
            run.job_id,
            restored.state,
            restored.certificates,
            config=run.spec.training.canonical_json(),
            model_size=self._around.models.file(run.model).size,
        )
        session.uplink_bytes = restored.survivors * shape_of(plan).upload_bytes
        runner = self.runner = SessionRunner(session, self._around)
        self.run = replace(run, attempt=plan.attempt)
        log.warning("session resumed", job=run.job_id, round=plan.round_number, survivors=restored.survivors)
        step = server.resume(restored.state)
        session.state = step.state
        await runner.perform(step)
