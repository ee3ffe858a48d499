"""Hostile callers of a real coordinator: good certificates, and everything else is not. Not a test itself.

Each attack is a coroutine that makes one attempt and says to the tally what the coordinator answered. An answer that is
not among `EXPECTED`, or that tells more than a short phrase, is a failure of the campaign.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.coordinator.local_federation import spec
from tests.e2e.services import World
from tests.fuzz import recordings
from tests.fuzz.mutations import MOST_BYTES, mutate_bytes, mutate_json, mutate_message, varint
from tests.fuzz.tally import Tally

from maskwork.net.identity import Role
from maskwork.net.permissions import PERMISSIONS
from maskwork.net.tls import CHANNEL_OPTIONS, channel_credentials
from maskwork.wire import codec
from maskwork.wire.v1 import federation_pb2, jobs_pb2

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor

FEDERATION = "/maskwork.wire.v1.FederationService/"
JOBS = "/maskwork.wire.v1.JobService/"
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAVAILABLE,
}
LONGEST_PHRASE = 1000
PATIENCE_S = 30.0
NO_WINDOW = (*CHANNEL_OPTIONS, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))
"""Options of a reader that wants its messages to pile up at the other side."""


@dataclass
class Arena:
    """What the attackers know: the coordinator, their own certificates, and what they overheard."""

    world: World
    tally: Tally
    job_ids: list[str] = field(default_factory=list)
    overheard: list[federation_pb2.ConnectRequest] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    @asynccontextmanager
    async def channel(
        self, role: Role, name: str, options: Sequence[tuple[str, int]] = CHANNEL_OPTIONS
    ) -> AsyncIterator[grpc.aio.Channel]:
        credentials = channel_credentials(self.world.identity(role, name))
        # A pool of its own: two channels with equal arguments would share one connection.
        alone = (*options, ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.secure_channel(self.world.address, credentials, options=alone) as channel:
            yield channel

    def answered(self, target: str, code: grpc.StatusCode, details: str | None) -> None:
        """Count an answer, and look whether it is one that a caller may get."""
        said = details or ""
        if was_reset(code, said):
            self.tally.tried(target, "reset")
            return
        self.tally.tried(target, code.name)
        if code not in EXPECTED:
            self.tally.failed(f"{target}: {code.name}: {said[:300]}")
        if len(said) > LONGEST_PHRASE or "Traceback" in said or "/maskwork/" in said.replace(FEDERATION, ""):
            self.tally.failed(f"{target}: told too much: {said[:300]}")


def was_reset(code: grpc.StatusCode, said: str) -> bool:
    """Whether gRPC's asyncio client made this up, as it does of a refusal that comes while it writes (grpc#36066).

    The coordinator's own INTERNAL has another phrase, and a line in its log, which is looked at too.
    """
    return code is grpc.StatusCode.INTERNAL and ("RST_STREAM" in said or said == "Internal error from Core")


Attack = Callable[[Arena, random.Random], Awaitable[None]]


async def exchange(
    channel: grpc.aio.Channel,
    method: str,
    messages: Iterable[bytes] | AsyncIterator[bytes],
    *,
    most: int = 64,
    patience_s: float = PATIENCE_S,
) -> tuple[grpc.StatusCode, str | None, list[bytes]]:
    """Say some raw messages, hear the answers, and return the status."""
    opened: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(method)
    call = opened(_each(messages))
    heard: list[bytes] = []
    try:
        async with asyncio.timeout(patience_s):
            while len(heard) < most:
                message = await call.read()
                if not isinstance(message, bytes):  # the end of the stream
                    return await call.code(), await call.details(), heard
                heard.append(message)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details(), heard
    except TimeoutError:
        return grpc.StatusCode.UNKNOWN, f"no answer within {patience_s:g} s", heard
    finally:
        call.cancel()
    return grpc.StatusCode.OK, None, heard


async def _each(messages: Iterable[bytes] | AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if isinstance(messages, AsyncIterator):
        async for message in messages:
            yield message
    else:
        for message in messages:
            yield message


async def _then_silence(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message
    await asyncio.sleep(3600)


async def _drip(first: bytes, drop: bytes, every_s: float) -> AsyncIterator[bytes]:
    yield first
    while True:
        await asyncio.sleep(every_s)
        yield drop


def hello(session: bytes = b"", tasks: Sequence[str] = ("nothing",)) -> bytes:
    return codec.encode_request(session, codec.Hello((1,), "x", tuple(tasks), session)).SerializeToString()


# --- any method -----------------------------------------------------------------------------------------------------

_VALID: dict[str, bytes] = {
    FEDERATION + "Connect": hello(),
    FEDERATION + "Upload": federation_pb2.UploadRequest(
        session_id=bytes(32), segment=federation_pb2.SEGMENT_UPDATE, data=b"x"
    ).SerializeToString(),
    FEDERATION + "Download": federation_pb2.DownloadRequest(digest=bytes(32)).SerializeToString(),
    JOBS + "SubmitJob": jobs_pb2.SubmitJobRequest(
        header=jobs_pb2.SubmitJobHeader(spec_json=spec().canonical_json(), model_size=100)
    ).SerializeToString(),
    JOBS + "GetJob": jobs_pb2.GetJobRequest(job_id="job-1").SerializeToString(),
    JOBS + "WatchJob": jobs_pb2.WatchJobRequest(job_id="job-1").SerializeToString(),
    JOBS + "AbortJob": jobs_pb2.AbortJobRequest(job_id="job-1").SerializeToString(),
    JOBS + "ExportModel": jobs_pb2.ExportModelRequest(job_id="job-1", round_number=7).SerializeToString(),
    JOBS + "ListJobs": b"",
    "/grpc.health.v1.Health/Check": b"",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": b"\x3a\x01*",
    "/no.such.Service/Method": b"",
}


def _role_for(method: str) -> Role:
    roles = PERMISSIONS.get(method, frozenset({Role.PARTICIPANT}))
    return Role.PARTICIPANT if Role.PARTICIPANT in roles else Role.RESEARCHER


async def spoilt_bytes(arena: Arena, rng: random.Random) -> None:
    """Messages of every method with their bytes spoilt."""
    method = rng.choice(sorted(_VALID))
    async with arena.channel(_role_for(method), f"evil-{rng.randrange(4)}") as channel:
        for _ in range(20):
            message = mutate_bytes(rng, _VALID[method], list(_VALID.values()))
            arena.answered(f"rpc {method.rpartition('/')[2]}", *(await exchange(channel, method, [message]))[:2])


async def wrong_role(arena: Arena, rng: random.Random) -> None:
    """Every method with the certificate of every role that may not call it."""
    method = rng.choice(sorted(PERMISSIONS))
    for role in sorted(set(Role) - PERMISSIONS[method] - {Role.COORDINATOR}):
        code, details = await _until_it_is_reached(arena, role, method)
        arena.answered("wrong role", code, details)
        refused = code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED)
        if not refused and not was_reset(code, details or ""):
            arena.tally.failed(f"{role} may call {method}: {code.name} ({details})")


async def _until_it_is_reached(arena: Arena, role: Role, method: str) -> tuple[grpc.StatusCode, str | None]:
    """Call again while strangers hold every connection, as an honest client has to: no connection is no answer."""
    give_up = asyncio.get_running_loop().time() + PATIENCE_S
    while True:
        async with arena.channel(role, "evil-0") as channel:
            code, details, _ = await exchange(channel, method, [_VALID.get(method, b"")])
        if code is not grpc.StatusCode.UNAVAILABLE or asyncio.get_running_loop().time() > give_up:
            return code, details
        await asyncio.sleep(0.2)


async def nothing_said(arena: Arena, rng: random.Random) -> None:
    """A call is opened and never gets its request."""
    method = rng.choice(sorted(set(_VALID) - {"/no.such.Service/Method"}))
    async with arena.channel(_role_for(method), f"evil-{rng.randrange(4)}") as channel:
        code, details, _ = await exchange(channel, method, _then_silence())
    arena.answered("nothing said", code, details)


async def oversized(arena: Arena, rng: random.Random) -> None:
    """One message beyond what is received, and length fields that promise gigabytes."""
    method = rng.choice(sorted(set(_VALID) - {"/no.such.Service/Method"}))
    promised = b"\x0a" + varint(rng.choice((2**31, 2**32, 2**40, 2**63))) + b"x" * 100
    message = rng.choice((b"\x0a" + varint(3 << 20) + bytes(3 << 20), promised, b"\x12\x00" * (MOST_BYTES // 4)))
    async with arena.channel(
        _role_for(method), "evil-1", (*CHANNEL_OPTIONS, ("grpc.max_send_message_length", -1))
    ) as c:
        arena.answered("oversized", *(await exchange(c, method, [message]))[:2])


# --- the control stream ---------------------------------------------------------------------------------------------


async def spoilt_control_stream(arena: Arena, rng: random.Random) -> None:
    """Real traffic of another session, spoilt, in another order, again; and what honest sites were overheard to say."""
    seeds = [*recordings.requests(), *arena.overheard[-200:]]
    said = [rng.choice(seeds) for _ in range(rng.randrange(1, 30))]
    messages = [
        m.SerializeToString() if rng.random() < 0.5 else mutate_message(rng, m).SerializeToString() for m in said
    ]
    session = rng.choice(said).session_id
    first = rng.choice((hello(), hello(session), hello(session, ["gated"]), messages[0]))
    async with arena.channel(Role.PARTICIPANT, f"evil-{rng.randrange(4)}") as channel:
        code, details, _ = await exchange(channel, FEDERATION + "Connect", [first, *messages])
    arena.answered("control stream", code, details)


async def huge_hello(arena: Arena, rng: random.Random) -> None:
    """A Hello of a hundred thousand tasks, or versions, or one task of a megabyte."""
    tasks, versions = rng.choice(((100_000, 1), (1, 100_000), (1, 1)))
    message = federation_pb2.ConnectRequest(
        hello=federation_pb2.Hello(versions=[1] * versions, tasks=["x" * rng.choice((1, 15))] * tasks)
    )
    if tasks == versions == 1:
        message.hello.tasks.append("y" * (1 << 20))
    async with arena.channel(Role.PARTICIPANT, "evil-2") as channel:
        arena.answered(
            "huge Hello", *(await exchange(channel, FEDERATION + "Connect", [message.SerializeToString()]))[:2]
        )


async def flood_of_messages(arena: Arena, rng: random.Random) -> None:
    """As many messages as the stream takes, for a session that is or is not."""
    message = rng.choice([*recordings.requests(), *arena.overheard[-20:]])
    raw = message.SerializeToString()
    many = (hello(message.session_id) if i == 0 else raw for i in range(20_000))
    async with arena.channel(Role.PARTICIPANT, "evil-3") as channel:
        arena.answered("flood of messages", *(await exchange(channel, FEDERATION + "Connect", many, most=100_000))[:2])


# --- uploads, downloads ---------------------------------------------------------------------------------------------


async def strange_upload(arena: Arena, rng: random.Random) -> None:
    """Chunks for sessions of others, without a grant, out of order, without an end."""
    sessions = [m.session_id for m in arena.overheard[-50:]] or [bytes(32)]
    chunk = federation_pb2.UploadRequest(
        session_id=rng.choice(sessions),
        segment=rng.choice(federation_pb2.Segment.values()),
        offset=rng.choice((0, 1, 2**63)),
        data=b"x" * 1000,
    )
    chunks = [mutate_message(rng, chunk).SerializeToString() for _ in range(rng.randrange(1, 5))]
    name = rng.choice(("evil-0", "evil-1"))
    async with arena.channel(Role.PARTICIPANT, name) as channel:
        messages = _then_silence(*chunks) if rng.random() < 0.3 else chunks
        arena.answered("upload", *(await exchange(channel, FEDERATION + "Upload", messages))[:2])


async def strange_download(arena: Arena, rng: random.Random) -> None:
    """Digests of other sessions, offsets beyond the end."""
    digest = rng.choice([*arena.digests[-5:], bytes(32), b"", b"x" * 100_000])
    request = federation_pb2.DownloadRequest(digest=digest, offset=rng.choice((0, 1, 2**40, 2**64 - 1)))
    async with arena.channel(Role.PARTICIPANT, f"evil-{rng.randrange(4)}") as channel:
        arena.answered(
            "download", *(await exchange(channel, FEDERATION + "Download", [request.SerializeToString()]))[:2]
        )


async def unread_export(arena: Arena, rng: random.Random) -> None:
    """Models asked for and not read, over and over, from connections of their own."""
    if not arena.job_ids:
        return
    request = jobs_pb2.ExportModelRequest(job_id=rng.choice(arena.job_ids[-3:]))
    async with arena.channel(Role.RESEARCHER, "evil-reader", NO_WINDOW) as channel:
        export: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(JOBS + "ExportModel")
        call = export(request.SerializeToString())
        await asyncio.sleep(rng.uniform(0.5, 4.0))
        try:
            async with asyncio.timeout(PATIENCE_S):
                while await call.read() is not grpc.aio.EOF:
                    pass
                arena.answered("unread export", await call.code(), await call.details())
        except grpc.aio.AioRpcError as error:
            arena.answered("unread export", error.code(), error.details())
        except TimeoutError:
            arena.tally.failed("an export ended neither well nor badly")


async def too_many_calls(arena: Arena, rng: random.Random) -> None:
    """Forty watchers, or health watches, or reflections of one identity, over ten connections, none of them read."""
    if not arena.job_ids:
        return
    watch = jobs_pb2.WatchJobRequest(job_id=arena.job_ids[-1]).SerializeToString()
    method, message = rng.choice(
        (
            (JOBS + "WatchJob", watch),
            ("/grpc.health.v1.Health/Watch", b""),
            ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"\x3a\x01*"),
        )
    )

    async def one() -> None:
        async with arena.channel(Role.RESEARCHER, "evil-watcher", NO_WINDOW) as channel:
            for answer in await asyncio.gather(
                *(exchange(channel, method, _then_silence(message), most=10**9, patience_s=5) for _ in range(4))
            ):
                code, details, heard = answer
                if code is grpc.StatusCode.UNKNOWN and heard:
                    code, details = grpc.StatusCode.OK, None  # admitted, served, and given up by us
                arena.answered("too many calls", code, details)

    await asyncio.gather(*(one() for _ in range(10)))


# --- submissions ----------------------------------------------------------------------------------------------------


async def strange_submission(arena: Arena, rng: random.Random) -> None:
    """Specs and models that are none, sizes that are not kept, streams that stall or drip."""
    spec_json = mutate_json(rng, recordings.SPEC_JSON)
    model = rng.choice(recordings.model_files())
    if rng.random() < 0.7:
        spec_json, model = recordings.SPEC_JSON, mutate_bytes(rng, model)
    size = rng.choice((len(model), len(model), 0, len(model) + 1, 2**40, 2**63, 2**64 - 1))
    header = jobs_pb2.SubmitJobRequest(
        header=jobs_pb2.SubmitJobHeader(spec_json=spec_json[:1_500_000], model_size=size)
    )
    first, body = header.SerializeToString(), jobs_pb2.SubmitJobRequest(model=model).SerializeToString()
    messages = rng.choice(
        (
            [first, body],
            [first, body],
            [body, first],
            [first, first],
            _then_silence(first, body[: len(body) // 2]),
            _drip(first, jobs_pb2.SubmitJobRequest(model=b"").SerializeToString(), 0.05),
            _drip(first, jobs_pb2.SubmitJobRequest(model=b"x").SerializeToString(), 0.5),
        )
    )
    async with arena.channel(Role.RESEARCHER, f"evil-submitter-{rng.randrange(2)}") as channel:
        code, details, heard = await exchange(channel, JOBS + "SubmitJob", messages)
        arena.answered("submission", code, details)
        for answer in heard:  # a mutation that is still a job: end it, or the honest jobs wait for it
            job_id = jobs_pb2.SubmitJobResponse.FromString(answer).job_id
            abort = jobs_pb2.AbortJobRequest(job_id=job_id).SerializeToString()
            arena.answered("abort", *(await exchange(channel, JOBS + "AbortJob", [abort]))[:2])


CALLS: tuple[Attack, ...] = (
    spoilt_bytes,
    spoilt_bytes,
    wrong_role,
    nothing_said,
    oversized,
    spoilt_control_stream,
    spoilt_control_stream,
    huge_hello,
    flood_of_messages,
    strange_upload,
    strange_download,
    unread_export,
    too_many_calls,
    strange_submission,
    strange_submission,
)
