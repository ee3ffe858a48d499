"""Coordinator and participants as real processes over loopback: kills, restarts, refusals and orderly ends.

What counts as failure: a round that does not commit, a session that is not the one expected, a traceback or an
unstructured line on standard error, an exit code other than the one named. Nothing here waits for time to pass.
"""

import asyncio
import contextlib
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from tests.e2e.services import PATIENCE_S, SITES, Service, Watch, World, descendants, free_port, spec

from maskwork import job_events as events
from maskwork.errors import UserError
from maskwork.net import tls
from maskwork.net.authority import Authority
from maskwork.net.identity import IdentityFiles, Role
from maskwork.tensors import read_vector
from maskwork.wire.v1 import federation_pb2, federation_pb2_grpc

# isort: split
# Only now: gRPC reads its cipher suites while it is imported.
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("services")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Four sites that were started before their coordinator; they train only what a test's job asks for."""
    world = World(tmp_path_factory.mktemp("ward"))
    await world.gate.open()
    try:
        for site in SITES:
            await world.start_site(site)
        await asyncio.gather(*(world.sites[site].logged("not connected") for site in SITES))
        await world.start_coordinator()
        yield world
    finally:
        await world.close()


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def everybody_goes_on(world: World) -> AsyncIterator[None]:
    """What a test held or stopped goes on after it, whatever became of the test."""
    yield
    for site in SITES:
        world.gate.release(site)
        if world.sites[site].process.returncode is None:
            world.sites[site].send(signal.SIGCONT)


async def test_sites_that_started_first_find_their_coordinator_and_a_job_completes(
    world: World, tmp_path: Path
) -> None:
    async with world.job("plain", rounds=2) as watch:
        ended = await watch.ended()
        assert (ended.state, ended.rounds_committed) == ("completed", 2)
        for number in (1, 2):
            committed = await watch.committed(number)
            assert committed.survivors == SITES
            assert committed.statistics == {"examples": 40.0, "train.loss": 0.5}
        async with world.client() as client:
            exported = await client.export(watch.job_id, tmp_path / "m.safetensors")
    assert exported.digest == ended.model_digest
    assert exported.signed is not None  # and was checked against the federation's CA
    said = exported.signed.statement
    assert (said.federation, said.job_id, said.round_number) == ("ward", watch.job_id, 2)
    opened = [e for e in watch.events if isinstance(e, events.AttemptOpened)]
    assert said.session_id == opened[-1].session_id
    # The sites add 0.25, 0.5, 0.75 and 1 to both weights, which are 1 in the beginning: 0.625 a round.
    np.testing.assert_allclose(read_vector(exported.path)[1], 2.25, atol=1e-5)


async def test_a_site_killed_before_its_upload_is_a_dropout_and_comes_back(world: World) -> None:
    world.gate.held = {"site-d"}
    async with world.job("before-upload", rounds=2) as watch:
        await watch.stage("masked-update")
        await watch.answered("masked-update", "site-a", "site-b", "site-c")
        await world.gate.reached("site-d")
        await world.sites["site-d"].kill()
        world.gate.release("site-d")
        first = await watch.committed(1)
        assert (first.survivors, first.dropouts) == (SITES[:3], ("site-d",))
        await world.start_site("site-d")
        assert (await watch.committed(2)).survivors == SITES
        details = await world.details(watch.job_id)
    assert [(d.round_number, d.participant, d.reason) for d in details.drops] == [(1, "site-d", "disconnected")]
    assert [a.outcome for a in details.attempts] == ["committed", "committed"]


async def test_a_site_killed_between_upload_and_unmasking_stays_in_the_sum(world: World) -> None:
    world.gate.held = {"site-a"}
    async with world.job("after-upload", rounds=2) as watch:
        await watch.answered("masked-update", "site-b", "site-c", "site-d")
        await world.gate.reached("site-a")
        await world.sites["site-c"].kill()
        world.gate.release("site-a")
        # Its update is in and counts: U3 holds it, and the other three hold enough shares of its self mask.
        assert (await watch.committed(1)).survivors == SITES
        await world.start_site("site-c")
        assert (await watch.committed(2)).survivors == SITES


