"""The participant's only loop: takes what happened from one queue, steps the pure parts, performs their effects.

Training, masking and transfers run beside it and report back through the same queue, so the control stream always
answers. What must be durable (`RecordAttempt`, `RecordRelease`) is in the ledger before what it guards is sent.

It decides nothing about the protocol (`maskwork.secagg.client` does) or about offers (`agent` and the policy do).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import assert_never

import structlog

from maskwork.errors import StorageUnavailable, storage_unavailable
from maskwork.net.identity import VerifiedCertificate
from maskwork.participant import room
from maskwork.participant.agent import check_offer, check_policy
from maskwork.participant.audit import SiteTrail
from maskwork.participant.client import LinkDown, LinkUp, Said, TurnedAway
from maskwork.participant.coming_back import ComingBack
from maskwork.participant.config import TaskConfig
from maskwork.participant.errands import Errands
from maskwork.participant.ledger import Ledger, SignedPlan, StaleAttempt
from maskwork.participant.policy import Policy
from maskwork.participant.revocations import CoordinatorRevoked, Revocations
from maskwork.participant.work import (
    Failed,
    Fetched,
    Happening,
    Link,
    Masked,
    SiteIdentity,
    Trained,
    Unacceptable,
    Uploaded,
    Work,
    Worker,
    training_worker,
)
from maskwork.secagg import client as protocol
from maskwork.secagg import client_states as core
from maskwork.secagg import keys
from maskwork.secagg.errors import AbortReason, DeclineCode, PlanRefused
from maskwork.secagg.messages import Decline, Proposal, SessionClosed
from maskwork.secagg.plan import session_id
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession, UploadGrant, UploadReady, WireError
from maskwork.wire.v1 import federation_pb2

log = structlog.get_logger("maskwork.participant")


class Driver:
    """Runs one participant."""

    def __init__(
        self,
        *,
        identity: SiteIdentity,
        ledger: Ledger,
        policy: Policy,
        tasks: Mapping[str, TaskConfig],
        seed: int,
        scratch: Path,
        make_worker: Callable[[str, TaskConfig], Worker] = training_worker,
        clock: Callable[[], float] = time.time,
        entropy: Callable[[int], bytes] = os.urandom,
        pause: room.Pause = asyncio.sleep,
        audit: SiteTrail | None = None,
    ) -> None:
        self._identity = identity
        self._ledger = ledger
        self._audit = audit or SiteTrail.in_memory(
            federation=identity.federation, certificate=b"", signer=identity.signer, clock=clock
        )
        self._policy = policy
        self._scratch = scratch
        self._clock = clock
        self._entropy = entropy
        self._tasks = tasks
        self._make_worker = make_worker
        self._workers: dict[str, Worker] = {}
        self._coordinator: VerifiedCertificate | None = None
        self._work: Work | None = None
        self._connected = asyncio.Event()
        self._coming_back = ComingBack(scratch=scratch, policy=policy, clock=clock, pause=pause, redial=self._redial)
        self.revocations = Revocations(
            scratch.parent,
            identity.verifier.roots,
            federation=identity.federation,
            numbers=ledger,
            policy=policy,
            clock=clock,
        )
        self.inbox: asyncio.Queue[object] = asyncio.Queue(256)
        self.link: Link | None = None
        self._errands = Errands(
            name=identity.name,
            seed=seed,
            inbox=self.inbox,
            link=self._linked,
            connected=self._connected,
            workers=self._workers,
            revocations=self.revocations,
            audit=self._audit,
        )

    def active_session(self) -> bytes:
        """The session that this participant is in, for the Hello of a new connection; empty for none."""
        return b"" if self._work is None else self._work.id

    def _linked(self) -> Link:
        assert self.link is not None  # offers come through it
        return self.link

    def take_up(self, identity: SiteIdentity) -> None:
        """From the next session on this participant goes by another certificate."""
        self._identity = identity

    async def prepare(self) -> None:
        """Start every task's worker and load the site's data, so that mistakes show now and rounds start warm.

        Raises:
            UserError: a task or its data is not usable.
        """
        for name, task in self._tasks.items():
            log.info("loading task", task=name)
            self._workers[name] = self._make_worker(name, task)
            await self._workers[name].start()
            log.info("task ready", task=name)

    async def run(self) -> None:
        """Handle one event after the other until cancelled."""
        while True:
            happening = await self.inbox.get()
            await self._handle(happening)  # type: ignore[arg-type]  # only Happenings are put there
            self.inbox.task_done()

    def leave(self) -> None:
        """Tell the coordinator that this site does not go on with the session that it is in, if it is in one."""
        if self._work is not None:
            self._fail(AbortReason.CANCELLED, "the participant stops")
        self._errands.cancel()
        self._coming_back.cancel()

    async def close(self) -> None:
        """Forget the session, end the workers."""
        self.leave()
        for worker in self._workers.values():
            await worker.close()

    async def _handle(self, happening: Happening) -> None:
        match happening:
            case LinkUp(coordinator):
                self._coordinator = coordinator
                self._connected.set()
                log.info("connected", coordinator=coordinator.name)
                self._offer_upload()
            case LinkDown():
                self._connected.clear()
                log.warning("connection lost")
            case TurnedAway():
                self._abandon("turned away")
            case Said(response):
                self._said(response)
            case Fetched():
                self._fetched(happening)
            case Unacceptable(work, refused):
                if work is self._work:
                    self._decline(work.id, work.offer.proposal, refused)
                    self._end()
            case Trained():
                self._trained(happening)
            case Masked():
                self._masked(happening)
            case Uploaded():
                self._uploaded(happening)
            case Failed(work, reason, detail):
                if work is self._work:
                    self._fail(reason, detail)
            case _:
                assert_never(happening)

    def _current(self, session: bytes) -> Work | None:
        work = self._work
        return work if work is not None and work.id == session else None

    # --- messages -------------------------------------------------------------------------------------------------

    def _said(self, response: federation_pb2.ConnectResponse) -> None:
        work = self._current(response.session_id)
        if work is None and response.WhichOneof("message") not in ("open_session", "welcome"):
            return  # about a session that is over here: its bitmaps cannot even be read
        try:
            message = codec.decode_response(response, 0 if work is None else work.plan.cohort)
        except WireError as error:
            log.error("malformed message of the coordinator", detail=str(error))
            if work is not None:
                self._fail(AbortReason.UNEXPECTED_MESSAGE, str(error))
            return
        match message:
            case OpenSession():
                self._offered(response.session_id, message)
            case UploadGrant(update_offset, statistics_offset):
                if work is not None:
                    self._start_upload(work, (update_offset, statistics_offset))
            case codec.Welcome():
                log.error("a second Welcome")
            case _ if work is not None:
                if isinstance(message, SessionClosed):
                    log.info("session closed", released=message.released, phrase=message.phrase)
                if work.state is None and isinstance(message, SessionClosed):
                    self._end()  # closed while the model was still being fetched
                elif work.state is not None:
                    self._step(message)

    def _send(self, session: bytes, message: codec.Request) -> None:
        if self.link is not None:
            self.link.send(session, message)

    def _redial(self) -> None:
        if self.link is not None:
            self.link.redial()

    # --- offers ---------------------------------------------------------------------------------------------------

    def _offered(self, session: bytes, offer: OpenSession) -> None:
        plan = offer.proposal.plan
        if session != session_id(offer.proposal.plan_bytes):
            log.error("an offer under another session's id")
            return
        if self._current(session) is not None:
            self._step(offer.proposal)  # asked again after a broken connection: the core repeats its answer
            return
        if self._coordinator is None or not protocol.is_signed_by(offer.proposal, self._coordinator.public_key):
            log.error("an offer that the coordinator did not sign")
            self._send(session, Decline(DeclineCode.BAD_PLAN, "the plan's signature is not the coordinator's"))
            return
        highest = self._ledger.highest_attempt(self._identity.federation, plan.job)
        try:
            config = check_offer(
                offer,
                federation=self._identity.federation,
                tasks=self._tasks,
                policy=self._policy,
                highest=highest,
                rounds_taken=self._ledger.rounds_taken(self._identity.federation, plan.job),
                now=self._clock(),
            )
            self.revocations.check_named(plan, offer.revocation_list_size)
            self._audit.check(session, offer, self._coordinator.public_key)
        except PlanRefused as refused:
            self._decline(session, offer.proposal, refused)
            return
        if self._work is not None:  # the coordinator has given up the session before; so do we
            self._abandon("superseded")
        folder, needed = self._scratch / session.hex(), room.needed_for(offer)
        try:
            room.make_room(folder, needed)
        except StorageUnavailable as error:
            log.error("no room for a session", detail=str(error))
            self._send(session, Decline(DeclineCode.PAUSED, _told(error)))
            self._coming_back.when_there_is_room(needed)
            return
        work = self._work = Work(session, offer, config, folder)
        log.info("plan accepted", job=plan.job, round=plan.round_number, attempt=plan.attempt, cohort=plan.cohort)
        self._errands.spawn(work, self._errands.fetch(work), AbortReason.WRONG_MODEL)

    def _decline(self, session: bytes, proposal: Proposal, refused: PlanRefused) -> None:
        plan = proposal.plan
        log.warning("plan declined", job=plan.job, round=plan.round_number, code=refused.code, detail=refused.detail)
        self._send(session, Decline(refused.code, refused.detail[:500]))
        kept = self._ledger.record_refused_plan(
            SignedPlan(
                plan.federation,
                plan.job,
                plan.round_number,
                plan.attempt,
                session,
                proposal.plan_bytes,
                proposal.signature,
                self._clock(),
                refused.detail,
            )
        )
        if refused.code is DeclineCode.PAUSED:  # the policy's hours, and nothing else, speak against it
            self._coming_back.when_hours_begin()
        if kept and self._coordinator is not None:
            self._audit.declined(session, proposal, refused, self._coordinator.der)

    def _fetched(self, fetched: Fetched) -> None:
        work = fetched.work
        if work is not self._work or self._coordinator is None:
            return
        plan, identity = work.plan, self._identity
        site = core.Site(
            name=identity.name,
            fingerprint=identity.fingerprint,
            signer=identity.signer,
            verifier=replace(identity.verifier, is_revoked=work.revocations),
            certificates=dict(enumerate(fetched.certificates)),
            coordinator_key=self._coordinator.public_key,
            model_digest=fetched.model_digest,
            rules=core.SiteRules(
                min_survivors=self._policy.min_survivors,
                min_survivor_difference=self._policy.min_survivor_difference,
                trusted=self._policy.trusted,
                min_trusted_survivors=self._policy.min_trusted_survivors,
                released=self._ledger.releases(identity.federation, plan.model_digest),
                highest_attempt=self._ledger.highest_attempt(identity.federation, plan.job),
                revocation_digest=work.revocations.digest,
                revocation_number=work.revocations.number,
            ),
        )
        taken = self._ledger.rounds_taken(identity.federation, plan.job)
        try:
            check_policy(plan, self._policy, rounds_taken=taken, now=self._clock())
            self.revocations.rely_upon(work.revocations, plan, fetched.certificates)
            self.revocations.check_coordinator(self._coordinator)
            started = protocol.begin(work.offer.proposal, site=site, rand=self._entropy(keys.SESSION_SEED_BYTES))
            work.state = started.state
            self._perform(work, started)
        except CoordinatorRevoked as revoked:
            self._decline(work.id, work.offer.proposal, revoked)
            self._end()
            if self.link is not None:
                self.link.redial()  # and meets nobody whom this site would talk to
        except PlanRefused as refused:
            self._decline(work.id, work.offer.proposal, refused)
            self._end()
        except StaleAttempt as stale:
            self._decline(work.id, work.offer.proposal, PlanRefused(DeclineCode.STALE_ATTEMPT, str(stale)))
            self._end()

    # --- the protocol ---------------------------------------------------------------------------------------------

    def _step(self, event: core.Event) -> None:
        work = self._work
        if work is None or work.state is None:
            return
        following = protocol.step(work.state, event, now=self._clock())
        work.state = following.state
        if isinstance(following.state, core.Aborted):
            log.warning("session aborted", reason=following.state.reason.value, detail=following.state.detail)
        self._perform(work, following)

    def _perform(self, work: Work, step: core.Step) -> None:
        for effect in step.effects:
            match effect:
                case core.RecordAttempt():
                    self._record_attempt(work, effect)
                case core.RecordRelease():
                    self._record_release(work, effect)
                case core.Send(message):
                    self._audit.sending(work.id, message, step.state)
                    self._send(work.id, message)
                case core.StartTraining():
                    self._errands.spawn(work, self._errands.train(work), AbortReason.TRAINING_FAILED)
                case core.MaskUpdate(mask_keys):
                    work.mask_keys = mask_keys
                    self._mask_when_ready(work)
                case core.UploadUpdate():
                    self._offer_upload()
                case core.EndSession():
                    self._end()
                case _:
                    assert_never(effect)

    def _record_attempt(self, work: Work, record: core.RecordAttempt) -> None:
        plan = work.plan
        self._ledger.record_attempt(
            plan.federation,
            plan.job,
            plan.round_number,
            attempt=plan.attempt,
            session_id=record.session,
            plan_bytes=record.plan_bytes,
            plan_signature=record.plan_signature,
            at=self._clock(),
        )
        assert self._coordinator is not None
        self._audit.accepted(work.id, work.offer, self._coordinator.der)
        if work.offer.history.size:
            self._ledger.record_audit_head(plan.federation, plan.audit_head)

    def _record_release(self, work: Work, record: core.RecordRelease) -> None:
        self._ledger.record_release(
            work.plan.federation,
            work.plan.job,
            record.model_digest,
            session_id=record.session,
            survivors=record.survivors,
            at=self._clock(),
        )
        assert work.state is not None
        self._audit.releasing(record, work.state)

    def _fail(self, reason: AbortReason, detail: str) -> None:
        work = self._work
        if work is not None and work.state is None:
            log.warning("session abandoned", reason=reason.value, detail=detail)
            code, said = _DECLINED.get(reason, (DeclineCode.WRONG_MODEL, "the plan's model could not be fetched"))
            self._send(work.id, Decline(code, said))
            self._end()
            if reason is AbortReason.STORAGE_FAILED:
                self._coming_back.when_there_is_room(room.needed_for(work.offer))
        else:
            self._step(core.LocalFailure(reason, detail))

    def _abandon(self, why: str) -> None:
        """Drop a session that is over at the coordinator, or out of reach; nobody waits for a Withdraw any more."""
        if self._work is not None:
            log.info(f"session {why}")
            self._end()

    def _end(self) -> None:
        work, self._work = self._work, None
        if work is None:
            return
        self._audit.ended(work.id, work.state)
        for task in work.tasks:
            task.cancel()  # a call that the worker is in the middle of ends the worker
        if work.state is not None:  # training was begun: the worker may hold an update
            self._errands.discard(work)
        if work.update is not None:
            work.update.close()
        shutil.rmtree(work.folder, ignore_errors=True)

    # --- work beside the loop -------------------------------------------------------------------------------------

    def _trained(self, trained: Trained) -> None:
        work = trained.work
        if work is not self._work:
            return
        work.trained = True
        after_hours = not self._policy.open_at(self._clock())  # hours say when a session may begin: it goes on
        seconds = round(trained.summary.seconds, 3)
        log.info("trained", seconds=seconds, round=work.plan.round_number, after_hours=after_hours)
        self._mask_when_ready(work)

    def _mask_when_ready(self, work: Work) -> None:
        if work.trained and work.mask_keys is not None:
            self._errands.spawn(work, self._errands.mask(work, work.mask_keys), AbortReason.ENCODING_REFUSED)
            work.mask_keys = None

    def _masked(self, masked: Masked) -> None:
        work = masked.work
        if work is not self._work:
            return
        path = work.folder / "update"
        try:
            work.update, work.statistics = path.open("rb", buffering=0), masked.result.statistics
            work.update_sent = (masked.result.update_bytes, masked.result.digest)
        except OSError as error:
            self._fail(AbortReason.STORAGE_FAILED, str(storage_unavailable(error, file=path) or error))
            return
        path.unlink()
        if masked.result.clamped:
            log.info("coordinates clamped", count=masked.result.clamped)
        self._step(core.UpdateMasked())

    def _offer_upload(self) -> None:
        work = self._work
        if work is not None and isinstance(work.state, core.Uploading) and not work.uploading:
            self._send(work.id, UploadReady())

    def _start_upload(self, work: Work, offsets: tuple[int, int]) -> None:
        if work.uploading or work.update is None or not isinstance(work.state, core.Uploading):
            return
        work.uploading = True
        size, digest = work.update_sent
        self._audit.uploading(work.id, size=size, digest=digest, statistics=work.statistics)
        self._errands.spawn(work, self._errands.upload(work, work.update, offsets), AbortReason.CANCELLED)

    def _uploaded(self, uploaded: Uploaded) -> None:
        work = uploaded.work
        if work is not self._work:
            return
        work.uploading = False
        if uploaded.received is None:
            self._offer_upload()  # if the stream is down this is lost, and offered again when it is up


_DECLINED = {
    AbortReason.CANCELLED: (DeclineCode.PAUSED, "the site stops"),
    AbortReason.STORAGE_FAILED: (DeclineCode.PAUSED, "the site's disk cannot take the session now; its log says more"),
}
"""What a site says when it gives an offer up while it still fetches; anything else is about the model."""


def _told(error: StorageUnavailable) -> str:
    """What the coordinator's operator may know of it: no path of this site's."""
    return f"the scratch directory cannot take a session now: {error.what.partition(' (')[0]}; its log says more"
