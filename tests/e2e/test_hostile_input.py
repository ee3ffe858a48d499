"""A real coordinator and a real link under hostile input, one thing at a time; the campaign does them all at once.

Bounds are shortened by configuration (`stall_s`), so what is waited for comes within seconds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from tests.e2e.services import Service, World
from tests.fuzz.honest import HONEST, coordinator, honest_sites, job
from tests.fuzz.hostile_calls import _VALID as VALID
from tests.fuzz.hostile_calls import FEDERATION, JOBS, NO_WINDOW, Arena, exchange, hello
from tests.fuzz.tally import Tally

from maskwork.coordinator.quotas import AT_A_TIME
from maskwork.net.identity import Role, TrustRoots, load_certificate, to_der
from maskwork.net.tls import HANDSHAKE_TIMEOUT_MS, SERVER_OPTIONS, server_credentials
from maskwork.participant.client import CoordinatorLink, LinkUp, TransferError
from maskwork.secagg.errors import AbortReason
from maskwork.secagg.messages import Withdraw
from maskwork.tensors import Schema, TensorSpec, write_model
from maskwork.wire import codec
from maskwork.wire.v1 import federation_pb2, jobs_pb2

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("services")]

PATIENCE_S = 100.0
STALL_S = 0.5
MAX_CONNECTIONS = 64
HANDSHAKE_S = HANDSHAKE_TIMEOUT_MS / 1000
OURS = sorted(method for method in VALID if method.startswith("/maskwork"))
RAW = grpc.stream_stream_rpc_method_handler


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Arena, Service]]:
    folder = tmp_path_factory.mktemp("ward")
    async with coordinator(folder, stall_s=STALL_S, max_downloads=1, max_connections=MAX_CONNECTIONS) as (
        world,
        service,
    ):
        yield Arena(world, Tally()), service
        assert await service.terminate() == 0
        service.assert_clean()


def role_for(method: str) -> Role:
    return Role.PARTICIPANT if method.startswith(FEDERATION) else Role.RESEARCHER


@pytest.mark.parametrize("method", OURS)
async def test_bytes_that_are_no_message_get_our_phrase_not_the_parsers(
    served: tuple[Arena, Service], method: str
) -> None:
    arena, _ = served
    async with arena.channel(role_for(method), "evil") as channel:
        code, details, _ = await exchange(channel, method, [b"\xff\xff\xff"])
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "malformed message")


@pytest.mark.parametrize("method", [m for m in OURS if m not in (FEDERATION + "Connect", JOBS + "SubmitJob")])
async def test_a_call_that_never_gets_its_request_ends(served: tuple[Arena, Service], method: str) -> None:
    async def silence() -> AsyncIterator[bytes]:
        await asyncio.sleep(3600)
        yield b""

    arena, _ = served
    async with arena.channel(role_for(method), "silent") as channel:
        code, details, _ = await exchange(channel, method, silence())
    assert (code, details) == (grpc.StatusCode.DEADLINE_EXCEEDED, "no data for too long")


async def test_a_submission_that_drips_ends_although_it_never_stalls(served: tuple[Arena, Service]) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield VALID[JOBS + "SubmitJob"]
        while True:
            await asyncio.sleep(0.05)
            yield jobs_pb2.SubmitJobRequest(model=b"").SerializeToString()

    arena, _ = served
    async with arena.channel(Role.RESEARCHER, "drip") as channel:
        code, _, _ = await exchange(channel, JOBS + "SubmitJob", drip())
    assert code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL)  # grpc#36066 makes INTERNAL of it
    # What the coordinator said is in its log, whatever the client's library made of it.
    await served[1].logged("a call was refused", method=JOBS + "SubmitJob", status="DEADLINE_EXCEEDED")


async def test_one_identity_has_its_quota_and_others_have_theirs(served: tuple[Arena, Service]) -> None:
    method, most = FEDERATION + "Upload", AT_A_TIME[FEDERATION + "Upload"]
    arena, _ = served
    refused = 0

    async def silence() -> AsyncIterator[bytes]:
        await asyncio.sleep(3600)
        yield b""

    async with arena.channel(Role.PARTICIPANT, "greedy") as channel:
        for answer in await asyncio.gather(*(exchange(channel, method, silence()) for _ in range(most + 2))):
            refused += answer[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused == 2
    async with arena.channel(Role.PARTICIPANT, "modest") as channel:
        code, _, _ = await exchange(channel, method, [VALID[method]])
    assert code is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_flood_on_a_control_stream_ends_it_with_the_reason_in_our_log(served: tuple[Arena, Service]) -> None:
    arena, service = served
    raw = codec.encode_request(bytes(32), Withdraw(AbortReason.CANCELLED)).SerializeToString()
    async with arena.channel(Role.PARTICIPANT, "flooding") as channel:
        await exchange(channel, FEDERATION + "Connect", (hello() if i == 0 else raw for i in range(20_000)))
    line = await service.logged("a control stream is closed", participant="flooding")
    assert "a flood" in line["detail"]


async def test_a_reader_that_stops_is_given_up_and_an_honest_job_completes(served: tuple[Arena, Service]) -> None:
    arena, service = served
    world = arena.world
    async with honest_sites(world), world.client() as client:
        job_id = await client.submit(job("honest", rounds=2, participants=HONEST), model(world.home))
        async for _ in client.watch(job_id):
            pass
        assert (await client.get(job_id)).job.rounds_committed == 2
        request = jobs_pb2.ExportModelRequest(job_id=job_id).SerializeToString()
        async with arena.channel(Role.RESEARCHER, "unreading", NO_WINDOW) as channel:
            export: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(JOBS + "ExportModel")
            call = export(request)
            await service.logged(
                "a call was refused", method=JOBS + "ExportModel", status="DEADLINE_EXCEEDED", caller=unreading()
            )
            call.cancel()


async def test_connections_beyond_the_limit_are_closed_and_the_operator_is_told(served: tuple[Arena, Service]) -> None:
    arena, service = served
    opened = [await asyncio.open_connection("127.0.0.1", arena.world.port) for _ in range(MAX_CONNECTIONS + 20)]
    try:
        closed = [asyncio.create_task(reader.read()) for reader, _ in opened]
        await service.logged("connections are at their limit", limit=MAX_CONNECTIONS)
        async with asyncio.timeout(HANDSHAKE_S / 2):  # by then nobody has been closed for a handshake that never came
            while sum(task.done() for task in closed) < 20:
                await asyncio.wait({task for task in closed if not task.done()}, return_when=asyncio.FIRST_COMPLETED)
        assert sum(task.done() for task in closed) < MAX_CONNECTIONS
    finally:
        for _, writer in opened:
            writer.transport.abort()
        await asyncio.gather(*closed, return_exceptions=True)


def unreading() -> str:
    return "spiffe://ward/researcher/unreading"


def model(home: Path) -> Path:
    path = home / "large.safetensors"
    schema = Schema((TensorSpec("weight", "F32", (3 << 20,)),))
    write_model(path, schema, np.random.default_rng(1).normal(size=3 << 20).astype(np.float32), {})
    return path


# --- a site and a coordinator that lies -----------------------------------------------------------------------------

Handler = Callable[[AsyncIterator[bytes], grpc.aio.ServicerContext[bytes, bytes]], AsyncIterator[bytes]]


@asynccontextmanager
async def linked(
    world: World, *, connect: Handler | None = None, download: Handler | None = None, upload: Handler | None = None
) -> AsyncIterator[tuple[CoordinatorLink, asyncio.Queue[object]]]:
    """A participant's link to a coordinator that answers with what the handlers say."""

    async def welcome(requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
        yield codec.encode_response(b"", codec.Welcome(1, certificate(world)), 0).SerializeToString()
        async for _request in requests:
            pass

    server = grpc.aio.server(options=SERVER_OPTIONS)
    given = {"Connect": connect or welcome, "Download": download, "Upload": upload}
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        name: RAW(handler) for name, handler in given.items() if handler is not None
    }
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("maskwork.wire.v1.FederationService", handlers)]
    )
    port = server.add_secure_port("127.0.0.1:0", server_credentials(world.identity(Role.COORDINATOR, "liar")))
    await server.start()
    files, inbox = world.identity(Role.PARTICIPANT, "believer"), asyncio.Queue[object]()
    link = CoordinatorLink(
        f"127.0.0.1:{port}",
        files,
        TrustRoots.from_file(files.ca),
        federation="ward",
        tasks=(),
        active_session=bytes,
        inbox=inbox,
        stall_s=STALL_S,
    )
    running = asyncio.create_task(link.run())
    try:
        yield link, inbox
        assert not running.done(), running.exception()
    finally:
        running.cancel()
        await asyncio.wait({running})
        await server.stop(None)


