"""A coordinator that lies: a good certificate, production's protocol half, and a test between it and the sites.

The sites are production's own participants over mutual TLS (`tests.fuzz.honest`). What the core wants sent goes through
`alter` first; a test may also say anything to anybody, at any time. It keeps what it hears, for later use against them.

Nothing here sleeps: `until` waits for what a test needs, at most `PATIENCE_S`, and `settled` for a site to have dealt
with everything that was said to it. Not a test itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from tests.e2e.services import World
from tests.fuzz.honest import EXAMPLES, AddsAConstant, Attached, attached
from tests.secagg.cohort import PARAMETERS, make_plan

from maskwork.net.diagnosis import load_private_key
from maskwork.net.identity import IdentityFiles, Role, fingerprint, load_certificate, to_der
from maskwork.net.tls import SERVER_OPTIONS, peer_identity, server_credentials
from maskwork.participant.policy import Policy
from maskwork.secagg import keys, masking, server
from maskwork.secagg import server_states as core
from maskwork.secagg.encoding import Encoding, Rotation, decode_statistics, decode_sum
from maskwork.secagg.errors import AbortReason, DealerEquivocated, DeclineCode, DropReason
from maskwork.secagg.keys import SIGNATURE_BYTES, SoftwareSigner
from maskwork.secagg.messages import Decline, Proposal, RevealedShare, Unmask, Withdraw
from maskwork.secagg.plan import RosterEntry, RoundPlan, StatisticSpec, session_id
from maskwork.secagg.ring import packed_size
from maskwork.secagg.unmasking import remaining_masks
from maskwork.task import TrainingConfig
from maskwork.tensors import Schema, TensorSpec, write_model
from maskwork.wire import codec
from maskwork.wire.codec import OpenSession, Request, Response, UploadGrant, UploadReady
from maskwork.wire.v1 import federation_pb2

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor

PATIENCE_S: Final = 20.0
SITES: Final = ("site-a", "site-b", "site-c", "site-d")
STEPS: Final[Mapping[str, float]] = {name: 0.01 * (1 + at) for at, name in enumerate(SITES)}
"""What each site adds to every parameter: small enough that nothing is clipped."""
CONFIG: Final = TrainingConfig().canonical_json()

Alter = Callable[[str, Response], Sequence[Response | bytes]]
"""What is said to a site instead of a message: messages, or the bytes of what is none."""
M = TypeVar("M")


def as_it_is(_name: str, message: Response) -> Sequence[Response | bytes]:
    """No lie at all."""
    return (message,)


@dataclass
class Liar:
    """The server: who is connected, what was heard, and the files that it hands out."""

    world: World
    heard: dict[str, list[tuple[bytes, Request]]] = field(default_factory=lambda: defaultdict(list))
    uploads: dict[tuple[bytes, str], list[bytes]] = field(default_factory=lambda: defaultdict(list))
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    sessions: dict[bytes, Session] = field(default_factory=dict)
    cut_uploads_at: int | None = None
    connections: int = 0
    _outboxes: dict[str, asyncio.Queue[bytes | None]] = field(default_factory=dict)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _probes: int = 0

    # --- the service ------------------------------------------------------------------------------------------------

    def handlers(self) -> grpc.GenericRpcHandler:
        raw = grpc.stream_stream_rpc_method_handler
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Connect": raw(self._connect),
            "Download": raw(self._download),
            "Upload": raw(self._upload),
        }
        return grpc.method_handlers_generic_handler("maskwork.wire.v1.FederationService", methods)

    async def _connect(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self.connections += 1
        name, outbox = self._caller(context), asyncio.Queue[bytes | None]()
        welcome = codec.Welcome(1, to_der(load_certificate(self.identity.cert)))
        yield codec.encode_response(b"", welcome, 0).SerializeToString()
        reader = asyncio.create_task(self._read(name, requests))
        self._outboxes[name] = outbox
        await self._notify()
        try:
            while (message := await outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()
            if self._outboxes.get(name) is outbox:
                del self._outboxes[name]
            await self._notify()

    async def _read(self, name: str, requests: AsyncIterator[bytes]) -> None:
        async for raw in requests:
            request = federation_pb2.ConnectRequest.FromString(raw)
            message = codec.decode_request(request)
            self.heard[name].append((request.session_id, message))
            session = self.sessions.get(request.session_id)
            if session is not None:
                session.heard(name, message)
            await self._notify()

    async def _download(self, requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
        request = federation_pb2.DownloadRequest.FromString(await anext(requests))
        data = self.blobs[request.digest][request.offset :]
        yield federation_pb2.DownloadResponse(offset=request.offset, data=data).SerializeToString()

    async def _upload(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        name, data, session = self._caller(context), b"", b""
        async for raw in requests:
            chunk = federation_pb2.UploadRequest.FromString(raw)
            session, data = chunk.session_id, data + chunk.data
        self.uploads[session, name].append(data)
        cut, self.cut_uploads_at = self.cut_uploads_at, None
        await self._notify()
        if cut is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
        if session in self.sessions:
            self.sessions[session].uploaded(name, data)
            await self._notify()
        yield federation_pb2.UploadResponse(received=len(data)).SerializeToString()

    def _caller(self, context: Any) -> str:
        return peer_identity(context, self.world.authority.roots, now=time.time(), federation="ward").name

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # --- what a test does -------------------------------------------------------------------------------------------

    @property
    def identity(self) -> IdentityFiles:
        return self.world.identity(Role.COORDINATOR, "main")

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Wait for something to have been heard."""
        try:
            async with asyncio.timeout(PATIENCE_S), self._changed:
                await self._changed.wait_for(wanted)
        except TimeoutError:
            heard = {name: [type(m).__name__ for _, m in said] for name, said in self.heard.items()}
            raise AssertionError(f"it did not happen; heard: {heard}") from None

    async def connected(self, *names: str) -> None:
        await self.until(lambda: set(names) <= self._outboxes.keys())

    def say(self, name: str, session: bytes, message: Response, *, cohort: int = len(SITES)) -> None:
        """Say something to one site."""
        self.say_raw(name, codec.encode_response(session, message, cohort).SerializeToString())

    def say_raw(self, name: str, message: bytes) -> None:
        """The same, in bytes of the test's own."""
        if name in self._outboxes:
            self._outboxes[name].put_nowait(message)

    def hang_up(self, name: str) -> None:
        """End a site's control stream; it dials anew."""
        self._outboxes.pop(name).put_nowait(None)

    def answers(self, name: str, session: bytes, kind: type[M]) -> list[M]:
        """What a site said in a session, of one kind."""
        return [m for s, m in self.heard[name] if s == session and isinstance(m, kind)]

    async def answer(self, name: str, session: bytes, kind: type[M], *, count: int = 1) -> M:
        """The `count`th answer of a kind, once it is there."""
        await self.until(lambda: len(self.answers(name, session, kind)) >= count)
        return self.answers(name, session, kind)[count - 1]

    async def settled(self, *names: str) -> None:
        """Every site has dealt with all that was said to it: it has answered an offer that nobody signed, said last."""
        for name in names:
            self._probes += 1
            plan = self.plan(SITES, job=f"probe-{self._probes}")
            raw = codec.encode_plan(plan)
            probe = OpenSession(Proposal(raw, bytes(SIGNATURE_BYTES), plan), CONFIG, 1, bytes(32), 1)
            self.say(name, session_id(raw), probe)
            assert await self.answer(name, session_id(raw), Decline) == Decline(
                DeclineCode.BAD_PLAN, "the plan's signature is not the coordinator's"
            )

    def left_because(self, name: str, session: bytes) -> list[AbortReason]:
        """Why a site left a session: at most one reason."""
        return [w.reason for w in self.answers(name, session, Withdraw)]

    async def leaves(self, name: str, session: bytes, reason: AbortReason) -> None:
        """A site leaves a session, for this reason; what it said there stays said, and nothing follows."""
        await self.answer(name, session, Withdraw)
        assert self.left_because(name, session) == [reason]
        assert isinstance([m for s, m in self.heard[name] if s == session][-1], Withdraw)

    async def declines(self, name: str, offer: OpenSession, code: DeclineCode, detail: str = "") -> None:
        """Offer a session to a site, which does not take part, for this reason."""
        session = session_id(offer.proposal.plan_bytes)
        self.say(name, session, offer)
        said = await self.answer(name, session, Decline)
        assert said.code is code, said
        assert detail in said.detail
        await self.settled(name)
        assert [m for s, m in self.heard[name] if s == session] == [said], "and not a byte more"

    def revealed(self, name: str, session: bytes) -> list[RevealedShare]:
        """Every share that a site gave away in a session."""
        return [share for m in self.answers(name, session, Unmask) for share in m.shares]

    # --- plans ------------------------------------------------------------------------------------------------------

    def coordinator_key(self) -> ec.EllipticCurvePrivateKey:
        return load_private_key(self.identity.key)

    def signer(self, name: str) -> SoftwareSigner:
        """What a member that colludes signs with."""
        return SoftwareSigner(load_private_key(self.world.identity(Role.PARTICIPANT, name).key))

    def certificate(self, name: str) -> bytes:
        return to_der(load_certificate(self.world.identity(Role.PARTICIPANT, name).cert))

    def model(self, value: float) -> bytes:
        """The digest of a model that is handed out from now on."""
        path = self.world.home / "model.safetensors"
        weights = np.full(PARAMETERS, value, np.float32)
        write_model(path, Schema((TensorSpec("weight", "F32", (PARAMETERS,)),)), weights, {})
        return self.hand_out(path.read_bytes())

    def hand_out(self, data: bytes) -> bytes:
        digest = hashlib.sha256(data).digest()
        self.blobs[digest] = data
        return digest

    def plan(self, names: Sequence[str], **changes: Any) -> RoundPlan:
        """A plan that a site with the default policy accepts."""
        certificates = [self.certificate(n) for n in names]
        values: dict[str, Any] = {
            "federation": "ward",
            "task": "gated",
            "colluders": 1 if len(names) > 3 else 0,
            "nonce": os.urandom(16),
            "training_digest": hashlib.sha256(CONFIG).digest(),
            "roster": tuple(RosterEntry(n, fingerprint(c)) for n, c in zip(names, certificates, strict=True)),
            "encoding": Encoding(1.0, EXAMPLES, 16, 20, Rotation.NONE),
            "statistics": (StatisticSpec("examples", EXAMPLES), StatisticSpec("train.loss", 1_000.0)),
        }
        if "model_digest" not in changes:
            values["model_digest"] = self.model(0.0)
        return make_plan(len(names), **{**values, **changes})

    def offer(self, plan: RoundPlan, *, certificates: Sequence[bytes] | None = None) -> OpenSession:
        """The plan, signed and with everything that belongs to it."""
        return self.offer_bytes(codec.encode_plan(plan), plan, certificates=certificates)

    def offer_bytes(
        self, plan_bytes: bytes, plan: RoundPlan, *, certificates: Sequence[bytes] | None = None
    ) -> OpenSession:
        """The same for bytes that need not be a plan's."""
        bundle = codec.encode_certificates(certificates or [self.certificate(e.participant) for e in plan.roster])
        signed = keys.signed_message("plan", session=session_id(plan_bytes), sender=keys.COORDINATOR_INDEX, fields=b"")
        signature = SoftwareSigner(self.coordinator_key()).sign(signed)
        size = len(self.blobs.get(plan.model_digest, b"x"))
        digest = self.hand_out(bundle)
        return OpenSession(Proposal(plan_bytes, signature, plan), CONFIG, size, digest, len(bundle))

    def open(self, plan: RoundPlan, alter: Alter = as_it_is, **changes: Any) -> Session:
        """Begin a session, as the production core does, with `alter` between it and the sites."""
        session = Session(self, self.offer(plan, **changes), alter)
        self.sessions[session.id] = session
        session.begin()
        return session

    async def run(self, plan: RoundPlan, alter: Alter = as_it_is, **changes: Any) -> Session:
        """A session to its end: the sum, or an abort."""
        session = self.open(plan, alter, **changes)
        await session.ends()
        return session


