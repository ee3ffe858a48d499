"""A coordinator's driver with real sites' protocol halves, all in one process and without a network; not a test itself.

Store, models and spools are real files; the worker runs what it is given at once; a site is the pure client half behind
a real `Peer`, and everything it says or hears goes through the codec.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from maskwork import job_events as events
from maskwork.coordinator import happenings
from maskwork.coordinator.board import Subscription
from maskwork.coordinator.driver import Driver
from maskwork.coordinator.job_runner import Federation
from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.peers import Peer
from maskwork.coordinator.records import JobRecord, JobState
from maskwork.coordinator.rounds import PresentSite
from maskwork.coordinator.store import Store
from maskwork.coordinator.vault import Vault
from maskwork.job import Cohort, JobSpec
from maskwork.net.authority import Authority, IssuedIdentity
from maskwork.net.identity import ParticipantVerifier, Role, fingerprint, to_der
from maskwork.net.revocation import NO_LIST, RevocationList
from maskwork.secagg import client, client_states, keys, masking
from maskwork.secagg.encoding import encode_statistics
from maskwork.secagg.keys import Segment, SoftwareSigner
from maskwork.secagg.messages import ParticipantMessage, SessionClosed
from maskwork.secagg.plan import RoundPlan
from maskwork.secagg.ring import packed_size
from maskwork.tensors import Schema, TensorSpec, read_vector, write_model_to
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession, UploadGrant, UploadReady
from maskwork.wire.v1 import federation_pb2

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE_S = 20.0
PARAMETERS = 6
EXAMPLES = 10
SITES = ("site-a", "site-b", "site-c", "site-d")
NOW = time.time()
AUTHORITY = Authority.create("ward", now=NOW)
COORDINATOR = AUTHORITY.issue(Role.COORDINATOR, "main", now=NOW, dns_names=["localhost"])
ISSUED = {name: AUTHORITY.issue(Role.PARTICIPANT, name, now=NOW) for name in SITES}


def der_of(issued: IssuedIdentity) -> bytes:
    return to_der(x509.load_pem_x509_certificate(issued.cert_pem))


def signer_of(issued: IssuedIdentity) -> SoftwareSigner:
    key = load_pem_private_key(issued.key_pem, None)
    return SoftwareSigner(key)  # type: ignore[arg-type]  # our CA issues P-256 keys only


class InlineWorker:
    """Runs a call at once, or raises what was set for the function's name, once for each time it was set."""

    def __init__(self) -> None:
        self.failures: dict[str, list[Exception]] = {}
        self.calls: list[str] = []

    async def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.calls.append(function.__name__)
        await asyncio.sleep(0)
        if self.failures.get(function.__name__):
            raise self.failures[function.__name__].pop(0)
        return function(*args, **kwargs)