async def test_a_coordinator_killed_before_unmasking_opens_a_new_attempt(world: World) -> None:
    world.gate.held = {"site-b"}
    async with world.job("killed-early") as watch:
        await watch.answered("masked-update", "site-a", "site-c", "site-d")
        await world.gate.reached("site-b")
        await world.coordinator.kill()
        world.gate.release("site-b")
        restarted = await world.start_coordinator()
        assert (await watch.ended()).state == "completed"
        details = await world.details(watch.job_id)
    assert [(a.attempt, a.outcome) for a in details.attempts] == [(1, "abandoned"), (2, "committed")]
    assert details.rounds[0].survivors == SITES
    assert not [e for e in restarted.lines if e["event"] == "session resumed"]


async def hold_at_unmasking(world: World, watch: Watch) -> None:
    """Bring a session to where unmasking was asked for and one site, stopped, has signed but not answered."""
    await watch.answered("masked-update", "site-a", "site-b", "site-c")
    await world.gate.reached("site-d")
    world.sites["site-a"].send(signal.SIGSTOP)  # has uploaded; will not sign for now
    world.gate.release("site-d")
    await watch.answered("consistency-check", "site-b", "site-c", "site-d")
    world.sites["site-d"].send(signal.SIGSTOP)  # has signed; what is asked next, it will not hear
    world.sites["site-a"].send(signal.SIGCONT)
    await watch.answered("unmask", "site-a", "site-b", "site-c")


async def test_a_coordinator_killed_after_asking_for_unmasking_resumes_that_session(world: World) -> None:
    world.gate.held = {"site-d"}
    async with world.job("killed-late") as watch:
        await hold_at_unmasking(world, watch)
        with sqlite3.connect(world.home / "coordinator-state" / "coordinator.sqlite") as database:
            ((session,),) = database.execute("select session_id from resumes").fetchall()
        await world.coordinator.kill()
        world.sites["site-d"].send(signal.SIGCONT)
        restarted = await world.start_coordinator()
        await restarted.logged("session resumed", job=watch.job_id)
        assert (await watch.ended()).state == "completed"
        details = await world.details(watch.job_id)
    assert [(a.attempt, a.outcome) for a in details.attempts] == [(1, "committed")]
    assert details.rounds[0].survivors == SITES
    opened = [e for e in watch.events if isinstance(e, events.AttemptOpened)]
    assert {e.session_id for e in opened} == {session}


async def test_a_task_that_raises_is_a_withdrawal_and_its_site_is_asked_again(world: World) -> None:
    world.gate.held = {"site-b"}
    async with world.job("raises", rounds=2) as watch:
        await world.gate.reached("site-b")
        world.gate.release("site-b", b"!")
        assert (await watch.committed(1)).dropouts == ("site-b",)
        assert (await watch.committed(2)).survivors == SITES
        details = await world.details(watch.job_id)
    assert [(d.participant, d.reason, d.detail) for d in details.drops] == [("site-b", "withdrew", "training-failed")]
    said = await world.sites["site-b"].logged("session aborted", reason="training-failed")
    assert "the data is gone" in said["detail"]


async def test_an_aborted_job_ends_the_training_at_every_site(world: World) -> None:
    world.gate.held = set(SITES)
    async with world.job("aborted") as watch, world.client(Role.OPERATOR) as operator:
        for site in SITES:
            await world.gate.reached(site)
        assert (await operator.abort(watch.job_id)).state == "aborted"
        assert (await watch.ended()).reason == "aborted by spiffe://ward/operator/someone"
        for site in SITES:
            await world.gate.left(site)
    world.gate.held = set()
    async with world.job("after-the-aborted-one") as watch:
        assert (await watch.ended()).state == "completed"


async def test_the_orderly_end_of_a_site_is_told_not_waited_for(world: World) -> None:
    world.gate.held = {"site-d"}
    async with world.job("leaves", rounds=1) as watch:
        await world.gate.reached("site-d")
        await watch.stage("masked-update")
        leaving = world.sites["site-d"]
        assert await leaving.terminate() == 0
        world.gate.release("site-d")
        leaving.assert_clean()
        assert (await watch.committed(1)).dropouts == ("site-d",)
        details = await world.details(watch.job_id)
    assert [(d.participant, d.reason, d.detail) for d in details.drops] == [("site-d", "withdrew", "cancelled")]
    await world.start_site("site-d")


async def test_the_coordinator_and_its_worker_hold_no_torch_after_all_these_rounds(world: World) -> None:
    family = descendants(world.coordinator.process.pid)
    assert len(family) >= 3  # itself, the fork server, the worker
    for pid in family:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    trainers = descendants(world.sites["site-a"].process.pid)
    assert any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in trainers)
    assert "libtorch" not in Path(f"/proc/{trainers[0]}/maps").read_text()  # the agent itself stays small


