"""The gRPC service through which operators and auditors read the audit log. It changes nothing and decides nothing.

Whole lines only, up to the end that the log had when the call began: what is read is a log that verifies.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from maskwork.coordinator.audit import Trail
from maskwork.net.status import Refusal, Refused
from maskwork.net.tls import CHUNK_BYTES
from maskwork.wire.v1 import audit_pb2, audit_pb2_grpc

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor


class AuditService(audit_pb2_grpc.AuditServiceServicer):
    """What operators and auditors call."""

    def __init__(self, trail: Trail) -> None:
        self._trail = trail

    async def ReadAudit(
        self,
        request: audit_pb2.ReadAuditRequest,
        context: grpc.aio.ServicerContext[audit_pb2.ReadAuditRequest, audit_pb2.ReadAuditResponse],
    ) -> AsyncIterator[audit_pb2.ReadAuditResponse]:
        """The log from an offset."""
        self._trail.log.sync()  # what an auditor holds, no power cut takes back
        end, offset = self._trail.log.length, request.offset
        if offset > end:
            raise Refused(Refusal.INVALID, f"the offset is beyond the end: the log has {end} bytes")
        while data := self._trail.log.read(offset, min(CHUNK_BYTES, end - offset)):
            yield audit_pb2.ReadAuditResponse(offset=offset, data=data)
            offset += len(data)
