"""The coordinator's only loop: takes what happened from one queue, steps the pure parts, performs their effects.

Everything that changes anything goes through `Driver.run`, one event at a time: what participants said, broken and new
connections, finished uploads, timers, the worker's answers, submitted and aborted jobs. What is to be durable is
written before what depends on it is sent.

It decides nothing about the protocol (`maskwork.secagg.server` does) or about jobs (`rounds` does), and knows nothing of
gRPC (`service` does). A `StoreError` ends the loop: a coordinator that cannot write down what it does must stop.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, assert_never

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from maskwork import job_events as events
from maskwork.coordinator import aggregation, rounds
from maskwork.coordinator.aggregation import Convicted, Implausible, Release, Released, ReleaseRequest
from maskwork.coordinator.board import EventBoard
from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.peers import Peer
from maskwork.coordinator.records import (
    AttemptOutcome,
    AttemptRecord,
    CommittedRound,
    DropRecord,
    EvidenceRecord,
    JobRecord,
    JobState,
    ResumeRecord,
)
from maskwork.coordinator.rounds import GiveUp, JobRun, OpenAttempt, PresentSite, Wait
from maskwork.coordinator.session import KEPT_OUT_UNTIL_RECONNECT, ActiveSession, deadline_s, shape_of
from maskwork.coordinator.spool import Spool, UploadSlots
from maskwork.coordinator.store import Store
from maskwork.job import parse_spec
from maskwork.metrics import means
from maskwork.secagg import keys, server
from maskwork.secagg import server_states as core
from maskwork.secagg.encoding import EncodingParameterError
from maskwork.secagg.errors import AbortReason, DropReason, PlanError
from maskwork.secagg.keys import Signer
from maskwork.secagg.messages import (
    Complaint,
    CoordinatorMessage,
    Decline,
    ParticipantMessage,
    Proposal,
    SessionClosed,
    Withdraw,
)
from maskwork.secagg.plan import session_id
from maskwork.tensors import read_schema
from maskwork.wire import codec
from maskwork.wire.codec import UploadReady
from maskwork.worker import WorkerProcess

log = structlog.get_logger("maskwork.coordinator")

INBOX_LIMIT = 4096


# --- what can happen ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A participant's control stream is open."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerGone:
    """A control stream ended."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerSaid:
    """A decoded message from a control stream."""

    peer: Peer
    session: bytes
    message: ParticipantMessage | UploadReady


@dataclass(frozen=True, slots=True)
class PeerMisbehaved:
    """A control stream carried something that is no message; the stream is being closed."""

    peer: Peer
    detail: str


@dataclass(frozen=True, slots=True)
class UploadEnded:
    """An upload stream ended: whole, or cut."""

    session: bytes
    member: int


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """Something for the protocol: a timer or the worker speaks."""

    session: bytes
    event: core.Event


@dataclass(frozen=True, slots=True)
class ReleaseDone:
    """The worker finished unmasking."""

    session: bytes
    release: Release


@dataclass(frozen=True, slots=True)
class JobAborted:
    """An operator or researcher ends a job."""

    job_id: str
    by: str
    done: asyncio.Future[JobRecord | None] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Look:
    """Time to look whether an attempt can be opened or a job started."""


