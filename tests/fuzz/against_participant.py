"""The campaign against a real participant process: a coordinator with a good certificate that lies. Not a test itself.

What counts as failure: the process ends; a traceback or an unstructured line in its log; more memory or open files than
`MOST_MIB` and `MOST_FILES`; or it does not take part in a round any more once an honest coordinator is back.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from tests.e2e.services import Service, World
from tests.fuzz import recordings
from tests.fuzz.honest import job, site
from tests.fuzz.mutations import TEXTS, mutate_bytes, mutate_message, varint
from tests.fuzz.tally import Gauge, Tally
from tests.secagg.cohort import make_plan

from maskwork.net.identity import IdentityFiles, Role, fingerprint, load_certificate, to_der
from maskwork.net.tls import SERVER_OPTIONS, server_credentials
from maskwork.secagg import keys
from maskwork.secagg.keys import SoftwareSigner
from maskwork.secagg.messages import Proposal
from maskwork.secagg.plan import RosterEntry, session_id
from maskwork.task import TrainingConfig
from maskwork.wire import codec
from maskwork.wire.v1 import federation_pb2, session_pb2

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor

SITE: Final = "site-a"
OTHERS: Final = ("honest-b", "honest-c")
MOST_MIB: Final = 900
MOST_FILES: Final = 100
START_S: Final = 90.0
CONFIG: Final = TrainingConfig().canonical_json()

_JUNK: Final = random.Random(0).randbytes(1 << 20)

Lie = Callable[[random.Random], AsyncIterator[bytes]]


class LyingCoordinator:
    """Answers every call with a lie of the day, drawn from its seed."""

    def __init__(self, tally: Tally, world: World, seed: int) -> None:
        self.tally, self.world, self.seed = tally, world, seed
        self.connections = 0
        self.offers = 0
        self.greeted = asyncio.Event()
        self._certificate = to_der(load_certificate(world.identity(Role.COORDINATOR, "main").cert))
        key = world.identity(Role.COORDINATOR, "main").key.read_bytes()
        self._signer = SoftwareSigner(load_pem_private_key(key, None))  # type: ignore[arg-type]  # P-256 keys only
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        server = self._server = grpc.aio.server(options=(*SERVER_OPTIONS, ("grpc.max_send_message_length", -1)))
        raw = grpc.stream_stream_rpc_method_handler
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Connect": raw(self._connect),
            "Download": raw(self._download),
            "Upload": raw(self._upload),
        }
        name = "maskwork.wire.v1.FederationService"
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
        server.add_secure_port(self.world.address, server_credentials(self.world.identity(Role.COORDINATOR, "main")))
        await server.start()

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.stop(0.2)

    async def _connect(self, _: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        self.connections += 1
        rng = random.Random(f"{self.seed}:connect:{self.connections}")
        lie = rng.choice(self._lies())
        self.tally.tried(f"connect: {lie.__name__.strip('_')}", "told")
        async for message in lie(rng):
            yield message
        if rng.random() < 0.3:
            await context.abort(rng.choice((grpc.StatusCode.INTERNAL, grpc.StatusCode.OK)), rng.choice(TEXTS)[:2000])

    def _lies(self) -> tuple[Lie, ...]:
        return (
            self._junk,
            self._strange_welcome,
            self._spoilt_messages,
            self._spoilt_messages,
            self._offers,
            self._offers,
            self._offers,
            self._spoilt_offers,
            self._enormous,
            self._flood,
            *((self._silence,) if self.connections % 7 == 0 else ()),
        )

    def _welcome(self) -> bytes:
        self.greeted.set()
        return codec.encode_response(b"", codec.Welcome(1, self._certificate), 0).SerializeToString()

    async def _silence(self, _: random.Random) -> AsyncIterator[bytes]:
        await asyncio.sleep(20)  # the Welcome never comes; the site gives up after fifteen seconds
        yield self._welcome()

    async def _junk(self, rng: random.Random) -> AsyncIterator[bytes]:
        if rng.random() < 0.5:
            yield self._welcome()
        for _ in range(10):
            yield mutate_bytes(rng, self._welcome())

    async def _strange_welcome(self, rng: random.Random) -> AsyncIterator[bytes]:
        strangers = (recordings.der_certificates()[-1], recordings.der_certificates()[0], b"", b"x" * 100_000)
        certificate = rng.choice((*strangers, mutate_bytes(rng, self._certificate)))
        welcome = codec.Welcome(rng.choice((0, 1, 2, 2**32 - 1)), certificate)
        yield codec.encode_response(b"", welcome, 0).SerializeToString()
        await asyncio.sleep(0.2)

    async def _spoilt_messages(self, rng: random.Random) -> AsyncIterator[bytes]:
        yield self._welcome()
        for _ in range(200):
            message = mutate_message(rng, rng.choice(recordings.responses()))
            self.tally.tried("ConnectResponse, live", "told")
            yield message.SerializeToString()

    async def _offers(self, rng: random.Random) -> AsyncIterator[bytes]:
        """Good offers, one replacing the other, and then what does not belong to them."""
        yield self._welcome()
        for _ in range(4):
            offer, session = self._offer(rng)
            yield codec.encode_response(session, offer, 4).SerializeToString()
            await asyncio.sleep(rng.uniform(0, 0.4))
            for _ in range(5):
                message = mutate_message(rng, rng.choice(recordings.responses()))
                message.session_id = session
                self.tally.tried("ConnectResponse, in session", "told")
                yield message.SerializeToString()

    async def _spoilt_offers(self, rng: random.Random) -> AsyncIterator[bytes]:
        yield self._welcome()
        for _ in range(40):
            offer, session = self._offer(rng)
            message = mutate_message(rng, codec.encode_response(session, offer, 4))
            message.session_id = session_id(message.open_session.plan)
            self.tally.tried("offer, spoilt", "told")
            yield message.SerializeToString()

    async def _enormous(self, rng: random.Random) -> AsyncIterator[bytes]:
        """Messages of megabytes: a million empty parts, lengths that promise gigabytes, more than is received."""
        yield self._welcome()
        parts = federation_pb2.ConnectResponse(advertisements=session_pb2.Advertisements(digests=[b""] * 1_000_000))
        offer, session = self._offer(rng)
        yield codec.encode_response(session, offer, 4).SerializeToString()
        parts.session_id = session
        raw = parts.SerializeToString()
        for _ in range(5):
            self.tally.tried("enormous message", "told")
            yield rng.choice((raw, b"\x0a" + varint(2**40) + b"x" * 1000, b"\x22" + varint(9 << 20) + bytes(9 << 20)))

    async def _flood(self, rng: random.Random) -> AsyncIterator[bytes]:
        yield self._welcome()
        raw = rng.choice(recordings.responses()).SerializeToString()
        for _ in range(500):
            yield raw
        self.tally.inputs["flood of responses"] += 500

    def _offer(self, rng: random.Random) -> tuple[codec.OpenSession, bytes]:
        self.offers += 1
        names = (SITE, *OTHERS, "evil-0")
        certificates = [to_der(load_certificate(self.world.identity(Role.PARTICIPANT, n).cert)) for n in names]
        bundle = codec.encode_certificates(certificates)
        plan = make_plan(
            4,
            colluders=1,
            federation="ward",
            task="gated",
            job=f"lie-{self.seed}-{self.offers}",
            training_digest=hashlib.sha256(CONFIG).digest(),
            roster=tuple(RosterEntry(n, fingerprint(c)) for n, c in zip(names, certificates, strict=True)),
        )
        raw = codec.encode_plan(plan)
        signed = keys.signed_message("plan", session=session_id(raw), sender=keys.COORDINATOR_INDEX, fields=b"")
        size = rng.choice((100, 5000, 1 << 20, 64 << 20, 2**63))
        digest = hashlib.sha256(bundle).digest()
        return codec.OpenSession(
            Proposal(raw, self._signer.sign(signed), plan), CONFIG, size, digest, len(bundle)
        ), session_id(raw)

    async def _download(self, _: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        rng = random.Random(f"{self.seed}:download:{sum(self.tally.inputs.values())}")
        what = rng.choice(("junk", "wrong", "endless", "empty", "out of step", "stalled", "refused"))
        self.tally.tried("download", what)
        offset, many = 0, rng.choice((1, 3, 40))
        if what == "stalled":
            await asyncio.sleep(5)
        if what == "refused":
            await context.abort(grpc.StatusCode.NOT_FOUND, rng.choice(TEXTS)[:2000])
        for _ in range(10_000 if what in ("endless", "empty") else many):
            data = b"" if what == "empty" else _JUNK[: rng.choice((1, 100, 1 << 16, 1 << 20))]
            chunk = federation_pb2.DownloadResponse(offset=offset, data=data)
            if what == "out of step":
                chunk = mutate_message(rng, chunk)
            yield rng.randbytes(50) if what == "junk" else chunk.SerializeToString()
            offset += len(data)

    async def _upload(self, _: Any, __: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        self.tally.tried("upload", "answered with junk")
        yield b"\xff\xff"


async def campaign(tally: Tally, *, seconds: float, seed: int) -> None:
    """Lie for `seconds`, then let an honest coordinator run a round with the same process."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        await world.gate.open()
        try:
            await _campaign(tally, world, seconds=seconds, seed=seed)
        finally:
            await world.close()


