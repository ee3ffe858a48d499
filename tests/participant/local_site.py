"""A participant's driver against a coordinator's protocol half in process; not a test itself.

The ledger is a real one; the link and the worker are fakes of their ports. The other two members of the cohort are the
pure client half. Everything that goes over the link goes through the codec.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from tests.secagg.cohort import make_plan

from maskwork.net.authority import Authority, IssuedIdentity
from maskwork.net.identity import ParticipantVerifier, Role, fingerprint, to_der
from maskwork.participant.audit import SiteTrail
from maskwork.participant.client import LinkDown, LinkUp, Said, TransferError
from maskwork.participant.config import TaskConfig
from maskwork.participant.driver import Driver
from maskwork.participant.ledger import Ledger
from maskwork.participant.policy import Policy
from maskwork.participant.room import Pause
from maskwork.participant.training_calls import MaskRequest, MaskResult, TrainRequest, TrainSummary
from maskwork.participant.work import SiteIdentity
from maskwork.secagg import client, client_states, keys, masking, server
from maskwork.secagg import server_states as core
from maskwork.secagg.encoding import encode_statistics
from maskwork.secagg.keys import SoftwareSigner
from maskwork.secagg.messages import CoordinatorMessage, Proposal, SessionClosed
from maskwork.secagg.plan import RosterEntry, RoundPlan, session_id
from maskwork.secagg.ring import packed_size
from maskwork.task import TrainingConfig
from maskwork.tensors import Schema, TensorSpec, write_model
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession, UploadGrant, UploadReady
from maskwork.wire.v1 import federation_pb2

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE_S = 20.0
NOW = time.time()
NAMES = ("site-a", "site-b", "site-c", "site-d")
OWN = 1
AUTHORITY = Authority.create("test", now=NOW)
ISSUED = [AUTHORITY.issue(Role.PARTICIPANT, name, now=NOW) for name in NAMES]
COORDINATOR = AUTHORITY.issue(Role.COORDINATOR, "main", now=NOW, dns_names=["localhost"])
CONFIG = TrainingConfig().canonical_json()


def der_of(issued: IssuedIdentity) -> bytes:
    return to_der(x509.load_pem_x509_certificate(issued.cert_pem))


def signer_of(issued: IssuedIdentity) -> SoftwareSigner:
    return SoftwareSigner(load_pem_private_key(issued.key_pem, None))  # type: ignore[arg-type]  # P-256 keys only


CERTIFICATES = tuple(der_of(issued) for issued in ISSUED)


class FakeWorker:
    """Runs the calls of a training worker in the loop. `held` calls wait for `go`; `failures` are raised once each."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.held: set[str] = set()
        self.go = asyncio.Event()
        self.failures: dict[str, Exception] = {}
        self.cancelled: list[str] = []
        self.kept: set[bytes] = set()
        self.requests: list[MaskRequest] = []
        self.closed = False

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        self.closed = True

    async def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        name = function.__name__
        self.calls.append(name)
        if name in self.held:
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.cancelled.append(name)
                self.kept.clear()  # as a worker that is ended does
                raise
        if name in self.failures:
            raise self.failures.pop(name)
        (argument,) = args
        done = {"train": self._train, "mask": self._mask, "discard": self._discard}[name]
        return done(argument)  # type: ignore[operator, no-any-return]

    def _train(self, request: TrainRequest) -> TrainSummary:
        assert request.model_path.is_file()
        self.kept.add(request.session_id)
        return TrainSummary(10, {"loss": 0.5}, 0, {}, 1.0, 0.1)

    def _mask(self, request: MaskRequest) -> MaskResult:
        assert request.session_id in self.kept
        self.requests.append(request)
        packed, statistics = masked(request.keys, request.session_id, make_plan(4))
        request.output.write_bytes(packed)
        return MaskResult(len(packed), statistics, 0)

    def _discard(self, session: bytes) -> None:
        self.kept.discard(session)


def masked(mask_keys: masking.MaskingKeys, session: bytes, plan: RoundPlan) -> tuple[bytes, bytes]:
    packed = np.zeros(packed_size(plan.parameters, plan.encoding.ring_bits), np.uint8)
    masking.mask_update(
        np.full(plan.parameters, 0.01, np.float32),
        10,
        encoding=plan.encoding,
        keys=mask_keys,
        rotation_seed=keys.rotation_seed(session),
        out_u8=packed,
    )
    encoded = encode_statistics([10.0, 5.0], [s.bound for s in plan.statistics], [s.name for s in plan.statistics])
    return packed.tobytes(), masking.mask_statistics(encoded, mask_keys.statistics)


