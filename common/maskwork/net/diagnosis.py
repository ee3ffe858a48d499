"""Why a connection fails: what is wrong with one's own identity files, and what may be wrong at the peer.

gRPC does not tell Python why a TLS handshake failed; a caller sees UNAVAILABLE. So each side verifies its own
files, before it starts and again after a failure, and says what it finds (DESIGN section 7). `probe_server`
repeats the handshake once with the standard library's TLS, which does give the reason.

It does NOT decide whether a peer may be trusted, and no connection it opens ever carries a request. It imports
no gRPC, so that the `pki` commands can use it.

Rule: time is an argument, and a probe is bounded by a timeout.
"""

import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from maskwork.errors import UserError
from maskwork.net.identity import (
    IdentityError,
    IdentityFiles,
    IdentityProblem,
    Role,
    TrustRoots,
    VerifiedCertificate,
    load_certificate,
    read_key_file,
    to_der,
)
from maskwork.net.names import shortened, utc_text

PROBE_TIMEOUT_S: Final = 5.0
_LOOKS_FOR_ALERTS_S: Final = 1.0
_NAMES_TOLD: Final = 8
_CLOCKS_DIFFER_S: Final = 300.0
_ABOUT_TIME: Final = (IdentityProblem.EXPIRED, IdentityProblem.NOT_YET_VALID)