async def _campaign(tally: Tally, world: World, *, seconds: float, seed: int) -> None:
    liar = LyingCoordinator(tally, world, seed)
    await liar.start()
    service = await world.start_site(SITE)
    async with asyncio.timeout(START_S):  # loading torch takes its time on a busy machine
        await liar.greeted.wait()
    gauge, end = Gauge(service.process.pid), time.monotonic() + seconds
    while time.monotonic() < end and service.process.returncode is None:
        await asyncio.to_thread(gauge.look)
        await asyncio.sleep(0.2)
    await liar.stop()
    tally.figures["participant"] = {**gauge.figures(), "connections": liar.connections, "offers": liar.offers}
    await _honest_again(tally, world)
    gauge.look()
    await _judge(tally, gauge, service)


async def _honest_again(tally: Tally, world: World) -> None:
    await world.start_coordinator()
    async with AsyncExitStack() as stack:
        for name in OTHERS:
            files: IdentityFiles = world.identity(Role.PARTICIPANT, name)
            await stack.enter_async_context(site(world.address, files, world.home / name))
        async with world.client() as client:
            spec = job("honest-again", participants=(SITE, *OTHERS))
            job_id = await client.submit(spec, world.model())
            try:
                async with asyncio.timeout(START_S):
                    async for event in client.watch(job_id):
                        if getattr(event, "ended", False):
                            break
            except TimeoutError:
                tally.failed("the participant took part in no round after the lies")
            details = await client.get(job_id)
    survivors = [r.survivors for r in details.rounds]
    if [set(names) for names in survivors] != [{SITE, *OTHERS}]:
        tally.failed(f"after the lies, the round's survivors are {survivors}: {details.job.reason}")
    tally.figures["participant"]["round_afterwards"] = survivors


async def _judge(tally: Tally, gauge: Gauge, service: Service) -> None:
    if service.process.returncode is not None:
        tally.failed(f"the participant ended with {service.process.returncode}")
    elif (code := await service.terminate()) != 0:
        tally.failed(f"the participant's exit code is {code}")
    if "Traceback" in service.text:
        at = service.text.index("Traceback")
        tally.failed(f"a traceback in the participant's log: {service.text[at : at + 3000]}")
    for line in service.lines:
        if "unstructured" in line:
            tally.failed(f"in the participant's log: {str(line)[:1000]}")
            break
    tally.figures["participant"]["told"] = dict(
        Counter(str(e.get("detail"))[:200] for e in service.lines).most_common(40)
    )
    tally.figures["participant"]["log_lines"] = dict(Counter(str(e["event"]) for e in service.lines))
    if gauge.peak_rss_mib > MOST_MIB:
        tally.failed(f"the participant took {gauge.peak_rss_mib:.0f} MiB, more than {MOST_MIB}")
    if gauge.most_files > MOST_FILES:
        tally.failed(f"the participant had {gauge.most_files} files open, more than {MOST_FILES}")
