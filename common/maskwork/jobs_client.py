"""The coordinator's JobService as a researcher or operator uses it: submit, list, get, watch, abort, export.

It takes and gives domain types (`maskwork.job_events`), and failures leave it as `UserError` in plain sentences. It is
NOT a terminal program (`maskwork.job_commands`) and does not know prefixes of job ids beyond `find_job`.

Rules it upholds:

1. Nothing is as large as a model in memory: it goes up and comes down in chunks of 1 MiB.
2. A model that comes down is written aside, its size and SHA-256 are checked, and only then has it its name.
3. Calls are made once. Only watching, which changes nothing, is taken up again after a broken connection: after a
   pause that doubles, with jitter, and for as long as our own certificate is good.
4. Text from elsewhere is shown without its control characters.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, BinaryIO, Final, Self

from maskwork.errors import StoreError, UserError
from maskwork.job import JobSpec
from maskwork.job_events import ConnectionLost, JobDetails, JobEvent, JobSummary, WatchEvent
from maskwork.model_signature import SignedModel, check_file, verify_signed
from maskwork.net import tls
from maskwork.net.diagnosis import Target
from maskwork.net.identity import IdentityFiles, TrustRoots
from maskwork.net.permissions import PERMISSIONS
from maskwork.tensors import read_schema
from maskwork.wire.codec import WireError
from maskwork.wire.job_codec import decode_details, decode_event, decode_job, decode_signature, printable
from maskwork.wire.v1 import jobs_pb2

# isort: split
# Only now: gRPC reads its cipher suites while it is imported.
import grpc

from maskwork.wire.v1.jobs_pb2_grpc import JobServiceStub

if TYPE_CHECKING:
    from maskwork.wire.v1.jobs_pb2_grpc import JobServiceAsyncStub

ANSWER_TIMEOUT_S: Final = 30.0
"""For calls that only read or change a row; submit and export last as long as their bytes flow."""
RECONNECT_TIMEOUT_S: Final = 15.0
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 15.0

_RANDOM: Final = random.SystemRandom()
_SERVICE: Final = "/maskwork.wire.v1.JobService/"
# What a watch survives: the connection broke, or the coordinator ended this one stream (we were too slow).
_PASSING: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
# Codes whose text the coordinator writes for the caller.
_SAID_BY_COORDINATOR: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
# What gRPC itself says when the time that we gave a call is over.
_OUR_DEADLINE: Final = "Deadline Exceeded"

Progress = Callable[[int, int], None]
"""Told the bytes moved so far and the bytes in all, perhaps by another thread."""


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """A model file that was fetched and checked: where it is, its SHA-256, its bytes, and what its coordinator signed.

    Attributes:
        signed: The signature, verified; None from a coordinator that is too old to sign.
    """

    path: Path
    digest: bytes
    size: int
    signed: SignedModel | None = None


class JobsClient:
    """A connection to a coordinator's JobService; an async context manager.

    Args:
        target: The coordinator, ``host:port``.
        files: Our identity: an operator's, a researcher's or (to look) an auditor's.
        now: Unix time in seconds.
        pause: Waits some seconds, between attempts to watch again.
        jitter: Draws from [0, 1).

    Raises:
        UserError: `target` is no address; one of our own files is wrong, and what is wrong with it.
    """

    def __init__(
        self,
        target: str,
        files: IdentityFiles,
        *,
        now: Callable[[], float] = time.time,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = _RANDOM.random,
    ) -> None:
        Target.parse(target)
        self._own = tls.check_own_files(files, now=now()).identity
        self._target = target
        self._files = files
        self._now = now
        self._pause = pause
        self._jitter = jitter

    async def __aenter__(self) -> Self:
        credentials = tls.channel_credentials(self._files)
        self._channel = grpc.aio.secure_channel(self._target, credentials, options=tls.CHANNEL_OPTIONS)
        self._stub: JobServiceAsyncStub = JobServiceStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def submit(self, spec: JobSpec, model_path: Path, *, progress: Progress | None = None) -> str:
        """Submit a job with its initial model.

        Returns:
            The id that the coordinator gave it.

        Raises:
            UserError: The model file is not one, or the coordinator does not take the job; the text says why.
        """
        read_schema(model_path)  # a file that is no model is told here, not after minutes of sending it
        with (
            model_path.open("rb") as model,
            grpc.secure_channel(
                self._target, tls.channel_credentials(self._files), options=tls.CHANNEL_OPTIONS
            ) as channel,
        ):
            # Not the asyncio API: when the coordinator refuses while we write, that one often reports INTERNAL in the
            # place of the coordinator's status and words (github.com/grpc/grpc/issues/36066).
            call = JobServiceStub(channel).SubmitJob.future(_submission(spec, model, progress))
            done, loop = asyncio.Event(), asyncio.get_running_loop()

            def ended(_: object) -> None:
                loop.call_soon_threadsafe(done.set)

            call.add_done_callback(ended)
            try:
                await done.wait()
            finally:
                call.cancel()
            code, said = call.code(), call.details()
            if code is not grpc.StatusCode.OK:
                raise await self._failure(code, said, "SubmitJob")
            return printable(call.result().job_id)

    async def list_jobs(self) -> tuple[JobSummary, ...]:
        """Every job that the coordinator knows, in its order.

        Raises:
            UserError: The coordinator cannot be asked.
        """
        try:
            response = await self._stub.ListJobs(jobs_pb2.ListJobsRequest(), timeout=ANSWER_TIMEOUT_S)
            return tuple(decode_job(job, at=self._now()) for job in response.jobs)
        except grpc.aio.AioRpcError as error:
            raise await self._failure(error.code(), error.details(), "ListJobs") from None
        except WireError as error:
            raise self._garbled(error) from None

    async def find(self, wanted: str) -> JobSummary:
        """The job that `wanted` means: its id, its name, or the beginning of its id.

        Raises:
            UserError: No job, or more than one; or the coordinator cannot be asked.
        """
        return find_job(await self.list_jobs(), wanted)

    async def get(self, job_id: str) -> JobDetails:
        """A job with its history.

        Raises:
            UserError: There is no such job, or the coordinator cannot be asked.
        """
        try:
            response = await self._stub.GetJob(jobs_pb2.GetJobRequest(job_id=job_id), timeout=ANSWER_TIMEOUT_S)
            return decode_details(response)
        except grpc.aio.AioRpcError as error:
            raise await self._failure(error.code(), error.details(), "GetJob", job_id=job_id) from None
        except WireError as error:
            raise self._garbled(error) from None

    async def abort(self, job_id: str) -> JobSummary:
        """End a job; what it has committed stays. One that has ended already stays as it is.

        Raises:
            UserError: There is no such job, or the coordinator cannot be asked.
        """
        try:
            response = await self._stub.AbortJob(jobs_pb2.AbortJobRequest(job_id=job_id), timeout=ANSWER_TIMEOUT_S)
            return decode_job(response.job, at=self._now())
        except grpc.aio.AioRpcError as error:
            raise await self._failure(error.code(), error.details(), "AbortJob", job_id=job_id) from None
        except WireError as error:
            raise self._garbled(error) from None

    async def watch(self, job_id: str) -> AsyncIterator[WatchEvent]:
        """What happened in a job and what happens, until it ends: the last `JobSummary` has `ended` true.

        After a broken connection a `ConnectionLost` is given and, once connected again, past rounds and the current
        attempt come a second time: `maskwork.watch_view.WatchState` takes them once.

        Raises:
            UserError: There is no such job, we may not watch it, our certificate is not good (any more), or the
                coordinator could not be reached in the first place.
        """
        failures, connected, ended = 0, False, False
        while True:
            began = math.inf
            try:
                if connected:
                    await asyncio.wait_for(self._channel.channel_ready(), RECONNECT_TIMEOUT_S)
                async for response in self._stub.WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id)):
                    connected, began = True, min(began, self._now())
                    if (event := self._event(response, job_id)) is not None:
                        ended = ended or (isinstance(event, JobSummary) and event.ended)
                        yield event
                connected, detail = True, "the coordinator ended the stream"
                if not ended and (job := await self._summary(job_id)).ended:
                    yield job
                    return
            except grpc.aio.AioRpcError as error:
                detail = printable(error.details() or error.code().name)
                passing = error.code() in _PASSING or "RST_STREAM" in detail
                if not ended and not (connected and passing):
                    raise await self._failure(error.code(), error.details(), "WatchJob", job_id=job_id) from None
            except TimeoutError:
                detail = f"{self._target} cannot be reached"
            if ended:
                return
            now = self._now()
            failures = 1 if now - began > LONGEST_PAUSE_S else failures + 1  # a stream that lasted begins anew
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures - 1, 10)) * (0.5 + self._jitter())
            yield ConnectionLost(job_id, now, detail, pause_s)
            await self._pause(pause_s)
            tls.check_own_files(self._files, now=self._now())

    async def _summary(self, job_id: str) -> JobSummary:
        response = await self._stub.GetJob(jobs_pb2.GetJobRequest(job_id=job_id), timeout=ANSWER_TIMEOUT_S)
        try:
            return decode_job(response.job, at=self._now())
        except WireError as error:
            raise self._garbled(error) from None

    def _event(self, response: jobs_pb2.WatchJobResponse, job_id: str) -> JobEvent | None:
        try:
            return decode_event(response, job_id=job_id)
        except WireError as error:
            raise self._garbled(error) from None

    async def export(
        self, job_id: str, to: Path, *, round_number: int = 0, progress: Progress | None = None
    ) -> ExportedModel:
        """Fetch a committed model into the file `to`, which is replaced only by a whole and checked model.

        Args:
            job_id: The job.
            to: A safetensors file.
            round_number: The model after this round; 0: the newest.
            progress: Told how far it is.

        Raises:
            UserError: There is no such job or model, what arrived is not what was promised, or `to` cannot be written.
        """
        request = jobs_pb2.ExportModelRequest(job_id=job_id, round_number=round_number)
        call = self._stub.ExportModel(request)
        try:
            return await _receive(call, to, progress=progress, judge=functools.partial(self._judge, request))
        except WireError as error:
            raise self._garbled(error) from None
        except grpc.aio.AioRpcError as error:
            raise await self._failure(error.code(), error.details(), "ExportModel", job_id=job_id) from None
        finally:
            call.cancel()

    def _judge(self, request: jobs_pb2.ExportModelRequest, signed: SignedModel, digest: bytes) -> None:
        """Raise UserError unless the coordinator signed for this model, as that of the job and round asked for."""
        roots = TrustRoots.from_file(self._files.ca)
        check_file(verify_signed(signed, roots=roots, now=self._now()), digest, named="what the coordinator sent")
        said, asked = signed.statement, request.round_number
        if said.job_id != request.job_id or (asked and said.round_number != asked):
            raise UserError(
                f"the coordinator sent round {said.round_number} of job {said.job_id} where "
                f"round {asked or 'the newest'} of {request.job_id} was asked for: tell its operator"
            )

    async def _failure(self, code: grpc.StatusCode, details: str | None, method: str, *, job_id: str = "") -> UserError:
        """What a failed call means for the person who asked for it."""
        said, roles = printable(details or ""), PERMISSIONS.get(_SERVICE + method, frozenset())
        if code is grpc.StatusCode.UNAVAILABLE:
            return await self._unavailable(said)
        if code is grpc.StatusCode.PERMISSION_DENIED and self._own.role not in roles:
            return UserError(
                f"{self._own.uri} may not do this at {self._target}: it takes a certificate of one of the roles "
                f"{', '.join(sorted(role.value for role in roles))}. Choose another --identity directory"
            )
        if code is grpc.StatusCode.UNAUTHENTICATED:
            return UserError(
                f"the coordinator at {self._target} does not accept {self._files.cert} ({self._own.uri}): "
                f"{said or code.name}. It may have been revoked; ask the federation's operator for a new one"
            )
        if code is grpc.StatusCode.NOT_FOUND:
            told = said or f"there is no job {job_id}"
            return UserError(f"the coordinator says: {told}. `maskwork job list` shows the jobs that it knows")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and said in ("", _OUR_DEADLINE):
            return UserError(
                f"the coordinator at {self._target} did not answer within {ANSWER_TIMEOUT_S:g} s: try again, "
                "or ask its operator"
            )
        if code in _SAID_BY_COORDINATOR:
            return UserError(f"the coordinator refuses: {said or code.name}")
        return UserError(
            f"the coordinator at {self._target} could not do it ({code.name}: {said or 'no details'}); "
            "its log says more"
        )

    async def _unavailable(self, said: str) -> UserError:
        reason = await asyncio.to_thread(tls.probe_server, self._files, self._target)
        if reason is None:
            # It can be reached and takes our certificate: the fault is elsewhere, or has passed.
            return UserError(f"the coordinator at {self._target} could not do it just now ({said}): try again")
        return UserError(tls.explain_connection_failure(self._files, self._target, now=self._now(), reason=reason))

    def _garbled(self, error: WireError) -> UserError:
        return UserError(
            f"the coordinator at {self._target} sent what this version does not understand ({error}): "
            "are both of the same version? `maskwork --version` tells"
        )


def find_job(jobs: Sequence[JobSummary], wanted: str) -> JobSummary:
    """The one job that `wanted` means: the job of that id, else of that name or with an id that begins so.

    Raises:
        UserError: There is none, or more than one.
    """
    for job in jobs:
        if job.job_id == wanted:
            return job
    found = [job for job in jobs if wanted and (job.name == wanted or job.job_id.startswith(wanted))]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"no job has the id or name {wanted!r}: `maskwork job list` shows the {len(jobs)} there are")
    several = ", ".join(f"{job.job_id} ({job.name}, {job.state})" for job in found[-5:])
    raise UserError(f"{wanted!r} could be any of {len(found)} jobs: give more of the id. The latest: {several}")


def _submission(spec: JobSpec, model: BinaryIO, progress: Progress | None) -> Iterator[jobs_pb2.SubmitJobRequest]:
    size = os.fstat(model.fileno()).st_size
    header = jobs_pb2.SubmitJobHeader(spec_json=spec.canonical_json(), model_size=size)
    yield jobs_pb2.SubmitJobRequest(header=header)
    sent = 0
    while chunk := model.read(tls.CHUNK_BYTES):
        yield jobs_pb2.SubmitJobRequest(model=chunk)
        sent += len(chunk)
        if progress is not None:
            progress(sent, size)


async def _receive(
    call: grpc.aio.UnaryStreamCall[jobs_pb2.ExportModelRequest, jobs_pb2.ExportModelResponse],
    to: Path,
    *,
    progress: Progress | None,
    judge: Callable[[SignedModel, bytes], None],
) -> ExportedModel:
    """Write what arrives beside `to`, check it, and give it its name; a failure leaves nothing behind."""
    if not to.parent.is_dir():
        raise UserError(f"{to}: there is no directory {to.parent}; make it first")
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=to.parent, prefix=f".{to.name}.", delete=False) as file:
            temporary = Path(file.name)
            digest, size, signed = await _write_checked(call, file, to, progress=progress)
            if signed is not None:
                judge(signed, digest)
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # 0600, as it is made, is not what a download should have
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(to)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StoreError.from_cause(error, file=to) from None
        raise
    return ExportedModel(to, digest, size, signed)


async def _write_checked(
    call: grpc.aio.UnaryStreamCall[jobs_pb2.ExportModelRequest, jobs_pb2.ExportModelResponse],
    file: IO[bytes],
    to: Path,
    *,
    progress: Progress | None,
) -> tuple[bytes, int, SignedModel | None]:
    hashed, received, promised, size, signed = hashlib.sha256(), 0, b"", 0, None
    async for response in call:
        if not promised:
            promised, size = response.digest, response.size
            signed = decode_signature(response.signature) if response.HasField("signature") else None
        received += len(response.data)
        if received > size:
            break
        hashed.update(response.data)
        file.write(response.data)
        if progress is not None:
            progress(received, size)
    if received != size or hashed.digest() != promised:
        raise UserError(
            f"{to}: not written, because the model that arrived is not the one that was promised "
            f"({received} of {size} bytes, SHA-256 {hashed.hexdigest()[:16]}… instead of {promised.hex()[:16]}…): "
            "try again; if it stays so, the coordinator's disk is damaged"
        )
    return promised, size, signed


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
