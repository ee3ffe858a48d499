"""What takes long and is done beside the participant's loop: fetching, training, masking, uploading.

Each errand belongs to one session's `Work` and ends with an event in the loop's inbox; the loop decides what the event
means. Nothing here looks at the protocol's state or tells the coordinator anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import BinaryIO

import structlog

from maskwork.errors import UserError, storage_unavailable
from maskwork.participant import training_calls
from maskwork.participant.audit import SiteTrail
from maskwork.participant.client import TransferError
from maskwork.participant.revocations import Revocations
from maskwork.participant.training_calls import MaskRequest, TrainRequest
from maskwork.participant.work import (
    Failed,
    Fetched,
    Link,
    Masked,
    Trained,
    Unacceptable,
    Uploaded,
    Work,
    Worker,
)
from maskwork.secagg import keys
from maskwork.secagg.errors import AbortReason, PlanRefused
from maskwork.secagg.masking import MaskingKeys
from maskwork.task import training_seed
from maskwork.wire import codec
from maskwork.worker import WorkerDied, WorkerFault

log = structlog.get_logger("maskwork.participant")

DOWNLOAD_TRIES = 5
DOWNLOAD_PAUSE_S = 0.5
UPLOAD_PAUSE_S = 0.05
LONGEST_UPLOAD_PAUSE_S = 5.0


class Errands:
    """Does them."""

    def __init__(
        self,
        *,
        name: str,
        seed: int,
        inbox: asyncio.Queue[object],
        link: Callable[[], Link],
        connected: asyncio.Event,
        workers: Mapping[str, Worker],
        revocations: Revocations,
        audit: SiteTrail,
    ) -> None:
        self._name = name
        self._seed = seed
        self._inbox = inbox
        self._link = link
        self._connected = connected
        self._workers = workers
        self._revocations = revocations
        self._audit = audit
        self._discarding: set[asyncio.Task[None]] = set()
        self._bundle = (b"", b"")  # the last cohort's certificates by their digest: the next round's are often the same

    async def fetch(self, work: Work) -> None:
        """Bring what an offer names: revocation list, model, certificates, the audit log's new digests."""
        offer, bundle = work.offer, work.folder / "certificates"
        shown, history = offer.history, work.folder / "history"
        tries = 0
        while True:
            try:
                await self._revocations.fetch(work, self._link())
                model_digest = await self._link().download(work.plan.model_digest, offer.model_size, work.model)
                if offer.certificates_digest != self._bundle[0]:
                    await self._link().download(offer.certificates_digest, offer.certificates_size, bundle)
                    self._bundle = (offer.certificates_digest, bundle.read_bytes())
                if shown.digests_digest:
                    await self._link().download(shown.digests_digest, shown.tail_bytes, history)
                break
            except PlanRefused as refused:
                await self._inbox.put(Unacceptable(work, refused))
                return
            except TransferError as error:
                log.warning("download interrupted", detail=str(error))
                if not self._connected.is_set():
                    await self._connected.wait()  # however long: if the session is over by then, we are told
                    continue
                tries += 1
                if tries == DOWNLOAD_TRIES:
                    raise
                await asyncio.sleep(DOWNLOAD_PAUSE_S * 2 ** (tries - 1))
        certificates = codec.decode_certificates(self._bundle[1], offer.certificates_digest, work.plan.cohort)
        bad_history = await self._audit.check_fetched(work.id, offer, history) if shown.digests_digest else None
        if bad_history is not None:
            await self._inbox.put(Unacceptable(work, bad_history))
        else:
            await self._inbox.put(Fetched(work, model_digest, certificates))

    def spawn(self, work: Work, job: Coroutine[None, None, None], reason: AbortReason) -> None:
        """Run an errand for a session; what goes wrong in it becomes a `Failed` with this reason."""

        async def guarded() -> None:
            try:
                await job
            except WorkerDied as error:  # and its update with it, whatever was being done to that
                await self._inbox.put(Failed(work, AbortReason.TRAINING_FAILED, str(error)))
            except Exception as error:  # a site's own code may raise anything; the session must hear of it
                short = storage_unavailable(error, file=work.folder)
                detail = str(short or error) or type(error).__name__
                why = reason if short is None else AbortReason.STORAGE_FAILED
                await self._inbox.put(Failed(work, why, detail))

        task = asyncio.get_running_loop().create_task(guarded())
        work.tasks.add(task)
        task.add_done_callback(work.tasks.discard)

    async def train(self, work: Work) -> None:
        """Local training, in the worker."""
        plan = work.plan
        seed = training_seed(self._seed, job=plan.job, round_number=plan.round_number, participant=self._name)
        request = TrainRequest(work.id, work.model, plan.parameters, work.config, seed)
        summary = await self._workers[plan.task].call(training_calls.train, request)
        await self._inbox.put(Trained(work, summary))

    async def mask(self, work: Work, mask_keys: MaskingKeys) -> None:
        """Encode and mask, in the worker, into a file of the session."""
        request = MaskRequest(
            session_id=work.id,
            encoding=work.plan.encoding,
            keys=mask_keys,
            rotation_seed=keys.rotation_seed(work.id),
            statistics=work.plan.statistics,
            output=work.folder / "update",
        )
        result = await self._workers[work.plan.task].call(training_calls.mask, request)
        await self._inbox.put(Masked(work, result))

    async def upload(self, work: Work, update: BinaryIO, offsets: tuple[int, int]) -> None:
        """Send the masked update from where the coordinator has it to."""
        try:
            received: int | None = await self._link().upload(work.id, update, work.statistics, offsets)
        except TransferError as error:
            log.warning("upload interrupted", detail=str(error))
            received = None
            work.interrupted += 1
            await asyncio.sleep(min(UPLOAD_PAUSE_S * 2**work.interrupted, LONGEST_UPLOAD_PAUSE_S))
        await self._inbox.put(Uploaded(work, received))

    def cancel(self) -> None:
        """Stop what belongs to no session any more."""
        for task in self._discarding:
            task.cancel()

    def discard(self, work: Work) -> None:
        """Have the worker forget the session's update."""
        discarding = asyncio.get_running_loop().create_task(_discard(self._workers[work.plan.task], work.id))
        self._discarding.add(discarding)
        discarding.add_done_callback(self._discarding.discard)


async def _discard(worker: Worker, session: bytes) -> None:
    try:
        await worker.call(training_calls.discard, session)
    except (WorkerDied, WorkerFault, UserError) as error:  # a new worker may not find the site's data any more
        log.warning("worker gone", detail=str(error))
