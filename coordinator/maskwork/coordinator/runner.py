"""Performs what the protocol asks of one open session: sends, timers, the sum, durable records, events for watchers.

The driver feeds it events one at a time; `SessionRunner.step` returns when every effect has been performed or, for the
worker's jobs, started. It decides nothing: which effect follows which event is `maskwork.secagg.server`'s business, and
what an ended session means for its job is the driver's.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, Protocol, TypeVar, assert_never

import structlog

from maskwork import job_events as events
from maskwork.coordinator import aggregation, rounds
from maskwork.coordinator.aggregation import Release, ReleaseRequest
from maskwork.coordinator.audit import Trail
from maskwork.coordinator.board import EventBoard
from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.peers import Peer
from maskwork.coordinator.records import DropRecord, EvidenceRecord, ResumeRecord
from maskwork.coordinator.session import ActiveSession, deadline_s
from maskwork.coordinator.store import Store
from maskwork.drop_texts import named
from maskwork.errors import storage_unavailable
from maskwork.net.revocation import RevocationList
from maskwork.secagg import server
from maskwork.secagg import server_states as core
from maskwork.secagg.errors import AbortReason, DropReason
from maskwork.secagg.messages import Complaint, CoordinatorMessage, Decline, Members, Proposal, SessionClosed, Withdraw
from maskwork.secagg.unmasking import UnmaskingJob
from maskwork.wire import codec
from maskwork.worker import WorkerDied, WorkerFault

log = structlog.get_logger("maskwork.coordinator")

GRANT_S = 30.0
"""A member that was granted a slot and does not begin to stream within this time leaves it to the others."""
RELEASE_TRIES = 2
"""A worker that dies while unmasking (out of memory, killed) is tried again once: the accumulator is as it was."""


P = ParamSpec("P")
R = TypeVar("R")


class Worker(Protocol):
    """Where heavy work is done; a `maskwork.worker.WorkerProcess` in a service."""

    async def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function` and wait for what it returns or raises."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a session needs of the process that it runs in.

    `later(seconds, event)` posts a protocol event after a while and returns its timer; `spawn` starts background work;
    `clock` is what records say, `ticks` what is measured by;
    `released` reports what unmasking gave.
    """

    store: Store
    models: ModelStore
    worker: Worker
    board: EventBoard
    audit: Trail
    peers: Mapping[str, Peer]
    clock: Callable[[], float]
    ticks: Callable[[], float]
    pause: Callable[[float], Awaitable[None]]
    later: Callable[[float, bytes, core.Event], asyncio.TimerHandle]
    spawn: Callable[[Coroutine[None, None, None]], None]
    report: Callable[[bytes, Release | core.Cancelled], Awaitable[None]]


