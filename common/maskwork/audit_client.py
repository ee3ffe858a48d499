"""Fetches the coordinator's audit log over its AuditService, as an operator or an auditor.

A file that is there already is gone on with from its end: what an auditor fetched last month stays as it is, and if the
coordinator has written its history anew since, the two parts do not fit and `maskwork audit verify` names the place.

It judges nothing; `maskwork.audit` does.
"""

from __future__ import annotations

import os
from pathlib import Path

from maskwork.errors import StoreError, UserError
from maskwork.net import tls
from maskwork.net.identity import IdentityFiles
from maskwork.wire.job_codec import printable
from maskwork.wire.v1 import audit_pb2

# isort: split
# Only now: gRPC reads its cipher suites while it is imported.
import grpc

from maskwork.wire.v1.audit_pb2_grpc import AuditServiceStub


def fetch(target: str, files: IdentityFiles, out: Path, *, now: float) -> tuple[int, int]:
    """Append to `out` what the coordinator's log has beyond it.

    Returns:
        Bytes that were there, and bytes that were added.

    Raises:
        UserError: it cannot be asked, may not be read by us, or is shorter than what is in `out`.
        StoreError: `out` cannot be written.
    """
    tls.check_own_files(files, now=now)
    try:
        with (
            out.open("ab") as file,
            grpc.secure_channel(target, tls.channel_credentials(files), options=tls.CHANNEL_OPTIONS) as channel,
        ):
            had = file.tell()
            added = 0
            call = AuditServiceStub(channel).ReadAudit(audit_pb2.ReadAuditRequest(offset=had))
            try:
                for response in call:
                    if response.offset != had + added:
                        raise UserError(f"the coordinator at {target} sent its log out of order: try again")
                    file.write(response.data)
                    added += len(response.data)
            except grpc.RpcError:
                raise _failure(call.code(), call.details(), target, files, out, now=now) from None
            file.flush()
            os.fsync(file.fileno())
            return had, added
    except OSError as error:
        raise StoreError.from_cause(error, file=out) from None


def _failure(
    code: grpc.StatusCode, details: str | None, target: str, files: IdentityFiles, out: Path, *, now: float
) -> UserError:
    said = printable(details or code.name)
    if code is grpc.StatusCode.UNAVAILABLE:
        reason = tls.probe_server(files, target)
        return UserError(tls.explain_connection_failure(files, target, now=now, reason=reason or said))
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return UserError(f"the coordinator at {target} shows its audit log to operators and auditors only: {said}")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return UserError(
            f"the coordinator's log is shorter than {out}, which holds more: records were cut off, or {out} is another "
            f"log. Keep {out} as evidence, and fetch into another file to compare ({said})"
        )
    return UserError(f"the coordinator at {target} did not hand out its audit log ({code.name}): {said}")
