"""Mutual TLS over loopback: who is refused, and who says why. Every wait is bounded by `PATIENCE_S`."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from maskwork.net import tls
from maskwork.net.authority import Authority
from maskwork.net.identity import (
    Identity,
    IdentityError,
    IdentityFiles,
    IdentityProblem,
    Role,
    TrustRoots,
)
from maskwork.net.permissions import allowed

# isort: split
# Only now: gRPC reads its cipher suites while it is imported.
import grpc
import grpc.aio
from cryptography import x509

pytestmark = pytest.mark.e2e

PATIENCE_S = 10.0
DAY = 86400.0
CONNECT = "/maskwork.wire.v1.FederationService/Connect"
LIST_JOBS = "/maskwork.wire.v1.JobService/ListJobs"
EMPTY_SETTINGS_FRAME = bytes.fromhex("000000040000000000")
UNARY = grpc.unary_unary_rpc_method_handler


class Federation:
    """A CA, a stranger's CA of the same name, and whatever certificates a test asks for."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.now = time.time()
        past = self.now - 800 * DAY
        self.authority = Authority.create("ward", now=past)
        self.stranger = Authority.create("ward", now=past)

    def coordinator(self, *, host: str = "localhost", now: float | None = None) -> IdentityFiles:
        issued = self.authority.issue(Role.COORDINATOR, "main", now=now or self.now, days=30, dns_names=[host])
        return issued.write(self.home / f"coordinator-{host}-{now}")

    def member(self, role: Role = Role.PARTICIPANT, *, now: float | None = None, days: int = 30) -> IdentityFiles:
        issued = self.authority.issue(role, "site-a", now=now or self.now, days=days)
        return issued.write(self.home / f"{role}-{now}")

    def strangers_member(self) -> IdentityFiles:
        """A stranger's certificate beside the right ca.pem."""
        files = self.stranger.issue(Role.PARTICIPANT, "site-a", now=self.now).write(self.home / "stranger")
        files.ca.write_bytes(self.authority.certificate.public_bytes(Encoding.PEM))
        return files


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


