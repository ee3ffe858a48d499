"""The CA's register: every certificate that it signed, one file each, ``issued/<serial hex>.pem`` beside the CA's key.

Whoever signs writes it, before the certificate is handed out: what is not on the register cannot be found again by name
when it has to be withdrawn. It holds no secret. It judges nobody, knows nothing of lists (`maskwork.net.revoking`), and
a CA directory of before there was a register simply has an empty one.

A CA that is being replaced stops signing at a definite moment (`successor.pem`), and the one that replaces it begins
then (`predecessor.pem` is gone): two that signed at a time would have two registers and two rows of list numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from maskwork.errors import UserError
from maskwork.net.identity import (
    Identity,
    IdentityError,
    Role,
    certificate_identity,
    fingerprint,
    load_certificate,
    serial_bytes,
    to_der,
)
from maskwork.net.whole_files import write_whole

ISSUED_DIRECTORY: Final = "issued"
PREDECESSOR_FILE: Final = "predecessor.pem"
SUCCESSOR_FILE: Final = "successor.pem"


class RegisterError(UserError):
    """The register cannot be read or written, or this CA must not sign now."""


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """One line of the register.

    Attributes:
        identity: Whom it names.
        serial: Serial number, 20 bytes big-endian.
        fingerprint: SHA-256 of its DER, 32 bytes.
        not_before: First second of validity, Unix time.
        not_after: Last second of validity, Unix time.
        certificate: The certificate itself.
    """

    identity: Identity
    serial: bytes
    fingerprint: bytes
    not_before: float
    not_after: float
    certificate: x509.Certificate

    @classmethod
    def of(cls, certificate: x509.Certificate) -> "IssuedCertificate":
        """The line for a certificate.

        Raises:
            IdentityError: it names nobody of ours.
        """
        return cls(
            identity=certificate_identity(certificate),
            serial=serial_bytes(certificate),
            fingerprint=fingerprint(to_der(certificate)),
            not_before=certificate.not_valid_before_utc.timestamp(),
            not_after=certificate.not_valid_after_utc.timestamp(),
            certificate=certificate,
        )


class Register:
    """The register in one CA's directory."""

    def __init__(self, ca: Path) -> None:
        self._ca = ca
        self._directory = ca / ISSUED_DIRECTORY

    def record(self, certificate: x509.Certificate) -> None:
        """Write a certificate that was just signed, before anybody gets it.

        Raises:
            RegisterError: This CA has been replaced or has not taken over yet, or the file cannot be written.
        """
        check_may_sign(self._ca)
        self.take_in((certificate,))

    def take_in(self, certificates: Iterable[x509.Certificate]) -> None:
        """Write certificates, whoever signed them.

        Raises:
            RegisterError: A file cannot be written.
        """
        for certificate in certificates:
            path = self._directory / f"{serial_bytes(certificate).hex()}.pem"
            try:
                write_whole(path, certificate.public_bytes(Encoding.PEM))
            except OSError as error:
                raise RegisterError(
                    f"{path} cannot be written ({error.strerror}): no certificate is handed out that is not registered"
                ) from None

    def certificates(self) -> tuple[IssuedCertificate, ...]:
        """Everything on the register, by role, name and end of validity.

        Raises:
            RegisterError: A file of it is not a member's certificate.
        """
        if not self._directory.is_dir():
            return ()
        found = []
        for path in sorted(self._directory.glob("*.pem")):
            try:
                found.append(IssuedCertificate.of(load_certificate(path)))
            except IdentityError as error:
                raise RegisterError(f"{path} does not belong on a register: {error.text}") from None
        return tuple(sorted(found, key=lambda line: (line.identity.role, line.identity.name, line.not_after)))

    def of_name(self, name: str, role: Role | None) -> tuple[IssuedCertificate, ...]:
        """Everything issued to a name, in one role or in any."""
        return tuple(
            line
            for line in self.certificates()
            if line.identity.name == name and (role is None or line.identity.role is role)
        )


def check_may_sign(ca: Path) -> None:
    """Raise unless it is this CA's turn to sign.

    Raises:
        RegisterError: It has been replaced, or has not taken over yet; the text says what to do.
    """
    if (ca / SUCCESSOR_FILE).exists():
        raise RegisterError(
            f"the CA in {ca} has been replaced by another (its certificate is {ca / SUCCESSOR_FILE}): use that one"
        )
    if (ca / PREDECESSOR_FILE).exists():
        raise RegisterError(
            f"the CA in {ca} has not taken over yet: once everybody trusts both CAs, run `maskwork pki take-over`"
        )
