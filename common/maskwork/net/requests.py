"""Certificate signing requests: how a member asks for a certificate without its key leaving its machine.

A request (PKCS #10) names one identity, carries the member's public key, and is signed with the key that stays behind.
`read_request` is the only way from its bytes to a `CertificateRequest`; what it returns is well-formed and its author
holds the key. It is NOT evidence of who the author is: that is what a signer looks at, or what a token stands for
(`maskwork.net.tokens`). The certificate's profile is the authority's alone; nothing of a request but the identity, the
key and a coordinator's host names ever gets into a certificate.

Rules it upholds:

1. A request asks for nothing beyond its names: any extension but the alternative names is refused, and so is any name
   but one URI, and host names where a coordinator asks. Refused, not dropped: whoever asks for more hears of it.
2. Keys are ECDSA P-256, and the request's own signature is ECDSA with SHA-256 and verifies.

Source: RFC 2986 (PKCS #10), RFC 5280 section 4.2.1.6.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import SignatureAlgorithmOID

from maskwork.errors import UserError
from maskwork.net.authority import Authority, host_names
from maskwork.net.identity import Identity, IdentityError, Role
from maskwork.net.names import shortened

MAX_REQUEST_BYTES: Final = 16384
"""Longest PEM request that is read; ours are about 500 bytes."""
MAX_HOST_NAMES: Final = 32


class RequestError(UserError):
    """A request that is refused; the text says why."""


@dataclass(frozen=True, slots=True)
class CertificateRequest:
    """A request whose author holds its key.

    Attributes:
        identity: Who it says it is.
        public_key: The key that the certificate is asked for.
        host_names: DNS names and addresses; empty unless a coordinator asks.
    """

    identity: Identity
    public_key: ec.EllipticCurvePublicKey
    host_names: tuple[x509.GeneralName, ...] = ()

    @property
    def key_fingerprint(self) -> bytes:
        """SHA-256 of the key, which both ends can read to each other: the request itself may have been replaced."""
        return key_fingerprint(self.public_key)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The host names for people."""
        return tuple(str(name.value) for name in self.host_names)


def key_fingerprint(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """SHA-256 of a public key's SubjectPublicKeyInfo, 32 bytes."""
    return hashlib.sha256(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def new_request(
    key: ec.EllipticCurvePrivateKey,
    identity: Identity,
    *,
    dns_names: Sequence[str] = (),
    ip_addresses: Sequence[str] = (),
) -> bytes:
    """A request for `identity` in PEM, signed with `key`.

    Raises:
        AuthorityError: The host names are not possible for the role.
    """
    hosts = host_names(identity.role, dns_names, ip_addresses)
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri), *hosts])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=False)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def read_request(pem: bytes, *, federation: str, source: str = "the request") -> CertificateRequest:
    """Read and check a request.

    Args:
        pem: At most `MAX_REQUEST_BYTES`.
        federation: The federation that it has to be of.
        source: Where it came from, for error texts.

    Raises:
        RequestError: Whatever is wrong with it.
    """
    if len(pem) > MAX_REQUEST_BYTES:
        raise RequestError(f"{source} has {len(pem)} bytes: at most {MAX_REQUEST_BYTES} are read")
    try:
        request = x509.load_pem_x509_csr(pem)
        algorithm = request.signature_algorithm_oid
        is_signed = request.is_signature_valid
        key = request.public_key()
        extensions = tuple(request.extensions)
    except (
        ValueError, TypeError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
        UnsupportedAlgorithm, InvalidSignature,
    ):  # fmt: skip  # each part is parsed when it is first looked at, and has errors of its own
        raise RequestError(
            f"{source} is not a readable PEM request: expected what `maskwork pki request` wrote"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RequestError(f"{source} is for a key that is not ECDSA P-256: make it with `maskwork pki request`")
    if algorithm != SignatureAlgorithmOID.ECDSA_WITH_SHA256 or not is_signed:
        raise RequestError(f"{source} is not signed with its own key: it was changed on the way, or is somebody else's")
    identity, hosts = _names(extensions, source)
    if identity.federation != federation:
        raise RequestError(
            f"{source} is for {identity.uri}, of the federation {identity.federation!r}, not {federation!r}"
        )
    return CertificateRequest(identity, key, hosts)


def _names(
    extensions: Sequence[x509.Extension[x509.ExtensionType]], source: str
) -> tuple[Identity, tuple[x509.GeneralName, ...]]:
    others = [e.oid.dotted_string for e in extensions if not isinstance(e.value, x509.SubjectAlternativeName)]
    if others:
        raise RequestError(
            f"{source} asks for the extension {others[0]}: a request carries names alone, "
            "and the CA decides about everything else"
        )
    names = [name for e in extensions if isinstance(e.value, x509.SubjectAlternativeName) for name in e.value]
    uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    hosts = tuple(name for name in names if isinstance(name, x509.DNSName | x509.IPAddress))
    if len(uris) != 1:
        raise RequestError(f"{source} has {len(uris)} URI names where exactly one is needed")
    if len(hosts) + 1 != len(names):
        raise RequestError(f"{source} asks for names that are neither the identity nor host names")
    try:
        identity = Identity.parse(uris[0])
    except IdentityError as error:
        raise RequestError(f"{source}: {error.text}") from None
    if identity.role is not Role.COORDINATOR and hosts:
        raise RequestError(
            f"{source} asks for the host name {shortened(str(hosts[0].value))}: a {identity.role!s} only dials out"
        )
    if identity.role is Role.COORDINATOR and not 0 < len(hosts) <= MAX_HOST_NAMES:
        raise RequestError(f"{source} has {len(hosts)} host names where a coordinator needs 1 to {MAX_HOST_NAMES}")
    _check_hosts(identity.role, hosts, source)
    return identity, hosts


def _check_hosts(role: Role, hosts: tuple[x509.GeneralName, ...], source: str) -> None:
    """Names written by somebody else go by the rule for those that the authority writes itself; no wildcards."""
    if role is not Role.COORDINATOR:
        return
    dns_names = [name.value for name in hosts if isinstance(name, x509.DNSName)]
    addresses = [str(name.value) for name in hosts if isinstance(name, x509.IPAddress)]
    try:
        host_names(role, dns_names, addresses)
    except UserError as error:
        raise RequestError(f"{source}: {error}") from None


def sign_request(authority: Authority, request: CertificateRequest, *, now: float, days: int) -> x509.Certificate:
    """The certificate that a request asks for; the caller has decided that it may be issued, and registers it.

    Raises:
        AuthorityError: The validity is not possible.
    """
    if request.public_key == authority.certificate.public_key():
        raise RequestError("the request is for the CA's own key")
    return authority.sign(request.public_key, request.identity, now=now, days=days, host_names=list(request.host_names))