_VERIFIED_BY_TIME: Final = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_OF_ANOTHER_NAME: Final = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_NOT_OF_THIS_CA: Final = frozenset({18, 19, 20, 21})
"""X509_V_ERR_*: self-signed, or no issuer among those trusted (OpenSSL, `x509_vfy.h`)."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a coordinator is dialled: a host name or address, and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read ``host:port`` or ``[v6 address]:port``.

        Raises:
            UserError: When it is neither.
        """
        host, separator, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not (separator and host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(f"{shortened(text)} is not an address to dial: expected HOST:PORT")
        return cls(host, int(port))


def check_own_files(
    files: IdentityFiles, *, now: float, role: Role | None = None, roots: TrustRoots | None = None
) -> VerifiedCertificate:
    """Verify one's own identity files the way that the peer will.

    Args:
        files: The three files.
        now: Unix time in seconds.
        role: The role that is needed for what is about to be done; None for any.
        roots: The federation's roots; None reads them from `files.ca`.

    Returns:
        The certificate, verified.

    Raises:
        IdentityError: What is wrong, beginning with the file that is.
    """
    roots = roots if roots is not None else TrustRoots.from_file(files.ca)
    certificate = load_certificate(files.cert)
    try:
        verified = roots.verify(to_der(certificate), now=now, role=role)
    except IdentityError as error:
        doubt = clock_doubt(files, now=now) if error.problem in _ABOUT_TIME else ""
        raise IdentityError(error.problem, f"{files.cert}: {error.text}{doubt}") from None
    _check_key(files, verified)
    return verified


def clock_doubt(files: IdentityFiles, *, now: float) -> str:
    """What speaks for this machine's clock being wrong, rather than a certificate: a sentence to add, or nothing.

    A clock cannot be earlier than the moment at which one's own files were written. One that is years past it may be
    right, and the certificate old; so there both are named.
    """
    try:
        written = max(path.stat().st_mtime for path in (files.ca, files.cert, files.key))
    except OSError:
        return ""
    said, then = _moment(now), _moment(written)
    if now < written - _CLOCKS_DIFFER_S:
        return (
            f". This machine's clock says {said}, but these files were written at {then}: the clock is wrong; set it "
            "(timedatectl), then start again"
        )
    return f". This machine's clock says {said}, and these files were written at {then}: if it is wrong, set it first"


def _moment(unix_s: float) -> str:
    return utc_text(datetime.fromtimestamp(unix_s, UTC))


def explain_connection_failure(
    files: IdentityFiles, target: str, *, now: float, role: Role | None = None, reason: str | None = None
) -> str:
    """Say in plain words why a connection to `target` may have failed.

    Args:
        files: One's own identity files.
        target: What was dialled, ``host:port``.
        now: Unix time in seconds.
        role: The role that one's own certificate needs.
        reason: What `probe_server` found, if it was asked.

    Returns:
        The fault in one's own files if there is one, else `reason`, else what may be wrong, one line each.
    """
    try:
        verified = check_own_files(files, now=now, role=role)
    except IdentityError as error:
        return f"cannot connect to {target}: {error.text}"
    if reason is not None:
        return f"cannot connect to {target}: {reason}"
    host = target.rpartition(":")[0]
    return "\n".join(
        (
            f"cannot connect to {target}. Our own files are in order ({verified.identity.uri}); check that",
            f"  - the coordinator runs and {target} can be reached from here (address, port, firewall)",
            f"  - its certificate was issued for the host name or address {host!r} (`maskwork pki show` lists them)",
            f"  - its certificate is signed by the CA in {files.ca}, and has not expired",
            f"  - the coordinator trusts that CA too, and has not revoked {files.cert}",
        )
    )


def probe_server(
    files: IdentityFiles, target: str, *, server_name: str | None = None, timeout_s: float = PROBE_TIMEOUT_S
) -> str | None:
    """Make a TLS handshake with `target` and say what is wrong with it; blocks for at most about `timeout_s`.

    If the certificate is of the CA and for other names, a second handshake asks which.

    Args:
        files: One's own identity files.
        target: What to dial, ``host:port``.
        server_name: The name that the server's certificate must hold; None: the host in `target`.
        timeout_s: For the connection, and again for each step of the handshake.

    Returns:
        The reason in plain words, or None when the handshake succeeded and the server did not object.
    """
    try:
        where = Target.parse(target)
        context = ssl.create_default_context(cafile=str(files.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["h2"])  # gRPC closes connections that do not ask for HTTP/2
        context.load_cert_chain(files.cert, files.key)
        with (
            socket.create_connection((where.host, where.port), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=server_name or where.host) as secured,
        ):
            return _objection(secured)
    except UserError as error:
        return str(error)
    except ssl.SSLCertVerificationError as error:
        clock = " (or this machine's clock is wrong)" if error.verify_code in _VERIFIED_BY_TIME else ""
        refused = f"the server's certificate is refused: {error.verify_message.rstrip('.')}{clock}"
        if error.verify_code in _NOT_OF_THIS_CA:
            refused += f"; it is not signed by the CA in {files.ca}: one of the two is of another federation"
        elif error.verify_code in _OF_ANOTHER_NAME:
            refused += _other_names(where, context, timeout_s)
        return refused
    except ssl.SSLError as error:
        return f"the TLS 1.3 handshake fails: {_tls_reason(error)}"
    except socket.gaierror as error:
        return f"the host name cannot be resolved ({error.strerror})"
    except TimeoutError:
        return f"no answer within {timeout_s:g} s: a firewall, or a server that hangs"
    except OSError as error:
        return f"{(error.strerror or str(error)).lower()}: does the coordinator run, and at this address and port?"


def _other_names(where: Target, context: ssl.SSLContext, timeout_s: float) -> str:
    """What to do about a certificate of our CA that is not for the name dialled, with the names that it is for."""
    context.check_hostname = False  # the chain is verified as before; nothing is sent over this connection
    names: list[str] = []
    try:
        with (
            socket.create_connection((where.host, where.port), timeout=timeout_s) as plain,
            context.wrap_socket(plain) as secured,
        ):
            found = secured.getpeercert() or {}
    except OSError:
        found = {}
    for entry in found.get("subjectAltName", ()):
        match entry:
            case ("DNS" | "IP Address", str(name)):
                names.append(shortened(name))
            case _:
                pass
    listed = f" ({', '.join(names[:_NAMES_TOLD])}{', …' if len(names) > _NAMES_TOLD else ''})" if names else ""
    return f"; dial a name that is in it{listed}, or have it issued with this one too (`--dns NAME` or `--ip ADDRESS`)"


def _objection(secured: ssl.SSLSocket) -> str | None:
    # In TLS 1.3 the client is done before the server has looked at the client's certificate: a refusal arrives
    # as an alert instead of the first data, which is the settings frame that every HTTP/2 server sends unasked.
    secured.settimeout(_LOOKS_FOR_ALERTS_S)
    try:
        first = secured.recv(1)
    except TimeoutError:
        return None
    except ssl.SSLError as error:
        return f"the server refuses our certificate: {_tls_reason(error)}"
    except OSError:
        first = b""
    if first:
        return None
    return "the server closes the connection after the handshake: it refuses our certificate, or is shutting down"


def _tls_reason(error: ssl.SSLError) -> str:
    return (error.reason or "unknown").lower().replace("_", " ")


def load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read one's own private key.

    Raises:
        IdentityError: `UNREADABLE`, also when others can read it, or `MALFORMED` when it is no unencrypted PEM key of
            an elliptic curve.
    """
    key_pem = read_key_file(path)
    try:
        key = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(
            IdentityProblem.MALFORMED,
            f"{path}: not an unencrypted PEM private key: expected the key.pem of `maskwork pki issue`",
        )
    return key


def _check_key(files: IdentityFiles, verified: VerifiedCertificate) -> None:
    if load_private_key(files.key).public_key() != verified.public_key:
        raise IdentityError(
            IdentityProblem.WRONG_KEY,
            f"{files.key}: not the key of {files.cert}: use the pair that one `maskwork pki issue` wrote",
        )
