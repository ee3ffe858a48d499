"""The enrolment port, and renewal on the main one.

The enrolment port asks for no client certificate, so it serves one RPC and nothing else: no health check, no
reflection. What it answers says as little as it can: the certificate, or one refusal for whatever was wrong with the
token or the request. Who may try how often is counted by address, and for all of them together; tokens are never
logged, nor is any part of one. A connection to it does not live long.

Renewal passes `guard` like every call on the main port: whose certificate it is, the handshake says.
It decides nothing about tokens or requests (`issuing` does).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, NoReturn

import structlog
from cryptography import x509

from maskwork.audit.records import CertificateEvent
from maskwork.coordinator.guard import caller
from maskwork.coordinator.issuing import Issuer
from maskwork.coordinator.quotas import Bucket
from maskwork.errors import UserError
from maskwork.net.identity import fingerprint, to_der
from maskwork.net.loaded import LoadedIdentity
from maskwork.net.names import shortened
from maskwork.net.requests import RequestError
from maskwork.net.status import Refusal, Refused
from maskwork.net.tls import SERVER_OPTIONS, enrolment_server_credentials
from maskwork.net.tokens import NotAToken, Token, TokenRefused
from maskwork.wire import codec
from maskwork.wire.codec import WireError
from maskwork.wire.v1 import enrolment_pb2, enrolment_pb2_grpc

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor

log = structlog.get_logger("maskwork.coordinator")

SERVICE: Final = "maskwork.wire.v1.EnrolmentService"
REFUSED: Final = (
    "refused: the token does not authorise this request. It may be mistyped, expired, used for another key, or made "
    "for another member; ask whoever made it for a new one"
)
TRIES_BURST: Final = 20
TRIES_PER_S: Final = 0.2
ALL_TRIES_BURST: Final = 200
ALL_TRIES_PER_S: Final = 10.0
MAX_ADDRESSES: Final = 1024
RENEWALS_BURST: Final = 5
RENEWALS_PER_S: Final = 1 / 3600
OPTIONS: Final = (
    *((key, value) for key, value in SERVER_OPTIONS if key != "grpc.max_receive_message_length"),
    # A token and a request are less than a kilobyte.
    ("grpc.max_receive_message_length", 32 << 10),
    ("grpc.max_allowed_incoming_connections", 64),
    # Whoever has no certificate yet holds a place for as long as one call takes, not for as long as it likes.
    ("grpc.max_connection_age_ms", 20_000),
    ("grpc.max_connection_age_grace_ms", 5_000),
)

Tell = Callable[[CertificateEvent], None]
"""Writes down what became of a certificate, before it goes out."""
Context = grpc.aio.ServicerContext[bytes, bytes]


class Door:
    """How often strangers may try: by address, and all together. Counts alone; the time is an argument."""

    def __init__(self) -> None:
        self._everybody = Bucket(ALL_TRIES_BURST, ALL_TRIES_PER_S)
        self._by_address: dict[str, Bucket] = {}

    def admits(self, address: str, *, now: float) -> bool:
        """Whether an address may try now; a try of one that may not costs the others nothing."""
        if address not in self._by_address:
            self._forget_idle(now)
            if len(self._by_address) >= MAX_ADDRESSES:
                return False
        bucket = self._by_address.setdefault(address, Bucket(TRIES_BURST, TRIES_PER_S))
        return bucket.take(now) and self._everybody.take(now)

    def _forget_idle(self, now: float) -> None:
        if len(self._by_address) >= MAX_ADDRESSES:
            self._by_address = {a: b for a, b in self._by_address.items() if not b.full(now)}


class Enrolment:
    """Answers strangers who have a token."""

    def __init__(self, issuer: Issuer, tell: Tell, *, ticks: Callable[[], float] = time.monotonic) -> None:
        self._issuer = issuer
        self._tell = tell
        self._ticks = ticks
        self._door = Door()
        self._lines = Bucket(50, 1.0)
        self._turn = asyncio.Lock()

    def handler(self) -> grpc.GenericRpcHandler:
        """The one RPC; messages are read here, so that what is none gets our answer and not gRPC's."""
        enrol: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self.enrol)
        return grpc.method_handlers_generic_handler(SERVICE, {"Enrol": enrol})

    async def enrol(self, raw: bytes, context: Context) -> bytes:
        """A certificate for the holder of a token."""
        if not self._door.admits(_address(context.peer()), now=self._ticks()):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many tries; try again in a minute")
        try:
            asked = codec.parse(enrolment_pb2.EnrolRequest, raw)
            token = Token.parse(asked.token)
            async with self._turn:
                request, pem = await asyncio.to_thread(self._issuer.enrol, token, asked.request)
        except (WireError, NotAToken, TokenRefused, RequestError) as error:
            await self._refuse(context, str(error))
        except UserError as error:
            log.error("a member could not be enrolled", detail=str(error))
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this coordinator cannot sign now; its log says why")
        self._tell(_event("enrolled", request.identity.uri, pem, detail="by a token"))
        log.info("enrolled", who=request.identity.uri, key=request.key_fingerprint.hex())
        return enrolment_pb2.EnrolResponse(certificate=pem).SerializeToString()

    async def _refuse(self, context: Context, detail: str) -> NoReturn:
        if self._lines.take(self._ticks()):
            log.warning("an enrolment was refused", address=_address(context.peer()), detail=detail[:500])
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, REFUSED)
        raise AssertionError  # abort never returns


