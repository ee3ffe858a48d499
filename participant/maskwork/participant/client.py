"""The connection to the coordinator: one control stream, kept up; uploads and downloads beside it.

It dials out, verifies that the other side holds a coordinator's certificate, hands every message to the driver as it
came, and reconnects with jittered backoff. It decides nothing and remembers nothing of a session: what was not answered
when a connection broke is asked again by the coordinator, and answered again to the letter by the protocol core.

The coordinator may lie: its messages are parsed here, where bytes that are none end the connection (gRPC would hand out
None in their place, and a traceback to the log); they are taken one at a time, since a message of a few megabytes can
take a hundred times that once it is parsed; a transfer that does not move ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Container
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

import structlog

from maskwork.net.diagnosis import explain_connection_failure, probe_server
from maskwork.net.identity import (
    IdentityError,
    IdentityFiles,
    IdentityProblem,
    Role,
    TrustRoots,
    VerifiedCertificate,
)
from maskwork.net.loaded import LoadedIdentity
from maskwork.net.tls import CHANNEL_OPTIONS, CHUNK_BYTES, channel_credentials, loaded_channel_credentials
from maskwork.secagg.keys import Segment
from maskwork.wire import codec
from maskwork.wire.codec import Hello, Request, Welcome, WireError
from maskwork.wire.job_codec import printable
from maskwork.wire.v1 import federation_pb2

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor

log = structlog.get_logger("maskwork.participant")

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 5.0
BACKOFF_GROWTH = 1.25
"""So a pause is about a quarter of the time that the coordinator has been away: a site is soon back after a restart of
seconds, and dials every few seconds while nobody answers for hours."""
REFUSED_BACKOFF_S = 300.0
"""After a certificate was refused: nobody mends that by the second, and a revoked site must not be a nuisance."""
WELCOME_TIMEOUT_S = 15.0
HANG_UP_S = 2.0
STALL_S = 60.0
"""Longest wait for the next piece of a download, or for the coordinator to take one of an upload."""
MAX_SAID = 500
_SERVICE = "/maskwork.wire.v1.FederationService/"
_SEGMENTS = {Segment.UPDATE: federation_pb2.SEGMENT_UPDATE, Segment.STATISTICS: federation_pb2.SEGMENT_STATISTICS}


class TransferError(Exception):
    """A download or upload broke or was refused; the text says which and why."""


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The control stream is open and the other side is a coordinator."""

    coordinator: VerifiedCertificate


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The control stream ended."""


@dataclass(frozen=True, slots=True)
class TurnedAway:
    """The coordinator does not take this site's certificate, or this site not the coordinator's: no session goes on."""


@dataclass(frozen=True, slots=True)
class Said:
    """A message of the coordinator, not yet decoded: its bitmaps need the roster that the session's plan names."""

    response: federation_pb2.ConnectResponse = field(repr=False)


LinkEvent: TypeAlias = LinkUp | LinkDown | TurnedAway | Said


