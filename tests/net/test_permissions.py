"""The permission table, against another spelling of the same table: every method with every role."""

import itertools

import pytest

from maskwork.net.names import Role
from maskwork.net.permissions import PERMISSIONS, allowed

#                                                        coordinator participant operator researcher auditor
TABLE = """
/maskwork.wire.v1.FederationService/Connect                            -           x        -         -        -
/maskwork.wire.v1.FederationService/Upload                             -           x        -         -        -
/maskwork.wire.v1.FederationService/Download                           -           x        -         -        -
/maskwork.wire.v1.JobService/SubmitJob                                -           -        x         x        -
/maskwork.wire.v1.JobService/AbortJob                                 -           -        x         x        -
/maskwork.wire.v1.JobService/ListJobs                                 -           -        x         x        x
/maskwork.wire.v1.JobService/GetJob                                   -           -        x         x        x
/maskwork.wire.v1.JobService/WatchJob                                 -           -        x         x        x
/maskwork.wire.v1.JobService/ExportModel                              -           -        x         x        x
/maskwork.wire.v1.AuditService/ReadAudit                              -           -        x         -        x
/maskwork.wire.v1.RenewalService/Renew                          -           x        x         x        x
/maskwork.wire.v1.EnrolmentService/Enrol                        -           -        -         -        -
/grpc.health.v1.Health/Check                                    x           x        x         x        x
/grpc.health.v1.Health/List                                     x           x        x         x        x
/grpc.health.v1.Health/Watch                                    x           x        x         x        x
/grpc.reflection.v1.ServerReflection/ServerReflectionInfo       x           x        x         x        x
/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo  x           x        x         x        x
/maskwork.wire.v1.JobService/DeleteEverything                         -           -        -         -        -
/maskwork.wire.v1.FederationService/connect                            -           -        -         -        -
maskwork.wire.v1.FederationService/Connect                             -           -        -         -        -
/maskwork.wire.v1.FederationService/Connect/                           -           -        -         -        -
/                                                               -           -        -         -        -
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]
EXPECTED = {(method, role): mark == "x" for method, *marks in ROWS for role, mark in zip(Role, marks, strict=True)}


@pytest.mark.parametrize(("method", "role"), list(itertools.product([row[0] for row in ROWS], Role)))
def test_every_method_with_every_role(method: str, role: Role) -> None:
    assert allowed(method, role) is EXPECTED[method, role]


def test_no_method_is_left_out_here() -> None:
    assert set(PERMISSIONS) <= {row[0] for row in ROWS}


def test_the_empty_method_is_refused() -> None:
    assert not any(allowed("", role) for role in Role)