@asynccontextmanager
async def serving(
    files: IdentityFiles, *, options: tuple[tuple[str, int], ...] = tls.SERVER_OPTIONS
) -> AsyncIterator[int]:
    """A server that does what each service of ours does first: ask who calls, and whether they may."""
    roots = TrustRoots.from_file(files.ca)

    def handler(method: str) -> Callable[[bytes, grpc.aio.ServicerContext[bytes, bytes]], Awaitable[bytes]]:
        async def handle(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            caller = tls.peer_identity(context, roots, now=time.time(), federation="ward")
            if not allowed(method, caller.identity.role):
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not for this role")
            return caller.identity.uri.encode()

        return handle

    server = grpc.aio.server(options=options)
    for service in ("maskwork.wire.v1.FederationService", "maskwork.wire.v1.JobService"):
        methods = [m for m in (CONNECT, LIST_JOBS) if m.startswith(f"/{service}/")]
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            m.rpartition("/")[2]: UNARY(handler(m)) for m in methods
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    port = server.add_secure_port("localhost:0", tls.server_credentials(files))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def call(files: IdentityFiles, port: int, *, method: str = CONNECT, host: str = "localhost") -> str:
    credentials = tls.channel_credentials(files)
    async with grpc.aio.secure_channel(f"{host}:{port}", credentials, options=tls.CHANNEL_OPTIONS) as channel:
        calling: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
        answer = await calling(b"", timeout=PATIENCE_S)
    return answer.decode()


async def refusal(files: IdentityFiles, port: int, *, method: str = CONNECT) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(files, port, method=method)
    return caught.value.code()


async def probed(files: IdentityFiles, port: int, *, host: str = "localhost") -> str | None:
    return await asyncio.to_thread(tls.probe_server, files, f"{host}:{port}", timeout_s=PATIENCE_S)


async def test_a_member_is_let_in_and_known(federation: Federation) -> None:
    site = federation.member()
    async with serving(federation.coordinator()) as port:
        assert await call(site, port) == "spiffe://ward/participant/site-a"
        assert await probed(site, port) is None


async def test_an_address_is_a_host_name_too(federation: Federation) -> None:
    issued = federation.authority.issue(Role.COORDINATOR, "main", now=federation.now, ip_addresses=["127.0.0.1"])
    async with serving(issued.write(federation.home / "by-address")) as port:
        site = federation.member()
        assert await call(site, port, host="127.0.0.1") == "spiffe://ward/participant/site-a"
        assert await probed(site, port, host="127.0.0.1") is None
        assert await refusal(site, port) is grpc.StatusCode.UNAVAILABLE


# --- the client holds the wrong file --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["wrong CA", "expired", "not yet valid"])
async def test_a_client_with_a_bad_certificate_is_refused_and_says_why(federation: Federation, case: str) -> None:
    now = federation.now
    files, problem, words = {
        "wrong CA": (federation.strangers_member(), IdentityProblem.WRONG_CA, "was not signed by the CA"),
        "expired": (federation.member(now=now - 60 * DAY), IdentityProblem.EXPIRED, "expired at"),
        "not yet valid": (federation.member(now=now + 60 * DAY), IdentityProblem.NOT_YET_VALID, "not valid before"),
    }[case]
    async with serving(federation.coordinator()) as port:
        assert await refusal(files, port) is grpc.StatusCode.UNAVAILABLE
        assert "refuses our certificate" in (await probed(files, port) or "")
    text = tls.explain_connection_failure(files, f"localhost:{port}", now=now, role=Role.PARTICIPANT)
    assert words in text
    assert str(files.cert) in text
    with pytest.raises(IdentityError) as caught:
        tls.check_own_files(files, now=now, role=Role.PARTICIPANT)
    assert caught.value.problem is problem


async def test_a_client_without_a_certificate_is_refused(federation: Federation) -> None:
    ca = federation.authority.certificate.public_bytes(Encoding.PEM)
    async with serving(federation.coordinator()) as port:
        credentials = grpc.ssl_channel_credentials(root_certificates=ca)
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            connect: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(CONNECT)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await connect(b"", timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_with_another_role_is_refused_and_says_why(federation: Federation) -> None:
    operator, site = federation.member(Role.OPERATOR), federation.member()
    async with serving(federation.coordinator()) as port:
        assert await refusal(operator, port, method=CONNECT) is grpc.StatusCode.PERMISSION_DENIED
        assert await call(operator, port, method=LIST_JOBS) == "spiffe://ward/operator/site-a"
        assert await refusal(site, port, method=LIST_JOBS) is grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(IdentityError, match="maskwork pki issue participant") as caught:
        tls.check_own_files(operator, now=federation.now, role=Role.PARTICIPANT)
    assert caught.value.problem is IdentityProblem.WRONG_ROLE


async def test_a_revoked_or_expired_member_is_refused_at_the_next_call(federation: Federation) -> None:
    # The handshake passes; only the server's own look at each call can tell.
    seen: list[IdentityError] = []

    async def handle(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            tls.peer_identity(context, federation.authority.roots, now=federation.now + 31 * DAY)
        except IdentityError as error:
            seen.append(error)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "certificate refused")
        return b""

    server = grpc.aio.server(options=tls.SERVER_OPTIONS)
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Connect": UNARY(handle)}
    service = grpc.method_handlers_generic_handler("maskwork.wire.v1.FederationService", handlers)
    server.add_generic_rpc_handlers([service])
    port = server.add_secure_port("localhost:0", tls.server_credentials(federation.coordinator()))
    await server.start()
    try:
        assert await refusal(federation.member(), port) is grpc.StatusCode.UNAUTHENTICATED
    finally:
        await server.stop(None)
    assert [error.problem for error in seen] == [IdentityProblem.EXPIRED]


# --- the server holds the wrong file --------------------------------------------------------------------------------


async def test_a_server_with_another_name_is_refused(federation: Federation) -> None:
    site = federation.member()
    async with serving(federation.coordinator(host="hub.example.org")) as port:
        assert await refusal(site, port) is grpc.StatusCode.UNAVAILABLE
        reason = await probed(site, port)
    assert reason is not None
    assert "Hostname mismatch" in reason
    text = tls.explain_connection_failure(site, f"localhost:{port}", now=federation.now, reason=reason)
    assert "not valid for 'localhost'" in text
    assert "dial a name that is in it ('hub.example.org'), or have it issued with this one too (`--dns NAME`" in text


async def test_an_address_that_is_not_in_the_servers_certificate_is_told_with_the_names_that_are(
    federation: Federation,
) -> None:
    site = federation.member()
    async with serving(federation.coordinator()) as port:
        reason = await probed(site, port, host="127.0.0.1") or ""
        assert await probed(site, port) is None
    assert "not valid for '127.0.0.1'" in reason
    assert "dial a name that is in it ('localhost'), or have it issued with this one too" in reason
    assert "`--ip ADDRESS`" in reason


async def test_a_server_of_another_ca_is_refused(federation: Federation) -> None:
    issued = federation.stranger.issue(Role.COORDINATOR, "main", now=federation.now, dns_names=["localhost"])
    files, site = issued.write(federation.home / "impostor"), federation.member()
    async with serving(files) as port:
        assert await refusal(site, port) is grpc.StatusCode.UNAVAILABLE
        told = await probed(site, port) or ""
        assert "the server's certificate is refused" in told
        assert f"it is not signed by the CA in {site.ca}" in told
    with pytest.raises(IdentityError) as caught:
        tls.check_own_files(files, now=federation.now, roots=federation.authority.roots)
    assert caught.value.problem is IdentityProblem.WRONG_CA


@pytest.mark.parametrize(
    ("age_days", "problem", "words"),
    [(60, IdentityProblem.EXPIRED, "expired"), (-60, IdentityProblem.NOT_YET_VALID, "not yet valid")],
)
async def test_a_server_out_of_its_time_is_refused_and_says_why(
    federation: Federation, age_days: int, problem: IdentityProblem, words: str
) -> None:
    files, site = federation.coordinator(now=federation.now - age_days * DAY), federation.member()
    async with serving(files) as port:
        assert await refusal(site, port) is grpc.StatusCode.UNAVAILABLE
        assert words in (await probed(site, port) or "")
    with pytest.raises(IdentityError) as caught:
        tls.check_own_files(files, now=federation.now, role=Role.COORDINATOR)
    assert caught.value.problem is problem


async def test_a_participant_cannot_stand_in_for_the_coordinator(federation: Federation) -> None:
    # Its certificate has the right CA and, by somebody's mistake, the right host name, but may not serve.
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = federation.authority.sign(
        key.public_key(),
        Identity("ward", Role.PARTICIPANT, "mallory"),
        now=federation.now,
        days=1,
        host_names=[x509.DNSName("localhost")],
    )
    files = federation.member()
    mallory = IdentityFiles(files.ca, federation.home / "m-cert.pem", federation.home / "m-key.pem")
    mallory.cert.write_bytes(certificate.public_bytes(Encoding.PEM))
    mallory.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    async with serving(mallory) as port:
        assert await refusal(files, port) is grpc.StatusCode.UNAVAILABLE
        assert await probed(files, port) is not None


async def test_nobody_there(federation: Federation) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        site = federation.member()
        assert await refusal(site, port) is grpc.StatusCode.UNAVAILABLE
        assert "refused" in (await probed(site, port, host="127.0.0.1") or "")


# --- TLS 1.3 and nothing else -----------------------------------------------------------------------------------------


def raw_handshake(files: IdentityFiles, port: int, version: ssl.TLSVersion) -> str | None:
    """Shake hands with the standard library's TLS at exactly `version`; returns what was agreed."""
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.cert, files.key)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("localhost", port), timeout=PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        return secured.version()


async def test_a_raw_client_gets_in_with_tls_1_3_and_not_with_1_2(federation: Federation) -> None:
    site = federation.member()
    async with serving(federation.coordinator()) as port:
        assert await asyncio.to_thread(raw_handshake, site, port, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(raw_handshake, site, port, ssl.TLSVersion.TLSv1_2)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_our_channel_talks_to_a_raw_server_with_tls_1_3_and_not_with_1_2(
    federation: Federation, version: ssl.TLSVersion
) -> None:
    files, site = federation.coordinator(), federation.member()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    context.load_verify_locations(files.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    agreed: list[str] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        agreed.append(writer.get_extra_info("ssl_object").version())
        writer.write(EMPTY_SETTINGS_FRAME)
        await writer.drain()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    # The loop's handler would print each refused handshake.
    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
    async with await asyncio.start_server(accept, "localhost", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        assert await refusal(site, port) is grpc.StatusCode.UNAVAILABLE
        reason = await probed(site, port)
    # The control: with TLS 1.3 the handshake itself succeeds, so 1.2 fails for its version and nothing else.
    if version is ssl.TLSVersion.TLSv1_3:
        assert set(agreed) == {"TLSv1.3"}
    else:
        assert agreed == []
        assert "TLS 1.3 handshake fails" in (reason or "")


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_a_stalled_handshake_is_closed(federation: Federation) -> None:
    options = {**dict(tls.SERVER_OPTIONS), "grpc.server_handshake_timeout_ms": 300}
    async with serving(federation.coordinator(), options=tuple(options.items())) as port:
        reader, writer = await asyncio.open_connection("localhost", port)
        async with asyncio.timeout(PATIENCE_S):
            with suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        assert await call(federation.member(), port) == "spiffe://ward/participant/site-a"


async def test_a_second_server_on_the_port_fails(federation: Federation) -> None:
    files = federation.coordinator()
    async with serving(files) as port:
        second = grpc.aio.server(options=tls.SERVER_OPTIONS)
        with pytest.raises(RuntimeError, match="Failed to bind"):
            second.add_secure_port(f"localhost:{port}", tls.server_credentials(files))


@pytest.mark.parametrize("polite", [True, False])
async def test_a_message_longer_than_a_chunk_can_be_is_refused_by_both_sides(
    federation: Federation, polite: bool
) -> None:
    files, site = federation.coordinator(), federation.member()
    options = tls.CHANNEL_OPTIONS if polite else ()
    async with serving(files) as port:
        credentials = tls.channel_credentials(site)
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options) as channel:
            connect: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(CONNECT)
            await connect(bytes(tls.CHUNK_BYTES + 4096), timeout=PATIENCE_S)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await connect(bytes(tls.SERVER_RECEIVE_BYTES + 1), timeout=PATIENCE_S)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