async def test_everybody_ends_in_order_in_the_middle_of_a_round(world: World) -> None:
    world.gate.held = {"site-a"}
    async with world.job("drained") as watch:
        await world.gate.reached("site-a")
        await watch.answered("masked-update", "site-b", "site-c", "site-d")
        assert await world.coordinator.terminate() == 0
        await world.gate.left("site-a")  # it was told
        codes = await asyncio.gather(*(world.sites[site].terminate() for site in SITES))
        assert codes == [0, 0, 0, 0]
    for service in world.all:
        if service.process.returncode == 0:
            service.assert_clean()


# --- what cannot start, and who is refused --------------------------------------------------------------------------


async def test_who_may_call_what(world: World) -> None:
    await world.start_coordinator()
    denied = {
        Role.PARTICIPANT: ("ListJobs", "SubmitJob", "AbortJob"),
        Role.AUDITOR: ("SubmitJob", "AbortJob"),
        Role.COORDINATOR: ("ListJobs", "SubmitJob", "AbortJob"),
        Role.OPERATOR: (),
        Role.RESEARCHER: (),
    }
    for role, methods in denied.items():
        async with world.client(role) as client:
            calls = {
                "ListJobs": client.list_jobs(),
                "SubmitJob": client.submit(spec("x", sites=("site-x", "site-y", "site-z")), world.model()),
                "AbortJob": client.abort("nothing"),
            }
            for method, call in calls.items():
                if method in methods:
                    with pytest.raises(UserError, match="may not do this"):
                        await call
                elif method == "AbortJob":
                    with pytest.raises(UserError, match="no job"):
                        await call
                else:
                    await call
    for role in (Role.OPERATOR, Role.RESEARCHER, Role.AUDITOR, Role.COORDINATOR):
        code, details = await connect(world, world.identity(role, "someone"))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert details == (
            f"a certificate with role {role.value} may not call /maskwork.wire.v1.FederationService/Connect"
        )


async def connect(world: World, files: IdentityFiles) -> tuple[grpc.StatusCode, str]:
    """Open a control stream with these files; how it was refused."""
    async with grpc.aio.secure_channel(
        world.address, tls.channel_credentials(files), options=tls.CHANNEL_OPTIONS
    ) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(
            "/maskwork.wire.v1.FederationService/Connect"
        )(timeout=PATIENCE_S)
        return await call.code(), await call.details()


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (federation_pb2.ConnectRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (federation_pb2.ConnectRequest(upload_ready=federation_pb2.UploadReady()), grpc.StatusCode.INVALID_ARGUMENT),
        (
            federation_pb2.ConnectRequest(hello=federation_pb2.Hello(versions=[7])),
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
    ],
)
async def test_a_control_stream_that_does_not_begin_with_a_hello_of_ours_is_refused(
    world: World, first: federation_pb2.ConnectRequest, code: grpc.StatusCode
) -> None:
    files = world.identity(Role.PARTICIPANT, "rude")
    async with grpc.aio.secure_channel(
        world.address, tls.channel_credentials(files), options=tls.CHANNEL_OPTIONS
    ) as channel:
        stub: federation_pb2_grpc.FederationServiceAsyncStub = federation_pb2_grpc.FederationServiceStub(channel)
        call = stub.Connect(timeout=PATIENCE_S)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call.write(first)
        assert await call.code() is code
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stub.Download(federation_pb2.DownloadRequest(digest=bytes(32)))))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Upload(iter([federation_pb2.UploadRequest(session_id=bytes(32))]))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_health_and_reflection_answer_any_member(world: World) -> None:
    files = world.identity(Role.AUDITOR, "someone")
    async with grpc.aio.secure_channel(
        world.address, tls.channel_credentials(files), options=tls.CHANNEL_OPTIONS
    ) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection.ServerReflectionInfo(timeout=PATIENCE_S)
        await asked.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        services = {s.name for s in (await asked.read()).list_services_response.service}
        assert {
            "maskwork.wire.v1.FederationService",
            "maskwork.wire.v1.JobService",
            "grpc.health.v1.Health",
        } <= services
        asked.cancel()


