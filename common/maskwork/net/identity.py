"""Who somebody is: certificates that carry an identity, and the trust roots of a federation.

One certificate names one identity, in exactly one URI subject alternative name
``spiffe://<federation>/<role>/<name>`` (DESIGN section 7). `TrustRoots.verify` is the only way from the bytes
of a certificate to an `Identity` that may be relied upon, and `VerifiedCertificate` is its only result.

It is NOT a general X.509 path builder: chains are one link long (root, leaf), keys are ECDSA P-256
throughout, and whatever is not understood is refused. It does not open sockets and does not know gRPC. It is
not the place where permissions are decided (`maskwork.net.permissions`).

Rules it upholds:

1. The accepted encoding of a certificate is unique: no byte of it can change and leave it accepted.
2. Time is an argument. Nothing is looked up, fetched or cached.
3. A refusal says what is wrong and what to do, and carries an `IdentityProblem` that code can act on.

Sources: RFC 5280 sections 4.1, 4.2 and 6.1 (profile and validation), SPIFFE X509-SVID section 2 (one URI name).
"""

import hashlib
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, SignatureAlgorithmOID

from maskwork.net.names import Identity, IdentityError, IdentityProblem, Role, malformed, named, shortened, utc_text
from maskwork.net.signed_der import signed_der
from maskwork.net.whole_files import OpenToOthers, read_private

__all__ = [
    "FINGERPRINT_BYTES",
    "FROM_ISSUE",
    "KNOWN_CERTIFICATES",
    "MAX_CERTIFICATE_BYTES",
    "ROOTS_EXPECTED",
    "Identity",
    "IdentityError",
    "IdentityFiles",
    "IdentityProblem",
    "ParticipantVerifier",
    "Role",
    "TrustRoots",
    "VerifiedCertificate",
    "certificate_identity",
    "check_profile",
    "fingerprint",
    "load_certificate",
    "read_identity_file",
    "read_key_file",
    "serial_bytes",
    "to_der",
]

KNOWN_CERTIFICATES: Final = 4096
"""How many verified certificates each `TrustRoots` remembers."""
MAX_CERTIFICATE_BYTES: Final = 8192
"""Longest DER certificate that is looked at; ours are about 600 bytes."""
FINGERPRINT_BYTES: Final = 32
FROM_ISSUE: Final = "identity files come from `maskwork pki issue`"
"""What is said of a file that cannot be read, where nothing better is known."""
ROOTS_EXPECTED: Final = "expected the federation's ca.pem: its keeper has it"

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


@dataclass(frozen=True, slots=True)
class VerifiedCertificate:
    """A certificate that a trust root signed and that was good in every respect when it was looked at.

    Attributes:
        identity: The one identity that it names.
        public_key: The holder's P-256 key.
        fingerprint: SHA-256 of `der`, 32 bytes.
        not_before: First second of validity, Unix time.
        not_after: Last second of validity, Unix time.
        der: The certificate as it was received.
    """

    identity: Identity
    public_key: ec.EllipticCurvePublicKey
    fingerprint: bytes
    not_before: float
    not_after: float
    der: bytes

    @property
    def name(self) -> str:
        """The holder's name within its role and federation."""
        return self.identity.name


@dataclass(frozen=True, slots=True)
class _Known:
    """A certificate that a root was found to have signed, and what it says."""

    certificate: x509.Certificate
    root: x509.Certificate
    identity: Identity
    public_key: ec.EllipticCurvePublicKey


