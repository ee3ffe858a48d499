"""The certificates that a server shows to whoever connects: the first half of enrolling.

Nothing that it returns may be believed: the handshake is made without verification, for want of a CA, and the
connection carries nothing and is closed. Who enrols compares the CA's fingerprint with the one that it was told, and
then makes another connection that trusts that CA alone. It imports no gRPC.
"""

import socket
import ssl
from collections.abc import Sequence
from typing import Final, Protocol

from cryptography import x509

from maskwork.errors import UserError
from maskwork.net.diagnosis import Target
from maskwork.net.identity import MAX_CERTIFICATE_BYTES, UNREADABLE_CERTIFICATE

TIMEOUT_S: Final = 10.0
MAX_CERTIFICATES: Final = 4
"""A server shows its own certificate and its CA's, two of those while one replaces the other."""


class _Certificate(Protocol):
    def public_bytes(self, encoding: int, /) -> bytes: ...


_DER: Final = 2  # _ssl.ENCODING_DER


def presented_certificates(target: str, *, timeout_s: float = TIMEOUT_S) -> list[x509.Certificate]:
    """What the server at `target` shows over TLS 1.3, its own certificate first; blocks.

    Raises:
        UserError: There is no server, or none that speaks TLS 1.3, or it shows what is no certificate.
    """
    where = Target.parse(target)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])  # gRPC closes connections that do not ask for HTTP/2
    try:
        with (
            socket.create_connection((where.host, where.port), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=where.host) as secured,
        ):
            chain = _chain_of(secured)
    except ssl.SSLError as error:
        reason = (error.reason or "unknown").lower().replace("_", " ")
        raise UserError(f"{target}: the TLS 1.3 handshake fails: {reason}: is this the enrolment port?") from None
    except TimeoutError:
        raise UserError(f"{target}: no answer within {timeout_s:g} s: a firewall, or a server that hangs") from None
    except OSError as error:
        said = (error.strerror or str(error)).lower()
        raise UserError(f"{target}: {said}: is enrolment open there, and is the address right?") from None
    if not chain or len(chain) > MAX_CERTIFICATES or any(len(der) > MAX_CERTIFICATE_BYTES for der in chain):
        raise UserError(f"{target} shows {len(chain)} certificates that are not a coordinator's and its CA's")
    try:
        return [x509.load_der_x509_certificate(der) for der in chain]
    except UNREADABLE_CERTIFICATE:
        raise UserError(f"{target} shows a certificate that cannot be read") from None


def _chain_of(secured: ssl.SSLSocket) -> Sequence[bytes]:
    public = getattr(secured, "get_unverified_chain", None)
    if public is not None:  # Python 3.13 gave what is below a public name
        found: Sequence[bytes] = public()
        return found
    certificates: Sequence[_Certificate] | None = secured._sslobj.get_unverified_chain()  # type: ignore[attr-defined]
    return [certificate.public_bytes(_DER) for certificate in certificates or ()]