async def refused_to_start(world: World, group: str, config: Path) -> str:
    """Start something that cannot start; its one line of error."""
    service = await world.start("wrong", group, config)
    assert await service.wait() == 1, service.text
    (line,) = [e["event"] for e in service.lines if e["event"] and "level" not in e]  # what is no log line
    assert line.startswith("error: ")
    return str(line)


async def test_a_coordinator_that_cannot_start_says_why_in_one_line(world: World) -> None:
    taken = world.coordinator_config(state="other-state")
    assert f"cannot listen on {world.address}" in await refused_to_start(world, "coordinator", taken)

    garbage = world.home / "garbage-state"
    garbage.mkdir()
    (garbage / "coordinator.sqlite").write_bytes(b"this is not a database" * 100)
    config = world.coordinator_config(state="garbage-state")
    assert f"{garbage / 'coordinator.sqlite'}: is damaged or not a database" in await refused_to_start(
        world, "coordinator", config
    )

    in_use = world.coordinator_config(listen=f"127.0.0.1:{free_port()}")
    assert "in use" in await refused_to_start(world, "coordinator", in_use)

    files = world.authority.issue(Role.COORDINATOR, "bad", now=time.time(), ip_addresses=["127.0.0.1"])
    broken = files.write(world.home / "broken-key")
    broken.key.write_bytes(b"-----BEGIN PRIVATE KEY-----\nnonsense\n-----END PRIVATE KEY-----\n")
    config = world.coordinator_config(identity="broken-key", state="other-state")
    assert str(broken.key) in await refused_to_start(world, "coordinator", config)


@pytest.mark.parametrize("wrong", ["expired", "role", "ca"])
async def test_a_site_with_the_wrong_certificate_says_what_is_wrong_with_it(world: World, wrong: str) -> None:
    now, home = time.time(), world.home / f"wrong-{wrong}"
    if wrong == "expired":
        elder = Authority.create("ward", now=now - 100 * 86_400)
        elder.issue(Role.PARTICIPANT, "site-x", now=now - 50 * 86_400, days=1).write(home)
        says = "expired"
    elif wrong == "role":
        world.authority.issue(Role.RESEARCHER, "site-x", now=now).write(home)
        says = "researcher"
    else:
        Authority.create("ward", now=now).issue(Role.PARTICIPANT, "site-x", now=now).write(home)
        says = ""
    config = world.site_config("site-a", identity=home.name, state=f"state-{wrong}")
    if wrong != "ca":
        line = await refused_to_start(world, "participant", config)
        assert says in line
        assert str(home) in line
        return
    # Its own files agree with each other; only the coordinator's certificate shows that the CA is another one.
    service = await world.start("stranger", "participant", config)
    line = (await service.logged("not connected"))["detail"]
    assert "the server's certificate is refused" in line
    assert await service.terminate() == 0
    service.assert_clean()


async def test_a_site_whose_task_cannot_be_loaded_says_so(world: World) -> None:
    config = world.site_config("site-a", state="state-no-task")
    config.write_text(config.read_text().replace("gated_task:Gated", "gated_task:Gate"))
    assert "gated_task:Gate" in await refused_to_start(world, "participant", config)


async def test_the_coordinator_that_was_refused_nothing_ends_in_order(world: World) -> None:
    assert await world.coordinator.terminate() == 0
    world.coordinator.assert_clean()


# --- torch ----------------------------------------------------------------------------------------------------------

SHOW_MODULES = """
import atexit, sys
atexit.register(lambda: print("MODULES", *sorted(m.partition(".")[0] for m in sys.modules), file=sys.stderr))
"""


async def test_no_process_of_the_coordinator_ever_imports_torch(world: World) -> None:
    """Every command, and the service from its start to its end; for its worker see the test of its memory maps."""
    site = world.home / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SHOW_MODULES)
    environment = {"PYTHONPATH": str(site)}
    for arguments in (["--help"], ["coordinator", "--help"], ["coordinator", "run", "--help"], ["job", "--help"]):
        service = await Service.start("modules", *arguments, environment=environment)
        assert await service.wait() == 0
        assert_without_torch(service)
    config = world.coordinator_config()
    service = await world.start("coordinator", "coordinator", config, environment=environment)
    await service.logged("coordinator ready")
    assert await service.terminate() == 0
    assert_without_torch(service)


def assert_without_torch(service: Service) -> None:
    dumps = [e["event"].split() for e in service.lines if e["event"].startswith("MODULES")]
    assert dumps
    for modules in dumps:
        assert "maskwork" in modules
        assert "torch" not in modules
