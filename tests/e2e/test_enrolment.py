"""Enrolment over loopback, with a real coordinator: who gets a certificate, who is refused, who never sees a token."""

import asyncio
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from tests.e2e.services import PATIENCE_S, free_port
from tests.enrolment.requests_of_others import EVIL, p256

from maskwork import enrolment_client
from maskwork.coordinator import enrolment
from maskwork.coordinator.config import CoordinatorConfig
from maskwork.coordinator.server import running
from maskwork.errors import UserError
from maskwork.net import tls
from maskwork.net.authority import Authority
from maskwork.net.identity import Identity, IdentityFiles, Role, TrustRoots, VerifiedCertificate, fingerprint, to_der
from maskwork.net.register import Register
from maskwork.net.requests import new_request
from maskwork.net.tokens import Token, TokenBook
from maskwork.wire.v1 import enrolment_pb2, enrolment_pb2_grpc

# isort: split
# Only now: gRPC reads its cipher suites while it is imported.
import grpc

pytestmark = [pytest.mark.e2e]
SITE = Identity("ward", Role.PARTICIPANT, "site-a")
ENROL = "/maskwork.wire.v1.EnrolmentService/Enrol"


@dataclass
class Hub:
    """A coordinator that holds the CA's key, in this process."""

    home: Path
    authority: Authority
    port: int
    main: int
    logged: list[str] = field(default_factory=list)

    @property
    def target(self) -> str:
        return f"localhost:{self.port}"

    @property
    def known(self) -> frozenset[bytes]:
        return frozenset({fingerprint(to_der(self.authority.certificate))})

    def token(self, identity: Identity = SITE, *, valid_s: float = 3600.0) -> Token:
        return TokenBook(self.home / "ca").make(identity, expires=time.time() + valid_s)

    async def enrol(self, token: Token, out: str, target: str | None = None) -> VerifiedCertificate:
        return await asyncio.to_thread(
            enrolment_client.enrol, target or self.target, token, self.home / out, known=self.known
        )

    async def answer(self, token: str, request: bytes) -> bytes:
        message = enrolment_pb2.EnrolRequest(token=token, request=request)
        async with self.channel() as channel:
            answer = await enrolment_pb2_grpc.EnrolmentServiceStub(channel).Enrol(message, timeout=PATIENCE_S)
            return bytes(answer.certificate)

    def channel(self, port: int | None = None) -> grpc.aio.Channel:
        credentials = tls.enrolling_credentials(self.authority.roots)
        return grpc.aio.secure_channel(f"localhost:{port or self.port}", credentials, options=tls.CHANNEL_OPTIONS)