class Session:
    """One session: the core's state, the sum, and everything the core wanted to be done."""

    def __init__(self, liar: Liar, offer: OpenSession, alter: Alter) -> None:
        self.liar, self.offer, self.alter = liar, offer, alter
        self.plan = offer.proposal.plan
        self.id = session_id(offer.proposal.plan_bytes)
        self.names = self.plan.participants(frozenset(range(self.plan.cohort)))
        self.state: core.State | None = None
        self.effects: list[core.Effect] = []
        self._uploads: dict[int, bytes] = {}
        self.update = np.zeros(self.plan.parameters, np.uint32)
        self.statistics = np.zeros(len(self.plan.statistics), np.uint64)
        self.mean: np.ndarray[tuple[int], np.dtype[np.float32]] | None = None

    def begin(self) -> None:
        certificates = [x509.load_der_x509_certificate(self.liar.certificate(n)) for n in self.names]
        signing_keys: Any = tuple(c.public_key() for c in certificates)
        self._take(server.begin(self.offer.proposal, signing_keys))

    def tell(self, event: core.Event) -> None:
        """Feed the core an event."""
        assert self.state is not None
        self._take(server.step(self.state, event))

    def heard(self, name: str, message: Request) -> None:
        member = self.names.index(name)
        if isinstance(message, UploadReady):
            self.liar.say(name, self.id, UploadGrant(0, 0), cohort=self.plan.cohort)
        elif not isinstance(message, codec.Hello):
            self.tell(core.Received(member, message))

    def uploaded(self, name: str, data: bytes) -> None:
        self._uploads[self.names.index(name)] = data
        self.tell(core.UploadCompleted(self.names.index(name)))

    def _take(self, step: core.Step) -> None:
        self.state = step.state
        self.effects.extend(step.effects)
        for effect in step.effects:
            match effect:
                case core.SendTo(recipient, message):
                    self._send(self.names[recipient], message)
                case core.AddUpdate(member):
                    self._add(self._uploads[member])
                case core.RemoveMasks(job):
                    self._remove_masks(job)
                case _:
                    pass

    def _send(self, name: str, message: Any) -> None:
        response: Response = self.offer if isinstance(message, Proposal) else message
        for said in self.alter(name, response):
            if isinstance(said, bytes):
                self.liar.say_raw(name, said)
            else:
                self.liar.say(name, self.id, said, cohort=self.plan.cohort)

    def _add(self, data: bytes) -> None:
        size = packed_size(self.plan.parameters, self.plan.encoding.ring_bits)
        masking.accumulate(self.update, np.frombuffer(data[:size], np.uint8), self.plan.encoding.ring_bits)
        masking.accumulate_statistics(self.statistics, data[size:])

    def _remove_masks(self, job: Any) -> None:
        try:
            masks = remaining_masks(job)
        except DealerEquivocated as error:
            self.tell(core.DealerConvicted(error.dealer, str(error)))
            return
        masking.remove_masks(self.update, masks.update)
        masking.remove_statistics_masks(self.statistics, masks.statistics)
        self.mean = np.zeros(self.plan.parameters, np.float32)
        weight = round(decode_statistics(self.statistics)[0])
        seed = keys.rotation_seed(self.id)
        decode_sum(self.update, self.plan.encoding, rotation_seed=seed, total_weight=weight, out_f32=self.mean)
        self.tell(core.MasksRemoved())

    async def until(self, *kinds: type) -> None:
        """The core has come to a state of one of these kinds."""
        await self.liar.until(lambda: isinstance(self.state, kinds))

    async def ends(self) -> None:
        """The sum is there, or there will be none."""
        await self.until(core.Completed, core.Aborted)
        await self.liar.settled(*(n for n in self.names if n in self.liar._outboxes))

    async def all_leave(self, reason: AbortReason) -> None:
        """Every site leaves this session for this reason, before a share is revealed."""
        for name in self.names:
            await self.liar.leaves(name, self.id, reason)
            assert not self.liar.revealed(name, self.id)

    def lose(self, name: str) -> None:
        """A member is not there any more, or is said not to be."""
        lost = core.Lost(self.index(name), DropReason.DISCONNECTED, "gone")
        self.tell(core.Disconnected(lost.sender))
        self.tell(lost)

    def index(self, name: str) -> int:
        return self.names.index(name)


