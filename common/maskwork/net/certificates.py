"""What the bytes of a certificate say, and whether they could be a member's or a CA's of ours.

It is NOT where a certificate is believed: nothing here proves who signed it (`maskwork.net.identity` does).

Rules it upholds:

1. The accepted encoding of a certificate is unique: no byte of it can change and leave it accepted.
2. Whatever is not understood is refused; a refusal says what is wrong and what to do.

Sources: RFC 5280 section 4 (profile), SPIFFE X509-SVID section 2 (one URI name).
"""

import hashlib
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, SignatureAlgorithmOID

from maskwork.net.names import Identity, IdentityError, IdentityProblem, Role, malformed, named, shortened, utc_text
from maskwork.net.signed_der import signed_der

MAX_CERTIFICATE_BYTES: Final = 8192
"""Longest DER certificate that is looked at; ours are about 600 bytes."""
FINGERPRINT_BYTES: Final = 32
_P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_UNDERSTOOD_EXTENSIONS: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    }
)
UNREADABLE_CERTIFICATE: Final = (ValueError, TypeError, x509.InvalidVersion)
"""What the parser raises, at once or when a part is first looked at."""


def certificate_identity(certificate: x509.Certificate) -> Identity:
    """The one identity that a certificate names; says nothing about whether it may be believed.

    Raises:
        IdentityError: `MALFORMED` unless the certificate has exactly one URI name and it is an identity.
    """
    with _malformed_extensions(_described_by_subject(certificate)):
        try:
            extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except x509.ExtensionNotFound:
            uris = []
        else:
            uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise malformed(
            f"the certificate of {named(certificate.subject)} has {len(uris)} URI names where exactly one is needed: "
            "issue it with `maskwork pki issue`"
        )
    return Identity.parse(uris[0])


def check_profile(certificate: x509.Certificate, *, now: float) -> tuple[Identity, ec.EllipticCurvePublicKey]:
    """Check what a certificate says of itself; proves nothing, since anybody could have signed it.

    Raises:
        IdentityError: When it is not valid at `now` (Unix seconds), or could not be a member's.
    """
    check_validity(certificate, now)
    public_key = _p256_key(certificate, described(certificate))
    identity = certificate_identity(certificate)
    _check_usage(certificate, identity)
    return identity, public_key


def fingerprint(der: bytes) -> bytes:
    """SHA-256 of a DER certificate, 32 bytes; what rosters and logs know a certificate by."""
    return hashlib.sha256(der).digest()


def serial_bytes(certificate: x509.Certificate) -> bytes:
    """A certificate's serial number, 20 bytes big-endian, as revocation sets hold it (RFC 5280 section 4.1.2.2)."""
    return certificate.serial_number.to_bytes(20, "big")


def to_der(certificate: x509.Certificate) -> bytes:
    """A certificate's DER encoding."""
    return certificate.public_bytes(Encoding.DER)


def certificates_in(pem: bytes, complaint: str) -> list[x509.Certificate]:
    """The certificates of a PEM text, each with a subject and an issuer that can be named in an error."""
    try:
        certificates = x509.load_pem_x509_certificates(pem)
        for certificate in certificates:  # names are parsed when first looked at
            named(certificate.subject), named(certificate.issuer)
    except UNREADABLE_CERTIFICATE:
        raise malformed(complaint) from None
    return certificates


def _described_by_subject(certificate: x509.Certificate) -> str:
    return f"the certificate of {named(certificate.subject)}"


def described(certificate: x509.Certificate) -> str:
    """A certificate for an error text: by the identity that it names, else by its subject."""
    try:
        return f"the certificate of {certificate_identity(certificate).uri}"
    except IdentityError:
        return _described_by_subject(certificate)


@contextmanager
def _malformed_extensions(what: str) -> Iterator[None]:
    # Extensions are parsed when first looked at, and each kind has errors of its own.
    try:
        yield
    except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise malformed(f"{what} has extensions that cannot be read: {shortened(str(error))}") from None


def parse(der: bytes) -> x509.Certificate:
    """A certificate in the one encoding that is accepted.

    Raises:
        IdentityError: `MALFORMED`.
    """
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise malformed(f"a certificate of {len(der)} bytes is too long: at most {MAX_CERTIFICATE_BYTES} are read")
    try:
        certificate = x509.load_der_x509_certificate(der)
        canonical = signed_der(certificate.tbs_certificate_bytes, certificate.signature)
        subject_readable = bool(certificate.subject) and bool(certificate.issuer)
    except UNREADABLE_CERTIFICATE as error:
        raise malformed(f"not an X.509 certificate: {shortened(str(error))}") from None
    # Rule 1: parsers forgive, for one, a wrong count of unused bits in the signature, which nothing signs.
    if canonical != der or not subject_readable:
        raise malformed(f"{described(certificate)} is not signed with ECDSA and SHA-256 in the one valid encoding")
    if certificate.serial_number < 1:  # RFC 5280 section 4.1.2.2; and a revocation list could not name it
        raise malformed(f"{described(certificate)} has a serial number that is not positive")
    with _malformed_extensions(_described_by_subject(certificate)):
        for extension in certificate.extensions:
            if extension.critical and extension.oid not in _UNDERSTOOD_EXTENSIONS:
                raise malformed(
                    f"{described(certificate)} has a critical extension {extension.oid.dotted_string} "
                    "that is not understood (RFC 5280 section 4.2)"
                )
    return certificate


