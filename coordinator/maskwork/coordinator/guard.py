"""The door: every RPC, ours or a standard one, passes here before any handler runs.

In this order: the caller's certificate is verified anew for each call, and once more when there is a new revocation
list; its role is looked up in the one table of permissions, its quota is charged, and only then is what it sent read
and decoded, each message within a bound. Whatever a handler raises becomes a status by the one table of statuses.
Handlers ask `caller()` who is calling.

All four kinds of call are served as streams both ways, which is the same on the wire: gRPC itself would read, decode
and write a single message before or after us, without a bound, and tell the caller of its own exceptions.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import structlog
from google.protobuf.message import DecodeError

from maskwork.coordinator.quotas import Quotas
from maskwork.coordinator.revocations import withdrawn
from maskwork.net.identity import IdentityError, IdentityProblem, TrustRoots, VerifiedCertificate
from maskwork.net.permissions import allowed
from maskwork.net.revocation import RevocationList
from maskwork.net.status import Refusal, Refused, status_of
from maskwork.net.tls import peer_identity
from maskwork.wire.codec import WireError

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor

log = structlog.get_logger("maskwork.coordinator")

STALL_S: Final = 60.0
LEAST_BYTES_PER_S: Final = 4096
"""Slowest stream that is served for longer than the stall: whoever sends a byte a minute holds a place from others."""
LASTING: Final = frozenset({"/maskwork.wire.v1.FederationService/Connect"})
"""Calls whose caller may be silent for as long as it likes; keepalive finds out whether it is still there."""
PARTING_S: Final = 1.0
MAX_DETAIL_LOGGED: Final = 2000

_caller: ContextVar[VerifiedCertificate] = ContextVar("caller")

# gRPC's handlers are generic over message types that only the generated code knows.
Message = Any
Context = grpc.aio.ServicerContext[Any, Any]


def caller() -> VerifiedCertificate:
    """Whose call is being handled."""
    return _caller.get()


@dataclass(eq=False, slots=True)
class _RunningCall:
    """A call that is being served: whose, by which task, and why it was cut off."""

    caller: VerifiedCertificate
    task: asyncio.Task[object]
    why: str = ""

    def cut(self, why: str) -> None:
        if not self.why:
            self.why = why
            self.task.cancel()


class Guard(grpc.aio.ServerInterceptor):
    """Authenticates, authorises, bounds, and turns errors into statuses."""

    def __init__(
        self,
        roots: TrustRoots,
        federation: str,
        *,
        stall_s: float = STALL_S,
        is_revoked: Container[bytes] = frozenset(),
    ) -> None:
        self._roots = roots
        self._federation = federation
        self._stall_s = stall_s
        self._is_revoked = is_revoked
        self._quotas = Quotas()
        self._running: set[_RunningCall] = set()

    async def cut_off(self, revocations: RevocationList) -> None:
        """End every running call, of whatever role, whose caller a list withdraws."""
        for call in self._running:
            if why := withdrawn(call.caller.der, revocations):
                call.cut(why)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Message, Message] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Message, Message] | None:
        """Wrap the method's handler, whichever of the four kinds it is."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        guarded = self._guarded(str(handler_call_details.method), handler)
        return grpc.stream_stream_rpc_method_handler(guarded, None, handler.response_serializer)

    def _guarded(self, method: str, handler: grpc.RpcMethodHandler[Message, Message]) -> Any:  # noqa: ANN401
        async def guarded(raw: AsyncIterator[bytes], context: Context) -> None:
            try:
                self._admit(method, context)
                requests = self._incoming(method, raw, handler.request_deserializer)
                async with self._until_cut_off():
                    await self._serve(handler, requests, context)
            except Exception as error:  # every error becomes a status, here and only here
                await self._refuse(method, context, error)

        return guarded

    @asynccontextmanager
    async def _until_cut_off(self) -> AsyncIterator[None]:
        """Within it the call ends with an `IdentityError` when its caller's certificate is withdrawn."""
        task = asyncio.current_task()
        assert task is not None
        call = _RunningCall(caller(), task)
        self._running.add(call)
        try:
            yield
        except asyncio.CancelledError:
            if not call.why:
                raise
            task.uncancel()
            text = f"{call.caller.identity.uri}: {call.why}"
            raise IdentityError(IdentityProblem.REVOKED, text) from None
        finally:
            self._running.discard(call)

    async def _serve(
        self, handler: grpc.RpcMethodHandler[Message, Message], requests: AsyncIterator[Message], context: Context
    ) -> None:
        behaviour: Any = (
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )  # the one that is set
        request = requests if handler.request_streaming else await _only(requests)
        produced = behaviour(request, context)
        if not handler.response_streaming:
            await self._write(context, await produced)
        elif inspect.isawaitable(produced):
            await produced  # a handler that writes to the context itself, as Health/Watch does
        else:
            async with aclosing(produced) as responses:  # so that the handler's end is seen at once
                async for response in responses:
                    await self._write(context, response)

    def _admit(self, method: str, context: Context) -> None:
        certificate = peer_identity(
            context, self._roots, now=time.time(), federation=self._federation, is_revoked=self._is_revoked
        )
        _caller.set(certificate)
        if not allowed(method, certificate.identity.role):
            raise Refused(
                Refusal.NOT_ALLOWED, f"a certificate with role {certificate.identity.role} may not call {method}"
            )
        identity = certificate.identity.uri
        self._quotas.enter(identity, method, now=time.monotonic())

        # When the call is over for gRPC too: an answer that nobody fetches counts for as long as it is held.
        def over(context: Context) -> None:
            self._quotas.leave(identity, method, now=time.monotonic())

        context.add_done_callback(over)  # type: ignore[arg-type]  # its protocol names a parameter that is positional

    async def _incoming(
        self, method: str, raw: AsyncIterator[bytes], decode: Callable[[bytes], Message] | None
    ) -> AsyncIterator[Message]:
        """The caller's messages, each awaited for a bounded time, and decoded only now."""
        waited, received = 0.0, 0
        while True:
            began = time.monotonic()
            patience = min(self._stall_s, self._stall_s + received / LEAST_BYTES_PER_S - waited)
            async with asyncio.timeout(None if method in LASTING else patience):
                message = await anext(raw, None)
            if message is None:
                return
            waited += time.monotonic() - began
            received += len(message)
            yield message if decode is None else _decoded(decode, message)

    async def _write(self, context: Context, response: Message) -> None:
        """Send a message; a caller that does not read is not waited for."""
        async with asyncio.timeout(self._stall_s):
            await context.write(response)

    async def _refuse(self, method: str, context: Context, error: Exception) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        code, phrase = status_of(error)
        certificate = _caller.get(None)
        identity = "" if certificate is None else certificate.identity.uri
        if code is grpc.StatusCode.INTERNAL:
            log.exception("a call failed", method=method, caller=identity, exc_info=error)
        elif (left_out := self._quotas.may_log(identity, now=time.monotonic())) is not None:
            detail = str(error)[:MAX_DETAIL_LOGGED] or type(error).__name__
            log.warning(
                "a call was refused", method=method, caller=identity, status=code.name, detail=detail, unlogged=left_out
            )
        try:
            async with asyncio.timeout(PARTING_S):
                await context.abort(code, phrase)
        except TimeoutError:
            pass  # the status waits behind answers that the caller does not read; gRPC holds it, we go on
        raise asyncio.CancelledError


async def _only(requests: AsyncIterator[Message]) -> Message:
    request = await anext(requests, None)
    if request is None:
        raise WireError("a call without a request")
    return request


def _decoded(decode: Callable[[bytes], Message], message: bytes) -> Message:
    try:
        return decode(message)
    except DecodeError as error:
        raise WireError(f"not a message of this method: {error}") from error