class FakeLink:
    """The coordinator's end of the link. What is sent while it is down is lost, as it is on the real one."""

    def __init__(self) -> None:
        self.up = True
        self.sent: list[tuple[bytes, codec.Request]] = []
        self.blobs: dict[bytes, bytes] = {}
        self.broken_downloads = 0
        self.uploads: list[tuple[tuple[int, int], bytes]] = []
        self.breaks_after: list[int] = []
        self.held_downloads = False
        self.go = asyncio.Event()
        self.redials = 0
        self.redialled = asyncio.Event()

    def redial(self) -> None:
        self.redials += 1
        self.redialled.set()

    def send(self, session: bytes, message: codec.Request) -> None:
        if self.up:
            request = codec.encode_request(session, message)
            read = codec.decode_request(federation_pb2.ConnectRequest.FromString(request.SerializeToString()))
            self.sent.append((session, read))

    async def download(self, digest: bytes, size: int, path: Path) -> bytes:
        if self.held_downloads:
            await self.go.wait()
        if not self.up:
            raise TransferError("not connected")
        if self.broken_downloads:
            self.broken_downloads -= 1
            raise TransferError("a download broke")
        if digest not in self.blobs:
            raise TransferError("nothing of that digest")
        path.write_bytes(self.blobs[digest])
        return hashlib.sha256(self.blobs[digest]).digest()

    async def upload(self, session: bytes, update: BinaryIO, statistics: bytes, offsets: tuple[int, int]) -> int:
        whole = update.read()
        update.seek(0)
        data = whole[offsets[0] :] + statistics[offsets[1] :]
        self.uploads.append((offsets, data))
        if self.breaks_after:
            self.uploads[-1] = (offsets, data[: self.breaks_after.pop(0)])
            raise TransferError("an upload broke")
        return len(whole) + len(statistics)