class RenewalService(enrolment_pb2_grpc.RenewalServiceServicer):
    """Answers members: another certificate for the caller itself."""

    def __init__(self, issuer: Issuer | None, tell: Tell, *, ticks: Callable[[], float] = time.monotonic) -> None:
        self._issuer = issuer
        self._tell = tell
        self._ticks = ticks
        self._pace: dict[str, Bucket] = {}

    async def Renew(
        self,
        request: enrolment_pb2.RenewRequest,
        context: grpc.aio.ServicerContext[enrolment_pb2.RenewRequest, enrolment_pb2.RenewResponse],
    ) -> enrolment_pb2.RenewResponse:
        """A certificate for the caller's identity and a new key."""
        if self._issuer is None:
            raise Refused(
                Refusal.NOT_NOW,
                "this coordinator does not hold the CA's key: use `maskwork pki request`, and have its keeper sign",
            )
        certificate, now = caller(), self._ticks()
        who = certificate.identity.uri
        self._pace = {uri: bucket for uri, bucket in self._pace.items() if not bucket.full(now)}
        if not self._pace.setdefault(who, Bucket(RENEWALS_BURST, RENEWALS_PER_S)).take(now):
            raise Refused(Refusal.TOO_MUCH, "this member has renewed its certificate often enough for now")
        pem = await asyncio.to_thread(self._issuer.renew, certificate, request.request)
        self._tell(_event("renewed", who, pem, by=who, detail=f"replaces {certificate.fingerprint.hex()}"))
        log.info("renewed", who=who, replaces=certificate.fingerprint.hex())
        return enrolment_pb2.RenewResponse(certificate=pem)


@asynccontextmanager
async def enrolling(
    listen: str | None, issuer: Issuer | None, current: Callable[[], LoadedIdentity], tell: Tell
) -> AsyncIterator[str]:
    """The enrolment port while it is open; gives its address, empty when there is none."""
    if listen is None or issuer is None:
        yield ""
        return
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((Enrolment(issuer, tell).handler(),))
    try:
        port = server.add_secure_port(listen, enrolment_server_credentials(current))
    except RuntimeError as error:
        raise UserError(
            f"cannot listen on {shortened(listen)}: {str(error).rstrip('.')}. "
            "Change `enrolment_listen`, or stop what is there."
        ) from error
    await server.start()
    address = f"{listen.rpartition(':')[0]}:{port}"
    log.info("members can enrol by token", listen=address)
    try:
        yield address
    finally:
        await server.stop(None)


def _event(event: str, who: str, pem: bytes, *, by: str = "", detail: str) -> CertificateEvent:
    der = to_der(x509.load_pem_x509_certificate(pem))
    return CertificateEvent(event=event, subject=who, fingerprint=fingerprint(der), by=by, detail=detail)


def _address(peer: str) -> str:
    """The caller's address without its port: ``ipv4:192.0.2.1``."""
    return peer.rpartition(":")[0]
