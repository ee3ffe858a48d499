"""Asking a coordinator whether it serves, through the standard service ``grpc.health.v1.Health``.

For probes of containers and supervisors: one question, one sentence, one exit code. It is NOT monitoring, it asks for
the server as a whole and for no single service, and it does not retry: whoever runs the probe does.

Rule: the question goes over mutual TLS like every other. A probe beside the coordinator may dial another address than
the one in the certificate, but the name is still checked, against the one that the caller says.

Source: github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

import time
from typing import Final

from cryptography import x509

from maskwork.errors import UserError
from maskwork.net import tls
from maskwork.net.identity import IdentityFiles, Role, load_certificate

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor
from grpc_health.v1 import health_pb2, health_pb2_grpc  # isort: skip

TIMEOUT_S: Final = 5.0

_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}  # noqa: S104  # nothing is bound here


def ask_whether_serving(
    target: str, files: IdentityFiles, *, role: Role, server_name: str | None = None, timeout_s: float = TIMEOUT_S
) -> None:
    """Return when the coordinator at `target` says that it serves.

    Args:
        target: What is dialled, ``host:port``.
        files: One's own identity files.
        role: The role that they are for.
        server_name: The name that the server's certificate must hold; None: the host in `target`.
        timeout_s: For the answer; saying why there was none takes about as long again.

    Raises:
        UserError: It does not serve, or gives no answer; the text says why as far as that can be found out.
    """
    tls.check_own_files(files, now=time.time(), role=role)
    named = () if server_name is None else (("grpc.ssl_target_name_override", server_name),)
    options = (*tls.CHANNEL_OPTIONS, *named)
    with grpc.secure_channel(target, tls.channel_credentials(files), options=options) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise _no_answer(error.code(), target, files, role=role, server_name=server_name) from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        said = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise UserError(f"the coordinator at {target} is up but does not serve ({said}): its log says why")


def reachable_from_here(listen: str) -> str:
    """The address to dial, on the same machine, for a server that listens on `listen`."""
    host, _, port = listen.rpartition(":")
    return f"{_ANY_ADDRESS.get(host, host)}:{port}"


def name_in_certificate(files: IdentityFiles) -> str | None:
    """The first host name or address that one's own certificate was issued for; None when there is none."""
    certificate = load_certificate(files.cert)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hosts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return hosts[0] if hosts else None


def _no_answer(
    code: grpc.StatusCode, target: str, files: IdentityFiles, *, role: Role, server_name: str | None
) -> UserError:
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        reason = tls.probe_server(files, target, server_name=server_name)
        if reason is not None:
            return UserError(tls.explain_connection_failure(files, target, now=time.time(), role=role, reason=reason))
    return UserError(
        f"the coordinator at {target} takes connections but did not answer ({code.name}): it may be starting, "
        "draining or overloaded; its log says more"
    )
