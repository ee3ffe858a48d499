"""Errors as gRPC statuses: the one table, used by every service.

A caller is told a code and a short phrase. The detail of an error that is about a peer's conduct goes to our log; only
`Refused`, whose text is written for the caller, and errors about a job file, which its author must mend, carry words.
"""

from __future__ import annotations

from enum import Enum

import grpc

from maskwork.errors import StoreError, UserError
from maskwork.net.identity import IdentityError
from maskwork.wire.codec import WireError


class Refusal(Enum):
    """Why a call was refused, with its gRPC status."""

    INVALID = grpc.StatusCode.INVALID_ARGUMENT
    NOT_FOUND = grpc.StatusCode.NOT_FOUND
    NOT_NOW = grpc.StatusCode.FAILED_PRECONDITION
    NOT_ALLOWED = grpc.StatusCode.PERMISSION_DENIED
    TOO_MUCH = grpc.StatusCode.RESOURCE_EXHAUSTED
    STOPPING = grpc.StatusCode.UNAVAILABLE
    TOO_SLOW = grpc.StatusCode.DEADLINE_EXCEEDED


class Refused(Exception):
    """A call is refused; the text is for the caller."""

    def __init__(self, refusal: Refusal, phrase: str) -> None:
        super().__init__(phrase)
        self.refusal = refusal


MAX_PHRASE = 1000
"""Longest phrase: a status travels in a header, of which gRPC takes 8 KiB with every character in up to three bytes."""


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The status and the phrase that a caller gets for an error."""
    code, phrase = _status_of(error)
    return code, phrase if len(phrase) <= MAX_PHRASE else phrase[: MAX_PHRASE - 1] + "…"


def _status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    match error:
        case Refused():
            return error.refusal.value, str(error)
        case IdentityError():
            return grpc.StatusCode.UNAUTHENTICATED, f"certificate refused: {error.problem.name.lower()}"
        case WireError():
            return grpc.StatusCode.INVALID_ARGUMENT, "malformed message"
        case StoreError():
            return grpc.StatusCode.UNAVAILABLE, "the coordinator's storage is not available"
        case UserError():
            return grpc.StatusCode.INVALID_ARGUMENT, str(error)
        case TimeoutError():
            return grpc.StatusCode.DEADLINE_EXCEEDED, "no data for too long"
        case _:
            return grpc.StatusCode.INTERNAL, "internal error"