@asynccontextmanager
async def hub_at(home: Path, **changes: object) -> AsyncIterator[Hub]:
    authority = Authority.create("ward", now=time.time())
    authority.write(home / "ca")
    issued = authority.issue(Role.COORDINATOR, "main", now=time.time(), dns_names=["localhost"])
    issued.write(home / "identity")
    port, main = free_port(), free_port()
    keys: dict[str, object] = {
        "listen": f"localhost:{main}",
        "identity": home / "identity",
        "state": home / "state",
        "enrolment_listen": f"localhost:{port}",
        "enrolment_ca": home / "ca",
        **changes,
    }
    hub = Hub(home, authority, port, main)

    def keep(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        hub.logged.append(repr(event))
        raise structlog.DropEvent

    structlog.configure(processors=[keep], cache_logger_on_first_use=False)
    try:
        async with running(CoordinatorConfig.model_validate(keys)):
            yield hub
    finally:
        structlog.reset_defaults()


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    async with hub_at(tmp_path) as hub:
        yield hub


async def refused(asked: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asked
    return caught.value


# --- what works -------------------------------------------------------------------------------------------------------


async def test_a_member_with_a_token_enrols_without_a_certificate_and_may_call_the_main_port(hub: Hub) -> None:
    token = hub.token()
    verified = await hub.enrol(token, "site")
    assert verified.identity == SITE
    files = IdentityFiles.in_directory(hub.home / "site")
    assert tls.check_own_files(files, now=time.time(), role=Role.PARTICIPANT).fingerprint == verified.fingerprint
    assert files.ca.read_bytes() == (hub.home / "ca" / "ca.pem").read_bytes()
    assert sorted(p.name for p in (hub.home / "site").iterdir()) == ["ca.pem", "cert.pem", "key.pem"]
    assert any("enrolled" in line and SITE.uri in line for line in hub.logged)
    assert not [line for line in hub.logged if token.secret in line or token.id in line]
    renewed = await asyncio.to_thread(enrolment_client.renew, f"localhost:{hub.main}", hub.home / "site")
    assert renewed.identity == SITE
    assert renewed.public_key != verified.public_key
    assert {line.fingerprint for line in Register(hub.home / "ca").certificates()} == {
        verified.fingerprint,
        renewed.fingerprint,
    }


async def test_a_lost_answer_is_asked_for_again_with_the_same_key(hub: Hub) -> None:
    token, key = hub.token(), p256()
    first = await hub.answer(token.text, new_request(key, SITE))
    assert await hub.answer(token.text, new_request(key, SITE)) == first
    assert len(Register(hub.home / "ca").certificates()) == 1


async def test_a_client_that_failed_keeps_its_key_for_the_next_try(hub: Hub) -> None:
    token = hub.token()
    with pytest.raises(UserError, match="another member"):
        await hub.enrol(replace(token, secret="A" * 43), "site")
    kept = (hub.home / "site" / "request-key.pem").read_bytes()
    await hub.enrol(token, "site")
    assert (hub.home / "site" / "key.pem").read_bytes() == kept


# --- who is refused ---------------------------------------------------------------------------------------------------


async def test_every_refusal_is_the_same_to_whoever_asks(hub: Hub) -> None:
    used, expired, for_b = hub.token(), hub.token(valid_s=-1), Identity("ward", Role.PARTICIPANT, "site-b")
    request = new_request(p256(), SITE)
    await hub.answer(used.text, new_request(p256(), SITE))
    other = Authority.create("ward", now=time.time())
    other.write(hub.home / "other")
    strangers = TokenBook(hub.home / "other").make(SITE, expires=time.time() + 60)
    asked = [
        ("", request),
        ("participant:site-a", request),
        (used.text, request),
        (expired.text, request),
        (strangers.text, request),
        (replace(hub.token(), secret="A" * 43).text, request),
        (hub.token().text, new_request(p256(), for_b)),
        (hub.token().text, new_request(p256(), Identity("ward", Role.OPERATOR, "site-a"))),
        (hub.token().text, new_request(p256(), Identity("other", Role.PARTICIPANT, "site-a"))),
    ]
    errors = [await refused(hub.answer(*one)) for one in asked]
    assert {(e.code(), e.details()) for e in errors} == {(grpc.StatusCode.PERMISSION_DENIED, enrolment.REFUSED)}
    assert len(Register(hub.home / "ca").certificates()) == 1
    for text, _ in asked[2:]:
        assert not [line for line in hub.logged if text.rpartition(":")[2] in line]


async def test_a_request_that_asks_for_more_gets_nothing_and_does_not_use_the_token_up(hub: Hub) -> None:
    token = hub.token()
    evil = [
        pem for name, (pem, _) in EVIL.items() if name in ("ca", "a-host", "a-second-uri", "rsa", "broken-signature")
    ]
    assert len(evil) == 5
    for pem in evil:
        assert (await refused(hub.answer(token.text, pem))).details() == enrolment.REFUSED
    assert Register(hub.home / "ca").certificates() == ()
    assert (await hub.enrol(token, "site")).identity == SITE


async def test_bytes_that_are_no_message_get_the_same_answer(hub: Hub) -> None:
    async with hub.channel() as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(ENROL)
        error = await refused(call(b"\xff" * 100, timeout=PATIENCE_S))
    assert error.details() == enrolment.REFUSED


async def test_whoever_tries_too_often_waits(hub: Hub) -> None:
    token = hub.token()
    codes = []
    for _ in range(enrolment.TRIES_BURST + 1):
        codes.append((await refused(hub.answer("x", b""))).code())
    assert codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert set(codes[:-1]) == {grpc.StatusCode.PERMISSION_DENIED}
    assert (
        await refused(hub.answer(token.text, new_request(p256(), SITE)))
    ).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_one_address_does_not_take_the_others_turns_and_what_is_kept_is_bounded() -> None:
    door = enrolment.Door()
    assert [door.admits("a", now=0.0) for _ in range(enrolment.TRIES_BURST + 5)].count(True) == enrolment.TRIES_BURST
    assert door.admits("b", now=0.0)
    for number in range(5000):
        door.admits(f"c{number}", now=0.0)
    assert len(door._by_address) <= enrolment.MAX_ADDRESSES
    assert sum(door.admits(f"d{number}", now=3600.0) for number in range(5000)) <= enrolment.ALL_TRIES_BURST


# --- the ports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "/maskwork.wire.v1.RenewalService/Renew",
        "/maskwork.wire.v1.EnrolmentService/Other",
        "/maskwork.wire.v1.JobService/ListJobs",
        "/maskwork.wire.v1.FederationService/Download",
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_the_enrolment_port_serves_nothing_else(hub: Hub, method: str) -> None:
    async with hub.channel() as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
        assert (await refused(call(b"", timeout=PATIENCE_S))).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_main_port_still_demands_a_certificate_and_does_not_enrol(hub: Hub) -> None:
    async with hub.channel(hub.main) as channel:
        for method in (ENROL, "/maskwork.wire.v1.RenewalService/Renew", "/grpc.health.v1.Health/Check"):
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
            assert (await refused(call(b"", timeout=PATIENCE_S))).code() is grpc.StatusCode.UNAVAILABLE
    await hub.enrol(hub.token(), "site")
    files = IdentityFiles.in_directory(hub.home / "site")
    credentials = tls.channel_credentials(files)
    async with grpc.aio.secure_channel(f"localhost:{hub.main}", credentials, options=tls.CHANNEL_OPTIONS) as channel:
        call = channel.unary_unary(ENROL)
        code = (await refused(call(b"", timeout=PATIENCE_S))).code()
    assert code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED)


async def test_neither_port_speaks_tls_1_2(hub: Hub) -> None:
    def dial(port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection(("localhost", port), timeout=PATIENCE_S) as plain,
            pytest.raises((ssl.SSLError, ConnectionError)),
        ):
            context.wrap_socket(plain, server_hostname="localhost")

    for port in (hub.port, hub.main):
        await asyncio.to_thread(dial, port)


async def test_without_the_ca_there_is_no_enrolment_port_and_no_renewal(tmp_path: Path) -> None:
    async with hub_at(tmp_path, enrolment_listen=None, enrolment_ca=None) as hub:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("localhost", hub.port), timeout=1).close()
        hub.authority.issue(Role.PARTICIPANT, "site-a", now=time.time()).write(hub.home / "site")
        before = (hub.home / "site" / "key.pem").read_bytes()
        with pytest.raises(UserError, match="does not hold the CA's key"):
            await asyncio.to_thread(enrolment_client.renew, f"localhost:{hub.main}", hub.home / "site")
        assert (hub.home / "site" / "key.pem").read_bytes() == before