class LocalSite:
    """One participant. `silent` holds the kinds of message that it withholds."""

    def __init__(self, name: str, issued: IssuedIdentity | None = None, *, tasks: Sequence[str] = ("digits",)) -> None:
        self.name = name
        self.issued = issued or ISSUED[name]
        self.der = der_of(self.issued)
        self.site = PresentSite(name, fingerprint(self.der), frozenset(tasks))
        self.heard: list[tuple[bytes, codec.Response]] = []
        self.said: list[ParticipantMessage | UploadReady] = []
        self.silent: set[type] = set()
        self.state: client_states.State | None = None
        self.shared: client_states.SharedKeys | None = None
        self.plan: RoundPlan | None = None
        self.session = b""
        self.coordinator = der_of(COORDINATOR)
        self.peer: Peer | None = None
        self._masked = (b"", b"")
        self._driver: Driver | None = None
        self._pump: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()

    async def connect(self, driver: Driver, *, active: bool = False) -> LocalSite:
        self._driver = driver
        self.peer = Peer(self.site, self.der, self.session if active else b"")
        await driver.post(happenings.PeerConnected(self.peer))
        self._pump = asyncio.create_task(self._run(self.peer))
        return self

    async def disconnect(self) -> None:
        assert self._driver is not None
        assert self.peer is not None
        assert self._pump is not None
        self._pump.cancel()
        await self._driver.post(happenings.PeerGone(self.peer))

    async def _run(self, peer: Peer) -> None:
        while (response := await peer.next_response()) is not None:
            await self._hear(federation_pb2.ConnectResponse.FromString(response.SerializeToString()))

    async def until_heard(self, kind: type, *, count: int = 1) -> codec.Response:
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(lambda: len([m for _, m in self.heard if isinstance(m, kind)]) >= count)
        return [m for _, m in self.heard if isinstance(m, kind)][count - 1]

    async def _hear(self, response: federation_pb2.ConnectResponse) -> None:
        size = 0 if self.plan is None else self.plan.cohort
        message = codec.decode_response(response, size)
        async with self._changed:
            self.heard.append((response.session_id, message))
            self._changed.notify_all()
        match message:
            case OpenSession():
                if response.session_id != self.session:
                    self.session, self.plan = response.session_id, message.proposal.plan
                    await self._perform(self._begin(message))
            case UploadGrant():
                if UploadGrant not in self.silent:
                    await self.upload((message.update_offset, message.statistics_offset))
            case codec.Welcome():  # the first is the service's; the driver says another when the certificate is renewed
                self.coordinator = message.coordinator_certificate
            case _:
                if self.state is not None and response.session_id == self.session:
                    await self.feed(message)

    def _begin(self, offer: OpenSession) -> client_states.Step:
        assert self._driver is not None
        plan = offer.proposal.plan
        bundle = self._driver.download(self.site, offer.certificates_digest)
        assert isinstance(bundle, bytes)
        certificates = codec.decode_certificates(bundle, offer.certificates_digest, plan.cohort)
        site = client_states.Site(
            name=self.name,
            fingerprint=self.site.fingerprint,
            signer=signer_of(self.issued),
            verifier=ParticipantVerifier(AUTHORITY.roots, "ward"),
            certificates=dict(enumerate(certificates)),
            coordinator_key=x509.load_der_x509_certificate(self.coordinator).public_key(),  # type: ignore[arg-type]
            model_digest=plan.model_digest,
            rules=client_states.SiteRules(
                revocation_digest=plan.revocation_digest, revocation_number=plan.revocation_number
            ),
        )
        return client.begin(offer.proposal, site=site, rand=self.name.encode().ljust(32, b"."))

    async def feed(self, event: client_states.Event) -> None:
        assert self.state is not None
        await self._perform(client.step(self.state, event, now=NOW))

    async def _perform(self, step: client_states.Step) -> None:
        self.state = step.state
        if isinstance(step.state, client_states.SharedKeys):
            self.shared = step.state
        for effect in step.effects:
            match effect:
                case client_states.Send(message):
                    await self.say(message)
                case client_states.MaskUpdate(mask_keys):
                    self._masked = self._mask(mask_keys)
                    await self.feed(client_states.UpdateMasked())
                case client_states.UploadUpdate():
                    await self.say(UploadReady())
                case _:
                    pass

    async def say(self, message: ParticipantMessage | UploadReady) -> None:
        assert self._driver is not None
        assert self.peer is not None
        if type(message) in self.silent:
            return
        self.said.append(message)
        decoded = codec.decode_request(codec.encode_request(self.session, message))
        assert not isinstance(decoded, codec.Hello)
        await self._driver.post(happenings.PeerSaid(self.peer, self.session, decoded))

    async def upload(self, offsets: tuple[int, int] = (0, 0)) -> bool:
        """Stream as the service would; False: nothing is due from this site."""
        assert self._driver is not None
        place = self._driver.spool_for(self.site, self.session)
        if place is None:
            return False
        spool, member = place
        with spool.writing() as writer:
            await self._driver.post(happenings.UploadBegan(self.session, member))
            for segment, data, offset in zip(Segment, self._masked, offsets, strict=True):
                if data[offset:]:
                    writer.write(segment, offset, data[offset:])
        await self._driver.post(happenings.UploadEnded(self.session, member))
        return True

    def _mask(self, mask_keys: masking.MaskingKeys) -> tuple[bytes, bytes]:
        assert self.plan is not None
        plan = self.plan
        packed = np.zeros(packed_size(plan.parameters, plan.encoding.ring_bits), np.uint8)
        masking.mask_update(
            update_of(self.name),
            EXAMPLES,
            encoding=plan.encoding,
            keys=mask_keys,
            rotation_seed=keys.rotation_seed(self.session),
            out_u8=packed,
        )
        values = [float(EXAMPLES), *(0.5 * EXAMPLES for _ in plan.statistics[1:])]
        specs = plan.statistics
        encoded = encode_statistics(values, [s.bound for s in specs], [s.name for s in specs])
        return packed.tobytes(), masking.mask_statistics(encoded, mask_keys.statistics)

    def closing(self) -> SessionClosed:
        """The last word that it heard."""
        message = self.heard[-1][1]
        assert isinstance(message, SessionClosed)
        return message


