"""Fetches the coordinator's audit log over its AuditService, as an operator or an auditor.

A file that is there already is gone on with from its end, if its last record is the coordinator's at the same place:
what an auditor fetched last month stays as it is. Each record's line carries a head that covers all before it, so
another coordinator's log, or a history that was written anew since, is told by that one line, and nothing is appended.

It judges nothing else; `maskwork.audit` does.
"""

from __future__ import annotations

import os
from pathlib import Path

from maskwork.audit.log import read_lines
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
        UserError: it cannot be asked, may not be read by us, is shorter than what is in `out`, or is another log.
        StoreError: `out` cannot be written.
    """
    tls.check_own_files(files, now=now)
    try:
        with (
            out.open("ab") as file,
            grpc.secure_channel(target, tls.channel_credentials(files), options=tls.CHANNEL_OPTIONS) as channel,
        ):
            had, at = file.tell(), last_record_at(out)
            call = AuditServiceStub(channel).ReadAudit(audit_pb2.ReadAuditRequest(offset=at))
            known = _read(out, at)
            try:
                for response in call:
                    if response.offset != at:
                        raise UserError(f"the coordinator at {target} sent its log out of order: try again")
                    at += len(response.data)
                    same, known = known[: len(response.data)], known[len(response.data) :]
                    if not response.data.startswith(same):
                        raise _another(target, out)
                    file.write(response.data[len(same) :])
            except grpc.RpcError:
                raise _failure(call.code(), call.details(), target, files, out, now=now) from None
            if known:
                raise _shorter(out, f"the log has {at} bytes")
            file.flush()
            os.fsync(file.fileno())
            return had, at - had
    except OSError as error:
        raise StoreError.from_cause(error, file=out) from None


def last_record_at(log: Path) -> int:
    """Where the last whole line of a log begins; what comes after that line is part of another. 0 if there is none.

    Raises:
        StoreError: It cannot be read.
    """
    begins = ends = 0
    for line in read_lines(log):
        if line.endswith(b"\n"):
            begins = ends
        ends += len(line)
    return begins


def _read(log: Path, offset: int) -> bytes:
    with log.open("rb") as file:
        file.seek(offset)
        return file.read()


def _another(target: str, out: Path) -> UserError:
    return UserError(
        f"{out} is not a log of the coordinator at {target}, or that coordinator has written its history anew: its log "
        f"does not hold the last record of {out} at that place. Nothing was added to {out}: keep it as evidence, and "
        "fetch into another file to compare"
    )


def _shorter(out: Path, said: str) -> UserError:
    return UserError(
        f"the coordinator's log is shorter than {out}, which holds more: records were cut off, or {out} is another "
        f"log. Keep {out} as evidence, and fetch into another file to compare ({said})"
    )


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
        return _shorter(out, said)
    return UserError(f"the coordinator at {target} did not hand out its audit log ({code.name}): {said}")