def check_root(certificate: x509.Certificate, source: str) -> None:
    """Raise unless a certificate can be a federation's CA; `source` is where it came from, for the text.

    Raises:
        IdentityError: `MALFORMED`, `WEAK_KEY` or `WRONG_USAGE`.
    """
    what = f"the CA certificate {named(certificate.subject)} in {source}"
    _p256_key(certificate, what)
    with _malformed_extensions(what):
        extensions = certificate.extensions
        unknown = [e.oid for e in extensions if e.critical and e.oid not in _UNDERSTOOD_EXTENSIONS]
        constraints = [e.value for e in extensions if isinstance(e.value, x509.BasicConstraints)]
        usages = [e.value for e in extensions if isinstance(e.value, x509.KeyUsage)]
    if unknown:
        raise malformed(f"{what} has a critical extension {unknown[0].dotted_string} that is not understood")
    if not (constraints and constraints[0].ca and usages and usages[0].key_cert_sign):
        raise IdentityError(
            IdentityProblem.WRONG_USAGE,
            f"{what} is not a CA's: expected the ca.pem that `maskwork pki init` wrote, not a member's cert.pem",
        )
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        raise IdentityError(IdentityProblem.WEAK_KEY, f"{what} is not signed with ECDSA and SHA-256")


def _p256_key(certificate: x509.Certificate, what: str) -> ec.EllipticCurvePublicKey:
    try:
        key = certificate.public_key()
    except Exception as error:  # each kind of broken key raises an error of its own
        raise malformed(f"{what} has a key that cannot be read: {shortened(str(error))}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(
            IdentityProblem.WEAK_KEY, f"{what} has a key that is not ECDSA P-256: issue it with `maskwork pki issue`"
        )
    return key


def check_validity(certificate: x509.Certificate, now: float) -> None:
    """Raise unless a certificate is valid at `now` (Unix seconds).

    Raises:
        IdentityError: `EXPIRED` or `NOT_YET_VALID`.
    """
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not now <= end.timestamp():
        raise IdentityError(
            IdentityProblem.EXPIRED,
            f"{described(certificate)} expired at {utc_text(end)}: make a new one with `maskwork pki`",
        )
    if not begin.timestamp() <= now:
        raise IdentityError(
            IdentityProblem.NOT_YET_VALID,
            f"{described(certificate)} is not valid before {utc_text(begin)}: check this machine's clock, or wait",
        )


def _check_usage(certificate: x509.Certificate, identity: Identity) -> None:
    what = f"the certificate of {identity.uri}"
    with _malformed_extensions(what):
        values = [extension.value for extension in certificate.extensions]
    is_ca = any(isinstance(value, x509.BasicConstraints) and value.ca for value in values)
    signs = any(isinstance(value, x509.KeyUsage) and value.digital_signature for value in values)
    purposes = {oid for value in values if isinstance(value, x509.ExtendedKeyUsage) for oid in value}
    # Only coordinators may act as servers: otherwise any participant whose certificate happens to carry the
    # right host name could stand in for the coordinator, since a TLS client looks at names alone.
    needed = {ExtendedKeyUsageOID.CLIENT_AUTH}
    if identity.role is Role.COORDINATOR:
        needed.add(ExtendedKeyUsageOID.SERVER_AUTH)
    if is_ca or not signs or purposes != needed:
        raise IdentityError(
            IdentityProblem.WRONG_USAGE,
            f"{what} is not issued for what a {identity.role!s} does (key usage digitalSignature; extended key usage "
            f"{'clientAuth and serverAuth' if len(needed) == 2 else 'clientAuth alone'}; not a CA): "
            "issue it with `maskwork pki issue`",
        )


def check_revocation(certificate: x509.Certificate, identity: Identity, is_revoked: Container[bytes]) -> None:
    """Raise if a certificate was withdrawn; `is_revoked` as in `TrustRoots.verify`.

    Raises:
        IdentityError: `REVOKED`.
    """
    # Anyone can turn the ECDSA signature (r, s) into (r, -s), which verifies as well: the same certificate under
    # another fingerprint. So a withdrawn fingerprint withdraws its twin too.
    r, s = decode_dss_signature(certificate.signature)
    twin = signed_der(certificate.tbs_certificate_bytes, encode_dss_signature(r, _P256_ORDER - s))
    names = (fingerprint(to_der(certificate)), fingerprint(twin), serial_bytes(certificate))
    if any(name in is_revoked for name in names):
        raise IdentityError(
            IdentityProblem.REVOKED,
            f"the certificate of {identity.uri} has been revoked by its federation: ask the operator for a new one",
        )
