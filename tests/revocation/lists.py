"""Lists that the CA would never sign, and one that it does; not a test itself."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from maskwork.net.authority import Authority
from maskwork.net.identity import serial_bytes
from maskwork.net.revocation import RevocationList

DAY = 86400.0

Extension = tuple[x509.ExtensionType, bool]


def signed_list(
    authority: Authority,
    number: int | None = 1,
    revoked: Sequence[x509.Certificate] = (),
    *,
    now: float,
    days: float = 7,
    key: ec.EllipticCurvePrivateKey | None = None,
    issuer: x509.Name | None = None,
    extensions: Sequence[Extension] = (),
    entry_extensions: Sequence[Extension] = (),
    serials: Sequence[int] = (),
    algorithm: SHA256 | SHA384 | None = None,
) -> bytes:
    """A list made by hand, DER; what is not given is as the CA does it."""
    made = datetime.fromtimestamp(int(now), UTC)
    entries = []
    for serial in [*(certificate.serial_number for certificate in revoked), *serials]:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(made)
        for value, critical in entry_extensions:
            entry = entry.add_extension(value, critical)
        entries.append(entry.build())
    builder = x509.CertificateRevocationListBuilder(
        issuer or authority.certificate.subject,
        made.replace(tzinfo=None),
        (made + timedelta(days=days)).replace(tzinfo=None),
        [],
        entries,
    )
    if number is not None:
        builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    return builder.sign(key or authority.key, algorithm or SHA256()).public_bytes(Encoding.DER)


def list_of(
    authority: Authority, number: int, *revoked: x509.Certificate, now: float, days: float = 7
) -> RevocationList:
    """A list that is as it should be."""
    made = RevocationList.parse(signed_list(authority, number, revoked, now=now, days=days), authority.roots, now=now)
    assert made.serials == {serial_bytes(certificate) for certificate in revoked}
    return made