class TrustRoots:
    """The CA certificates that a federation's members are signed by; more than one only while a CA is replaced."""

    __slots__ = ("_certificates", "_known", "_source")

    def __init__(self, certificates: Sequence[x509.Certificate], *, source: str = "the given CA certificates") -> None:
        """Check that each of `certificates` can be a federation CA.

        Args:
            certificates: At least one CA certificate.
            source: Where they came from, for error texts (a path).

        Raises:
            IdentityError: `MALFORMED`, `WEAK_KEY` or `WRONG_USAGE` when one cannot be a federation CA.
        """
        if not certificates:
            raise malformed(f"{source} holds no certificate: expected the federation's CA certificate in PEM")
        for certificate in certificates:
            _check_root(certificate, source)
        self._certificates = tuple(certificates)
        self._source = source
        self._known: dict[bytes, _Known] = {}

    def __repr__(self) -> str:
        return f"TrustRoots({self._source!r}, {len(self._certificates)})"

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """The CA certificates, in the order given."""
        return self._certificates

    @classmethod
    def from_pem(cls, pem: bytes, *, source: str = "the given CA certificates") -> "TrustRoots":
        """Read one or more PEM certificates.

        Raises:
            IdentityError: As the constructor, and `MALFORMED` when `pem` is not PEM.
        """
        return cls(
            _certificates_in(pem, f"{source} is not a PEM certificate: expected the federation's ca.pem"), source=source
        )

    @classmethod
    def from_file(cls, path: Path, *, expected: str = FROM_ISSUE) -> "TrustRoots":
        """Read the PEM file at `path`; `expected` as in `read_identity_file`.

        Raises:
            IdentityError: As `from_pem`, and `UNREADABLE` when the file cannot be read.
        """
        return cls.from_pem(read_identity_file(path, expected=expected), source=str(path))

    def issuer_of(self, certificate: x509.Certificate) -> x509.Certificate | None:
        """The root whose signature `certificate` carries, or None."""
        for root in self._certificates:
            try:
                certificate.verify_directly_issued_by(root)
            except (InvalidSignature, ValueError, TypeError):
                continue
            return root
        return None

    def check_validity(self, now: float) -> None:
        """Raise unless a root is valid at `now` (Unix seconds); the others are what `out_of_date` says.

        Raises:
            IdentityError: `EXPIRED` or `NOT_YET_VALID`.
        """
        if len(self.out_of_date(now)) == len(self._certificates):
            _check_validity(self._certificates[0], now)

    def out_of_date(self, now: float) -> tuple[str, ...]:
        """What is wrong with each root that is not valid at `now` (Unix seconds): nothing it signed is good any more.

        One that is left over from the replacement of a CA stops nobody whose certificate another root signed.
        """
        said = []
        for certificate in self._certificates:
            try:
                _check_validity(certificate, now)
            except IdentityError as error:
                said.append(error.text)
        return tuple(said)

    def verify(
        self,
        der: bytes,
        *,
        now: float,
        role: Role | None = None,
        federation: str | None = None,
        is_revoked: Container[bytes] = frozenset(),
    ) -> VerifiedCertificate:
        """Decide whether a certificate is good now, and for whom.

        Args:
            der: The certificate, DER, at most `MAX_CERTIFICATE_BYTES`.
            now: Unix time in seconds.
            role: The role that it has to have; None accepts any.
            federation: The federation that it has to be of; None accepts any that the roots signed.
            is_revoked: Withdrawn certificates, each as the fingerprint (32 bytes) or the serial number (as
                `serial_bytes` writes it, 20 bytes).

        Returns:
            What the certificate says, now that it may be believed.

        Raises:
            IdentityError: With the first problem found.
        """
        known = self._known.get(der)
        if known is None:
            certificate = _parse(der)
            root = self._signer(certificate)
            _check_validity(root, now)
            identity, public_key = check_profile(certificate, now=now)
            self._remember(der, _Known(certificate, root, identity, public_key))
        else:  # what its bytes say and who signed them does not change; the time does, and the list
            certificate, identity, public_key = known.certificate, known.identity, known.public_key
            _check_validity(known.root, now)
            _check_validity(certificate, now)
        if federation is not None and identity.federation != federation:
            raise IdentityError(
                IdentityProblem.WRONG_FEDERATION,
                f"the certificate of {identity.uri} is of the federation {identity.federation!r}, not {federation!r}: "
                "use the one that this federation's CA issued",
            )
        if role is not None and identity.role is not role:
            raise IdentityError(
                IdentityProblem.WRONG_ROLE,
                f"the certificate of {identity.uri} has the role {identity.role!s} where {role!s} is needed: "
                f"use one issued with `maskwork pki issue {role!s} …`",
            )
        _check_revocation(certificate, identity, is_revoked)
        return VerifiedCertificate(
            identity=identity,
            public_key=public_key,
            fingerprint=fingerprint(der),
            not_before=certificate.not_valid_before_utc.timestamp(),
            not_after=certificate.not_valid_after_utc.timestamp(),
            der=der,
        )

    def _remember(self, der: bytes, known: _Known) -> None:
        """Whoever calls often is not checked bit by bit each time. Bounded: anybody the CA signed may call."""
        if len(self._known) >= KNOWN_CERTIFICATES:
            self._known.pop(next(iter(self._known)), None)
        self._known[der] = known

    def _signer(self, certificate: x509.Certificate) -> x509.Certificate:
        root = self.issuer_of(certificate)
        if root is not None:
            return root
        same_name = any(root.subject == certificate.issuer for root in self._certificates)
        how = "a CA of the same name but with another key" if same_name else named(certificate.issuer)
        raise IdentityError(
            IdentityProblem.WRONG_CA,
            f"{_described(certificate)} was not signed by the CA in {self._source} "
            f"({named(self._certificates[0].subject)}) but claims {how}: "
            "use the certificate and the ca.pem of one and the same federation",
        )


@dataclass(frozen=True, slots=True)
class ParticipantVerifier:
    """What the protocol core asks about its neighbours: is this certificate a participant's of our federation?

    Attributes:
        roots: The federation's CA.
        federation: The federation's name.
        is_revoked: As in `TrustRoots.verify`.
    """

    roots: TrustRoots
    federation: str
    is_revoked: Container[bytes] = frozenset()

    def verify_participant(self, certificate_der: bytes, now: float) -> VerifiedCertificate:
        """Verify a participant's certificate at `now` (Unix seconds).

        Raises:
            IdentityError: When it is not a good certificate of a participant of the federation.
        """
        return self.roots.verify(
            certificate_der, now=now, role=Role.PARTICIPANT, federation=self.federation, is_revoked=self.is_revoked
        )


