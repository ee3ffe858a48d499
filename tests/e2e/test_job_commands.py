"""`maskwork job`, `maskwork model export` and the client under them, against a JobService on loopback with real mTLS.

No wait is a sleep: pauses between attempts to watch again end at once, or when the test says so.
"""

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from maskwork.errors import UserError
from maskwork.job import JobSpec, parse_spec
from maskwork.job_events import ConnectionLost, JobDetails, JobSummary, PastAttempt, RoundCommitted, WatchEvent
from maskwork.jobs_client import LONGEST_PAUSE_S, JobsClient
from maskwork.net.authority import Authority
from maskwork.net.identity import IdentityError, IdentityFiles, IdentityProblem, Role
from maskwork.net.tls import CHUNK_BYTES
from maskwork.tensors import Schema, TensorSpec, write_model
from tests.jobs import scripted_events as make
from tests.jobs.fake_job_service import BREAK, FakeJobService, Federation, serving, summary

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


def a_model(folder: Path, *, parameters: int = 700_000) -> Path:
    path = folder / "m.safetensors"
    vector = np.linspace(-1, 1, parameters, dtype=np.float32)
    write_model(path, Schema((TensorSpec("w", "F32", (parameters,)),)), vector, {})
    return path


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
    service.watches = [[RUNNING, make.committed(1), BREAK], [RUNNING, make.committed(2), COMPLETED]]
    down, up = asyncio.Event(), asyncio.Event()

    async def pause(_: float) -> None:
        down.set()
        await up.wait()

    async with serving(federation, service) as target, JobsClient(target, federation.researcher, pause=pause) as client:
        watching = asyncio.create_task(watched(client))
        await asyncio.wait_for(down.wait(), PATIENCE_S)
    async with serving(federation, service, port=int(target.rpartition(":")[2])):
        client = JobsClient(target, federation.researcher, pause=pause)
        up.set()
        with pytest.raises(UserError):  # that client was closed with its block: the watch says so and ends
            await watching
        async with client:
            assert (await watched(client))[-1] == COMPLETED


