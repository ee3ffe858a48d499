"""The gRPC services: they decode, hand over, and encode. They decide nothing.

Ingress is a pipeline: size (gRPC's message limit), identity, role, quota and patience (`guard`), decoding (`codec`),
then the driver's queue, where the right session and the right sender are looked at. Every wait has a bound: the guard's
for each message read or written, and here for a Hello, for what the driver owes, and for how fast a site may talk.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import AsyncIterator, Iterator

import structlog

from maskwork.coordinator.audit import Trail
from maskwork.coordinator.driver import Driver
from maskwork.coordinator.exports import Exports
from maskwork.coordinator.guard import MAX_DETAIL_LOGGED, caller
from maskwork.coordinator.happenings import (
    JobAborted,
    Look,
    PeerConnected,
    PeerGone,
    PeerMisbehaved,
    PeerSaid,
    StorageFailed,
    UploadBegan,
    UploadEnded,
)
from maskwork.coordinator.job_view import summary as summary_of
from maskwork.coordinator.jobs import JobDesk
from maskwork.coordinator.models import ModelFile
from maskwork.coordinator.peers import Peer
from maskwork.coordinator.quotas import Bucket
from maskwork.coordinator.rounds import PresentSite
from maskwork.coordinator.spool import UploadRefused
from maskwork.errors import StoreError
from maskwork.net.status import Refusal, Refused
from maskwork.net.tls import CHUNK_BYTES
from maskwork.secagg.keys import Segment
from maskwork.wire import codec, job_codec
from maskwork.wire.codec import Hello, WireError
from maskwork.wire.v1 import federation_pb2, federation_pb2_grpc, jobs_pb2, jobs_pb2_grpc

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor

log = structlog.get_logger("maskwork.coordinator")

VERSIONS = (1,)
HELLO_TIMEOUT_S = 10.0
DOWNLOAD_WAIT_S = 60.0
ABORT_WAIT_S = 60.0
MESSAGES_BURST = 1000
MESSAGES_PER_S = 100.0
"""A site says six messages in a session; one that says more than these in a second is not of our making."""
DISPLACED = (
    "another connection with this certificate took this one's place: if that was not this agent itself, a second one "
    "runs with the same identity directory; stop one of them"
)
_SEGMENTS = {
    federation_pb2.SEGMENT_UPDATE: Segment.UPDATE,
    federation_pb2.SEGMENT_STATISTICS: Segment.STATISTICS,
}

ConnectContext = grpc.aio.ServicerContext[federation_pb2.ConnectRequest, federation_pb2.ConnectResponse]


class FederationService(federation_pb2_grpc.FederationServiceServicer):
    """What participants call."""

    def __init__(self, driver: Driver, *, max_downloads: int) -> None:
        self._driver = driver
        self._downloads = asyncio.Semaphore(max_downloads)

    async def Connect(
        self, request_iterator: AsyncIterator[federation_pb2.ConnectRequest], context: ConnectContext
    ) -> AsyncIterator[federation_pb2.ConnectResponse]:
        """The control stream: greet, then carry messages both ways until either side ends it."""
        requests = aiter(request_iterator)
        peer = await self._greet(requests)
        yield codec.encode_response(b"", codec.Welcome(VERSIONS[0], peer.welcomed_by), 0)
        await self._driver.post(PeerConnected(peer))
        reader = asyncio.create_task(self._read(peer, requests))
        try:
            while (response := await peer.next_response()) is not None:
                yield response
            if peer.displaced:
                raise Refused(Refusal.NOT_NOW, DISPLACED)
        finally:
            reader.cancel()
            self._driver.post_soon(PeerGone(peer))

    async def _greet(self, requests: AsyncIterator[federation_pb2.ConnectRequest]) -> Peer:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            first = await anext(requests, None)
        hello = None if first is None else codec.decode_request(first)
        if not isinstance(hello, Hello):
            raise Refused(Refusal.INVALID, "a control stream begins with Hello")
        if not set(hello.versions) & set(VERSIONS):
            raise Refused(Refusal.NOT_NOW, f"this coordinator speaks protocol versions {VERSIONS}")
        certificate = caller()
        site = PresentSite(certificate.name, certificate.fingerprint, frozenset(hello.tasks))
        return Peer(
            site,
            certificate.der,
            hello.active_session,
            hello.audit_size,
            succeeds_another=hello.succeeds_another,
            welcomed_by=self._driver.federation.certificate,
        )

    async def _read(self, peer: Peer, requests: AsyncIterator[federation_pb2.ConnectRequest]) -> None:
        try:
            pace = Bucket(MESSAGES_BURST, MESSAGES_PER_S)
            async for request in requests:
                if not pace.take(time.monotonic()):
                    raise WireError(f"a flood: more than {MESSAGES_PER_S:g} messages a second")
                message = codec.decode_request(request)
                if isinstance(message, Hello):
                    raise WireError("a second Hello")
                await peer.room()
                await self._driver.post(PeerSaid(peer, request.session_id, message))
        except WireError as error:
            log.warning("a control stream is closed", participant=peer.name, detail=str(error)[:MAX_DETAIL_LOGGED])
            await self._driver.post(PeerMisbehaved(peer, str(error)))
        finally:
            peer.close()

    async def Upload(
        self,
        request_iterator: AsyncIterator[federation_pb2.UploadRequest],
        context: grpc.aio.ServicerContext[federation_pb2.UploadRequest, federation_pb2.UploadResponse],
    ) -> federation_pb2.UploadResponse:
        """One upload, or the rest of one."""
        requests = aiter(request_iterator)
        chunk = await anext(requests, None)
        if chunk is None:
            raise Refused(Refusal.INVALID, "an upload without a chunk")
        certificate = caller()
        site = PresentSite(certificate.name, certificate.fingerprint, frozenset())
        place = self._driver.spool_for(site, chunk.session_id)
        if place is None:
            raise Refused(Refusal.NOT_NOW, "no upload is due from this participant in that session")
        session, (spool, member) = chunk.session_id, place
        try:
            with spool.writing() as writer:
                self._driver.post_soon(UploadBegan(session, member))
                try:
                    while chunk is not None:
                        if chunk.session_id != session or chunk.segment not in _SEGMENTS:
                            raise UploadRefused("a chunk of another session or segment")
                        writer.write(_SEGMENTS[chunk.segment], chunk.offset, chunk.data)
                        chunk = await anext(requests, None)
                finally:
                    if not writer.superseded:
                        self._driver.post_soon(UploadEnded(session, member))
        except UploadRefused as error:
            raise Refused(Refusal.INVALID, "the chunk does not continue the upload") from error
        except OSError as error:
            failure = StoreError.from_cause(error, file=spool.path)
            self._driver.post_soon(StorageFailed(session, failure))
            raise failure from error
        return federation_pb2.UploadResponse(received=spool.received)

    async def Download(
        self,
        request: federation_pb2.DownloadRequest,
        context: grpc.aio.ServicerContext[federation_pb2.DownloadRequest, federation_pb2.DownloadResponse],
    ) -> AsyncIterator[federation_pb2.DownloadResponse]:
        """The global model or the certificates of the open session, from an offset."""
        certificate = caller()
        site = PresentSite(certificate.name, certificate.fingerprint, frozenset())
        source = self._driver.download(site, request.digest)
        if source is None:
            raise Refused(Refusal.NOT_FOUND, "nothing of that digest belongs to an open session of yours")
        if request.offset > (len(source) if isinstance(source, bytes) else source.size):
            raise Refused(Refusal.INVALID, "the offset is beyond the end")
        async with asyncio.timeout(DOWNLOAD_WAIT_S):
            await self._downloads.acquire()
        try:
            for offset, data in _pieces(source, request.offset):
                yield federation_pb2.DownloadResponse(offset=offset, data=data)
        finally:
            self._downloads.release()


def _pieces(source: ModelFile | bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    with io.BytesIO(source) if isinstance(source, bytes) else source.open() as file:
        file.seek(offset)
        while data := file.read(CHUNK_BYTES):
            yield offset, data
            offset += len(data)


class JobService(jobs_pb2_grpc.JobServiceServicer):
    """What operators, researchers and auditors call."""

    def __init__(self, driver: Driver, desk: JobDesk, trail: Trail) -> None:
        self._driver = driver
        self._desk = desk
        self._trail = trail
        self._exports = Exports(lambda: driver.federation, desk, trail.standing)

    async def SubmitJob(
        self,
        request_iterator: AsyncIterator[jobs_pb2.SubmitJobRequest],
        context: grpc.aio.ServicerContext[jobs_pb2.SubmitJobRequest, jobs_pb2.SubmitJobResponse],
    ) -> jobs_pb2.SubmitJobResponse:
        """Header first, then the initial model in chunks."""
        requests = aiter(request_iterator)
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise Refused(Refusal.INVALID, "a submission begins with the job's header")
        submitted = await self._desk.submit(
            first.header.spec_json,
            first.header.model_size,
            _model_chunks(requests),
            submitted_by=caller().identity.uri,
        )
        self._trail.asked_for("submit", caller(), job=submitted.job_id, model=submitted.model_digest)
        await self._driver.post(Look())
        return jobs_pb2.SubmitJobResponse(job_id=submitted.job_id)

    async def ListJobs(
        self,
        request: jobs_pb2.ListJobsRequest,
        context: grpc.aio.ServicerContext[jobs_pb2.ListJobsRequest, jobs_pb2.ListJobsResponse],
    ) -> jobs_pb2.ListJobsResponse:
        """Every job."""
        return jobs_pb2.ListJobsResponse(jobs=[job_codec.encode_job(job) for job in self._desk.list()])

    async def GetJob(
        self,
        request: jobs_pb2.GetJobRequest,
        context: grpc.aio.ServicerContext[jobs_pb2.GetJobRequest, jobs_pb2.GetJobResponse],
    ) -> jobs_pb2.GetJobResponse:
        """One job with its history."""
        return job_codec.encode_details(self._desk.details(request.job_id))

    async def WatchJob(
        self,
        request: jobs_pb2.WatchJobRequest,
        context: grpc.aio.ServicerContext[jobs_pb2.WatchJobRequest, jobs_pb2.WatchJobResponse],
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        """A job's past rounds, then what happens."""
        async for event in self._desk.watch(request.job_id):
            yield job_codec.encode_event(event)

    async def AbortJob(
        self,
        request: jobs_pb2.AbortJobRequest,
        context: grpc.aio.ServicerContext[jobs_pb2.AbortJobRequest, jobs_pb2.AbortJobResponse],
    ) -> jobs_pb2.AbortJobResponse:
        """End a job; what is committed stays."""
        self._desk.details(request.job_id)  # a job that is not there is nobody's action
        self._trail.asked_for("abort", caller(), job=request.job_id)
        done = asyncio.get_running_loop().create_future()
        await self._driver.post(JobAborted(request.job_id, caller().identity.uri, done))
        async with asyncio.timeout(ABORT_WAIT_S):
            record = await done
        if record is None:
            raise Refused(Refusal.NOT_FOUND, f"there is no job {request.job_id}")
        return jobs_pb2.AbortJobResponse(job=job_codec.encode_job(summary_of(record, at=0.0)))

    async def ExportModel(
        self,
        request: jobs_pb2.ExportModelRequest,
        context: grpc.aio.ServicerContext[jobs_pb2.ExportModelRequest, jobs_pb2.ExportModelResponse],
    ) -> AsyncIterator[jobs_pb2.ExportModelResponse]:
        """A committed model: first what is said of it, signed; then the model in chunks."""
        model, signed = self._exports.of(request.job_id, request.round_number)
        self._trail.asked_for(
            "export", caller(), job=request.job_id, round_number=request.round_number, model=model.digest
        )
        with model.open() as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            signature = job_codec.encode_signature(signed)
            yield jobs_pb2.ExportModelResponse(digest=model.digest, size=size, signature=signature)
            while data := file.read(CHUNK_BYTES):
                yield jobs_pb2.ExportModelResponse(digest=model.digest, size=size, data=data)


async def _model_chunks(requests: AsyncIterator[jobs_pb2.SubmitJobRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "model":
            raise Refused(Refusal.INVALID, "after the header come only chunks of the model")
        yield request.model