class Table:
    """One participant under test, at roster index `OWN`, and everybody else played by the pure halves."""

    def __init__(
        self,
        folder: Path,
        policy: Policy | None = None,
        *,
        pause: Pause = asyncio.sleep,
        clock: Callable[[], float] = lambda: NOW,
        audit: SiteTrail | None = None,
    ) -> None:
        self.folder = folder
        self.worker = FakeWorker()
        self.link = FakeLink()
        folder.mkdir(exist_ok=True)
        self.ledger = Ledger.open(folder / "state")
        own = ISSUED[OWN]
        self.driver = Driver(
            identity=SiteIdentity(
                "test",
                NAMES[OWN],
                fingerprint(CERTIFICATES[OWN]),
                signer_of(own),
                ParticipantVerifier(AUTHORITY.roots, "test"),
            ),
            ledger=self.ledger,
            policy=policy or Policy(min_weight_cap=1),
            tasks={"digits": TaskConfig(use="m:T")},
            seed=1,
            scratch=folder / "scratch",
            make_worker=lambda _name, _task: self.worker,
            clock=clock,
            entropy=lambda length: hashlib.shake_256(b"entropy").digest(length),
            pause=pause,
            audit=audit,
        )
        self.driver.link = self.link
        model = folder / "model.safetensors"
        write_model(model, Schema((TensorSpec("w", "F32", (40,)),)), np.zeros(40, np.float32), {})
        self.model = model.read_bytes()
        self.loop: asyncio.Task[None] | None = None
        self.others: dict[int, client_states.State] = {}
        self.state: core.State | None = None
        self.heard = 0

    async def start(self) -> Table:
        await self.driver.prepare()
        self.loop = asyncio.create_task(self.driver.run())
        await self.connect()
        return self

    async def connect(self) -> None:
        coordinator = AUTHORITY.roots.verify(der_of(COORDINATOR), now=NOW, role=Role.COORDINATOR)
        self.link.up = True
        await self.driver.inbox.put(LinkUp(coordinator))
        await self.settle()

    async def disconnect(self) -> None:
        self.link.up = False
        await self.driver.inbox.put(LinkDown())
        await self.settle()

    async def close(self) -> None:
        if self.loop is not None:
            self.loop.cancel()
            await asyncio.wait({self.loop})
        await self.driver.close()
        self.ledger.close()

    async def settle(self) -> None:
        """Until nothing moves any more that does not wait for us."""
        for _ in range(60):
            await asyncio.sleep(0)
        if self.loop is not None and self.loop.done():
            self.loop.result()

    # --- the coordinator --------------------------------------------------------------------------------------------

    def offer(self, **changes: object) -> OpenSession:
        self.link.blobs[hashlib.sha256(self.model).digest()] = self.model
        bundle = codec.encode_certificates(CERTIFICATES)
        self.link.blobs[hashlib.sha256(bundle).digest()] = bundle
        plan = make_plan(
            4,
            **{
                "colluders": 1,
                "model_digest": hashlib.sha256(self.model).digest(),
                "training_digest": hashlib.sha256(CONFIG).digest(),
                "roster": tuple(RosterEntry(n, fingerprint(c)) for n, c in zip(NAMES, CERTIFICATES, strict=True)),
                **changes,
            },
        )
        plan_bytes = codec.encode_plan(plan)
        signed = keys.signed_message("plan", session=session_id(plan_bytes), sender=keys.COORDINATOR_INDEX, fields=b"")
        proposal = Proposal(plan_bytes, signer_of(COORDINATOR).sign(signed), plan)
        return OpenSession(proposal, CONFIG, len(self.model), hashlib.sha256(bundle).digest(), len(bundle))

    async def say(self, session: bytes, message: codec.Response, size: int = 4) -> None:
        response = codec.encode_response(session, message, size)
        await self.driver.inbox.put(Said(federation_pb2.ConnectResponse.FromString(response.SerializeToString())))
        await self.settle()

    async def propose(self, offer: OpenSession) -> bytes:
        session = session_id(offer.proposal.plan_bytes)
        await self.say(session, offer)
        return session

    def answers(self, session: bytes, kind: type[R]) -> list[R]:
        return [m for s, m in self.link.sent if s == session and isinstance(m, kind)]

    async def play(self, offer: OpenSession, *, until: type = core.Completed) -> bytes:
        """Run a session to the end, or until the coordinator is in a state of that kind."""
        session = await self.propose(offer)
        public = [x509.load_der_x509_certificate(c).public_key() for c in CERTIFICATES]
        self.heard = 0
        self.others = {}
        await self._coordinate(server.begin(offer.proposal, tuple(public)), until)  # type: ignore[arg-type]
        while not isinstance(self.state, until | core.Aborted):
            await self._listen(session, until)
        return session

    async def _listen(self, session: bytes, until: type) -> None:
        await self.settle()
        fresh = [m for s, m in self.link.sent if s == session][self.heard :]
        assert fresh, f"the participant says nothing in {type(self.state).__name__}"
        for message in fresh:
            self.heard += 1
            if isinstance(message, UploadReady):
                before = len(self.link.uploads)
                await self.say(session, UploadGrant(0, 0))
                if len(self.link.uploads) > before:
                    await self._tell(core.UploadCompleted(OWN), until)
            elif not isinstance(message, codec.Hello):
                await self._tell(core.Received(OWN, message), until)

    async def _tell(self, event: core.Event, until: type) -> None:
        assert self.state is not None
        if not isinstance(self.state, until):
            await self._coordinate(server.step(self.state, event), until)

    async def _coordinate(self, step: core.Step, until: type) -> None:
        self.state = step.state
        if isinstance(step.state, until) and until is not core.Completed:
            return
        for effect in step.effects:
            match effect:
                case core.SendTo(recipient, message):
                    await self._deliver(step.state.session.id, recipient, message, until)
                case core.RemoveMasks():
                    await self._coordinate(server.step(self.state, core.MasksRemoved()), until)
                case _:
                    pass

    async def _deliver(self, session: bytes, recipient: int, message: CoordinatorMessage, until: type) -> None:
        if recipient == OWN:
            if not isinstance(message, Proposal):  # that one has gone out with its envelope
                await self.say(session, message)
            return
        if isinstance(message, Proposal):
            step = client.begin(message, site=self._site(recipient), rand=bytes([recipient]) * 32)
        elif isinstance(message, SessionClosed):
            return
        else:
            step = client.step(self.others[recipient], message, now=NOW)
        await self._other(recipient, step, until)

    async def _other(self, index: int, step: client_states.Step, until: type) -> None:
        self.others[index] = step.state
        for effect in step.effects:
            match effect:
                case client_states.Send(message):
                    await self._tell(core.Received(index, message), until)
                case client_states.MaskUpdate():
                    await self._other(index, client.step(step.state, client_states.UpdateMasked(), now=NOW), until)
                case client_states.UploadUpdate():
                    await self._tell(core.UploadCompleted(index), until)
                case _:
                    pass

    def _site(self, index: int) -> client_states.Site:
        return client_states.Site(
            name=NAMES[index],
            fingerprint=fingerprint(CERTIFICATES[index]),
            signer=signer_of(ISSUED[index]),
            verifier=ParticipantVerifier(AUTHORITY.roots, "test"),
            certificates=dict(enumerate(CERTIFICATES)),
            coordinator_key=x509.load_der_x509_certificate(der_of(COORDINATOR)).public_key(),  # type: ignore[arg-type]
            model_digest=hashlib.sha256(self.model).digest(),
            rules=client_states.SiteRules(),
        )
