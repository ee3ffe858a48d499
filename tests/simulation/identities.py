"""Who is in a simulated federation: certificates made once for all runs of a process.

They differ from process to process and nothing in a run depends on that: rosters are in the order of names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from maskwork.coordinator.rounds import PresentSite
from maskwork.net.authority import Authority, IssuedIdentity
from maskwork.net.identity import ParticipantVerifier, Role, VerifiedCertificate, fingerprint, to_der
from maskwork.secagg.keys import SoftwareSigner

FEDERATION = "simulated"
ISSUED_AT = 1_799_999_000.0
_AUTHORITY = Authority.create(FEDERATION, now=ISSUED_AT)


class CachingVerifier(ParticipantVerifier):
    """Looks at each certificate once: none expires or is revoked while a simulation lasts."""

    def verify_participant(self, certificate_der: bytes, now: float) -> VerifiedCertificate:
        """As production verifies it."""
        return _verified(certificate_der)


@cache
def _verified(certificate_der: bytes) -> VerifiedCertificate:
    return ParticipantVerifier(_AUTHORITY.roots, FEDERATION).verify_participant(certificate_der, ISSUED_AT)


def _der(issued: IssuedIdentity) -> bytes:
    return to_der(x509.load_pem_x509_certificate(issued.cert_pem))


def _signer(issued: IssuedIdentity) -> SoftwareSigner:
    return SoftwareSigner(load_pem_private_key(issued.key_pem, None))  # type: ignore[arg-type]  # P-256 keys only


@dataclass(frozen=True)
class Member:
    """A site's identity."""

    name: str
    certificate: bytes
    fingerprint: bytes
    signer: SoftwareSigner
    verifier: ParticipantVerifier

    def present(self, tasks: frozenset[str]) -> PresentSite:
        """How the coordinator's service announces it."""
        return PresentSite(self.name, self.fingerprint, tasks)


@cache
def member(index: int) -> Member:
    """The site with this number."""
    name = f"site-{index + 1}"
    issued = _AUTHORITY.issue(Role.PARTICIPANT, name, now=ISSUED_AT)
    der = _der(issued)
    return Member(name, der, fingerprint(der), _signer(issued), CachingVerifier(_AUTHORITY.roots, FEDERATION))


_COORDINATOR = _AUTHORITY.issue(Role.COORDINATOR, "main", now=ISSUED_AT, dns_names=["localhost"])
ROOTS = _AUTHORITY.roots
COORDINATOR_CERTIFICATE = _der(_COORDINATOR)
COORDINATOR_SIGNER = _signer(_COORDINATOR)
VERIFIED_COORDINATOR = _AUTHORITY.roots.verify(COORDINATOR_CERTIFICATE, now=ISSUED_AT, role=Role.COORDINATOR)