def test_a_port_without_a_ca_is_a_mistake_in_the_file() -> None:
    with pytest.raises(ValueError, match="enrolment_ca"):
        CoordinatorConfig.model_validate({"identity": "i", "state": "s", "enrolment_listen": "0.0.0.0:8751"})


async def test_renewal_is_limited(hub: Hub) -> None:
    await hub.enrol(hub.token(), "site")
    for _ in range(enrolment.RENEWALS_BURST):
        await asyncio.to_thread(enrolment_client.renew, f"localhost:{hub.main}", hub.home / "site")
    with pytest.raises(UserError, match="often enough"):
        await asyncio.to_thread(enrolment_client.renew, f"localhost:{hub.main}", hub.home / "site")


# --- somebody in between ----------------------------------------------------------------------------------------------


class Thief:
    """Speaks TLS with a certificate and chain of its choice, and keeps every byte that it is sent in clear."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self.heard = b""
        self.connections = 0
        self._tasks: list[asyncio.Task[Any]] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.load_cert_chain(certificate, key)
        self._context.set_alpn_protocols(["h2"])

    @asynccontextmanager
    async def serving(self, *, pass_first_to: int | None = None) -> AsyncIterator[int]:
        """Listen; the first connection may be passed on untouched, as somebody in between can."""
        inner = await asyncio.start_server(self._listen, "localhost", 0, family=socket.AF_INET, ssl=self._context)
        ours = int(inner.sockets[0].getsockname()[1])

        async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._keep()
            self.connections += 1
            port = pass_first_to if pass_first_to is not None and self.connections == 1 else ours
            there, back = await asyncio.open_connection("localhost", port)
            try:
                await asyncio.gather(_pour(reader, back), _pour(there, writer))
            finally:
                writer.close()
                back.close()

        outer = await asyncio.start_server(met, "localhost", 0, family=socket.AF_INET)
        try:
            yield int(outer.sockets[0].getsockname()[1])
        finally:
            for server in (outer, inner):
                server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _keep(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.append(task)

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._keep()
        try:
            writer.write(bytes.fromhex("000000040000000000"))  # an empty SETTINGS frame: go on, tell me
            while data := await reader.read(4096):
                self.heard += data
        except OSError:
            pass
        finally:
            writer.close()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
        writer.close()


def thief_of(hub: Hub, kind: str) -> Thief:
    """What somebody in between can show: the true CA's certificate is public, and a member may be dishonest."""
    there, now = hub.home / kind, time.time()
    right = (hub.home / "ca" / "ca.pem").read_bytes()
    if kind == "own-ca":
        own = Authority.create("ward", now=now)
        files = own.issue(Role.COORDINATOR, "main", now=now, dns_names=["localhost"]).write(there)
        chain = files.cert.read_bytes() + files.ca.read_bytes()
    elif kind == "own-leaf-under-the-true-ca":
        own = Authority.create("ward", now=now)
        files = own.issue(Role.COORDINATOR, "main", now=now, dns_names=["localhost"]).write(there)
        chain = files.cert.read_bytes() + right
    else:
        files = hub.authority.issue(Role.PARTICIPANT, "site-b", now=now).write(there)
        chain = files.cert.read_bytes() + right
    (there / "chain.pem").write_bytes(chain)
    return Thief(there / "chain.pem", files.key)


