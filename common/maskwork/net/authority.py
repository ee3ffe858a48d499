"""The federation's certificate authority: makes a CA, issues its members' certificates, writes both to disk.

A member's certificate carries its identity as the one URI name, host names and addresses as DNS and IP names,
and no common name: TLS stacks fall back to the common name when they check a host, so one there would be a
second, weaker way to be a host. Only coordinators get host names and `serverAuth`, because only they are
dialled.

It is NOT an enrolment service. The register of what was issued is `maskwork.net.register`, and whoever has a
certificate signed here writes it there. It judges nobody's certificate: that is `maskwork.net.identity`, whose
profile this module writes.

Rules it upholds: private keys are PKCS #8 PEM with mode 0600, written aside, synced and renamed; no file that
exists is replaced unless the caller says so; time is an argument.

Source: RFC 5280 section 4 (profile).
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from maskwork.errors import UserError
from maskwork.net.identity import Identity, IdentityFiles, Role, TrustRoots, load_certificate, read_key_file
from maskwork.net.names import shortened, utc_text
from maskwork.net.whole_files import write_whole

CA_DAYS: Final = 3652
"""Validity of a new CA: ten years."""
LEAF_DAYS: Final = 365
"""Validity of a member's certificate unless another is asked for."""
CA_CERTIFICATE_FILE: Final = "ca.pem"
CA_KEY_FILE: Final = "ca-key.pem"
CA_EXPECTED: Final = "expected in the directory of a CA, which `maskwork pki init` makes"
ROOTS_FILE: Final = "roots.pem"
"""Beside the key while a CA is replaced: both CA certificates, which members then get as their ``ca.pem``."""

_CA_UNIT: Final = "Maskwork federation CA"
# A member whose clock runs behind the CA's must be able to use its certificate at once.
_BACKDATED: Final = timedelta(minutes=5)
_DNS_NAME: Final = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*",
    re.ASCII | re.IGNORECASE,
)


class AuthorityError(UserError):
    """A certificate that cannot be issued, or a file that cannot or must not be written."""


def refuse_existing(files: IdentityFiles, *, overwrite: bool) -> None:
    """Raise if an identity is there already, before a certificate is signed that would be thrown away.

    Raises:
        AuthorityError: When one of the files exists and `overwrite` is not set.
    """
    refuse_existing_files((files.key, files.cert, files.ca), overwrite=overwrite)


