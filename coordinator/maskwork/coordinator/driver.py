"""The coordinator's only loop: takes what happened from one queue, steps the pure parts, performs their effects.

Everything that changes anything goes through `Driver.run`, one event at a time: what participants said, broken and new
connections, finished uploads, timers, the worker's answers, submitted and aborted jobs. What is to be durable is
written before what depends on it is sent.

It decides nothing about the protocol (`maskwork.secagg.server` does) or about jobs (`rounds` does), and knows nothing
of gRPC (`service` does). A `StoreError` ends the loop: a coordinator that cannot write down what it does must stop.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import assert_never

import structlog

from maskwork import job_events as events
from maskwork.coordinator import recovery, rounds
from maskwork.coordinator.aggregation import Convicted, Implausible, Release, Released
from maskwork.coordinator.board import EventBoard
from maskwork.coordinator.happenings import (
    Crashed,
    Happening,
    JobAborted,
    Look,
    PeerConnected,
    PeerGone,
    PeerMisbehaved,
    PeerSaid,
    ReleaseDone,
    SessionEvent,
    StorageFailed,
    UploadBegan,
    UploadEnded,
)
from maskwork.coordinator.job_view import round_event, summary
from maskwork.coordinator.models import ModelDamaged, ModelStore
from maskwork.coordinator.peers import Peer
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
from maskwork.coordinator.runner import SessionRunner, Surroundings, Worker
from maskwork.coordinator.session import ActiveSession, public_keys, shape_of
from maskwork.coordinator.spool import Spool, UploadSlots
from maskwork.coordinator.store import Store
from maskwork.errors import StorageUnavailable
from maskwork.metrics import means
from maskwork.net.status import Refusal, Refused
from maskwork.secagg import keys, server
from maskwork.secagg import server_states as core
from maskwork.secagg.encoding import EncodingParameterError
from maskwork.secagg.errors import AbortReason, DeclineCode, DropReason, PlanError
from maskwork.secagg.graph import GraphError
from maskwork.secagg.keys import Signer
from maskwork.secagg.messages import (
    ParticipantMessage,
    Proposal,
    SessionClosed,
)
from maskwork.secagg.plan import session_id
from maskwork.wire import codec
from maskwork.wire.codec import UploadReady

log = structlog.get_logger("maskwork.coordinator")

INBOX_LIMIT = 4096


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


class Driver:
    """Runs jobs, one at a time, in the order of their submission."""

    def __init__(
        self,
        *,
        federation: Federation,
        store: Store,
        models: ModelStore,
        worker: Worker,
        sessions: Path,
        max_uploads: int,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.federation = federation
        self.board = EventBoard()
        self._store = store
        self._models = models
        self._worker = worker
        self._sessions = sessions
        self._max_uploads = max_uploads
        self._clock = clock  # what records say; it may jump
        self._ticks = ticks  # what is waited for and measured by; it never jumps
        self._entropy = entropy
        self._inbox: asyncio.Queue[Happening] = asyncio.Queue(INBOX_LIMIT)
        self._peers: dict[str, Peer] = {}
        self._run: JobRun | None = None
        self._aborting: JobAborted | None = None
        self._runner: SessionRunner | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._look_timer: asyncio.TimerHandle | None = None
        self._waiting_told = ""
        self._model_doubted = False
        self._around = Surroundings(
            store=store,
            models=models,
            worker=worker,
            board=self.board,
            peers=self._peers,
            clock=clock,
            ticks=ticks,
            pause=pause,
            later=self._post_later,
            spawn=self._spawn,
            report=self._report,
        )

    # --- for the service ----------------------------------------------------------------------------------

    async def post(self, happening: Happening) -> None:
        """Queue what happened; waits when the queue is full, which slows the sender down."""
        await self._inbox.put(happening)

    def post_soon(self, happening: Happening) -> None:
        """Queue what happened from a place that cannot wait."""
        self._spawn(self.post(happening))

    def spool_for(self, site: PresentSite, session: bytes) -> tuple[Spool, int] | None:
        """The spool of a member that may upload to this session now: one that was granted a slot."""
        active = None if self._runner is None else self._runner.session
        if active is None or active.id != session:
            return None
        member = active.index_of(site.name, site.fingerprint)
        if member is None or member not in server.outstanding(active.state):
            return None
        if not isinstance(active.state, core.CollectingUpdates) or not active.slots.holds(member):
            return None
        return active.spool(member), member

    def download(self, site: PresentSite, digest: bytes) -> Path | bytes | None:
        """What a member of the open session may fetch: the global model's file, or the roster's certificates."""
        active = None if self._runner is None else self._runner.session
        if active is None or active.index_of(site.name, site.fingerprint) is None:
            return None
        if digest == active.plan.model_digest:
            return self._models.path(digest)
        bundle = active.certificate_bundle
        return bundle if hashlib.sha256(bundle).digest() == digest else None

    # --- the loop ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Recover, then handle one event after the other until cancelled."""
        await self._recover()
        self._after_step()
        await self._consider()
        while True:
            await self._handle(await self._inbox.get())
            self._after_step()
            if self._runner is None:
                await self._consider()

    async def stop(self) -> None:
        """Give up the open session, tell everybody, close every stream."""
        runner = self._runner
        if runner is not None and not isinstance(runner.session.state, core.CollectingUnmask | core.RemovingMasks):
            await runner.step(core.Cancelled(AbortReason.CANCELLED, "the coordinator stops"))
            self._after_step()
        self.hang_up()

    def hang_up(self) -> None:
        """Close every stream and stop what runs beside the loop, without a word to anybody."""
        self.board.close()
        for peer in tuple(self._peers.values()):
            peer.close()
        if self._look_timer is not None:
            self._look_timer.cancel()
        if self._runner is not None:
            self._runner.session.cancel_timers()
        for task in tuple(self._tasks):
            task.cancel()
        self._turn_away()

    def _turn_away(self) -> None:
        """Whoever still waits to hear of an abort hears that nothing more is decided here."""
        waiting = [] if self._aborting is None else [self._aborting]
        while not self._inbox.empty():
            happening = self._inbox.get_nowait()
            waiting.extend([happening] if isinstance(happening, JobAborted) else [])
        for asked in waiting:
            if not asked.done.done():
                asked.done.set_exception(Refused(Refusal.STOPPING, "the coordinator stops"))

    async def _handle(self, happening: Happening) -> None:
        match happening:
            case PeerConnected(peer):
                await self._connected(peer)
            case PeerGone(peer):
                await self._gone(peer)
            case PeerSaid(peer, session, message):
                await self._said(peer, session, message)
                peer.handled()
            case PeerMisbehaved(peer, detail):
                await self._misbehaved(peer, detail)
            case UploadBegan(session, member):
                if (runner := self._runner_of(session)) is not None:
                    runner.upload_began(member)
            case UploadEnded(session, member):
                if (runner := self._runner_of(session)) is not None:
                    await runner.upload_ended(member)
            case StorageFailed(session, error):
                runner = self._runner_of(session)
                if runner is not None and isinstance(runner.session.state, core.CollectingUpdates):
                    await runner.step(core.Cancelled(AbortReason.STORAGE_FAILED, str(error)))
            case SessionEvent(session, event):
                if (runner := self._runner_of(session)) is not None:
                    await runner.step(event)
            case ReleaseDone(session, release):
                if (runner := self._runner_of(session)) is not None:
                    await self._released(runner, release)
            case JobAborted():
                self._aborting = happening
                await self._abort_job(happening)
                self._aborting = None
            case Crashed(error):
                raise error
            case Look():
                pass
            case _:
                assert_never(happening)

    def _runner_of(self, session: bytes) -> SessionRunner | None:
        runner = self._runner
        return runner if runner is not None and runner.session.id == session else None

    def _after_step(self) -> None:
        """Put an ended session away."""
        if self._runner is not None and isinstance(self._runner.session.state, core.Aborted):
            self._close_aborted(self._runner, self._runner.session.state)
        elif self._runner is not None and isinstance(self._runner.session.state, core.Completed):
            self._runner.forget()
            self._runner = None

    async def _consider(self) -> None:
        """Start the next job, or open the next attempt, or wait: whatever `rounds` says."""
        while self._runner is None:
            if self._run is None and not self._start_next_job():
                return
            assert self._run is not None
            if self._model_doubted:
                await self._check_model(self._run)
                continue
            present = [peer.site for peer in self._peers.values()]
            self._run, decision = rounds.decide(self._run, present, now=self._ticks(), rand=self._entropy(16))
            match decision:
                case OpenAttempt(cohort):
                    await self._open_attempt(self._run, cohort)
                    self._after_step()
                case Wait(why, until):
                    self._tell_waiting(why)
                    if until is not None:
                        self._look_at(until)
                    return
                case GiveUp(reason):
                    self._end_job(self._run.job_id, JobState.FAILED, reason)
                case _:
                    assert_never(decision)

    def _look_at(self, when: float) -> None:
        if self._look_timer is not None:
            self._look_timer.cancel()
        delay = max(0.0, when - self._ticks())
        self._look_timer = asyncio.get_running_loop().call_later(delay, self.post_soon, Look())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.post_soon(Crashed(error))

    def _post_later(self, seconds: float, session: bytes, event: core.Event) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, self.post_soon, SessionEvent(session, event))

    async def _report(self, session: bytes, result: Release | core.Cancelled) -> None:
        if isinstance(result, core.Cancelled):
            await self.post(SessionEvent(session, result))
        else:
            await self.post(ReleaseDone(session, result))

    # --- jobs ----------------------------------------------------------------------------------

    def _start_next_job(self) -> bool:
        record = self._store.next_queued()
        if record is None:
            return False
        self._store.set_job_state(record.job_id, JobState.RUNNING)
        self._publish_job(record.job_id)
        log.info("job started", job=record.job_id, task=record.task, rounds=record.rounds_total)
        self._run = self._job_run(record)
        return self._run is not None or self._start_next_job()

    def _job_run(self, record: JobRecord) -> JobRun | None:
        """The job as it stands, rolled back if it had to be; None, and the job has failed, when it cannot go on."""
        try:
            run = recovery.run_of(record, store=self._store, models=self._models)
        except JobLost as lost:
            self._end_job(record.job_id, JobState.FAILED, str(lost))
            return None
        if run.rolled_back != record.rolled_back:
            self._publish_job(record.job_id)
        return run

    def _end_job(self, job_id: str, state: JobState, reason: str) -> None:
        self._store.set_job_state(job_id, state, reason)
        self._job_over(job_id)
        log.warning("job ended", job=job_id, state=state.value, reason=reason)

    def _job_over(self, job_id: str) -> None:
        self._run = None
        self._waiting_told = ""
        self._publish_job(job_id)
        self.board.forget(job_id)

    async def _abort_job(self, request: JobAborted) -> None:
        record = self._store.job(request.job_id)
        if record is not None and record.state in (JobState.QUEUED, JobState.RUNNING):
            reason = f"aborted by {request.by}"
            if self._runner is not None and self._runner.session.job_id == request.job_id:
                await self._runner.step(core.Cancelled(AbortReason.CANCELLED, reason))
                self._after_step()
            if self._run is not None and self._run.job_id == request.job_id:
                self._end_job(request.job_id, JobState.ABORTED, reason)
            else:
                self._store.set_job_state(request.job_id, JobState.ABORTED, reason)
                self._publish_job(request.job_id)
        if not request.done.done():  # who asked may have hung up
            request.done.set_result(self._store.job(request.job_id))

    def _publish_job(self, job_id: str) -> None:
        record = self._store.job(job_id)
        if record is not None:
            self.board.publish(summary(record, at=self._clock()))

    def _tell_waiting(self, why: str) -> None:
        assert self._run is not None
        if why != self._waiting_told:
            self._waiting_told = why
            connected = tuple(sorted(self._peers))
            self.board.publish(events.Waiting(self._run.job_id, self._clock(), why, connected))
            log.info("waiting", job=self._run.job_id, why=why)

    # --- attempts ----------------------------------------------------------------------------------

    async def _open_attempt(self, run: JobRun, cohort: tuple[PresentSite, ...]) -> None:
        config = run.spec.training.canonical_json()
        try:
            plan = rounds.build_plan(
                run,
                cohort,
                federation=self.federation.name,
                nonce=self._entropy(16),
                training_digest=hashlib.sha256(config).digest(),
            )
        except (PlanError, EncodingParameterError, GraphError) as error:
            self._end_job(run.job_id, JobState.FAILED, f"no plan can be made for {len(cohort)} sites: {error}")
            return
        try:
            model_size = self._models.path(run.model).stat().st_size
        except ModelDamaged:
            self._roll_back(run)
            return
        plan_bytes = codec.encode_plan(plan)
        identifier = session_id(plan_bytes)
        signed = keys.signed_message("plan", session=identifier, sender=keys.COORDINATOR_INDEX, fields=b"")
        signature = self.federation.signer.sign(signed)
        certificates = tuple(self._peers[site.name].certificate for site in cohort)
        started = server.begin(Proposal(plan_bytes, signature, plan), public_keys(certificates))
        session = self._new_session(run.job_id, started.state, certificates, config=config, model_size=model_size)
        try:
            make_room(session, self._models.directory)
        except StorageUnavailable as error:
            self._run = rounds.put_off(run, str(error), now=self._ticks())
            return
        now = self._clock()
        self._store.open_attempt(
            AttemptRecord(run.job_id, run.round_number, run.attempt, identifier, plan_bytes, signature, now)
        )
        runner = self._runner = SessionRunner(session, self._around)
        self._waiting_told = ""
        self.board.publish(
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
        record = self._store.job(run.job_id)
        assert record is not None
        following = self._job_run(record)
        # A site that declined because of what it was given did nothing wrong; one that was convicted did.
        self._run = None if following is None else replace(following, barred=run.barred)

    async def _check_model(self, run: JobRun) -> None:
        """Hash the model again when an attempt has given reason to."""
        self._model_doubted = False
        try:
            await asyncio.to_thread(self._models.verify, run.model)
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
            opened_at=self._ticks(),
        )

    async def _released(self, runner: SessionRunner, release: Release) -> None:
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
        assert self._run is not None
        now, p = self._clock(), session.plan
        session.enter_stage(None, self._ticks())
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
        self._store.commit_round(committed)
        self.board.publish(round_event(committed, seconds=self._ticks() - session.opened_at))
        log.info("round committed", job=p.job, round=p.round_number, attempt=p.attempt, survivors=len(survivors))
        run = rounds.after_commit(self._run, model=model, survivors=survivors)
        if run is None:
            self._job_over(session.job_id)
        else:
            self._run = rounds.exclude(run, session.excluded)

    def _close_aborted(self, runner: SessionRunner, state: core.Aborted) -> None:
        session, now = runner.session, self._clock()
        p = session.plan
        blamed = {session.name(i): f"{state.reason.value} ({state.detail})" for i in state.blamed}
        self._store.close_attempt(session.id, AttemptOutcome.ABORTED, f"{state.reason.value}: {state.detail}")
        self.board.publish(
            events.AttemptAborted(session.job_id, now, p.round_number, p.attempt, state.reason.value, state.detail)
        )
        log.warning("attempt aborted", job=p.job, round=p.round_number, reason=state.reason.value, detail=state.detail)
        # Of a disputed ciphertext nobody can tell who lied: both are asked again when they connect anew.
        disputed = state.reason is AbortReason.COMPLAINT_DISPUTED
        if self._run is not None:
            self._run = rounds.after_abort(
                self._run,
                reason=state.reason,
                excluded={**session.excluded, **(blamed if disputed else {})},
                barred={} if disputed else blamed,
                now=self._ticks(),
                drops=session.drops,
                detail=state.detail,
            )
            answered = recovery.answered_on(self._store, session.job_id, p.model_digest)
            self._run = rounds.repeat_only(self._run, answered)
        self._model_doubted = state.reason is AbortReason.AGGREGATION_FAILED or any(
            said.startswith(f"declined ({DeclineCode.WRONG_MODEL.value}") for said in session.drops.values()
        )
        runner.forget()
        self._runner = None

    # --- participants ----------------------------------------------------------------------------------

    def _place(self, peer: Peer) -> tuple[SessionRunner, int] | None:
        """The open session and the peer's index in it, when this very connection speaks for that member."""
        if self._runner is None or self._peers.get(peer.name) is not peer:
            return None
        member = self._runner.session.index_of(peer.name, peer.site.fingerprint)
        return None if member is None else (self._runner, member)

    async def _connected(self, peer: Peer) -> None:
        older = self._peers.get(peer.name)
        before = None if older is None else self._place(older)
        if older is not None:
            log.warning("a newer connection takes the place of one that is still open", participant=peer.name)
            older.close()
        self._peers[peer.name] = peer
        log.info("participant connected", participant=peer.name, connected=len(self._peers))
        if self._run is not None:
            self._run = rounds.readmit(self._run, peer.name)
        place = self._place(peer)
        if place is not None and peer.active_session == place[0].session.id:
            await place[0].back(place[1])
            return
        if place is not None:
            await place[0].lose(place[1], DropReason.DISCONNECTED, "came back without this session")
        elif before is not None:
            await before[0].lose(before[1], DropReason.DISCONNECTED, "came back with another certificate")
        if peer.active_session:
            closed = SessionClosed(released=False, phrase="that session is over")
            peer.send(codec.encode_response(peer.active_session, closed, 0))

    async def _gone(self, peer: Peer) -> None:
        place = self._place(peer)
        if self._peers.get(peer.name) is not peer:
            return  # a newer connection took its place
        del self._peers[peer.name]
        log.info("participant disconnected", participant=peer.name, connected=len(self._peers))
        if place is not None and self._run is not None:
            await place[0].away(place[1], self._run.spec.deadlines.reconnect_s)

    async def _said(self, peer: Peer, session: bytes, message: ParticipantMessage | UploadReady) -> None:
        place = self._place(peer)
        if place is None or place[0].session.id != session:
            return  # about a session that is over, or from a connection that is
        runner, member = place
        if isinstance(message, UploadReady):
            runner.upload_ready(member)
        else:
            await runner.step(core.Received(member, message))

    async def _misbehaved(self, peer: Peer, detail: str) -> None:
        place = self._place(peer)
        if place is not None:
            await place[0].lose(place[1], DropReason.MALFORMED, detail)

    # --- after a restart ----------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Go on where the last process stopped: resume a session that asked for unmasking, give up any other."""
        self._models.sweep(set(self._store.referenced_models()))
        keep = ""
        for record in self._store.jobs():
            if record.state is not JobState.RUNNING:
                continue
            self._run = self._job_run(record)
            # Only now: a job that was rolled back, or has failed, has no session to go on with.
            resume = self._store.resume_record(record.job_id)
            attempt = self._store.current_attempt(record.job_id)
            if self._run is not None and resume is not None:
                keep = resume.session_id.hex()
                await self._resume(self._run, resume)
            elif attempt is not None:
                self._store.close_attempt(attempt.session_id, AttemptOutcome.ABANDONED, "the coordinator restarted")
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
            model_size=self._models.path(run.model).stat().st_size,
        )
        session.uplink_bytes = restored.survivors * shape_of(plan).upload_bytes
        runner = self._runner = SessionRunner(session, self._around)
        self._run = replace(run, attempt=plan.attempt)
        log.warning("session resumed", job=run.job_id, round=plan.round_number, survivors=restored.survivors)
        step = server.resume(restored.state)
        session.state = step.state
        await runner.perform(step)
