"""The coordinator's only loop: takes what happened from one queue, steps the pure parts, performs their effects.

Everything that changes anything goes through `Driver.run`, one event at a time: what participants said, broken and new
connections, finished uploads, timers, the worker's answers, submitted and aborted jobs. What is to be durable is
written before what depends on it is sent.

What a job needs is done by `job_runner`, what a session needs by `runner`. It decides nothing about the protocol
(`maskwork.secagg.server` does) or about jobs (`rounds` does), and knows nothing of gRPC (`service` does). A
`StoreError` ends the loop: a coordinator that cannot write down what it does must stop.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import assert_never

import structlog

from maskwork.audit.records import CertificateEvent
from maskwork.coordinator import rounds
from maskwork.coordinator.aggregation import Release
from maskwork.coordinator.audit import Trail
from maskwork.coordinator.board import EventBoard
from maskwork.coordinator.happenings import (
    Crashed,
    Happening,
    JobAborted,
    ListChanged,
    Look,
    OwnCertificateRenewed,
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
from maskwork.coordinator.job_runner import Federation, JobRunner
from maskwork.coordinator.models import ModelFile, ModelStore
from maskwork.coordinator.peers import Peer
from maskwork.coordinator.renewals import Renewals
from maskwork.coordinator.revocations import withdrawn
from maskwork.coordinator.rounds import PresentSite
from maskwork.coordinator.runner import SessionRunner, Surroundings, Worker
from maskwork.coordinator.spool import Spool
from maskwork.coordinator.store import Store
from maskwork.net.revocation import NO_LIST, RevocationList
from maskwork.net.status import Refusal, Refused
from maskwork.secagg import server
from maskwork.secagg import server_states as core
from maskwork.secagg.errors import AbortReason, DropReason
from maskwork.secagg.messages import (
    ParticipantMessage,
    SessionClosed,
)
from maskwork.wire import codec
from maskwork.wire.codec import UploadReady

log = structlog.get_logger("maskwork.coordinator")

INBOX_LIMIT = 4096


class Driver:
    """Takes one event after the other and gives it to whom it concerns: the jobs, the open session, a peer."""

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
        audit: Trail | None = None,
        revocations: RevocationList = NO_LIST,
    ) -> None:
        self.federation = federation
        self.audit = audit or Trail.in_memory(
            federation=federation.name, certificate=federation.certificate, signer=federation.signer, clock=clock
        )
        self.board = EventBoard()
        self._models = models
        self._ticks = ticks  # what is waited for and measured by; it never jumps
        self._inbox: asyncio.Queue[Happening] = asyncio.Queue(INBOX_LIMIT)
        self._peers: dict[str, Peer] = {}
        self._aborting: JobAborted | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._look_timer: asyncio.TimerHandle | None = None
        self._renewals = Renewals()
        around = Surroundings(
            store=store,
            models=models,
            worker=worker,
            board=self.board,
            audit=self.audit,
            peers=self._peers,
            clock=clock,
            ticks=ticks,
            pause=pause,
            later=self._post_later,
            spawn=self._spawn,
            report=self._report,
        )
        self._jobs = JobRunner(
            federation=federation,
            around=around,
            sessions=sessions,
            max_uploads=max_uploads,
            entropy=entropy,
            look_at=self._look_at,
            revocations=revocations,
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
        active = None if self._jobs.runner is None else self._jobs.runner.session
        if active is None or active.id != session:
            return None
        member = active.index_of(site.name, site.fingerprint)
        if member is None or member not in server.outstanding(active.state):
            return None
        if not isinstance(active.state, core.CollectingUpdates) or not active.slots.holds(member):
            return None
        return active.spool(member), member

    def download(self, site: PresentSite, digest: bytes) -> ModelFile | bytes | None:
        """What a member of the open session may fetch: model, certificates, revocation list, audit digests."""
        active = None if self._jobs.runner is None else self._jobs.runner.session
        if active is None or active.index_of(site.name, site.fingerprint) is None:
            return None
        if digest == active.plan.model_digest:
            return self._models.file(digest)
        if active.revocations.number and digest == active.revocations.digest:
            return active.revocations.der
        bundle = active.certificate_bundle
        return bundle if hashlib.sha256(bundle).digest() == digest else self.audit.tail(digest)

    # --- the loop ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Recover, then handle one event after the other until cancelled."""
        await self._jobs.recover()
        await self._list_changed(self._jobs.revocations)  # a session that was resumed may have a member of it
        self._jobs.after_step()
        await self._jobs.consider()
        while True:
            await self._handle(await self._inbox.get())
            self._jobs.after_step()
            if self._jobs.runner is None:
                self._take_up_renewed()
                await self._jobs.consider()

    async def stop(self) -> None:
        """Give up the open session, tell everybody, close every stream."""
        runner = self._jobs.runner
        if runner is not None and not isinstance(runner.session.state, core.CollectingUnmask | core.RemovingMasks):
            await runner.step(core.Cancelled(AbortReason.CANCELLED, "the coordinator stops"))
            self._jobs.after_step()
        self.hang_up()

    def hang_up(self) -> None:
        """Close every stream and stop what runs beside the loop, without a word to anybody."""
        self.board.close()
        for peer in tuple(self._peers.values()):
            peer.close()
        self._renewals.close()
        if self._look_timer is not None:
            self._look_timer.cancel()
        if self._jobs.runner is not None:
            self._jobs.runner.session.cancel_timers()
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
                    await self._jobs.released(runner, release)
            case JobAborted():
                self._aborting = happening
                await self._jobs.abort(happening)
                self._aborting = None
            case ListChanged(revocations):
                await self._list_changed(revocations)
            case OwnCertificateRenewed():
                self._renewals.own(happening)
            case Crashed(error):
                raise error
            case Look():
                pass
            case _:
                assert_never(happening)

    def _runner_of(self, session: bytes) -> SessionRunner | None:
        runner = self._jobs.runner
        return runner if runner is not None and runner.session.id == session else None

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

    # --- participants ----------------------------------------------------------------------------------

    async def _list_changed(self, revocations: RevocationList) -> None:
        if revocations.number:
            told = CertificateEvent(event="list", number=revocations.number, digest=revocations.digest)
            self.audit.certificate_event(told)
        found = {peer: withdrawn(peer.certificate, revocations) for peer in self._peers.values()}
        revoked = {peer: why for peer, why in found.items() if why}
        await self._jobs.withdraw(revocations, {peer.name: why for peer, why in revoked.items()})
        for peer, why in revoked.items():
            log.warning("participant cut off", participant=peer.name, detail=why)
            del self._peers[peer.name]
            peer.close()

    def _place(self, peer: Peer) -> tuple[SessionRunner, int] | None:
        """The open session and the peer's index in it, when this very connection speaks for that member."""
        if self._jobs.runner is None or self._peers.get(peer.name) is not peer:
            return None
        member = self._jobs.runner.session.index_of(peer.name, peer.site.fingerprint)
        return None if member is None else (self._jobs.runner, member)

    async def _connected(self, peer: Peer) -> None:
        if why := withdrawn(peer.certificate, self._jobs.revocations):
            log.warning("participant cut off", participant=peer.name, detail=why)  # the list came while it greeted
            peer.close()
            return
        older = self._peers.get(peer.name)
        before = None if older is None else self._place(older)
        if before is not None and self._renewals.waits(peer, older):
            return
        if older is not None:
            remedy = "if this goes on, two agents run with this site's certificate: have its operator stop one"
            log.warning(
                "a newer connection takes the place of one that is still open", participant=peer.name, remedy=remedy
            )
            older.displaced = older.site.fingerprint == peer.site.fingerprint
            older.close()
        self._peers[peer.name] = peer
        self._renewals.welcome(peer, self.federation)
        log.info("participant connected", participant=peer.name, connected=len(self._peers))
        self._readmit(peer.name)
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
            peer.send(partial(codec.encode_response, peer.active_session, closed, 0))

    def _readmit(self, name: str) -> None:
        if self._jobs.run is not None:
            self._jobs.run = rounds.readmit(self._jobs.run, name)

    def _take_up_renewed(self) -> None:
        """No session is open: certificates that were renewed during the last one count from now on."""
        self.federation, succeeded = self._renewals.take_up(self.federation, self._peers)
        self._jobs.federation = self.federation
        self.audit.renewed(self.federation.certificate, self.federation.signer)
        for name in succeeded:
            self._readmit(name)

    async def _gone(self, peer: Peer) -> None:
        place = self._place(peer)
        self._renewals.gone(peer)
        if self._peers.get(peer.name) is not peer:
            return  # a newer connection took its place
        del self._peers[peer.name]
        log.info("participant disconnected", participant=peer.name, connected=len(self._peers))
        if place is not None and self._jobs.run is not None:
            await place[0].away(place[1], self._jobs.run.spec.deadlines.reconnect_s)

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