@dataclass(frozen=True, slots=True)
class IdentityFiles:
    """Where one party's identity lies on disk, all PEM.

    Attributes:
        ca: The federation's CA certificate (or two of them, while a CA is replaced).
        cert: The party's certificate.
        key: Its private key, PKCS #8, unencrypted; readable by its owner alone.
    """

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def in_directory(cls, directory: Path) -> "IdentityFiles":
        """The three files of an identity directory: ``ca.pem``, ``cert.pem``, ``key.pem``."""
        return cls(ca=directory / "ca.pem", cert=directory / "cert.pem", key=directory / "key.pem")


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
    _check_validity(certificate, now)
    public_key = _p256_key(certificate, _described(certificate))
    identity = certificate_identity(certificate)
    _check_usage(certificate, identity)
    return identity, public_key


def fingerprint(der: bytes) -> bytes:
    """SHA-256 of a DER certificate, 32 bytes; what rosters and logs know a certificate by."""
    return hashlib.sha256(der).digest()


def serial_bytes(certificate: x509.Certificate) -> bytes:
    """A certificate's serial number, 20 bytes big-endian, as revocation sets hold it (RFC 5280 section 4.1.2.2)."""
    return certificate.serial_number.to_bytes(20, "big")


def load_certificate(path: Path, *, expected: str = FROM_ISSUE) -> x509.Certificate:
    """Read the single PEM certificate at `path`, without judging it; `expected` as in `read_identity_file`.

    Raises:
        IdentityError: `UNREADABLE` or `MALFORMED`.
    """
    certificates = _certificates_in(
        read_identity_file(path, expected=expected),
        f"{path} is not a PEM certificate: expected the cert.pem of `maskwork pki issue`",
    )
    if len(certificates) != 1:
        raise malformed(f"{path} holds {len(certificates)} certificates where one is needed: keep the CA in ca.pem")
    return certificates[0]


def read_identity_file(path: Path, *, expected: str = FROM_ISSUE) -> bytes:
    """Read a file that belongs to an identity, or leads to one.

    Args:
        path: What is read.
        expected: What it should be and where it comes from, for whoever named another file by mistake.

    Raises:
        IdentityError: `UNREADABLE`, naming the path and the system's reason.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error, expected) from None


def read_key_file(path: Path, *, expected: str = FROM_ISSUE) -> bytes:
    """Read a file that holds a private key, if others cannot; `expected` as in `read_identity_file`.

    Raises:
        IdentityError: `UNREADABLE`, naming the path and the system's reason, or that others can read it too.
    """
    try:
        return read_private(path)
    except OpenToOthers as error:
        raise IdentityError(IdentityProblem.UNREADABLE, str(error)) from None
    except OSError as error:
        raise _unreadable(path, error, expected) from None


def _unreadable(path: Path, error: OSError, expected: str) -> IdentityError:
    return IdentityError(IdentityProblem.UNREADABLE, f"{path} cannot be read ({error.strerror}): {expected}")


def to_der(certificate: x509.Certificate) -> bytes:
    """A certificate's DER encoding."""
    return certificate.public_bytes(Encoding.DER)


def _certificates_in(pem: bytes, complaint: str) -> list[x509.Certificate]:
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


def _described(certificate: x509.Certificate) -> str:
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


def _parse(der: bytes) -> x509.Certificate:
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
        raise malformed(f"{_described(certificate)} is not signed with ECDSA and SHA-256 in the one valid encoding")
    if certificate.serial_number < 1:  # RFC 5280 section 4.1.2.2; and a revocation list could not name it
        raise malformed(f"{_described(certificate)} has a serial number that is not positive")
    with _malformed_extensions(_described_by_subject(certificate)):
        for extension in certificate.extensions:
            if extension.critical and extension.oid not in _UNDERSTOOD_EXTENSIONS:
                raise malformed(
                    f"{_described(certificate)} has a critical extension {extension.oid.dotted_string} "
                    "that is not understood (RFC 5280 section 4.2)"
                )
    return certificate


def _check_root(certificate: x509.Certificate, source: str) -> None:
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


def _check_validity(certificate: x509.Certificate, now: float) -> None:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not now <= end.timestamp():
        raise IdentityError(
            IdentityProblem.EXPIRED,
            f"{_described(certificate)} expired at {utc_text(end)}: make a new one with `maskwork pki`",
        )
    if not begin.timestamp() <= now:
        raise IdentityError(
            IdentityProblem.NOT_YET_VALID,
            f"{_described(certificate)} is not valid before {utc_text(begin)}: check this machine's clock, or wait",
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


def _check_revocation(certificate: x509.Certificate, identity: Identity, is_revoked: Container[bytes]) -> None:
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
