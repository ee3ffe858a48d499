"""The client of the JobService, against one on loopback with real mTLS.

No wait is a sleep: pauses between attempts to watch again end at once, or when the test says so.
"""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from tests.jobs import scripted_events as make
from tests.jobs.fake_job_service import BREAK, FAULT, FakeJobService, Federation, a_model, serving, summary

from maskwork.errors import UserError
from maskwork.job import JobSpec, parse_spec
from maskwork.job_events import ConnectionLost, JobSummary, RoundCommitted, WatchEvent
from maskwork.jobs_client import LONGEST_PAUSE_S, JobsClient
from maskwork.net.authority import Authority
from maskwork.net.identity import IdentityError, IdentityFiles, IdentityProblem, Role
from maskwork.net.tls import CHUNK_BYTES

# isort: split
# Only now: gRPC reads its cipher suites while it is imported.
import grpc

pytestmark = pytest.mark.e2e

PATIENCE_S = 20.0
SPEC = JobSpec(name="digits", task="digits", rounds=20)
RUNNING = summary()
COMPLETED = summary(state="completed", committed=2, total=2)
FAILED = summary(state="failed", committed=1, total=2)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("ward"))


@pytest.fixture
def service(federation: Federation) -> FakeJobService:
    return FakeJobService(federation.authority.roots, jobs=[RUNNING])


@pytest.fixture
async def target(federation: Federation, service: FakeJobService) -> AsyncIterator[str]:
    async with serving(federation, service) as address:
        yield address