class SessionRunner:
    """One open session and everything done for it."""

    def __init__(self, session: ActiveSession, around: Surroundings) -> None:
        self.session = session
        self._around = around

    async def step(self, event: core.Event) -> None:
        """Feed the protocol one event and perform what it asks for."""
        session, before = self.session, self.session.state
        following = server.step(before, event)
        session.state = following.state
        for effect in following.effects:
            if isinstance(effect, core.RecordEvidence):
                self._keep_evidence(effect, before, event)
        self._tell_answer(before, event, following)
        await self.perform(following)

    async def perform(self, step: core.Step) -> None:
        """Perform the effects of a step, in order; one that fails ends the session."""
        try:
            for effect in step.effects:
                await self._perform(effect)
        except (WorkerDied, WorkerFault, ValueError, OSError) as error:
            short = storage_unavailable(error, file=self.session.folder)
            reason = AbortReason.AGGREGATION_FAILED if short is None else AbortReason.STORAGE_FAILED
            await self.step(core.Cancelled(reason, str(short or error)))

    async def _perform(self, effect: core.Effect) -> None:
        match effect:
            case core.SendTo(recipient, message):
                self._send(recipient, message)
            case core.DropPeer():
                self._dropped(effect)
            case core.StageOpened(stage, expected):
                self._stage_opened(stage, expected)
            case core.AddUpdate(member):
                self._add_upload(member)
            case core.PersistUnmask():
                await self._persist()
            case core.RemoveMasks(job):
                self._around.spawn(self._release(job))
            case core.RecordEvidence():
                pass  # kept by `step`, from the state before the session ended
            case _:
                assert_never(effect)

    # --- participants ----------------------------------------------------------------------------------

    def upload_ready(self, member: int) -> None:
        """A member can stream its update: grant it a slot, or let it wait for one."""
        state = self.session.state
        wanted = isinstance(state, core.CollectingUpdates) and member in server.outstanding(state)
        if wanted and self.session.slots.ask(member):
            self._grant(member)

    def upload_began(self, member: int) -> None:
        """A member streams: from now on the service sees to it that it does not stop."""
        self._cancel_timer("grant", member)

    async def upload_ended(self, member: int) -> None:
        """A member's upload stream ended, whole or cut."""
        self.free_slot(member)
        if self.session.spool(member).complete:
            await self.step(core.UploadCompleted(member))

    def free_slot(self, member: int) -> None:
        """Let the next member upload."""
        self._cancel_timer("grant", member)
        following = self.session.slots.release(member)
        if following is not None:
            self._grant(following)

    async def away(self, member: int, grace_s: float) -> None:
        """A member's connection broke: it may come back within the grace."""
        self.free_slot(member)
        self._cancel_timer("away", member)
        lost = core.Lost(member, DropReason.DISCONNECTED, f"away for more than {grace_s:g} s")
        self.session.timers["away", member] = self._around.later(grace_s, self.session.id, lost)
        await self.step(core.Disconnected(member))

    async def back(self, member: int) -> None:
        """A member is back in this session; one that was given up meanwhile is told so."""
        self._cancel_timer("away", member)
        await self.step(core.Reconnected(member))
        if isinstance(self.session.state, core.Collecting) and member in self.session.state.lost:
            self._send(member, SessionClosed(released=False, phrase="left out of this session: it went on without you"))

    async def lose(self, member: int, reason: DropReason, detail: str) -> None:
        """A member cannot go on in this session."""
        self._cancel_timer("away", member)
        await self.step(core.Lost(member, reason, detail))

    async def withdraw(self, revocations: RevocationList) -> None:
        """Members whose certificates a new list withdraws lose their place, whatever stage is open."""
        for member, why in self.session.withdrawn(revocations).items():
            if isinstance(self.session.state, core.Collecting) and member not in self.session.state.lost:
                await self.lose(member, DropReason.REVOKED, why)

    def _cancel_timer(self, kind: str, member: int) -> None:
        timer = self.session.timers.pop((kind, member), None)
        if timer is not None:
            timer.cancel()

    def _peer(self, member: int) -> Peer | None:
        entry = self.session.plan.roster[member]
        peer = self._around.peers.get(entry.participant)
        return peer if peer is not None and peer.site.fingerprint == entry.fingerprint else None

    def _send(self, member: int, message: CoordinatorMessage | codec.UploadGrant) -> None:
        peer = self._peer(member)
        if peer is None:
            return  # away: it is told again when it comes back
        response = self._offer(peer) if isinstance(message, Proposal) else message
        peer.send(partial(codec.encode_response, self.session.id, response, self.session.plan.cohort))

    def _offer(self, peer: Peer) -> codec.OpenSession:
        return self._around.audit.shown(self.session.opening(), peer.audit_size)

    def _grant(self, member: int) -> None:
        if ("grant", member) not in self.session.timers:  # asking again buys no time: others wait for the slot
            idle = core.Lost(member, DropReason.DEADLINE, f"did not begin its upload within {GRANT_S:g} s of the grant")
            self.session.timers["grant", member] = self._around.later(GRANT_S, self.session.id, idle)
        self._send(member, self.session.grant(member))

    # --- for watchers and the record ----------------------------------------------------------------------------------

    def _tell_answer(self, before: core.State, event: core.Event, following: core.Step) -> None:
        """Post that a member completed a stage, if this event did that."""
        stage = self.session.stage
        if not isinstance(event, core.Received | core.UploadCompleted) or stage is None:
            return
        if isinstance(event, core.Received) and isinstance(event.message, Decline | Withdraw | Complaint):
            return
        dropped = any(isinstance(e, core.DropPeer) and e.member == event.sender for e in following.effects)
        if not dropped and event.sender in server.outstanding(before):
            name = self.session.name(event.sender)
            self._keeps_our_head(event.sender, stage)
            self._publish(events.Answered(*self._when(), stage=stage.value, participant=name))

    def _keeps_our_head(self, member: int, stage: core.Stage) -> None:
        """A site that takes a plan up has written down the head in it: next time it is shown what follows that one."""
        peer, size = self._peer(member), self._around.audit.size_of(self.session.plan.audit_head)
        if stage is core.Stage.ADVERTISE_KEYS and peer is not None and size is not None:
            peer.audit_size = size

    def _stage_opened(self, stage: core.Stage, expected: Members) -> None:
        session = self.session
        session.enter_stage(stage, self._around.ticks())
        seconds = deadline_s(session.plan, stage)
        session.timers[stage] = self._around.later(seconds, session.id, core.DeadlinePassed(stage))
        if stage is core.Stage.CONSISTENCY_CHECK:
            # The sum is whole: what takes the disk so long is under way while the signatures are gathered.
            session.additions.append(asyncio.ensure_future(self._make_durable()))
        self._publish(events.StageOpened(*self._when(), stage=stage.value, expected=session.names(expected)))

    def _dropped(self, drop: core.DropPeer) -> None:
        session, name = self.session, self.session.name(drop.member)
        job_id, now, round_number, attempt = self._when()
        self._around.store.record_drop(
            DropRecord(job_id, round_number, attempt, name, drop.stage.value, drop.reason.value, drop.detail, now)
        )
        why = session.note_drop(name, drop.reason, drop.detail)
        self._publish(
            events.Dropped(
                *self._when(),
                stage=drop.stage.value,
                participant=name,
                reason=drop.reason.value,
                detail=drop.detail,
            )
        )
        log.warning(
            "participant dropped", participant=name, reason=drop.reason.value, detail=drop.detail, said=named(name, why)
        )
        phrase = f"left out of this session: {drop.reason.value}"
        self._send(drop.member, SessionClosed(released=False, phrase=phrase))
        self.free_slot(drop.member)

    def _keep_evidence(self, evidence: core.RecordEvidence, before: core.State, event: core.Event) -> None:
        transcript = self.session.transcript(before)
        if isinstance(event, core.Received) and isinstance(event.message, Complaint):
            transcript = codec.with_accusation(transcript, event.sender, event.message)
        accused = self.session.name(evidence.accused)
        self._around.store.add_evidence(
            EvidenceRecord(
                self.session.job_id,
                self.session.id,
                evidence.kind.value,
                accused,
                codec.encode_transcript(transcript),
                self._around.clock(),
            )
        )
        log.error("evidence kept", accused=accused, kind=evidence.kind.value)

    def _when(self) -> tuple[str, float, int, int]:
        plan = self.session.plan
        return self.session.job_id, self._around.clock(), plan.round_number, plan.attempt

    def _publish(self, event: events.JobEvent) -> None:
        self._around.board.publish(event)

    # --- the sum ----------------------------------------------------------------------------------

    def _add_upload(self, member: int) -> None:
        session = self.session
        session.uplink_bytes += session.shape.upload_bytes
        spool = session.spool(member)
        work = self._around.worker.call(
            aggregation.add_upload, session.accumulator, spool.path, session.shape, spool.seal
        )
        session.additions.append(asyncio.ensure_future(work))

    async def _make_durable(self) -> None:
        await self._around.worker.call(aggregation.make_durable, self.session.accumulator)

    async def _persist(self) -> None:
        """Everything in U3 is in the sum and on the disk, with the sets and signatures, before Unmask is asked for."""
        session = self.session
        await asyncio.gather(*session.additions)
        await self._make_durable()
        transcript = session.transcript(session.state)
        self._around.store.save_resume(
            ResumeRecord(
                session.id,
                session.job_id,
                codec.encode_transcript(transcript),
                str(session.accumulator),
                session.names(transcript.u3),
                self._around.clock(),
            )
        )

    async def _release(self, job: UnmaskingJob) -> None:
        session, p = self.session, self.session.plan
        request = ReleaseRequest(
            accumulator=session.accumulator,
            shape=session.shape,
            encoding=p.encoding,
            job=job,
            survivors=len(job.self_seeds),
            models=self._around.models.directory,
            model=p.model_digest,
            metadata=(("federation", p.federation), ("job", p.job), ("round", str(p.round_number))),
            vault=session.vault,
        )
        left, pause = RELEASE_TRIES, rounds.FIRST_PUT_OFF_S
        while left:
            try:
                await self._around.report(session.id, await self._around.worker.call(aggregation.release, request))
                return
            except Exception as error:  # whatever it is, the session must not wait for ever for a sum
                detail = str(error)
                short = storage_unavailable(error, file=session.folder)
            if short is not None:
                # Everything that the sum needs is on the disk: it is worth waiting for as long as it takes.
                why = f"round {p.round_number} is complete but for its model, written once this is mended: {short}"
                log.error("waiting", job=session.job_id, why=why)
                self._publish(events.Waiting(session.job_id, self._around.clock(), why, tuple(self._around.peers)))
                await self._around.pause(pause)
                pause = min(2 * pause, rounds.LONGEST_PUT_OFF_S)
                continue
            left -= 1
            log.error("unmasking failed", job=session.job_id, detail=detail, tries_left=left)
        await self._around.report(session.id, core.Cancelled(AbortReason.AGGREGATION_FAILED, detail))

    def forget(self) -> None:
        """Stop the timers and delete every file of the session."""
        session = self.session
        session.cancel_timers()
        for addition in session.additions:
            if not addition.cancel() and not addition.cancelled():
                addition.exception()  # known already, or no longer of interest
        for spool in session.spools.values():
            spool.discard()
        shutil.rmtree(session.folder, ignore_errors=True)