async def test_pauses_grow_to_a_limit_with_jitter(federation: Federation, service: FakeJobService, target: str) -> None:
    service.watches = [[RUNNING, BREAK], *([BREAK] for _ in range(8)), [RUNNING, BREAK], [COMPLETED]]
    pauses, draws = Pauses(), iter([0.0, 0.999, *[0.5] * 8])
    async with JobsClient(target, federation.researcher, pause=pauses, jitter=lambda: next(draws)) as client:
        await watched(client)
    assert pauses.seconds[:2] == [pytest.approx(0.25), pytest.approx(1.499)]
    assert pauses.seconds[2:9] == [2.0, 4.0, 8.0, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert pauses.seconds[9:] == [0.5], "a connection that worked begins anew"


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


async def test_a_job_that_ended_ends_the_watch_even_if_the_connection_breaks_then(
    federation: Federation, service: FakeJobService, target: str
) -> None:
    service.watches = [[COMPLETED, BREAK]]
    async with JobsClient(target, federation.researcher, pause=Pauses()) as client:
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
    to = tmp_path / "model.safetensors"
    to.write_bytes(b"an older model")
    async with JobsClient(target, federation.researcher) as client:
        with pytest.raises(UserError, match="not the one that was promised"):
            await client.export(make.JOB, to)
    assert to.read_bytes() == b"an older model"
    assert list(tmp_path.iterdir()) == [to]


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
        for call in (client.submit(SPEC, a_model(tmp_path, parameters=9)), client.abort(make.JOB)):
            with pytest.raises(UserError, match="auditor/eve may not do this.*: operator, researcher") as caught:
                await call
            assert "--identity" in str(caught.value)
        with pytest.raises(UserError, match="operator, researcher"):
            await client.export(make.JOB, tmp_path / "m")
    async with JobsClient(target, federation.member(Role.PARTICIPANT, "site")) as client:
        with pytest.raises(UserError, match="auditor, operator, researcher"):
            await client.list_jobs()
        with pytest.raises(UserError, match="auditor, operator, researcher"):
            await watched(client)


async def test_an_unknown_job(federation: Federation, target: str, tmp_path: Path) -> None:
    async with JobsClient(target, federation.researcher) as client:
        for call in (client.get("zz"), client.abort("zz"), client.export("zz", tmp_path / "m"), watched(client, "zz")):
            with pytest.raises(UserError, match="knows no job zz: `maskwork job list`"):
                await call


async def test_the_coordinators_own_words(federation: Federation, service: FakeJobService, target: str) -> None:
    service.jobs = [COMPLETED]
    async with JobsClient(target, federation.researcher) as client:
        with pytest.raises(UserError, match="the coordinator refuses: job 3f9a1c is completed already"):
            await client.abort(make.JOB)


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
    with pytest.raises(UserError, match="expected HOST:PORT"):
        JobsClient("localhost", federation.researcher)


# --- the commands ---------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from importlib.metadata import EntryPoint
from maskwork.cli import ENTRY_POINT_GROUP, run
points = {name: (EntryPoint(name, f"maskwork.job_commands:{app}", ENTRY_POINT_GROUP),)
          for name, app in (("job", "app"), ("model", "model_app"))}
run(points, sys.argv[1:])
"""


class Shell:
    """Runs `maskwork …` as a process of its own, with the two environment variables set."""

    def __init__(self, target: str, federation: Federation) -> None:
        identity = str(federation.researcher.cert.parent)
        self.environment = {**os.environ, "MASKWORK_COORDINATOR": target, "MASKWORK_IDENTITY": identity}

    async def start(self, *arguments: str | Path) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        words = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
        return await asyncio.create_subprocess_exec(*words, stdout=pipe, stderr=pipe, env=self.environment)

    async def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        process = await self.start(*arguments)
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()


@pytest.fixture
def maskwork(target: str, federation: Federation) -> Shell:
    return Shell(target, federation)


async def test_submit_and_watch(maskwork: Shell, service: FakeJobService, tmp_path: Path) -> None:
    a_model(tmp_path)
    (tmp_path / "job.toml").write_text('name="digits"\ntask="digits"\nrounds=2\nmodel="m.safetensors"\n')
    service.watches = [[RUNNING, make.committed(1), make.committed(2), COMPLETED]]
    code, out, err = await maskwork("job", "submit", tmp_path / "job.toml", "--watch")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == RUNNING.job_id
    assert "round 2/20 committed: 5 of 5 sites" in lines[-2]
    assert "completed" in lines[-1]
    assert len(service.submitted_model) == (tmp_path / "m.safetensors").stat().st_size


async def test_a_failed_job_is_exit_code_1(maskwork: Shell, service: FakeJobService) -> None:
    service.watches = [[RUNNING, make.committed(1), FAILED]]
    code, out, _ = await maskwork("job", "watch", "digits")
    assert code == 1
    assert "is failed" in out


async def test_ctrl_c_stops_watching_and_not_the_job(maskwork: Shell, service: FakeJobService) -> None:
    service.watches = [[RUNNING, make.committed(1)]]
    service.hold = asyncio.Event()
    process = await maskwork.start("job", "watch", "3f9")
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 130
    assert err.decode() == "stopped watching; the job goes on. Come back with `maskwork job watch 3f9a1c`\n"
    assert service.aborted == []


async def test_list_and_show(maskwork: Shell, service: FakeJobService) -> None:
    service.jobs = [RUNNING, summary("a81200", name="chest", state="failed")]
    service.details["a81200"] = JobDetails(
        service.jobs[1],
        (make.committed(1),),
        (PastAttempt(2, 1, "aborted", "complaint-upheld", make.T0), PastAttempt(1, 1, "committed", "", make.T0)),
        (make.dropped("north", 2),),
    )
    code, out, _ = await maskwork("job", "list")
    assert code == 0
    assert [line.split()[:5] for line in out.splitlines()[1:]] == [
        ["3f9a1c", "digits", "digits", "running", "0/20"],
        ["a81200", "chest", "digits", "failed", "0/20"],
    ]
    code, out, _ = await maskwork("job", "list", "--json")
    assert [job["job_id"] for job in json.loads(out)] == ["3f9a1c", "a81200"]
    assert json.loads(out)[0]["model_digest"] == RUNNING.model_digest.hex()
    code, out, _ = await maskwork("job", "show", "chest")
    assert code == 0
    for words in ("researcher/ada", "train.loss", "attempt 1 aborted: complaint-upheld", "north is out at masked-upd"):
        assert words in out
    assert "attempt 1 committed" not in out
    code, out, _ = await maskwork("job", "show", "a8", "--json")
    assert json.loads(out)["rounds"][0]["statistics"]["eval.accuracy"] == 0.875


async def test_abort(maskwork: Shell, service: FakeJobService) -> None:
    code, out, _ = await maskwork("job", "abort", "3f")
    assert (code, out) == (0, "digits (3f9a1c) is aborted, 0 of 20 rounds\n")
    assert service.aborted == ["3f9a1c"]


async def test_export_command(maskwork: Shell, service: FakeJobService, tmp_path: Path) -> None:
    service.model = bytes(range(256)) * 2000
    code, out, err = await maskwork("model", "export", "digits", "-o", tmp_path / "m.safetensors", "--round", "3")
    assert (code, err) == (0, "")
    assert hashlib.sha256(service.model).hexdigest() in out
    assert (tmp_path / "m.safetensors").read_bytes() == service.model
    assert service.exported_rounds == [3]


async def test_an_error_is_one_sentence_and_exit_code_1(maskwork: Shell, tmp_path: Path) -> None:
    code, out, err = await maskwork("job", "watch", "zz")
    assert (code, out) == (1, "")
    assert err == "error: no job has the id or name 'zz': `maskwork job list` shows the 1 there are\n"
    (tmp_path / "job.toml").write_text('name="digits"\ntask="digits"\nrunds=2\nmodel="m.safetensors"\n')
    code, _, err = await maskwork("job", "submit", tmp_path / "job.toml")
    assert code == 1
    assert "did you mean rounds?" in err
