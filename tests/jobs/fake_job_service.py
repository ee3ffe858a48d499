"""A JobService in this process, on loopback with real mutual TLS: it plays scripts and remembers what it was sent."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from maskwork.job_events import JobDetails, JobEvent, JobSummary
from maskwork.model_signature import ModelStatement, SignedModel, sign_model
from maskwork.net import tls
from maskwork.net.authority import Authority
from maskwork.net.diagnosis import load_private_key
from maskwork.net.identity import IdentityFiles, Role, TrustRoots, load_certificate, to_der
from maskwork.net.permissions import allowed
from maskwork.secagg.keys import SoftwareSigner
from maskwork.tensors import Schema, TensorSpec, write_model
from maskwork.wire.job_codec import encode_details, encode_event, encode_job, encode_signature
from maskwork.wire.v1 import jobs_pb2

# isort: split
# Only now: gRPC reads its cipher suites while it is imported.
import grpc
import numpy as np

from maskwork.wire.v1.jobs_pb2_grpc import JobServiceServicer, add_JobServiceServicer_to_server

BREAK = "UNAVAILABLE"
FAULT = "INTERNAL"
"""In a script of a watch: the call ends here, with that status."""
EXPORT_CHUNK = 1 << 16
EPOCH = 1_790_000_000.0

Context = grpc.aio.ServicerContext[object, object]


class Federation:
    """A CA, a coordinator's certificate for localhost, and a researcher's identity directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.now = time.time()
        self.authority = Authority.create("ward", now=self.now)
        issued = self.authority.issue(Role.COORDINATOR, "main", now=self.now, dns_names=["localhost"])
        self.coordinator = issued.write(home / "coordinator")
        self.researcher = self.member(Role.RESEARCHER, "ada")

    def member(self, role: Role, name: str) -> IdentityFiles:
        return self.authority.issue(role, name, now=self.now).write(self.home / name)

    def signed(self, model: bytes, *, job_id: str, round_number: int, signed_at: float | None = None) -> SignedModel:
        """As the coordinator signs a model."""
        digest = hashlib.sha256(model).digest()
        statement = ModelStatement(
            federation="ward",
            job_id=job_id,
            round_number=round_number,
            session_id=b"\x05" * 32 if round_number else b"",
            file_sha256=digest,
            model_digest=digest,
            signed_at=int(self.now if signed_at is None else signed_at),
            audit_head=b"",
            audit_size=0,
            certificate=to_der(load_certificate(self.coordinator.cert)),
        )
        return sign_model(statement, SoftwareSigner(load_private_key(self.coordinator.key)))