class _Calls:
    """The coordinator's methods, answered with bytes that nobody has parsed."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.connect: grpc.aio.StreamStreamMultiCallable[federation_pb2.ConnectRequest, bytes] = channel.stream_stream(
            _SERVICE + "Connect", federation_pb2.ConnectRequest.SerializeToString
        )
        self.download: grpc.aio.UnaryStreamMultiCallable[federation_pb2.DownloadRequest, bytes] = channel.unary_stream(
            _SERVICE + "Download", federation_pb2.DownloadRequest.SerializeToString
        )
        self.upload: grpc.aio.StreamUnaryMultiCallable[federation_pb2.UploadRequest, bytes] = channel.stream_unary(
            _SERVICE + "Upload", federation_pb2.UploadRequest.SerializeToString
        )


class CoordinatorLink:
    """Keeps a control stream to the coordinator."""

    def __init__(
        self,
        target: str,
        files: IdentityFiles,
        roots: TrustRoots,
        *,
        federation: str,
        tasks: tuple[str, ...],
        active_session: Callable[[], bytes],
        inbox: asyncio.Queue[object],
        stall_s: float = STALL_S,
        audit_size: Callable[[], int] = lambda: 0,
        is_revoked: Container[bytes] = frozenset(),
        identity: LoadedIdentity | None = None,
        succeeds_another: Callable[[], bool] = lambda: False,
    ) -> None:
        self._identity = identity
        self._succeeds_another = succeeds_another
        self._target = target
        self._files = files
        self._roots = roots
        self._federation = federation
        self._tasks = tasks
        self._active_session = active_session
        self._inbox = inbox
        self._stall_s = stall_s
        self._audit_size = audit_size
        self._is_revoked = is_revoked
        self._redial = asyncio.Event()
        self._greeted = False
        self._down = asyncio.Event()
        self._calls: _Calls | None = None
        self._outbox: asyncio.Queue[federation_pb2.ConnectRequest | None] | None = None

    async def run(self) -> None:
        """Connect, serve, reconnect, until cancelled."""
        backoff = FIRST_BACKOFF_S
        while True:
            self._greeted, refused = False, False
            started = time.monotonic()
            self._redial.clear()
            try:
                await self._connection()
            except (grpc.aio.AioRpcError, WireError, ValueError, TimeoutError) as error:
                refused = is_refusal(error)
                await self._explain(error)
            finally:
                self._outbox = None
            # A connection that ends at once, again and again, may be another process with the same certificate.
            if self._greeted and time.monotonic() - started > LONGEST_BACKOFF_S:
                backoff = FIRST_BACKOFF_S
            # Jitter spreads a federation's reconnects after the coordinator restarts; it needs no secrecy.
            pause = (REFUSED_BACKOFF_S if refused else backoff) * random.uniform(0.5, 1.0)  # noqa: S311
            if refused:
                await self._inbox.put(TurnedAway())
                log.error("waiting long before dialling again", seconds=round(pause))
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._redial.wait()
            backoff = next_backoff(backoff)

    def send(self, session: bytes, message: Request) -> None:
        """Send a message if connected; if not, the coordinator asks again once we are back."""
        if self._outbox is not None:
            self._outbox.put_nowait(codec.encode_request(session, message))

    def redial(self) -> None:
        """End the control stream, or the wait for the next try; `run` connects anew."""
        self._redial.set()
        if self._outbox is not None:
            self._outbox.put_nowait(None)

    async def hang_up(self) -> None:
        """End the control stream after what is queued already, and wait until the coordinator has ended it too."""
        if self._outbox is not None:
            self._outbox.put_nowait(None)
            with suppress(TimeoutError):
                async with asyncio.timeout(HANG_UP_S):
                    await self._down.wait()

    async def download(self, digest: bytes, size: int, path: Path) -> bytes:
        """Fetch something content-addressed into `path`, going on where an earlier try stopped; returns its SHA-256.

        Raises:
            TransferError: it broke, is longer than announced, or has another digest (then `path` is removed).
        """
        path.touch(mode=0o600)
        with path.open("r+b", buffering=0) as file:
            offset = file.seek(0, os.SEEK_END)
            found = await asyncio.to_thread(_digest, path) if offset else hashlib.sha256()
            call = self._calls_now().download(federation_pb2.DownloadRequest(digest=digest, offset=offset))
            try:
                async for raw in _steadily(call, self._stall_s):
                    chunk = codec.parse(federation_pb2.DownloadResponse, raw)
                    if chunk.offset != offset or not chunk.data or offset + len(chunk.data) > size:
                        raise TransferError("a download went out of step with what was announced")
                    file.write(chunk.data)
                    found.update(chunk.data)
                    offset += len(chunk.data)
            except grpc.aio.AioRpcError as error:
                raise TransferError(f"a download broke at {offset} of {size} bytes: {_said(error)}") from error
            except WireError as error:
                raise TransferError(f"a download is garbled at {offset} of {size} bytes") from error
            except TimeoutError as error:
                raise TransferError(f"a download stands still at {offset} of {size} bytes") from error
            finally:
                call.cancel()  # what is not wanted any more is not sent on
        if offset != size or found.digest() != digest:
            path.unlink()
            raise TransferError("what was downloaded is not what the plan names")
        return digest

    async def upload(self, session: bytes, update: BinaryIO, statistics: bytes, offsets: tuple[int, int]) -> int:
        """Stream both segments from their offsets; returns how many bytes the coordinator holds.

        Raises:
            TransferError: it broke or was refused.
        """
        try:
            async with asyncio.timeout(self._stall_s) as patience:

                def moves() -> None:
                    patience.reschedule(asyncio.get_running_loop().time() + self._stall_s)

                raw = await self._calls_now().upload(_chunks(session, update, statistics, offsets, moves))
            return int(codec.parse(federation_pb2.UploadResponse, raw).received)
        except grpc.aio.AioRpcError as error:
            raise TransferError(f"an upload broke: {_said(error)}") from error
        except WireError as error:
            raise TransferError("the answer to an upload is garbled") from error
        except TimeoutError as error:
            raise TransferError("an upload stands still") from error

    def _calls_now(self) -> _Calls:
        if self._calls is None:
            raise TransferError("not connected to the coordinator")
        return self._calls

    async def _connection(self) -> None:
        own = self._identity  # if there is one, the files may hold its successor by now
        credentials = channel_credentials(self._files) if own is None else loaded_channel_credentials(own)
        async with grpc.aio.secure_channel(self._target, credentials, options=CHANNEL_OPTIONS) as channel:
            calls = _Calls(channel)
            outbox: asyncio.Queue[federation_pb2.ConnectRequest | None] = asyncio.Queue()
            size, succeeds = self._audit_size(), self._succeeds_another()
            hello = Hello((1,), "maskwork", self._tasks, self._active_session(), size, succeeds)
            outbox.put_nowait(codec.encode_request(hello.active_session, hello))
            responses = aiter(calls.connect(_requests(outbox)))
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                first = await anext(responses, None)
            if first is None:
                raise WireError("the coordinator ended the stream without a Welcome")
            coordinator = self._verify(codec.decode_response(codec.parse(federation_pb2.ConnectResponse, first), 0))
            self._calls, self._outbox, self._greeted = calls, outbox, True
            self._down.clear()
            await self._inbox.put(LinkUp(coordinator))
            try:
                async for raw in responses:
                    await self._inbox.put(self._event_of(codec.parse(federation_pb2.ConnectResponse, raw)))
                    await self._inbox.join()
            finally:
                self._calls = self._outbox = None
                self._down.set()
                outbox.put_nowait(None)
                await self._inbox.put(LinkDown())

    def _event_of(self, response: federation_pb2.ConnectResponse) -> LinkUp | Said:
        if response.WhichOneof("message") != "welcome":
            return Said(response)
        # Between two sessions the coordinator's certificate may be renewed: plans are signed by the new one then.
        return LinkUp(self._verify(codec.decode_response(response, 0)))

    def _verify(self, welcome: codec.Response) -> VerifiedCertificate:
        if not isinstance(welcome, Welcome):
            raise WireError("the coordinator's first message is no Welcome")
        if welcome.version != 1:
            raise WireError(f"the coordinator chose protocol version {welcome.version}, which was not offered")
        return self._roots.verify(
            welcome.coordinator_certificate,
            now=time.time(),
            role=Role.COORDINATOR,
            federation=self._federation,
            is_revoked=self._is_revoked,
        )

    async def _explain(self, error: Exception) -> None:
        if isinstance(error, TimeoutError):
            reason, unreachable = f"no answer within {WELCOME_TIMEOUT_S:g} s", True
        elif isinstance(error, grpc.aio.AioRpcError):
            reason, unreachable = _said(error), error.code() is grpc.StatusCode.UNAVAILABLE
        else:
            log.error("connection refused by this site", detail=str(error))
            return
        if is_refusal(error):
            remedy = "ask the federation's operator; a new certificate is taken up without a restart"
            log.error("the coordinator refuses this site's certificate", detail=reason, remedy=remedy)
            return
        if unreachable:
            probed = await asyncio.to_thread(probe_server, self._files, self._target)
            reason = explain_connection_failure(
                self._files, self._target, now=time.time(), role=Role.PARTICIPANT, reason=probed
            )
        log.warning("not connected", coordinator=self._target, detail=reason)


def is_refusal(error: Exception) -> bool:
    """Whether a connection failed for what no redialling mends: our certificate or the coordinator's is refused."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return isinstance(error, IdentityError) and error.problem is IdentityProblem.REVOKED