def certificate(world: World) -> bytes:
    return to_der(load_certificate(world.identity(Role.COORDINATOR, "liar").cert))


async def up(inbox: asyncio.Queue[object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not isinstance(await inbox.get(), LinkUp):
            inbox.task_done()
    inbox.task_done()


def answering(*messages: bytes, then: float = 0.0, again: int = 1) -> Handler:
    async def handler(_: AsyncIterator[bytes], __: object) -> AsyncIterator[bytes]:
        for _number in range(again):
            for message in messages:
                yield message
        await asyncio.sleep(then)

    return handler


async def test_a_coordinator_whose_first_message_is_none_is_tried_again(served: tuple[Arena, Service]) -> None:
    world, tried = served[0].world, asyncio.Queue[None]()

    async def junk(_: AsyncIterator[bytes], __: object) -> AsyncIterator[bytes]:
        tried.put_nowait(None)
        yield b"\xff\xff\xff"

    async with linked(world, connect=junk), asyncio.timeout(PATIENCE_S):
        await tried.get()
        await tried.get()  # a message that could not be parsed used to end the process


@pytest.mark.parametrize(
    ("messages", "then", "again", "words"),
    [
        ([b"\xff\xff\xff"], 0, 1, "garbled"),
        ([b""], 0, 1_000_000, "out of step"),  # pieces of nothing, for ever
        ([], 3600, 1, "stands still"),
        ([federation_pb2.DownloadResponse(offset=0, data=b"x" * 11).SerializeToString()], 0, 1, "out of step"),
        ([federation_pb2.DownloadResponse(offset=0, data=b"x" * 10).SerializeToString()], 0, 1, "not what the plan"),
    ],
)
async def test_a_download_that_lies_ends_with_an_error_of_ours(
    served: tuple[Arena, Service], tmp_path: Path, messages: list[bytes], then: float, again: int, words: str
) -> None:
    lie = answering(*messages, then=then, again=again)
    async with linked(served[0].world, download=lie) as (link, inbox):
        await up(inbox)
        with pytest.raises(TransferError, match=words):
            await link.download(bytes(32), 10, tmp_path / "file")


@pytest.mark.parametrize(
    ("lie", "words"), [(answering(b"\xff\xff"), "garbled"), (answering(then=3600), "stands still")]
)
async def test_an_upload_to_a_liar_ends_with_an_error_of_ours(
    served: tuple[Arena, Service], tmp_path: Path, lie: Handler, words: str
) -> None:
    path = tmp_path / "update"
    path.write_bytes(random.Random(1).randbytes(100))
    async with linked(served[0].world, upload=lie) as (link, inbox):
        await up(inbox)
        with path.open("rb") as update, pytest.raises(TransferError, match=words):
            await link.upload(bytes(32), update, b"statistics", (0, 0))