@pytest.mark.parametrize("passes_first", [False, True], ids=["at-once", "after-the-first-connection"])
@pytest.mark.parametrize("kind", ["own-ca", "own-leaf-under-the-true-ca", "a-members-certificate"])
async def test_somebody_in_between_gets_no_token(
    hub: Hub, kind: str, passes_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment_client, "TIMEOUT_S", 3.0)  # the connection never comes up: no need to wait long
    token, thief = hub.token(), thief_of(hub, kind)
    async with thief.serving(pass_first_to=hub.port if passes_first else None) as port:
        with pytest.raises(UserError) as caught:
            await hub.enrol(token, "site", f"localhost:{port}")
    assert thief.connections >= (2 if passes_first else 1)
    assert token.secret.encode() not in thief.heard
    assert token.secret not in str(caught.value)
    assert not (hub.home / "site" / "cert.pem").exists()
    if not passes_first:
        assert re.search("shows no CA|no coordinator of it", str(caught.value))
    # The token is unused: at the true port it is still good.
    assert (await hub.enrol(token, "site")).identity == SITE


async def test_the_thief_would_hear_a_client_that_trusts_it(hub: Hub) -> None:
    """So that the test above can fail."""
    thief = thief_of(hub, "own-ca")
    async with thief.serving() as port:
        roots = TrustRoots.from_file(hub.home / "own-ca" / "ca.pem")
        message = enrolment_pb2.EnrolRequest(token="what is said to it")
        async with grpc.aio.secure_channel(f"localhost:{port}", tls.enrolling_credentials(roots)) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await enrolment_pb2_grpc.EnrolmentServiceStub(channel).Enrol(message, timeout=2)
    assert b"what is said to it" in thief.heard


async def test_another_host_than_the_certificates_is_refused_before_the_token_goes_out(hub: Hub) -> None:
    token = hub.token()
    with pytest.raises(UserError, match="localhost"):
        await hub.enrol(token, "site", f"127.0.0.1:{hub.port}")
    assert not [line for line in hub.logged if "refused" in line]


async def test_the_right_token_under_another_ca_goes_nowhere(hub: Hub) -> None:
    token = hub.token()
    with pytest.raises(UserError, match="shows no CA"):
        await asyncio.to_thread(
            enrolment_client.enrol, hub.target, token, hub.home / "site", known=frozenset({bytes(32)})
        )
    assert not (hub.home / "site").exists()
    assert not [line for line in hub.logged if "refused" in line]
