"""Which role may call which RPC: one table, read by the server before a call reaches any code of ours.

It is NOT a policy engine: what a caller may do *within* a call (its own round, its own job) is decided where
the call is handled.

Rule: what the table does not name is refused, whoever asks (DESIGN section 7).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from maskwork.net.names import Role

_PARTICIPANTS: Final = frozenset({Role.PARTICIPANT})
_SUBMITTERS: Final = frozenset({Role.OPERATOR, Role.RESEARCHER})
_AUDITORS: Final = frozenset({Role.OPERATOR, Role.AUDITOR})
_READERS: Final = frozenset({Role.OPERATOR, Role.RESEARCHER, Role.AUDITOR})
# A coordinator's certificate carries host names, which somebody has to look at: it is not renewed by itself.
_RENEWING: Final = frozenset(Role) - {Role.COORDINATOR}
_ANYONE: Final = frozenset(Role)

PERMISSIONS: Final[Mapping[str, frozenset[Role]]] = MappingProxyType(
    {
        "/maskwork.wire.v1.FederationService/Connect": _PARTICIPANTS,
        "/maskwork.wire.v1.FederationService/Upload": _PARTICIPANTS,
        "/maskwork.wire.v1.FederationService/Download": _PARTICIPANTS,
        "/maskwork.wire.v1.JobService/SubmitJob": _SUBMITTERS,
        "/maskwork.wire.v1.JobService/AbortJob": _SUBMITTERS,
        # An auditor compares a model with the digest in the log. That it was handed out is a record of its own.
        "/maskwork.wire.v1.JobService/ExportModel": _READERS,
        "/maskwork.wire.v1.JobService/ListJobs": _READERS,
        "/maskwork.wire.v1.JobService/GetJob": _READERS,
        "/maskwork.wire.v1.JobService/WatchJob": _READERS,
        "/maskwork.wire.v1.AuditService/ReadAudit": _AUDITORS,
        "/maskwork.wire.v1.RenewalService/Renew": _RENEWING,
        "/grpc.health.v1.Health/Check": _ANYONE,
        "/grpc.health.v1.Health/List": _ANYONE,
        "/grpc.health.v1.Health/Watch": _ANYONE,
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": _ANYONE,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANYONE,
    }
)
"""Full method name, as gRPC gives it (``/package.Service/Method``), to the roles that may call it."""


def allowed(method: str, role: Role) -> bool:
    """Whether `role` may call the RPC with the full name `method`; False for a method that is not in the table."""
    return role in PERMISSIONS.get(method, frozenset())