def next_backoff(backoff_s: float) -> float:
    """The pause after a pause that led to nothing; both are upper ends, of which jitter takes up to a half."""
    return min(LONGEST_BACKOFF_S, backoff_s * BACKOFF_GROWTH)


async def _requests(
    outbox: asyncio.Queue[federation_pb2.ConnectRequest | None],
) -> AsyncIterator[federation_pb2.ConnectRequest]:
    while (request := await outbox.get()) is not None:
        yield request


async def _chunks(
    session: bytes, update: BinaryIO, statistics: bytes, offsets: tuple[int, int], moves: Callable[[], None]
) -> AsyncIterator[federation_pb2.UploadRequest]:
    update_offset, statistics_offset = offsets
    # Through the file object: a descriptor's number may be another file's once the session has ended.
    while not update.closed and (data := os.pread(update.fileno(), CHUNK_BYTES, update_offset)):
        moves()
        yield federation_pb2.UploadRequest(
            session_id=session, segment=_SEGMENTS[Segment.UPDATE], offset=update_offset, data=data
        )
        update_offset += len(data)
    while data := statistics[statistics_offset : statistics_offset + CHUNK_BYTES]:
        moves()
        yield federation_pb2.UploadRequest(
            session_id=session, segment=_SEGMENTS[Segment.STATISTICS], offset=statistics_offset, data=data
        )
        statistics_offset += len(data)


async def _steadily(call: AsyncIterable[bytes], stall_s: float) -> AsyncIterator[bytes]:
    """The answers of a call, each within the time."""
    answers = aiter(call)
    while True:
        async with asyncio.timeout(stall_s):
            answer = await anext(answers, None)
        if answer is None:
            return
        yield answer


def _said(error: grpc.aio.AioRpcError) -> str:
    """The status's text, which the coordinator chose, as it may be logged."""
    return printable(error.details() or error.code().name)[:MAX_SAID]


def _digest(path: Path) -> hashlib._Hash:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.sha256)
