"""The door: every RPC, ours or a standard one, passes here before any handler runs.

The caller's certificate is verified anew for each call, its role is looked up in the one table of permissions, and
whatever a handler raises becomes a status by the one table of statuses. Handlers ask `caller()` who is calling.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import structlog

from maskwork.net.identity import TrustRoots, VerifiedCertificate
from maskwork.net.permissions import allowed
from maskwork.net.status import Refusal, Refused, status_of
from maskwork.net.tls import peer_identity

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor

log = structlog.get_logger("maskwork.coordinator")

_caller: ContextVar[VerifiedCertificate] = ContextVar("caller")

# gRPC's handlers are generic over message types that only the generated code knows.
Message = Any


def caller() -> VerifiedCertificate:
    """Whose call is being handled."""
    return _caller.get()


class Guard(grpc.aio.ServerInterceptor):
    """Authenticates, authorises, and turns errors into statuses."""

    def __init__(self, roots: TrustRoots, federation: str) -> None:
        self._roots = roots
        self._federation = federation

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Message, Message] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Message, Message] | None:
        """Wrap the method's handler, whichever of the four kinds it is."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = str(handler_call_details.method)
        serialisers = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._single(method, handler.unary_unary), *serialisers)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._single(method, handler.stream_unary), *serialisers)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._many(method, handler.unary_stream), *serialisers)
        return grpc.stream_stream_rpc_method_handler(self._many(method, handler.stream_stream), *serialisers)

    def _single(self, method: str, behaviour: Any) -> Any:  # noqa: ANN401  # gRPC's own types say no more
        async def guarded(request: Message, context: grpc.aio.ServicerContext[Message, Message]) -> Message:
            try:
                self._admit(method, context)
                return await behaviour(request, context)
            except Exception as error:  # every error becomes a status, here and only here
                await self._refuse(method, context, error)

        return guarded

    def _many(self, method: str, behaviour: Any) -> Any:  # noqa: ANN401
        async def guarded(
            request: Message, context: grpc.aio.ServicerContext[Message, Message]
        ) -> AsyncIterator[Message]:
            try:
                self._admit(method, context)
                produced = behaviour(request, context)
                if inspect.isawaitable(produced):  # a handler that writes to the context itself, as Health/Watch does
                    await produced
                    return
                async with aclosing(produced) as responses:  # so that the handler's end is seen at once
                    async for response in responses:
                        yield response
            except Exception as error:
                await self._refuse(method, context, error)

        return guarded

    def _admit(self, method: str, context: grpc.aio.ServicerContext[Message, Message]) -> None:
        certificate = peer_identity(context, self._roots, now=time.time(), federation=self._federation)
        if not allowed(method, certificate.identity.role):
            raise Refused(
                Refusal.NOT_ALLOWED, f"a certificate with role {certificate.identity.role} may not call {method}"
            )
        _caller.set(certificate)

    async def _refuse(self, method: str, context: grpc.aio.ServicerContext[Message, Message], error: Exception) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        code, phrase = status_of(error)
        if code is grpc.StatusCode.INTERNAL:
            log.exception("a call failed", method=method, exc_info=error)
        else:
            log.warning("a call was refused", method=method, status=code.name, detail=str(error))
        await context.abort(code, phrase)