@dataclass
class FakeJobService(JobServiceServicer):
    """What it answers with is set by the test; what it was sent is read by it.

    `watches` holds one script for each call of WatchJob, the last of which is played again and again;
    a watch stays open after its script while `hold` is not set.
    """

    roots: TrustRoots
    jobs: list[JobSummary] = field(default_factory=list)
    details: dict[str, JobDetails] = field(default_factory=dict)
    watches: list[Sequence[JobEvent | str]] = field(default_factory=list)
    model: bytes = b""
    promised_digest: bytes | None = None
    promised_size: int | None = None
    signed: SignedModel | None = None
    hold: asyncio.Event | None = None
    refuse_submit: str = ""
    submitted_spec: bytes = b""
    submitted_model: bytes = b""
    chunk_sizes: list[int] = field(default_factory=list)
    exported_rounds: list[int] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    watch_calls: int = 0
    failures: dict[str, tuple[grpc.StatusCode, str]] = field(default_factory=dict)

    async def _admit(self, method: str, context: Context) -> None:
        if method in self.failures:
            await context.abort(*self.failures[method])
        caller = tls.peer_identity(context, self.roots, now=time.time(), federation="ward")
        if not allowed(f"/maskwork.wire.v1.JobService/{method}", caller.identity.role):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not permitted")

    async def _known(self, job_id: str, context: Context) -> JobSummary:
        for job in self.jobs:
            if job.job_id == job_id:
                return job
        await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no job {job_id}")
        raise AssertionError

    async def SubmitJob(
        self, request_iterator: AsyncIterator[jobs_pb2.SubmitJobRequest], context: Context
    ) -> jobs_pb2.SubmitJobResponse:
        await self._admit("SubmitJob", context)
        async for request in request_iterator:
            if request.WhichOneof("part") == "header":
                self.submitted_spec = request.header.spec_json
                if self.refuse_submit:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, self.refuse_submit)
            else:
                self.chunk_sizes.append(len(request.model))
                self.submitted_model += request.model
        return jobs_pb2.SubmitJobResponse(job_id=self.jobs[-1].job_id)

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: Context) -> jobs_pb2.ListJobsResponse:
        await self._admit("ListJobs", context)
        return jobs_pb2.ListJobsResponse(jobs=[encode_job(job) for job in self.jobs])

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Context) -> jobs_pb2.GetJobResponse:
        await self._admit("GetJob", context)
        job = await self._known(request.job_id, context)
        return encode_details(self.details.get(job.job_id, JobDetails(job)))

    async def WatchJob(
        self, request: jobs_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        await self._admit("WatchJob", context)
        await self._known(request.job_id, context)
        script = self.watches[min(self.watch_calls, len(self.watches) - 1)]
        self.watch_calls += 1
        for step in script:
            if isinstance(step, str):
                await context.abort(grpc.StatusCode[step], "the coordinator is shutting down")
            else:
                yield encode_event(step)
        if self.hold is not None:
            await self.hold.wait()

    async def AbortJob(self, request: jobs_pb2.AbortJobRequest, context: Context) -> jobs_pb2.AbortJobResponse:
        await self._admit("AbortJob", context)
        job = await self._known(request.job_id, context)
        if job.ended:
            return jobs_pb2.AbortJobResponse(job=encode_job(job))
        self.aborted.append(job.job_id)
        return jobs_pb2.AbortJobResponse(job=encode_job(summary(job.job_id, name=job.name, state="aborted")))

    async def ExportModel(
        self, request: jobs_pb2.ExportModelRequest, context: Context
    ) -> AsyncIterator[jobs_pb2.ExportModelResponse]:
        await self._admit("ExportModel", context)
        await self._known(request.job_id, context)
        self.exported_rounds.append(request.round_number)
        digest = self.promised_digest or hashlib.sha256(self.model).digest()
        size = len(self.model) if self.promised_size is None else self.promised_size
        signature = None if self.signed is None else encode_signature(self.signed)
        yield jobs_pb2.ExportModelResponse(digest=digest, size=size, signature=signature)
        for at in range(0, len(self.model), EXPORT_CHUNK):
            yield jobs_pb2.ExportModelResponse(data=self.model[at : at + EXPORT_CHUNK])


@asynccontextmanager
async def serving(federation: Federation, service: FakeJobService, *, port: int = 0) -> AsyncIterator[str]:
    """Serve until the block ends; gives the address to dial."""
    server = grpc.aio.server(options=tls.SERVER_OPTIONS)
    add_JobServiceServicer_to_server(service, server)
    bound = server.add_secure_port(f"localhost:{port}", tls.server_credentials(federation.coordinator))
    await server.start()
    try:
        yield f"localhost:{bound}"
    finally:
        await server.stop(None)


def summary(
    job_id: str = "3f9a1c", *, name: str = "digits", state: str = "running", committed: int = 0, total: int = 20
) -> JobSummary:
    """A job that Ada submitted."""
    return JobSummary(
        job_id=job_id,
        at=EPOCH,
        name=name,
        task="digits",
        state=state,
        rounds_total=total,
        rounds_committed=committed,
        submitted_by="spiffe://ward/researcher/ada",
        submitted_at=EPOCH,
        model_digest=hashlib.sha256(job_id.encode()).digest(),
    )


def a_model(folder: Path, *, parameters: int = 700_000) -> Path:
    """A model file in `folder`."""
    path = folder / "m.safetensors"
    vector = np.linspace(-1, 1, parameters, dtype=np.float32)
    write_model(path, Schema((TensorSpec("w", "F32", (parameters,)),)), vector, {})
    return path