def update_of(name: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.full(PARAMETERS, 0.25 * (1 + SITES.index(name)), np.float32)


def mean_update(names: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    mean: np.ndarray[tuple[int], np.dtype[np.float64]] = np.mean(
        [update_of(n) for n in names], axis=0, dtype=np.float64
    )
    return mean


def spec(**changes: object) -> JobSpec:
    values: dict[str, object] = {
        "name": "job",
        "task": "digits",
        "rounds": 1,
        "metrics": {"train.loss": 10.0},
        "cohort": Cohort(min_participants=3, max_participants=4, wait_s=0),
        "encoding": {"weight_cap": EXAMPLES, "clip_norm": 5.0},
    }
    return JobSpec.model_validate({**values, **changes})


class LocalCoordinator:
    """The driver, its files, and its loop in a task."""

    def __init__(
        self,
        folder: Path,
        *,
        max_uploads: int = 8,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        worker: InlineWorker | None = None,
        vault: Vault | None = None,
        revocations: RevocationList = NO_LIST,
    ) -> None:
        self.folder = folder
        self.worker = InlineWorker() if worker is None else worker
        self.store = Store.open(f"sqlite:///{folder}/coordinator.sqlite", vault=vault)
        self.models = ModelStore(folder / "models", vault=vault)
        sessions = folder / "sessions"
        sessions.mkdir(exist_ok=True)
        self.driver = Driver(
            federation=Federation("ward", der_of(COORDINATOR), signer_of(COORDINATOR)),
            store=self.store,
            models=self.models,
            worker=self.worker,
            sessions=sessions,
            max_uploads=max_uploads,
            clock=clock,
            ticks=ticks,
            pause=pause,
            revocations=revocations,
        )
        self.loop: asyncio.Task[None] | None = None
        self.events: list[events.JobEvent] = []

    def add_job(self, job_id: str = "job-1", **changes: object) -> str:
        asked = spec(**changes)
        schema = Schema((TensorSpec("w", "F32", (PARAMETERS,)),))
        zeros = np.zeros(PARAMETERS, np.float32)
        digest = self.models.write_in_order(
            lambda file: write_model_to(file, schema, zeros, {}, named="zeros"), max_bytes=4096
        )
        self.store.add_job(
            JobRecord(
                job_id=job_id,
                name=asked.name,
                task=asked.task,
                state=JobState.QUEUED,
                rounds_total=asked.rounds,
                next_round=1,
                next_attempt=1,
                spec_json=asked.canonical_json().decode(),
                submitted_by="spiffe://ward/researcher/rosa",
                submitted_at=NOW,
                initial_model=digest,
                current_model=digest,
            )
        )
        return job_id

    def start(self) -> None:
        self.loop = asyncio.create_task(self.driver.run())

    async def until(self, wanted: Callable[[events.JobEvent], bool], job_id: str = "job-1") -> events.JobEvent:
        """Go on until such an event of the current attempt, or a later one, is posted."""
        with self.driver.board.subscribe(job_id) as subscription:
            return await self._until(subscription, wanted, job_id)

    async def _until(
        self, subscription: Subscription, wanted: Callable[[events.JobEvent], bool], job_id: str
    ) -> events.JobEvent:
        assert self.loop is not None

        async def look() -> events.JobEvent | None:
            async for event in subscription:
                self.events.append(event)
                if wanted(event):
                    return event
            return None

        looking = asyncio.create_task(look())
        await asyncio.wait({looking, self.loop}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        looking.cancel()
        if self.loop.done():
            self.loop.result()
        found = looking.result() if looking.done() else None
        assert found is not None, f"no such event; the job: {self.store.job(job_id)}"
        return found

    async def until_stage(self, stage: str) -> None:
        await self.until(lambda e: isinstance(e, events.StageOpened) and e.stage == stage)

    async def until_ended(self, job_id: str = "job-1") -> JobRecord:
        """Go on until the job has ended."""
        with self.driver.board.subscribe(job_id) as subscription:
            if self.record(job_id).state in (JobState.QUEUED, JobState.RUNNING):
                await self._until(subscription, lambda e: isinstance(e, events.JobSummary) and e.ended, job_id)
        return self.record(job_id)

    async def settled(self) -> None:
        """Everything that is queued has been handled."""
        done: asyncio.Future[JobRecord | None] = asyncio.get_running_loop().create_future()
        await self.driver.post(happenings.JobAborted("no such job", "nobody", done))
        async with asyncio.timeout(PATIENCE_S):
            await done

    def record(self, job_id: str = "job-1") -> JobRecord:
        record = self.store.job(job_id)
        assert record is not None
        return record

    async def crash(self) -> None:
        """What SIGKILL leaves: no word to anybody, the files as they are."""
        if self.loop is not None:
            self.loop.cancel()
            await asyncio.wait({self.loop})
        self.driver.hang_up()
        await asyncio.sleep(0)
        self.store.close()


@asynccontextmanager
async def federation(
    folder: Path,
    names: Sequence[str] = SITES,
    *,
    max_uploads: int = 8,
    clock: Callable[[], float] = time.time,
    ticks: Callable[[], float] = time.monotonic,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    worker: InlineWorker | None = None,
    vault: Vault | None = None,
) -> AsyncIterator[tuple[LocalCoordinator, dict[str, LocalSite]]]:
    """A running coordinator, and sites that are not connected yet."""
    coordinator = LocalCoordinator(
        folder, max_uploads=max_uploads, clock=clock, ticks=ticks, pause=pause, worker=worker, vault=vault
    )
    coordinator.start()
    try:
        yield coordinator, {name: LocalSite(name) for name in names}
    finally:
        await coordinator.crash()


FOUR = Cohort(participants=SITES, min_participants=3, max_participants=4, wait_s=60)


async def connect_all(coordinator: LocalCoordinator, sites: dict[str, LocalSite]) -> None:
    for site in sites.values():
        await site.connect(coordinator.driver)


def model_of(coordinator: LocalCoordinator, digest: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    vector: np.ndarray[tuple[int], np.dtype[np.float32]] = read_vector(coordinator.models.file(digest))[1]
    return vector


def answered(event: events.JobEvent, stage: str, participant: str) -> bool:
    return isinstance(event, events.Answered) and (event.stage, event.participant) == (stage, participant)
