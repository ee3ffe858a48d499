"""Who somebody is: certificates that carry an identity, and the trust roots of a federation.

One certificate names one identity, in exactly one URI subject alternative name
``spiffe://<federation>/<role>/<name>`` (DESIGN section 7). `TrustRoots.verify` is the only way from the bytes
of a certificate to an `Identity` that may be relied upon, and `VerifiedCertificate` is its only result.

It is NOT a general X.509 path builder: chains are one link long (root, leaf), keys are ECDSA P-256
throughout, and whatever is not understood is refused. It does not open sockets and does not know gRPC. It is
not the place where permissions are decided (`maskwork.net.permissions`).

Rules it upholds:

1. Time is an argument. Nothing is looked up or fetched; of a certificate that was found good only what cannot change is
   remembered: what its bytes say, and which root signed them.
2. A refusal says what is wrong and what to do, and carries an `IdentityProblem` that code can act on.

Sources: RFC 5280 sections 4.1, 4.2 and 6.1 (profile and validation), SPIFFE X509-SVID section 2 (one URI name).
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.net.certificates import (
    FINGERPRINT_BYTES,
    MAX_CERTIFICATE_BYTES,
    UNREADABLE_CERTIFICATE,
    certificate_identity,
    certificates_in,
    check_profile,
    check_revocation,
    check_root,
    check_validity,
    described,
    fingerprint,
    parse,
    serial_bytes,
    to_der,
)
from maskwork.net.names import Identity, IdentityError, IdentityProblem, Role, malformed, named
from maskwork.net.whole_files import OpenToOthers, read_private

__all__ = [
    "FINGERPRINT_BYTES",
    "FROM_ISSUE",
    "KNOWN_CERTIFICATES",
    "MAX_CERTIFICATE_BYTES",
    "ROOTS_EXPECTED",
    "UNREADABLE_CERTIFICATE",
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
FROM_ISSUE: Final = "identity files come from `maskwork pki issue`"
"""What is said of a file that cannot be read, where nothing better is known."""
ROOTS_EXPECTED: Final = "expected the federation's ca.pem: its keeper has it"


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
            check_root(certificate, source)
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
            certificates_in(pem, f"{source} is not a PEM certificate: expected the federation's ca.pem"), source=source
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
            check_validity(self._certificates[0], now)

    def out_of_date(self, now: float) -> tuple[str, ...]:
        """What is wrong with each root that is not valid at `now` (Unix seconds): nothing it signed is good any more.

        One that is left over from the replacement of a CA stops nobody whose certificate another root signed.
        """
        said = []
        for certificate in self._certificates:
            try:
                check_validity(certificate, now)
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
            certificate = parse(der)
            root = self._signer(certificate)
            check_validity(root, now)
            identity, public_key = check_profile(certificate, now=now)
            self._remember(der, _Known(certificate, root, identity, public_key))
        else:  # what its bytes say and who signed them does not change; the time does, and the list
            certificate, identity, public_key = known.certificate, known.identity, known.public_key
            check_validity(known.root, now)
            check_validity(certificate, now)
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
        check_revocation(certificate, identity, is_revoked)
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
            f"{described(certificate)} was not signed by the CA in {self._source} "
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


def load_certificate(path: Path, *, expected: str = FROM_ISSUE) -> x509.Certificate:
    """Read the single PEM certificate at `path`, without judging it; `expected` as in `read_identity_file`.

    Raises:
        IdentityError: `UNREADABLE` or `MALFORMED`.
    """
    certificates = certificates_in(
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