class Pauses:
    """Records pauses instead of making them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


async def watched(client: JobsClient, job_id: str = make.JOB) -> list[WatchEvent]:
    async with asyncio.timeout(PATIENCE_S):
        return [event async for event in client.watch(job_id)]


# --- submitting -----------------------------------------------------------------------------------------------------


async def test_submit_streams_the_model(
    federation: Federation, service: FakeJobService, target: str, tmp_path: Path
) -> None:
    model = a_model(tmp_path)
    moved: list[tuple[int, int]] = []
    async with JobsClient(target, federation.researcher) as client:
        job_id = await client.submit(SPEC, model, progress=lambda done, total: moved.append((done, total)))
    assert job_id == RUNNING.job_id
    assert parse_spec(service.submitted_spec) == SPEC
    assert service.submitted_model == model.read_bytes()
    assert service.chunk_sizes[:-1] == [CHUNK_BYTES, CHUNK_BYTES]
    size = model.stat().st_size
    assert moved[-1] == (size, size)


async def test_a_job_that_the_coordinator_refuses(
    federation: Federation, service: FakeJobService, target: str, tmp_path: Path
) -> None:
    service.refuse_submit = "task digits: \x1b[2Jno site is configured for it"
    async with JobsClient(target, federation.researcher) as client:
        with pytest.raises(UserError, match=r"refuses: task digits:  \[2Jno site is configured") as caught:
            await client.submit(SPEC, a_model(tmp_path, parameters=4_000_000))
    assert "\x1b" not in str(caught.value)


async def test_a_file_that_is_no_model_is_not_sent(
    federation: Federation, service: FakeJobService, target: str, tmp_path: Path
) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"PK\x03\x04 a pickle in a zip")
    async with JobsClient(target, federation.researcher) as client:
        with pytest.raises(UserError, match=r"m\.safetensors"):
            await client.submit(SPEC, tmp_path / "m.safetensors")
    assert not service.submitted_spec


# --- watching -------------------------------------------------------------------------------------------------------


async def test_watch_survives_broken_connections(federation: Federation, service: FakeJobService, target: str) -> None:
    service.watches = [
        [RUNNING, make.committed(1), BREAK],
        [BREAK],
        [RUNNING, make.committed(1), make.committed(2), COMPLETED],
    ]
    pauses = Pauses()
    async with JobsClient(target, federation.researcher, pause=pauses, jitter=lambda: 0.5) as client:
        events = await watched(client)
    lost = [event for event in events if isinstance(event, ConnectionLost)]
    assert [event.retry_s for event in lost] == pauses.seconds == [0.5, 1.0]
    assert "shutting down" in lost[0].detail
    assert [event.round_number for event in events if isinstance(event, RoundCommitted)] == [1, 1, 2]
    assert isinstance(events[-1], JobSummary)
    assert events[-1].ended


async def test_watch_survives_a_restart_of_the_coordinator(federation: Federation, service: FakeJobService) -> None:
    service.watches = [[RUNNING, make.committed(1)], [RUNNING, make.committed(1), make.committed(2), COMPLETED]]
    service.hold = asyncio.Event()
    stopped, restarted = asyncio.Event(), asyncio.Event()

    async def pause(_: float) -> None:
        stopped.set()
        await restarted.wait()

    first = AsyncExitStack()
    target = await first.enter_async_context(serving(federation, service))
    async with JobsClient(target, federation.researcher, pause=pause) as client:
        events = client.watch(make.JOB)
        assert [await anext(events), await anext(events)] == [RUNNING, make.committed(1)]
        watching = asyncio.create_task(_rest(events))
        await first.aclose()
        await asyncio.wait_for(stopped.wait(), PATIENCE_S)
        service.hold = None
        refused = await _refuse_one_connection(int(target.rpartition(":")[2]))
        restarted.set()
        await asyncio.wait_for(refused, PATIENCE_S)
        async with serving(federation, service, port=int(target.rpartition(":")[2])):
            rest = await asyncio.wait_for(watching, PATIENCE_S)
    assert [isinstance(event, ConnectionLost) for event in rest] == [True, False, False, False, False]
    assert rest[-2:] == [make.committed(2), COMPLETED]


async def _refuse_one_connection(port: int) -> "asyncio.Task[None]":
    """Close the first connection to a port, then the port."""
    called = asyncio.Event()

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        called.set()

    server = await asyncio.start_server(close, "localhost", port)

    async def wait() -> None:
        async with server:
            await called.wait()

    return asyncio.create_task(wait())


async def _rest(events: AsyncIterator[WatchEvent]) -> list[WatchEvent]:
    return [event async for event in events]


async def test_pauses_grow_to_a_limit_with_jitter(federation: Federation, service: FakeJobService, target: str) -> None:
    service.watches = [[RUNNING, BREAK] for _ in range(9)]
    service.watches += [[COMPLETED]]
    pauses, draws, clock = Pauses(), iter([0.0, 0.999, *[0.5] * 7]), [federation.now]
    async with JobsClient(
        target, federation.researcher, now=lambda: clock[0], pause=pauses, jitter=lambda: next(draws)
    ) as client:
        async for event in client.watch(make.JOB):
            if isinstance(event, JobSummary) and service.watch_calls == 8:
                clock[0] += LONGEST_PAUSE_S + 1  # the eighth stream lasts; the others break at once
    assert pauses.seconds[:2] == [pytest.approx(0.25), pytest.approx(1.499)]
    assert pauses.seconds[2:7] == [2.0, 4.0, 8.0, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert pauses.seconds[7:] == [0.5, 1.0], "a stream that lasted begins anew"


async def test_a_watch_that_was_cut_off_looks_whether_the_job_has_ended(
    federation: Federation, service: FakeJobService, target: str
) -> None:
    service.watches = [[RUNNING, make.committed(1)]]
    service.jobs = [COMPLETED]
    pauses = Pauses()
    async with JobsClient(target, federation.researcher, pause=pauses) as client:
        assert (await watched(client))[-1].job_id == COMPLETED.job_id
    assert pauses.seconds == []


async def test_a_watch_that_was_cut_off_from_a_running_job_goes_on(
    federation: Federation, service: FakeJobService, target: str
) -> None:
    service.watches = [[RUNNING, make.committed(1)], [RUNNING, make.committed(2), COMPLETED]]
    async with JobsClient(target, federation.researcher, pause=Pauses()) as client:
        events = await watched(client)
    assert [type(event) for event in events].count(ConnectionLost) == 1
    assert events[-1] == COMPLETED


async def test_a_coordinator_that_ends_its_streams_and_goes_is_waited_for(
    federation: Federation, service: FakeJobService, target: str
) -> None:
    service.watches = [[RUNNING], [RUNNING, COMPLETED]]
    service.failures["GetJob"] = (grpc.StatusCode.UNAVAILABLE, "shutting down")
    async with JobsClient(target, federation.researcher, pause=Pauses()) as client:
        events = await watched(client)
    assert [type(event) for event in events] == [JobSummary, ConnectionLost, JobSummary, JobSummary]


async def test_a_job_that_ended_ends_the_watch_even_if_the_connection_breaks_then(
    federation: Federation, service: FakeJobService, target: str
) -> None:
    service.watches = [[COMPLETED, BREAK], [COMPLETED, FAULT]]
    async with JobsClient(target, federation.researcher, pause=Pauses()) as client:
        assert await watched(client) == [COMPLETED]
        assert await watched(client) == [COMPLETED]


async def test_a_watch_ends_when_our_certificate_does(
    federation: Federation, service: FakeJobService, target: str
) -> None:
    service.watches = [[RUNNING, BREAK]]
    clock = [federation.now]

    async def pause(_: float) -> None:
        clock[0] += 400 * 86_400

    async with JobsClient(target, federation.researcher, now=lambda: clock[0], pause=pause) as client:
        with pytest.raises(IdentityError) as caught:
            await watched(client)
    assert caught.value.problem is IdentityProblem.EXPIRED


# --- taking the model home ------------------------------------------------------------------------------------------


async def test_export_writes_the_model(
    federation: Federation, service: FakeJobService, target: str, tmp_path: Path
) -> None:
    service.model = a_model(tmp_path).read_bytes()
    to = tmp_path / "out" / "model.safetensors"
    to.parent.mkdir()
    to.write_bytes(b"an older model")
    async with JobsClient(target, federation.researcher) as client:
        exported = await client.export(make.JOB, to, round_number=7)
    assert to.read_bytes() == service.model
    assert exported.digest == hashlib.sha256(service.model).digest()
    assert exported.size == len(service.model)
    assert service.exported_rounds == [7]
    assert [path.name for path in to.parent.iterdir()] == ["model.safetensors"]
    umask = os.umask(0o077)
    os.umask(umask)
    assert to.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("fault", ["another digest", "too long", "too short", "nothing"])
async def test_export_checks_what_arrives(
    federation: Federation, service: FakeJobService, target: str, tmp_path: Path, fault: str
) -> None:
    service.model = bytes(300_000)
    if fault == "another digest":
        service.promised_digest = bytes(32)
    else:
        service.promised_size = {"too long": 200_000, "too short": 300_001, "nothing": 0}[fault]
    moved: list[tuple[int, int]] = []
    to = tmp_path / "model.safetensors"
    to.write_bytes(b"an older model")
    async with JobsClient(target, federation.researcher) as client:
        with pytest.raises(UserError, match="not the one that was promised"):
            await client.export(make.JOB, to, progress=lambda done, total: moved.append((done, total)))
    assert all(done <= total for done, total in moved), "no more is written than was promised"
    assert to.read_bytes() == b"an older model"
    assert list(tmp_path.iterdir()) == [to]


@pytest.mark.parametrize("lie", ["another job", "another round", "another model", "another CA", "changed", "future"])
async def test_export_checks_the_coordinators_signature_before_the_file_has_its_name(
    federation: Federation, service: FakeJobService, target: str, tmp_path: Path, lie: str
) -> None:
    service.model = bytes(3000)
    good = federation.signed(service.model, job_id=make.JOB, round_number=7)
    if lie == "another CA":
        stranger = Federation(tmp_path / "stranger")
        service.signed = stranger.signed(service.model, job_id=make.JOB, round_number=7)
    else:
        service.signed = {
            "another job": federation.signed(service.model, job_id="other", round_number=7),
            "another round": federation.signed(service.model, job_id=make.JOB, round_number=6),
            "another model": federation.signed(bytes(2999), job_id=make.JOB, round_number=7),
            "changed": replace(good, statement=replace(good.statement, session_id=bytes(32))),
            "future": federation.signed(service.model, job_id=make.JOB, round_number=7, signed_at=2**33),
        }[lie]
    to = tmp_path / "model.safetensors"
    async with JobsClient(target, federation.researcher) as client:
        with pytest.raises(UserError):
            await client.export(make.JOB, to, round_number=7)
        assert not to.exists()
        service.signed = good
        assert (await client.export(make.JOB, to, round_number=7)).signed == good


async def test_export_into_a_directory_that_is_not_there(
    federation: Federation, service: FakeJobService, target: str, tmp_path: Path
) -> None:
    async with JobsClient(target, federation.researcher) as client:
        with pytest.raises(UserError, match="there is no directory"):
            await client.export(make.JOB, tmp_path / "nowhere" / "m.safetensors")


# --- errors in words ------------------------------------------------------------------------------------------------


async def test_the_wrong_role_is_told_which_roles_may(federation: Federation, target: str, tmp_path: Path) -> None:
    async with JobsClient(target, federation.member(Role.AUDITOR, "eve")) as client:
        assert await client.list_jobs()
        with pytest.raises(UserError, match=r"auditor/eve may not do this .* the roles operator, researcher\. Ch"):
            await client.submit(SPEC, a_model(tmp_path, parameters=9))
        with pytest.raises(UserError, match="roles operator, researcher"):
            await client.abort(make.JOB)
        await client.export(make.JOB, tmp_path / "m")  # an auditor reads everything
    async with JobsClient(target, federation.member(Role.PARTICIPANT, "site")) as client:
        with pytest.raises(UserError, match="auditor, operator, researcher"):
            await client.list_jobs()
        with pytest.raises(UserError, match="auditor, operator, researcher"):
            await watched(client)


async def test_an_unknown_job(federation: Federation, target: str, tmp_path: Path) -> None:
    async with JobsClient(target, federation.researcher) as client:
        for call in (client.get("zz"), client.abort("zz"), client.export("zz", tmp_path / "m"), watched(client, "zz")):
            with pytest.raises(UserError, match=r"says: there is no job zz\. `maskwork job list`"):
                await call


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (
            grpc.StatusCode.FAILED_PRECONDITION,
            "no round is committed",
            "^the coordinator refuses: no round is committed$",
        ),
        (grpc.StatusCode.PERMISSION_DENIED, "not your job", "^the coordinator refuses: not your job$"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "no data for too long", "^the coordinator refuses: no data for too long$"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", "did not answer within 30 s"),
        (grpc.StatusCode.UNAUTHENTICATED, "certificate refused: revoked", "does not accept .*cert.pem .*: revoked"),
        (grpc.StatusCode.UNAVAILABLE, "its storage is not available", r"just now \(its storage is not available\)"),
        (grpc.StatusCode.INTERNAL, "internal error", "INTERNAL: internal error.*; its log says more"),
    ],
)
async def test_each_refusal_in_words(
    federation: Federation, service: FakeJobService, target: str, *, code: grpc.StatusCode, said: str, words: str
) -> None:
    service.failures["GetJob"] = service.failures["WatchJob"] = (code, said)
    async with JobsClient(target, federation.researcher) as client:
        for call in (client.get(make.JOB), watched(client)):
            with pytest.raises(UserError, match=words):
                await call


async def test_a_fault_of_the_coordinator_ends_a_watch(
    federation: Federation, service: FakeJobService, target: str
) -> None:
    service.watches = [[RUNNING, BREAK]]

    async def pause(_: float) -> None:
        service.failures["WatchJob"] = (grpc.StatusCode.INTERNAL, "internal error")

    async with JobsClient(target, federation.researcher, pause=pause) as client:
        with pytest.raises(UserError, match="internal error"):
            await watched(client)


async def test_nobody_there(federation: Federation, service: FakeJobService) -> None:
    async with serving(federation, service) as target:
        pass
    async with JobsClient(target, federation.researcher) as client:
        with pytest.raises(UserError, match=f"cannot connect to {target}: connection refused"):
            await client.list_jobs()
        with pytest.raises(UserError, match="connection refused"):
            await watched(client)


async def test_a_coordinator_of_another_federation(federation: Federation, target: str, tmp_path: Path) -> None:
    stranger = Authority.create("ward", now=federation.now).issue(Role.RESEARCHER, "ada", now=federation.now)
    async with JobsClient(target, stranger.write(tmp_path / "stranger")) as client:
        with pytest.raises(UserError, match="the server's certificate is refused"):
            await client.list_jobs()


def test_our_own_files_are_looked_at_first(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="cannot be read"):
        JobsClient("localhost:1", IdentityFiles.in_directory(tmp_path))
    with pytest.raises(IdentityError, match="expired"):
        JobsClient("localhost:1", federation.researcher, now=lambda: federation.now + 400 * 86_400)
    with pytest.raises(UserError, match="expected HOST:PORT"):
        JobsClient("localhost", federation.researcher)
