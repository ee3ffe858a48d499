"""Getting a certificate from a coordinator that holds the CA's key: the first by a token, later ones by the one before.

The key is made here, in the identity directory, and stays. An answer that gets lost is asked for again with the same
key: until the certificate is installed, ``request-key.pem`` is kept.

Rules it upholds:

1. A token is sent only over a connection that trusts nothing but a CA whose fingerprint the member was told, to a
   server whose certificate is a coordinator's of that CA. The connection that shows the CA carries nothing; the one
   that carries the token is another, and verifies for itself.
2. What comes back is installed only if it is for this key, this name, and from that CA.
"""

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from maskwork.errors import UserError
from maskwork.net import tls
from maskwork.net.identity import (
    Identity,
    IdentityError,
    IdentityFiles,
    Role,
    TrustRoots,
    VerifiedCertificate,
    to_der,
)
from maskwork.net.installing import RequestFiles, check_new, known_roots, refuse_existing
from maskwork.net.presented import presented_certificates
from maskwork.net.requests import new_request
from maskwork.net.tokens import Token
from maskwork.wire.job_codec import printable
from maskwork.wire.v1 import enrolment_pb2, enrolment_pb2_grpc

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor

TIMEOUT_S: Final = 30.0
_MAX_SAID: Final = 500


def enrol(
    target: str,
    token: Token,
    out: Path,
    *,
    known: Collection[bytes],
    overwrite: bool = False,
    clock: Callable[[], float] = time.time,
) -> VerifiedCertificate:
    """Have a new key certified by the coordinator whose enrolment port is `target`, and install both in `out`.

    Args:
        target: ``host:port`` of the enrolment port.
        token: As it was handed over.
        out: The identity directory; made if missing.
        known: Fingerprints of the federation's CA, heard of by another way.
        overwrite: Replace an identity that is there.
        clock: Unix time in seconds.

    Raises:
        UserError: It did not work; the text says why, and never holds the token.
    """
    refuse_existing(out, overwrite=overwrite)
    roots, coordinator = check_server(target, known=known, now=clock())
    identity = Identity(coordinator.identity.federation, token.role, token.name)
    files = RequestFiles.in_directory(out)
    request = new_request(files.own_key(), identity)
    files.write(request)
    message = enrolment_pb2.EnrolRequest(token=token.text, request=request)
    with grpc.secure_channel(target, tls.enrolling_credentials(roots), options=tls.CHANNEL_OPTIONS) as channel:
        try:
            answer = enrolment_pb2_grpc.EnrolmentServiceStub(channel).Enrol(message, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise _refusal(error, target, coordinator) from None
    ca = b"".join(root.public_bytes(Encoding.PEM) for root in roots.certificates)
    source = f"what {target} answered"
    new = check_new(answer.certificate + b"\n" + ca, out, now=clock(), known=known, asked=identity, source=source)
    new.write(out, overwrite=overwrite)
    return new.certificate


def renew(
    target: str, directory: Path, *, role: Role | None = None, clock: Callable[[], float] = time.time
) -> VerifiedCertificate:
    """Have a new key certified by the coordinator at `target`, with the certificate in `directory`, and replace both.

    Raises:
        UserError: It did not work; the text says why, and the pair in use is as it was.
    """
    identity_files = IdentityFiles.in_directory(directory)
    own = tls.check_own_files(identity_files, now=clock(), role=role)
    if own.identity.role is Role.COORDINATOR:
        raise UserError(
            "a coordinator is not renewed by itself: its certificate carries host names, which somebody has to look "
            "at; use `maskwork pki request`, `sign` and `install`"
        )
    files = RequestFiles.in_directory(directory)
    request = new_request(files.own_key(), own.identity)
    files.write(request)
    credentials = tls.channel_credentials(identity_files)
    with grpc.secure_channel(target, credentials, options=tls.CHANNEL_OPTIONS) as channel:
        stub = enrolment_pb2_grpc.RenewalServiceStub(channel)
        try:
            answer = stub.Renew(enrolment_pb2.RenewRequest(request=request), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise _not_renewed(error, target, identity_files, role, now=clock()) from None
    source = f"what {target} answered"
    new = check_new(answer.certificate, directory, now=clock(), known=(), asked=own.identity, source=source)
    new.write(directory, overwrite=True)
    return new.certificate


def check_server(target: str, *, known: Collection[bytes], now: float) -> tuple[TrustRoots, VerifiedCertificate]:
    """The CA that is to be trusted from now on, and the coordinator that showed it; nothing was sent.

    Raises:
        UserError: The server shows no CA of these fingerprints, or is no coordinator of it.
    """
    shown = presented_certificates(target)
    if len(shown) == 1:
        raise UserError(
            f"{target} shows no CA beside its certificate, as an enrolment port does: give the coordinator's "
            "enrolment port, not the port that members with a certificate use. Nothing was sent to it."
        )
    roots = known_roots(shown[1:], known, source=target)
    roots.check_validity(now)
    try:
        return roots, roots.verify(to_der(shown[0]), now=now, role=Role.COORDINATOR)
    except IdentityError as error:
        raise UserError(
            f"{target} shows the right CA, but is no coordinator of it: {error.text}. Nothing was sent to it."
        ) from None


def _refusal(error: grpc.RpcError, target: str, coordinator: VerifiedCertificate) -> UserError:
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        hosts = ", ".join(_hosts(coordinator))
        return UserError(
            f"{target} did not answer. Its certificate is for {hosts}: if that is not the host that you gave, give one "
            "of these; else somebody may be in between, or it is stopping. Nothing is lost: run the same command again"
        )
    return UserError(f"{target}: {_said(error)}")


def _not_renewed(
    error: grpc.RpcError, target: str, files: IdentityFiles, role: Role | None, *, now: float
) -> UserError:
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        reason = tls.probe_server(files, target)
        return UserError(tls.explain_connection_failure(files, target, now=now, role=role, reason=reason))
    return UserError(f"{target}: {_said(error)}")


def _said(error: grpc.RpcError) -> str:
    return printable(error.details() or error.code().name)[:_MAX_SAID]


def _hosts(coordinator: VerifiedCertificate) -> list[str]:
    certificate = x509.load_der_x509_certificate(coordinator.der)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