def refuse_existing_files(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Raise if one of `paths` is there and may not be replaced.

    Raises:
        AuthorityError: When one exists and `overwrite` is not set.
    """
    existing = [str(path) for path in paths if path.exists() or path.is_symlink()]
    if existing and not overwrite:
        raise AuthorityError(
            f"{', '.join(existing)} already there, nothing written: choose another directory, or replace with --force"
        )


@dataclass(frozen=True, slots=True)
class IssuedIdentity:
    """A member's new certificate and key, PEM, and the CA certificate that goes with them."""

    identity: Identity
    ca_pem: bytes
    cert_pem: bytes
    key_pem: bytes = field(repr=False)

    def write(self, directory: Path, *, overwrite: bool = False) -> IdentityFiles:
        """Write ``ca.pem``, ``cert.pem`` and ``key.pem`` into `directory`, which is made if missing.

        Raises:
            AuthorityError: When one of them exists and `overwrite` is not set, or cannot be written.
        """
        files = IdentityFiles.in_directory(directory)
        _write_all({files.key: self.key_pem, files.cert: self.cert_pem, files.ca: self.ca_pem}, overwrite=overwrite)
        return files


@dataclass(frozen=True, slots=True)
class Authority:
    """A federation's CA, with its key.

    Attributes:
        federation: The federation's name, also the organisation in the CA's subject.
        certificate: Self-signed, P-256, path length 0.
        key: The private key.
        trusted: What members trust: this CA, and while one CA replaces another both.
    """

    federation: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    trusted: tuple[x509.Certificate, ...] = ()

    @classmethod
    def create(cls, federation: str, *, now: float, days: int = CA_DAYS) -> "Authority":
        """Make a new CA, valid from five minutes before `now` (Unix seconds).

        Raises:
            IdentityError: `MALFORMED` when the federation's name is not allowed.
            AuthorityError: When `days` is not in 1 to 36,500.
        """
        Identity(federation, Role.COORDINATOR, "ca")  # holds the rule for the federation's name
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, _CA_UNIT),
            ]
        )
        key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _dated(now, days)
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(key_id, critical=False)
            .sign(key, SHA256())
        )
        return cls(federation, certificate, key)

    @classmethod
    def load(cls, directory: Path) -> "Authority":
        """Read ``ca.pem``, ``ca-key.pem`` and, while a CA is replaced, ``roots.pem`` from `directory`.

        Raises:
            IdentityError: When a file is unreadable, others can read the key, or a certificate is no federation CA's.
            AuthorityError: When the key is not the CA's, or the CA's subject names no federation.
        """
        cert_path, key_path = directory / CA_CERTIFICATE_FILE, directory / CA_KEY_FILE
        certificate = load_certificate(cert_path, expected=CA_EXPECTED)
        TrustRoots([certificate], source=str(cert_path))
        key_pem = read_key_file(key_path, expected=CA_EXPECTED)
        try:
            key = load_pem_private_key(key_pem, password=None)
        except (ValueError, TypeError):
            raise AuthorityError(f"{key_path} is not an unencrypted PEM private key") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise AuthorityError(f"{key_path} is not the key of {cert_path}: restore the pair from one backup")
        organisations = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        if len(organisations) != 1:
            raise AuthorityError(f"{cert_path} names no federation: expected one made by `maskwork pki init`")
        return cls(str(organisations[0].value), certificate, key, _trusted(directory / ROOTS_FILE, certificate))

    @property
    def roots(self) -> TrustRoots:
        """What the federation's members trust: this CA, and while one CA replaces another both."""
        return TrustRoots(self.trusted or [self.certificate], source=f"the CA of {self.federation}")

    @property
    def roots_pem(self) -> bytes:
        """The same in PEM: a member's ``ca.pem``."""
        return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in self.roots.certificates)

    def write(self, directory: Path, *, overwrite: bool = False) -> None:
        """Write ``ca.pem`` and ``ca-key.pem`` into `directory`, which is made if missing.

        Raises:
            AuthorityError: When one of them exists and `overwrite` is not set, or cannot be written.
        """
        contents = {
            directory / CA_KEY_FILE: _key_pem(self.key),
            directory / CA_CERTIFICATE_FILE: self.certificate.public_bytes(Encoding.PEM),
        }
        _write_all(contents, overwrite=overwrite)

    def issue(
        self,
        role: Role,
        name: str,
        *,
        now: float,
        days: int = LEAF_DAYS,
        dns_names: Sequence[str] = (),
        ip_addresses: Sequence[str] = (),
    ) -> IssuedIdentity:
        """Make a key for a member and sign its certificate.

        Args:
            role: What the member is.
            name: Its name, unique per role.
            now: Unix time in seconds.
            days: Validity; must end before the CA's own.
            dns_names: The host names that a coordinator is dialled by; only for coordinators.
            ip_addresses: Likewise, addresses.

        Raises:
            IdentityError: `MALFORMED` when the name is not allowed.
            AuthorityError: When the host names or the validity are not possible.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.sign(
            key.public_key(),
            Identity(self.federation, role, name),
            now=now,
            days=days,
            host_names=host_names(role, dns_names, ip_addresses),
        )
        return IssuedIdentity(
            identity=Identity(self.federation, role, name),
            ca_pem=self.roots_pem,
            cert_pem=certificate.public_bytes(Encoding.PEM),
            key_pem=_key_pem(key),
        )

    def sign(
        self,
        public_key: ec.EllipticCurvePublicKey,
        identity: Identity,
        *,
        now: float,
        days: int,
        host_names: Sequence[x509.GeneralName] = (),
    ) -> x509.Certificate:
        """Sign a certificate for a key that somebody else holds.

        Raises:
            AuthorityError: When the validity is not possible.
        """
        names = [x509.UniformResourceIdentifier(identity.uri), *host_names]
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if identity.role is Role.COORDINATOR:
            purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
        authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return (
            _dated(now, days, no_later_than=self.certificate.not_valid_after_utc)
            .subject_name(_subject(identity))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(authority_id, critical=False)
            .sign(self.key, SHA256())
        )


def _trusted(path: Path, own: x509.Certificate) -> tuple[x509.Certificate, ...]:
    if not path.exists():
        return (own,)
    certificates = TrustRoots.from_file(path).certificates
    if own not in certificates:
        raise AuthorityError(f"{path} does not hold the CA beside it: restore both from one backup")
    return certificates


def _subject(identity: Identity) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, identity.federation),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, identity.role.value),
            x509.NameAttribute(NameOID.USER_ID, identity.name),
        ]
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _dated(now: float, days: int, *, no_later_than: datetime | None = None) -> x509.CertificateBuilder:
    if not 1 <= days <= 36500:
        raise AuthorityError(f"a certificate cannot be valid for {days} days: choose 1 to 36500")
    begin = datetime.fromtimestamp(int(now), UTC) - _BACKDATED
    end = begin + _BACKDATED + timedelta(days=days)
    if no_later_than is not None and end > no_later_than:
        raise AuthorityError(
            f"a certificate of {days} days would outlive its CA, which ends at {utc_text(no_later_than)}: "
            "choose fewer days, or make a new CA with `maskwork pki init`"
        )
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def host_names(role: Role, dns_names: Sequence[str], ip_addresses: Sequence[str]) -> list[x509.GeneralName]:
    """A coordinator's host names as its certificate carries them.

    Raises:
        AuthorityError: Another role has some, a coordinator none, or one is no host name or address.
    """
    given = [*dns_names, *ip_addresses]
    if role is not Role.COORDINATOR and given:
        raise AuthorityError(
            f"a {role!s} only dials out, so its certificate carries no host name: leave out {shortened(given[0])}"
        )
    if role is Role.COORDINATOR and not given:
        raise AuthorityError("a coordinator's certificate needs the name that sites dial: add --dns or --ip")
    names: list[x509.GeneralName] = []
    for dns_name in dns_names:
        if not _DNS_NAME.fullmatch(dns_name):
            raise AuthorityError(f"{shortened(dns_name)} is not a host name: expected one like coordinator.example.org")
        names.append(x509.DNSName(dns_name.lower()))
    for address in ip_addresses:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            raise AuthorityError(f"{shortened(address)} is not an IP address") from None
    return names


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_all(contents: Mapping[Path, bytes], *, overwrite: bool) -> None:
    """Write files so that each is there whole or not at all; keys come first, so a certificate never lacks one."""
    refuse_existing_files(contents, overwrite=overwrite)
    for path, content in contents.items():
        try:
            write_whole(path, content, private=b"PRIVATE KEY" in content)
        except OSError as error:
            raise AuthorityError(f"{path} cannot be written ({error.strerror})") from None