Happening: TypeAlias = (
    PeerConnected | PeerGone | PeerSaid | PeerMisbehaved | UploadEnded | SessionEvent | ReleaseDone | JobAborted | Look
)


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
        worker: WorkerProcess,
        sessions: Path,
        max_uploads: int,
        clock: Callable[[], float] = time.time,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.federation = federation
        self.board = EventBoard()
        self._store = store
        self._models = models
        self._worker = worker
        self._sessions = sessions
        self._max_uploads = max_uploads
        self._clock = clock
        self._entropy = entropy
        self._inbox: asyncio.Queue[Happening] = asyncio.Queue(INBOX_LIMIT)
        self._peers: dict[str, Peer] = {}
        self._run: JobRun | None = None
        self._session: ActiveSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._look_timer: asyncio.TimerHandle | None = None
        self._waiting_told = ""

    # --- for the service ---------------------------------------------------------------------------------------------

    async def post(self, happening: Happening) -> None:
        """Queue what happened; waits when the queue is full, which slows the sender down."""
        await self._inbox.put(happening)

    def spool_for(self, site: PresentSite, session: bytes) -> tuple[Spool, int] | None:
        """The spool of a member that may upload to this session now."""
        active = self._session
        if active is None or active.id != session:
            return None
        member = active.index_of(site.name, site.fingerprint)
        if member is None or member not in server.outstanding(active.state):
            return None
        if not isinstance(active.state, core.CollectingUpdates):
            return None
        return active.spool(member), member

    def download(self, digest: bytes) -> Path | bytes | None:
        """What a member of the open session may fetch: the global model's file, or the roster's certificates."""
        active = self._session
        if active is None:
            return None
        if digest == active.plan.model_digest:
            return self._models.path(digest)
        bundle = active.certificate_bundle
        return bundle if hashlib.sha256(bundle).digest() == digest else None

    # --- the loop ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Recover, then handle one event after the other until cancelled."""
        await self._recover()
        self._consider()
        while True:
            happening = await self._inbox.get()
            await self._handle(happening)
            if self._session is None:
                self._consider()

    async def stop(self) -> None:
        """Give up the open session, tell everybody, close every stream."""
        if self._session is not None and not isinstance(
            self._session.state, core.CollectingUnmask | core.RemovingMasks
        ):
            await self._step(self._session, core.Cancelled(AbortReason.CANCELLED, "the coordinator stops"))
        for peer in tuple(self._peers.values()):
            peer.close()
        for task in tuple(self._tasks):
            task.cancel()

    async def _handle(self, happening: Happening) -> None:
        match happening:
            case PeerConnected(peer):
                await self._connected(peer)
            case PeerGone(peer):
                await self._gone(peer)
            case PeerSaid(peer, session, message):
                await self._said(peer, session, message)
            case PeerMisbehaved(peer, detail):
                await self._misbehaved(peer, detail)
            case UploadEnded(session, member):
                await self._upload_ended(session, member)
            case SessionEvent(session, event):
                if self._session is not None and self._session.id == session:
                    await self._step(self._session, event)
            case ReleaseDone(session, release):
                await self._released(session, release)
            case JobAborted():
                await self._abort_job(happening)
            case Look():
                pass
            case _:
                assert_never(happening)

    def _consider(self) -> None:
        """Start the next job, or open the next attempt, or wait: whatever `rounds` says."""
        while self._session is None:
            if self._run is None and not self._start_next_job():
                return
            assert self._run is not None
            present = [peer.site for peer in self._peers.values()]
            self._run, decision = rounds.decide(self._run, present, now=self._clock(), rand=self._entropy(16))
            match decision:
                case OpenAttempt(cohort):
                    self._open_attempt(self._run, cohort)
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
        delay = max(0.0, when - self._clock())
        self._look_timer = asyncio.get_running_loop().call_later(delay, self._spawn_post, Look())

    def _spawn_post(self, happening: Happening) -> None:
        self._spawn(self.post(happening))

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[arg-type]  # any coroutine without result
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- jobs ----------------------------------------------------------------------------------------------------------

    def _start_next_job(self) -> bool:
        record = self._store.next_queued()
        if record is None:
            return False
        self._store.set_job_state(record.job_id, JobState.RUNNING)
        self._run = self._job_run(record)
        self._publish_job(record.job_id)
        log.info("job started", job=record.job_id, task=record.task, rounds=record.rounds_total)
        return True

    def _job_run(self, record: JobRecord) -> JobRun:
        spec = parse_spec(record.spec_json.encode())
        schema = read_schema(self._models.path(record.current_model))
        return JobRun(
            record.job_id,
            spec,
            record.next_round,
            record.next_attempt,
            record.current_model,
            schema.size,
            self._store.last_survivors(record.job_id),
        )

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
            if self._session is not None and self._session.job_id == request.job_id:
                await self._step(self._session, core.Cancelled(AbortReason.CANCELLED, reason))
            if self._run is not None and self._run.job_id == request.job_id:
                self._end_job(request.job_id, JobState.ABORTED, reason)
            else:
                self._store.set_job_state(request.job_id, JobState.ABORTED, reason)
                self._publish_job(request.job_id)
        request.done.set_result(self._store.job(request.job_id))

    def _publish_job(self, job_id: str) -> None:
        record = self._store.job(job_id)
        if record is not None:
            self.board.publish(events.JobSummary(job_id=job_id, at=self._clock(), **summary_fields(record)))

    def _tell_waiting(self, why: str) -> None:
        assert self._run is not None
        if why != self._waiting_told:
            self._waiting_told = why
            connected = tuple(sorted(self._peers))
            self.board.publish(events.Waiting(self._run.job_id, self._clock(), why, connected))
            log.info("waiting", job=self._run.job_id, why=why)

    # --- attempts --------------------------------------------------------------------------------------------------------

    def _open_attempt(self, run: JobRun, cohort: tuple[PresentSite, ...]) -> None:
        config = run.spec.training.canonical_json()
        try:
            plan = rounds.build_plan(
                run,
                cohort,
                federation=self.federation.name,
                nonce=self._entropy(16),
                training_digest=hashlib.sha256(config).digest(),
            )
        except (PlanError, EncodingParameterError) as error:
            self._end_job(run.job_id, JobState.FAILED, f"no plan can be made for {len(cohort)} sites: {error}")
            return
        plan_bytes = codec.encode_plan(plan)
        identifier = session_id(plan_bytes)
        signed = keys.signed_message("plan", session=identifier, sender=keys.COORDINATOR_INDEX, fields=b"")
        signature = self.federation.signer.sign(signed)
        now = self._clock()
        self._store.open_attempt(
            AttemptRecord(run.job_id, run.round_number, run.attempt, identifier, plan_bytes, signature, now)
        )
        certificates = tuple(self._peers[site.name].certificate for site in cohort)
        started = server.begin(Proposal(plan_bytes, signature, plan), _public_keys(certificates))
        session = self._new_session(run.job_id, started.state, certificates, config)
        session.folder.mkdir(parents=True)
        aggregation.create_accumulator(session.accumulator, session.shape)
        self._session = session
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
        self._spawn(self._begin(session, started))

    async def _begin(self, session: ActiveSession, started: core.Step) -> None:
        # The first effects only send and start a timer; they run before the loop can see an answer to them.
        await self._perform(session, started)

    def _new_session(
        self, job_id: str, state: core.State, certificates: tuple[bytes, ...], config: bytes
    ) -> ActiveSession:
        return ActiveSession(
            job_id=job_id,
            core=state.session,
            state=state,
            folder=self._sessions / state.session.id.hex(),
            certificates=certificates,
            training_config=config,
            model_size=self._models.path(state.session.plan.model_digest).stat().st_size,
            slots=UploadSlots(self._max_uploads),
            opened_at=self._clock(),
        )

    async def _step(self, session: ActiveSession, event: core.Event) -> None:
        """Feed the protocol one event and perform what it asks for."""
        before = session.state
        transcript = session.transcript()
        following = server.step(before, event)
        session.state = following.state
        if isinstance(event, core.Received) and isinstance(event.message, Complaint):
            transcript = codec.with_accusation(transcript, event.sender, event.message)
        for effect in following.effects:
            if isinstance(effect, core.RecordEvidence):
                self._keep_evidence(session, effect, transcript)
        self._tell_answer(session, before, event, following)
        await self._perform(session, following)
        if isinstance(session.state, core.Aborted):
            self._close_aborted(session, session.state)

    async def _perform(self, session: ActiveSession, step: core.Step) -> None:
        for effect in step.effects:
            match effect:
                case core.SendTo(recipient, message):
                    self._send(session, recipient, message)
                case core.DropPeer():
                    self._dropped(session, effect)
                case core.StageOpened(stage, expected):
                    self._stage_opened(session, stage, expected)
                case core.AddUpdate(member):
                    self._add_upload(session, member)
                case core.PersistUnmask():
                    await self._persist(session)
                case core.RemoveMasks(job):
                    self._spawn(self._release(session, job))
                case core.RecordEvidence():
                    pass  # kept by `_step`, from the state before the session ended
                case _:
                    assert_never(effect)

    def _send(self, session: ActiveSession, recipient: int, message: CoordinatorMessage) -> None:
        peer = self._peers.get(session.name(recipient))
        if peer is None or peer.site.fingerprint != session.plan.roster[recipient].fingerprint:
            return  # away: it is told again when it comes back
        response = session.opening() if isinstance(message, Proposal) else message
        peer.send(codec.encode_response(session.id, response, session.plan.cohort))

    def _tell_answer(self, session: ActiveSession, before: core.State, event: core.Event, following: core.Step) -> None:
        """Post that a member completed a stage, if this event did that."""
        if not isinstance(event, core.Received | core.UploadCompleted) or session.stage is None:
            return
        if isinstance(event, core.Received) and isinstance(event.message, Decline | Withdraw | Complaint):
            return
        dropped = any(isinstance(e, core.DropPeer) and e.member == event.sender for e in following.effects)
        if dropped or event.sender not in server.outstanding(before):
            return
        p = session.plan
        self.board.publish(
            events.Answered(
                session.job_id,
                self._clock(),
                p.round_number,
                p.attempt,
                session.stage.value,
                session.name(event.sender),
            )
        )

    def _stage_opened(self, session: ActiveSession, stage: core.Stage, expected: frozenset[int]) -> None:
        session.enter_stage(stage, self._clock())
        self._timer(session, stage, deadline_s(session.plan, stage), core.DeadlinePassed(stage))
        p = session.plan
        self.board.publish(
            events.StageOpened(
                session.job_id, self._clock(), p.round_number, p.attempt, stage.value, session.names(expected)
            )
        )

    def _timer(self, session: ActiveSession, key: object, seconds: float, event: core.Event) -> None:
        loop = asyncio.get_running_loop()
        session.timers[key] = loop.call_later(seconds, self._spawn_post, SessionEvent(session.id, event))

    def _dropped(self, session: ActiveSession, drop: core.DropPeer) -> None:
        name, p, now = session.name(drop.member), session.plan, self._clock()
        self._store.record_drop(
            DropRecord(
                session.job_id,
                p.round_number,
                p.attempt,
                name,
                drop.stage.value,
                drop.reason.value,
                drop.detail,
                now,
            )
        )
        if drop.reason in KEPT_OUT_UNTIL_RECONNECT:
            session.excluded[name] = f"{drop.reason.value} ({drop.detail})"
        self.board.publish(
            events.Dropped(
                session.job_id,
                now,
                p.round_number,
                p.attempt,
                drop.stage.value,
                name,
                drop.reason.value,
                drop.detail,
            )
        )
        log.warning("participant dropped", participant=name, reason=drop.reason.value, detail=drop.detail)
        phrase = f"left out of this session: {drop.reason.value}"
        self._send(session, drop.member, SessionClosed(released=False, phrase=phrase))
        self._grant(session, session.slots.release(drop.member))

    # --- uploads and the sum ---------------------------------------------------------------------------------------------

    def _grant(self, session: ActiveSession, member: int | None) -> None:
        if member is None:
            return
        peer = self._peers.get(session.name(member))
        if peer is not None:
            peer.send(codec.encode_response(session.id, session.grant(member), session.plan.cohort))

    async def _upload_ended(self, session_digest: bytes, member: int) -> None:
        session = self._session
        if session is None or session.id != session_digest:
            return
        self._grant(session, session.slots.release(member))
        if session.spool(member).complete:
            await self._step(session, core.UploadCompleted(member))

    def _add_upload(self, session: ActiveSession, member: int) -> None:
        session.uplink_bytes += session.shape.upload_bytes
        spool = session.spool(member)
        work = self._worker.call(aggregation.add_upload, session.accumulator, spool.path, session.shape)
        session.additions.append(asyncio.ensure_future(work))

    async def _persist(self, session: ActiveSession) -> None:
        """Everything in U3 is in the sum and on the disk, with the sets and signatures, before Unmask is asked for."""
        await asyncio.gather(*session.additions)
        await self._worker.call(aggregation.make_durable, session.accumulator)
        transcript = session.transcript()
        self._store.save_resume(
            ResumeRecord(
                session.id,
                session.job_id,
                codec.encode_transcript(transcript),
                str(session.accumulator),
                session.names(transcript.u3),
                self._clock(),
            )
        )

    async def _release(self, session: ActiveSession, job: core.UnmaskingJob) -> None:
        assert isinstance(session.state, core.RemovingMasks)
        p = session.plan
        request = ReleaseRequest(
            accumulator=session.accumulator,
            shape=session.shape,
            encoding=p.encoding,
            job=job,
            survivors=len(session.state.gathered.sets.u3),
            models=self._models.directory,
            model=p.model_digest,
            metadata=(("federation", p.federation), ("job", p.job), ("round", str(p.round_number))),
        )
        release = await self._worker.call(aggregation.release, request)
        await self.post(ReleaseDone(session.id, release))

    async def _released(self, session_digest: bytes, release: Release) -> None:
        session = self._session
        if session is None or session.id != session_digest:
            return
        match release:
            case Released(model, sums):
                self._commit(session, model, sums)
                await self._step(session, core.MasksRemoved())
                self._forget(session)
            case Convicted(dealer, detail):
                await self._step(session, core.DealerConvicted(dealer, detail))
            case Implausible(detail):
                await self._step(session, core.Cancelled(AbortReason.AGGREGATION_FAILED, detail))
            case _:
                assert_never(release)

    def _commit(self, session: ActiveSession, model: bytes, sums: tuple[float, ...]) -> None:
        assert isinstance(session.state, core.RemovingMasks)
        assert self._run is not None
        now, p = self._clock(), session.plan
        session.enter_stage(None, now)
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
        self.board.publish(round_event(committed, seconds=now - session.opened_at))
        log.info("round committed", job=p.job, round=p.round_number, attempt=p.attempt, survivors=len(survivors))
        run = rounds.after_commit(self._run, model=model, survivors=survivors)
        if run is None:
            self._job_over(session.job_id)
        else:
            self._run = rounds.exclude(run, session.excluded)

    def _close_aborted(self, session: ActiveSession, state: core.Aborted) -> None:
        p, now = session.plan, self._clock()
        blamed = {session.name(i): f"{state.reason.value} ({state.detail})" for i in state.blamed}
        self._store.close_attempt(session.id, AttemptOutcome.ABORTED, f"{state.reason.value}: {state.detail}")
        self.board.publish(
            events.AttemptAborted(session.job_id, now, p.round_number, p.attempt, state.reason.value, state.detail)
        )
        log.warning("attempt aborted", job=p.job, round=p.round_number, reason=state.reason.value, detail=state.detail)
        if self._run is not None:
            self._run = rounds.after_abort(
                self._run, reason=state.reason, excluded={**session.excluded, **blamed}, now=now
            )
        self._forget(session)

    def _forget(self, session: ActiveSession) -> None:
        session.cancel_timers()
        for addition in session.additions:
            addition.cancel()
        for spool in session.spools.values():
            spool.discard()
        shutil.rmtree(session.folder, ignore_errors=True)
        self._session = None

    def _keep_evidence(
        self, session: ActiveSession, evidence: core.RecordEvidence, transcript: codec.Transcript
    ) -> None:
        accused = session.name(evidence.accused)
        self._store.add_evidence(
            EvidenceRecord(
                session.job_id,
                session.id,
                evidence.kind.value,
                accused,
                codec.encode_transcript(transcript),
                self._clock(),
            )
        )
        log.error("evidence kept", accused=accused, kind=evidence.kind.value)

    # --- participants -------------------------------------------------------------------------------------------------------

    async def _connected(self, peer: Peer) -> None:
        older = self._peers.get(peer.name)
        if older is not None:
            older.close()
        self._peers[peer.name] = peer
        log.info("participant connected", participant=peer.name, connected=len(self._peers))
        if self._run is not None:
            self._run = rounds.readmit(self._run, peer.name)
        session = self._session
        member = None if session is None else session.index_of(peer.name, peer.site.fingerprint)
        if session is not None and member is not None and peer.active_session == session.id:
            self._cancel_grace(session, member)
            await self._step(session, core.Reconnected(member))
            return
        if session is not None and member is not None:
            await self._lose(session, member, DropReason.DISCONNECTED, "came back without this session")
        if peer.active_session:
            closed = SessionClosed(released=False, phrase="that session is over")
            peer.send(codec.encode_response(peer.active_session, closed, 0))

    async def _gone(self, peer: Peer) -> None:
        if self._peers.get(peer.name) is not peer:
            return  # a newer connection took its place
        del self._peers[peer.name]
        log.info("participant disconnected", participant=peer.name, connected=len(self._peers))
        session = self._session
        member = None if session is None else session.index_of(peer.name, peer.site.fingerprint)
        if session is None or member is None or self._run is None:
            return
        self._grant(session, session.slots.release(member))
        grace = self._run.spec.deadlines.reconnect_s
        lost = core.Lost(member, DropReason.DISCONNECTED, f"away for more than {grace:g} s")
        self._timer(session, ("away", member), grace, lost)
        await self._step(session, core.Disconnected(member))

    def _cancel_grace(self, session: ActiveSession, member: int) -> None:
        timer = session.timers.pop(("away", member), None)
        if timer is not None:
            timer.cancel()

    async def _lose(self, session: ActiveSession, member: int, reason: DropReason, detail: str) -> None:
        self._cancel_grace(session, member)
        await self._step(session, core.Lost(member, reason, detail))

    async def _said(self, peer: Peer, session_digest: bytes, message: ParticipantMessage | UploadReady) -> None:
        session = self._session
        if session is None or session.id != session_digest or self._peers.get(peer.name) is not peer:
            return  # about a session that is over, or from a connection that is
        member = session.index_of(peer.name, peer.site.fingerprint)
        if member is None:
            return
        if isinstance(message, UploadReady):
            wanted = isinstance(session.state, core.CollectingUpdates) and member in server.outstanding(session.state)
            if wanted and session.slots.ask(member):
                self._grant(session, member)
            return
        await self._step(session, core.Received(member, message))

    async def _misbehaved(self, peer: Peer, detail: str) -> None:
        session = self._session
        member = None if session is None else session.index_of(peer.name, peer.site.fingerprint)
        if session is not None and member is not None and self._peers.get(peer.name) is peer:
            await self._lose(session, member, DropReason.MALFORMED, detail)

    # --- after a restart ------------------------------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Go on where the last process stopped: resume a session that asked for unmasking, give up any other."""
        keep: Path | None = None
        for record in self._store.jobs():
            if record.state is not JobState.RUNNING:
                continue
            self._run = self._job_run(record)
            resume = self._store.resume_record(record.job_id)
            attempt = self._store.current_attempt(record.job_id)
            if resume is not None:
                keep = Path(resume.accumulator_path).parent
                await self._resume(record, resume)
            elif attempt is not None:
                self._store.close_attempt(attempt.session_id, AttemptOutcome.ABANDONED, "the coordinator restarted")
                log.warning("attempt abandoned", job=record.job_id, round=attempt.round_number)
                self._run = self._job_run(record)
            break
        for folder in self._sessions.iterdir():
            if folder != keep:
                shutil.rmtree(folder, ignore_errors=True)

    async def _resume(self, record: JobRecord, resume: ResumeRecord) -> None:
        transcript = codec.decode_transcript(resume.blob)
        plan = codec.decode_plan(transcript.plan_bytes)
        proposal = Proposal(transcript.plan_bytes, transcript.plan_signature, plan)
        state = server.restore(
            proposal,
            _public_keys(transcript.certificates),
            advertised=transcript.advertised,
            dealings=transcript.dealings,
            u3=transcript.u3,
            signatures=transcript.signatures,
        )
        assert self._run is not None
        config = self._run.spec.training.canonical_json()
        session = self._new_session(record.job_id, state, transcript.certificates, config)
        session.uplink_bytes = len(transcript.u3) * shape_of(plan).upload_bytes
        self._session = session
        log.warning("session resumed", job=record.job_id, round=plan.round_number, survivors=len(transcript.u3))
        step = server.resume(state)
        session.state = step.state
        await self._perform(session, step)


def summary_fields(record: JobRecord) -> dict[str, object]:
    """What a job's record says, as the fields of a `JobSummary`."""
    return {
        "name": record.name,
        "task": record.task,
        "state": record.state.value,
        "rounds_total": record.rounds_total,
        "rounds_committed": record.next_round - 1,
        "reason": record.reason,
        "submitted_by": record.submitted_by,
        "submitted_at": record.submitted_at,
        "model_digest": record.current_model,
    }


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


def _public_keys(certificates: tuple[bytes, ...]) -> tuple[ec.EllipticCurvePublicKey, ...]:
    """The keys of certificates that were verified when their holders connected."""
    public_keys = []
    for der in certificates:
        key = x509.load_der_x509_certificate(der).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        public_keys.append(key)
    return tuple(public_keys)
