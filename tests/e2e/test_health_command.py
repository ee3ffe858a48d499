"""`maskwork coordinator health` and `maskwork participant health`: against real services, and against what is none."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from maskwork.errors import UserError
from maskwork.net import health, tls
from maskwork.net.authority import Authority
from maskwork.net.identity import IdentityFiles, Role

import grpc  # isort: skip
from grpc_health.v1 import health as standard  # isort: skip
from grpc_health.v1 import health_pb2, health_pb2_grpc  # isort: skip

pytestmark = pytest.mark.e2e

MASKWORK = Path(sys.executable).parent / "maskwork"
PATIENCE_S = 100.0
STATUS = health_pb2.HealthCheckResponse.ServingStatus


class Federation:
    """Certificates, and configurations that name `port`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.authority = Authority.create("ward", now=time.time())

    def issue(self, role: Role, name: str, *hosts: str) -> IdentityFiles:
        issued = self.authority.issue(role, name, now=time.time(), dns_names=hosts)
        return issued.write(self.home / name)

    def config(self, port: int, **keys: str) -> Path:
        path = self.home / "config.toml"
        tail = "[tasks]\n" if "coordinator" in keys else ""
        lines = [f"{key} = {json.dumps(value.format(port=port))}\n" for key, value in keys.items()]
        path.write_text("".join(lines) + tail)
        return path


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


@asynccontextmanager
async def serving(files: IdentityFiles, status: int = STATUS.SERVING) -> AsyncIterator[int]:
    """The standard service alone, over the coordinator's TLS."""
    server = grpc.aio.server(options=tls.SERVER_OPTIONS)
    answers = standard.aio.HealthServicer()
    await answers.set("", status)
    health_pb2_grpc.add_HealthServicer_to_server(answers, server)
    port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(files))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def command(group: str, config: Path) -> tuple[int, str]:
    """Its exit code, and all that it printed."""
    process = await asyncio.create_subprocess_exec(
        MASKWORK, group, "health", "--config", config, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(PATIENCE_S):
        printed, _ = await process.communicate()
    return process.returncode or 0, printed.decode()


async def test_the_coordinators_own_probe_needs_no_certificate_for_the_loopback_address(federation: Federation) -> None:
    files = federation.issue(Role.COORDINATOR, "main", "coordinator.example.org")
    async with serving(files) as port:
        code, printed = await command(
            "coordinator", federation.config(port, listen="0.0.0.0:{port}", identity="main", state="state")
        )
    assert (code, printed) == (0, f"the coordinator at 127.0.0.1:{port} serves\n")


async def test_a_sites_probe_asks_with_the_sites_certificate(federation: Federation) -> None:
    files = federation.issue(Role.COORDINATOR, "main", "localhost")
    federation.issue(Role.PARTICIPANT, "site-a")
    async with serving(files) as port:
        config = federation.config(port, coordinator="localhost:{port}", identity="site-a", state="state")
        code, printed = await command("participant", config)
    assert (code, printed) == (0, f"the coordinator at localhost:{port} serves, and takes this site's certificate\n")


async def test_a_coordinator_that_is_not_there_is_exit_code_1_and_a_sentence(federation: Federation) -> None:
    federation.issue(Role.COORDINATOR, "main", "localhost")
    with socket.socket() as taken:  # bound and never listening: nobody else gets the port meanwhile
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        code, printed = await command(
            "coordinator", federation.config(port, listen="127.0.0.1:{port}", identity="main", state="state")
        )
    assert code == 1
    assert printed.startswith(f"error: cannot connect to 127.0.0.1:{port}: connection refused")
    assert printed.count("\n") == 1


async def test_a_coordinator_that_is_up_but_does_not_serve_is_not_healthy(federation: Federation) -> None:
    files = federation.issue(Role.COORDINATOR, "main", "localhost")
    async with serving(files, STATUS.NOT_SERVING) as port:
        with pytest.raises(UserError, match=r"is up but does not serve \(NOT_SERVING\)"):
            await asyncio.to_thread(health.ask_whether_serving, f"localhost:{port}", files, role=Role.COORDINATOR)


async def test_another_server_than_the_named_one_is_not_healthy(federation: Federation) -> None:
    """The name is checked though the address is not the one in the certificate."""
    stranger = federation.issue(Role.COORDINATOR, "other", "localhost")
    files = federation.issue(Role.COORDINATOR, "main", "coordinator.example.org")

    def asked(target: str) -> None:
        health.ask_whether_serving(target, files, role=Role.COORDINATOR, server_name=health.name_in_certificate(files))

    async with serving(stranger) as port:
        with pytest.raises(UserError, match=r"certificate is refused: Hostname mismatch.*coordinator\.example\.org"):
            await asyncio.to_thread(asked, f"127.0.0.1:{port}")


async def test_a_certificate_that_the_server_does_not_take_is_told(federation: Federation) -> None:
    files = federation.issue(Role.COORDINATOR, "main", "localhost")
    stranger = Authority.create("ward", now=time.time()).issue(Role.PARTICIPANT, "site-a", now=time.time())
    impostor = stranger.write(federation.home / "impostor")
    impostor.ca.write_bytes(files.ca.read_bytes())
    async with serving(files) as port:
        with pytest.raises(UserError, match="was not signed by the CA"):
            await asyncio.to_thread(health.ask_whether_serving, f"localhost:{port}", impostor, role=Role.PARTICIPANT)


async def test_a_certificate_for_another_role_makes_no_healthy_site(federation: Federation) -> None:
    """The service answers any role; a site with a researcher's certificate could still never take part."""
    files = federation.issue(Role.COORDINATOR, "main", "localhost")
    researcher = federation.issue(Role.RESEARCHER, "alice")
    async with serving(files) as port:
        with pytest.raises(UserError, match="role researcher"):
            await asyncio.to_thread(health.ask_whether_serving, f"localhost:{port}", researcher, role=Role.PARTICIPANT)


@pytest.mark.parametrize(
    ("listen", "dialled"),
    [
        ("0.0.0.0:8750", "127.0.0.1:8750"),
        ("[::]:8750", "[::1]:8750"),
        ("10.0.0.7:1", "10.0.0.7:1"),
        ("here.example.org:1", "here.example.org:1"),
    ],
)
def test_what_is_dialled_for_what_is_listened_on(listen: str, dialled: str) -> None:
    assert health.reachable_from_here(listen) == dialled


def test_the_name_is_a_host_name_before_an_address(tmp_path: Path) -> None:
    authority = Authority.create("ward", now=time.time())

    def written(**hosts: tuple[str, ...]) -> IdentityFiles:
        role = Role.COORDINATOR if hosts else Role.PARTICIPANT
        issued: Callable[..., object] = authority.issue
        identity = issued(role, "main", now=time.time(), **hosts)
        return identity.write(tmp_path / repr(hosts).replace("/", "_"))  # type: ignore[attr-defined,no-any-return]

    assert (
        health.name_in_certificate(written(dns_names=("a.example.org",), ip_addresses=("127.0.0.1",)))
        == "a.example.org"
    )
    assert health.name_in_certificate(written(ip_addresses=("127.0.0.1",))) == "127.0.0.1"
    assert health.name_in_certificate(written()) is None