def changed(kind: type[M], change: Callable[[str, M], Response | bytes | None]) -> Alter:
    """A lie about every message of one kind; None: it is not sent."""

    def alter(name: str, message: Response) -> Sequence[Response | bytes]:
        if not isinstance(message, kind):
            return (message,)
        said = change(name, message)
        return () if said is None else (said,)

    return alter


@asynccontextmanager
async def listening(home: Path, *, serve_as: IdentityFiles | None = None) -> AsyncIterator[Liar]:
    """The liar, on loopback. `serve_as`: what it shows in the handshake, if not the coordinator's certificate."""
    liar = Liar(World(home))
    server_ = grpc.aio.server(options=SERVER_OPTIONS)
    server_.add_generic_rpc_handlers([liar.handlers()])
    server_.add_secure_port(liar.world.address, server_credentials(serve_as or liar.identity))
    await server_.start()
    try:
        yield liar
    finally:
        for outbox in list(liar._outboxes.values()):
            outbox.put_nowait(None)
        await server_.stop(0)


@asynccontextmanager
async def site(liar: Liar, name: str, *, policy: Policy | None = None) -> AsyncIterator[Attached]:
    """One of the honest, connected; the same again has the same memory."""
    files = liar.world.identity(Role.PARTICIPANT, name)
    worker = AddsAConstant(STEPS.get(name, 0.01))
    async with attached(liar.world.address, files, liar.world.home / name, policy=policy, worker=worker) as running:
        await liar.connected(name)
        yield running
    await liar.until(lambda: name not in liar._outboxes)


@asynccontextmanager
async def against(home: Path, *, names: Sequence[str] = SITES) -> AsyncIterator[tuple[Liar, dict[str, Attached]]]:
    """The liar and some honest sites."""
    async with listening(home) as liar, AsyncExitStack() as stack:
        yield liar, {name: await stack.enter_async_context(site(liar, name)) for name in names}
